// Plays the device. A CUDA thread is a coroutine with a stack of its own, and all of them share one
// OS thread: they change places at barriers, collectives, atomics and fences, in a random but
// seeded order, so that a run repeats exactly, and a barrier that cannot complete is seen at once.
//
// To ThreadSanitizer each of them is a thread of its own (a "fiber"). It learns from here, and from
// nothing else, what is ordered: this file is compiled without it, switches fibers without
// synchronizing them, and tells it of each barrier. A missing barrier is then a data race in any
// schedule. Containers are touched as the host (AsHost): to it, their memory is the host's.
//
// Environment: EMULATOR_SEED, of the schedule; EMULATOR_MULTIPROCESSORS, EMULATOR_OCCUPANCY (blocks
// on each) and EMULATOR_CAPABILITY (90 for 9.0), what the device says of itself; EMULATOR_CODE, the
// capability of the PTX that the driver has compiled; EMULATOR_CLUSTER, the blocks of the largest
// cluster that there is room for; EMULATOR_THREADS, see take_thread.
#include "emulator.h"

#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <climits>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "coroutine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

// ---- threads and blocks -------------------------------------------------------------------------

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;

// A fence is sequentially consistent, as __threadfence() is: of two, the earlier is ordered before
// the later where an atomic after the earlier was seen by one before the later. Barriers carry both
// facts to the other threads.
struct Fence {
  const struct Thread* thread;
  const struct Block* block;
  Scope scope;
  Moment moment;
  bool operator<(const Fence& other) const { return moment < other.moment; }
};

class Fences {
 public:
  bool empty() const { return !fences_; }
  void clear() { fences_ = nullptr; }
  bool operator==(const Fences&) const = default;
  auto begin() const { return fences_ ? fences_->begin() : none_.begin(); }
  auto end() const { return fences_ ? fences_->end() : none_.end(); }
  void add(const Fences& other) {
    if (*this == other || other.empty()) return;
    if (empty()) {
      *this = other;
      return;
    }
    auto sum = std::make_shared<std::set<Fence>>(*fences_);
    sum->insert(other.begin(), other.end());
    fences_ = sum;
  }
  // What comes before the fence is what came before earlier ones of its thread, and more.
  void add_latest(const Fence& fence) {
    auto sum = std::make_shared<std::set<Fence>>();
    for (const Fence& known : *this) {
      if (known.thread != fence.thread) sum->insert(known);
    }
    sum->insert(fence);
    fences_ = sum;
  }

 private:
  static const std::set<Fence> none_;
  std::shared_ptr<const std::set<Fence>> fences_;  // shared by those who know the same ones
};
const std::set<Fence> Fences::none_;

constexpr size_t kMostCopies = 256;  // of a thread at a time

struct Thread : Coroutine {
  Block* block = nullptr;
  unsigned number = 0;  // in its block
  uint3 index{};
  long launch = -1;  // the latest it took part in

  enum { kReady, kWaiting, kExited } state = kReady;
  Collective what{};
  Where where;
  unsigned mask = 0;                             // the lanes it waits for
  unsigned long long brought = 0, received = 0;  // by a collective
  int source = 0;

  // Copies that it has begun and not waited for. No container: ThreadSanitizer would see its memory
  // change hands.
  struct {
    Copy copy;
    size_t lot;
  } copies[kMostCopies];
  size_t copies_begun = 0, lots_closed = 0;

  Fences made;  // by itself, and by others before a barrier: an atomic shows them to who reads it
  Fences seen;  // by atomics
};

struct Cluster {
  std::vector<Block*> blocks;
  size_t arrived = 0, exited = 0;
};

// Shared memory: an unused page, dynamic, and static variables.
constexpr size_t kDynamicStart = kPage, kStaticStart = 256 << 10, kStaticEnd = 352 << 10;
constexpr size_t kSharedBytes = 512 << 10;
constexpr size_t kMaxShared = 227 << 10, kDefaultShared = 48 << 10;
constexpr size_t kRedZone = 64, kSharedAlignment = 128;

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  uint3 index{};
  char* shared = nullptr;
  std::vector<Thread*> threads;
  size_t arrived = 0, exited = 0;
  unsigned votes = 0;
  Moment exit = nullptr;
};

struct Variable {
  const void* key;
  size_t offset, bytes;
};

struct Launch {
  Kernel kernel = nullptr;
  cudaLaunchConfig_t config;
  dim3 cluster;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;

  long number = 0;
  Moment start = nullptr, end = nullptr;
  size_t live_blocks = 0;
  std::vector<Cluster*> clusters;  // those that run
  std::vector<Variable> variables;
  std::map<const void*, Fences> shown;  // at an address, by atomics
};

struct Attributes {
  std::optional<size_t> dynamic_shared;  // none: what static variables leave of kDefaultShared
  bool any_cluster = false;
};

Launch* launch = nullptr;  // null: the host runs
Thread* current = nullptr;
std::vector<Thread*> ready;
std::vector<std::unique_ptr<Thread>> all_threads;
std::deque<Thread*> idle;
std::vector<char*> free_shared;
std::map<Kernel, Attributes> attributes;
void (*watch)(const void* address) = nullptr;
void (*other_stream)() = nullptr;
Coroutine bystander;  // only a fiber: the host or another stream, on the stack of who runs

int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}

uint64_t next_random() {
  static uint64_t state = 0x9e3779b97f4a7c15 * (setting("EMULATOR_SEED", 0) * 2 + 1);
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state >> 11;
}

size_t volume(dim3 d) { return size_t{d.x} * d.y * d.z; }

// ---- failures -----------------------------------------------------------------------------------

void print_kernel_name() {
  Dl_info module;
  char command[PATH_MAX + 100], name[1000];
  if (!dladdr(reinterpret_cast<void*>(launch->kernel), &module)) return;
  const auto offset =
      reinterpret_cast<const char*>(launch->kernel) - static_cast<const char*>(module.dli_fbase);
  snprintf(command, sizeof command, "addr2line -sfCe '%s' %#tx", module.dli_fname, offset);
  FILE* pipe = popen(command, "r");
  if (pipe && fgets(name, sizeof name, pipe)) fprintf(stderr, "kernel %s", name);
  if (pipe) pclose(pipe);
}

void print_thread(const Thread& thread) {
  const uint3 b = thread.block->index, t = thread.index;
  fprintf(stderr, "block (%u, %u, %u), thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
}

const char* name_of(Collective what) {
  switch (what) {
    case Collective::kSyncThreads:
      return "__syncthreads";
    case Collective::kSyncWarp:
      return "__syncwarp";
    case Collective::kShuffle:
      return "a shuffle";
    case Collective::kVote:
      return "a vote";
    case Collective::kSyncCluster:
      return "cluster.sync";
  }
  abort();
}

bool same_place(const Thread& a, const Thread& b) {
  return a.state == b.state &&
         (a.state == Thread::kExited ||
          (a.what == b.what && a.mask == b.mask && a.where.line() == b.where.line() &&
           a.where.column() == b.where.column() &&
           !strcmp(a.where.file_name(), b.where.file_name())));
}

// No thread can go on: says where each is.
[[noreturn]] void fail_stuck() {
  fprintf(stderr, "cuda emulator: divergent barrier or collective: not all whom it needs arrive\n");
  print_kernel_name();
  for (const Cluster* cluster : launch->clusters) {
    for (const Block* block : cluster->blocks) {
      const auto& threads = block->threads;
      for (size_t i = 0, end; i < threads.size(); i = end) {
        for (end = i + 1; end < threads.size() && same_place(*threads[i], *threads[end]); ++end) {
        }
        const Thread& first = *threads[i];
        print_thread(first);
        if (end > i + 1) fprintf(stderr, "as the next %zu, ", end - i - 1);
        if (first.state == Thread::kExited) {
          fprintf(stderr, "has exited\n");
        } else {
          fprintf(stderr, "waits at %s, %s:%u", name_of(first.what), first.where.file_name(),
                  first.where.line());
          if (first.mask) fprintf(stderr, ", lanes %#x", first.mask);
          fprintf(stderr, "\n");
        }
      }
    }
  }
  abort();
}

void on_fault(int, siginfo_t* info, void*) {
  fail("access to %p: no such memory, or shared memory of a block that has exited", info->si_addr);
}

void catch_faults() {
  if (__tsan_acquire || __asan_poison_memory_region) return;  // they say so themselves
  static char signal_stack[64 << 10];
  const stack_t stack = {.ss_sp = signal_stack, .ss_flags = 0, .ss_size = sizeof signal_stack};
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
}

// ---- who is no thread of the launch -------------------------------------------------------------

void let_in_bystanders() {
  if (__tsan_create_fiber && !bystander.fiber) bystander.fiber = __tsan_create_fiber(0);
}

// act() by a bystander who knows what came before the launch, and these fences.
template <class Act>
void stand_by(const Fences& fences, Act&& act) {
  As the_bystander(bystander);
  acquire(launch->start);
  for (const Fence& fence : fences) {
    if (fence.scope == Scope::kSystem) acquire(fence.moment);
  }
  act();
  release(launch->end);
}

// ---- scheduling ---------------------------------------------------------------------------------

void wake(Thread& thread) {
  thread.state = Thread::kReady;
  ready.push_back(&thread);
}

void resume(Coroutine& from, Thread& next) {
  current = &next;
  threadIdx = next.index;
  blockIdx = next.block->index;
  if (&from != &next) change(from, next);
}

void go_to_host() {
  Thread& self = *std::exchange(current, nullptr);
  change(self, host);
}

// Leaves the current thread for any that is ready, be it itself.
void reschedule() {
  Thread& self = *current;
  if (other_stream) stand_by({}, other_stream);
  if (ready.empty()) return go_to_host();
  std::swap(ready[next_random() % ready.size()], ready.back());
  Thread* next = ready.back();
  ready.pop_back();
  resume(self, *next);
}

void yield() {
  wake(*current);
  reschedule();
}

// To AddressSanitizer a block's shared memory is what its launch has asked for.
void open_variables(const Block& block) {
  if (!__asan_unpoison_memory_region) return;
  for (const Variable& variable : launch->variables) {
    __asan_unpoison_memory_region(block.shared + variable.offset, variable.bytes);
  }
}

void exit_block(Block& block) {
  // As though the last thread wrote all of it: to be reported as a race with whoever reads on.
  acquire(block.exit);
  memset(block.shared + kDynamicStart, 0xff, launch->config.dynamicSmemBytes);
  for (const Variable& variable : launch->variables) {
    memset(block.shared + variable.offset, 0xff, variable.bytes);
  }
  if (__asan_poison_memory_region) __asan_poison_memory_region(block.shared, kSharedBytes);
  mprotect(block.shared, kSharedBytes, PROT_NONE);
  ++block.cluster->exited;
}

void run_thread() {
  arrive(*current, left);
  for (;;) {
    launch->body(launch->arguments);
    Thread& self = *current;
    Block& block = *self.block;
    if (self.copies_begun > 0) fail("leaves with copies to shared memory under way");
    release(launch->end);
    release(block.exit);
    self.state = Thread::kExited;
    if (++block.exited == block.threads.size()) {
      exit_block(block);
      go_to_host();  // which starts another
    } else {
      reschedule();
    }
  }
}

// ThreadSanitizer takes whatever one coroutine does for ordered, so none serves twice in a launch
// before there are this many.
const size_t kTargetThreads = setting("EMULATOR_THREADS", __tsan_create_fiber ? 1024 : 0);

Thread* take_thread() {
  if (idle.empty() ||
      (idle.front()->launch == launch->number && all_threads.size() < kTargetThreads)) {
    all_threads.push_back(std::make_unique<Thread>());
    all_threads.back()->start(run_thread);
    ready.reserve(all_threads.size());  // here, as the host
    return all_threads.back().get();
  }
  Thread* thread = idle.front();
  idle.pop_front();
  return thread;
}

void start_block(Block& block) {
  const size_t dynamic_bytes = launch->config.dynamicSmemBytes;
  if (free_shared.empty()) free_shared.push_back(map_memory(nullptr, kSharedBytes));
  block.shared = free_shared.back();
  free_shared.pop_back();
  // Unmapped first, for ThreadSanitizer to forget what other blocks did there.
  munmap(block.shared, kSharedBytes);
  map_memory(block.shared, kSharedBytes);
  release(launch->start);

  const dim3 size = launch->config.blockDim;
  block.threads.resize(volume(size));
  block.exit = new_moment();
  const Moment filled = new_moment();
  for (unsigned i = 0; i < block.threads.size(); ++i) {
    Thread* thread = block.threads[i] = take_thread();
    thread->block = &block;
    thread->number = i;
    thread->index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread->launch = launch->number;
    thread->copies_begun = thread->lots_closed = 0;
    thread->made.clear();
    thread->seen.clear();
    wake(*thread);

    As the_thread(*thread);
    acquire(launch->start);
    if (i == 0) {
      if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(block.shared, kSharedBytes);
      memset(block.shared + kDynamicStart, 0xff, dynamic_bytes);
      memset(block.shared + kStaticStart, 0xff, kStaticEnd - kStaticStart);
      if (__asan_poison_memory_region) {
        __asan_poison_memory_region(block.shared, kSharedBytes);
        __asan_unpoison_memory_region(block.shared + kDynamicStart, dynamic_bytes);
        open_variables(block);
      }
      release(filled);
    }
    acquire(filled);
  }
}

void start_cluster(unsigned number) {
  const dim3 size = launch->cluster, grid = launch->config.gridDim;
  const dim3 clusters(grid.x / size.x, grid.y / size.y, grid.z / size.z);
  const dim3 at(number % clusters.x, number / clusters.x % clusters.y,
                number / (clusters.x * clusters.y));
  Cluster* cluster = new Cluster;
  launch->clusters.push_back(cluster);
  for (unsigned rank = 0; rank < volume(size); ++rank) {
    Block* block = new Block;
    cluster->blocks.push_back(block);
    block->cluster = cluster;
    block->rank = rank;
    block->index = {at.x * size.x + rank % size.x, at.y * size.y + rank / size.x % size.y,
                    at.z * size.z + rank / (size.x * size.y)};
    start_block(*block);
  }
  launch->live_blocks += volume(size);
}

bool finish(Cluster* cluster) {
  if (cluster->exited < cluster->blocks.size()) return false;
  for (Block* block : cluster->blocks) {
    idle.insert(idle.end(), block->threads.begin(), block->threads.end());
    free_shared.push_back(block->shared);
    delete block;
  }
  launch->live_blocks -= cluster->blocks.size();
  delete cluster;
  return true;
}

void check_limits() {
  const cudaLaunchConfig_t& config = launch->config;
  const dim3 grid = config.gridDim, block = config.blockDim, cluster = launch->cluster;
  const Attributes& allowed = attributes[launch->kernel];
  if (!volume(grid) || grid.x > INT_MAX || grid.y > 0xffff || grid.z > 0xffff) {
    fail("launched over a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  }
  if (!volume(block) || volume(block) > kMaxThreads || block.z > 64) {
    fail("launched with blocks of (%u, %u, %u) threads", block.x, block.y, block.z);
  }
  const size_t allowed_shared = allowed.dynamic_shared.value_or(kDefaultShared);
  if (config.dynamicSmemBytes > allowed_shared) {
    fail("launched with %zu bytes of dynamic shared memory, allowed are %zu",
         config.dynamicSmemBytes, allowed_shared);
  }
  if (volume(cluster) != 1 && std::min(setting("EMULATOR_CAPABILITY", 90), code_version()) < 90) {
    fail("launched with clusters, which the device or its code does not have");
  }
  const int most = std::min(allowed.any_cluster ? 16 : 8, setting("EMULATOR_CLUSTER", 16));
  if (!volume(cluster) || volume(cluster) > static_cast<size_t>(std::max(1, most)) ||
      grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    fail("launched with clusters of (%u, %u, %u) blocks over a grid of (%u, %u, %u)", cluster.x,
         cluster.y, cluster.z, grid.x, grid.y, grid.z);
  }
}

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) fail("unknown launch attribute");
    const auto& size = config.attrs[i].val.clusterDim;
    cluster = {size.x, size.y, size.z};
  }
  return cluster;
}

// All threads have arrived: what each did before is ordered before what any does after.
void order(const std::vector<Thread*>& threads) {
  if (!__tsan_acquire) return;
  const Moment moment = new_moment();
  for (Thread* thread : threads) {
    As the_thread(*thread);
    release(moment);
  }
  for (Thread* thread : threads) {
    As the_thread(*thread);
    acquire(moment);
  }
  AsHost host_allocates;
  Fences made, seen;
  for (const Thread* thread : threads) {
    made.add(thread->made);
    seen.add(thread->seen);
  }
  for (Thread* thread : threads) {
    thread->made = made;
    thread->seen = seen;
  }
}

void wait_at(Collective what, unsigned mask, Where where) {
  Thread& self = *current;
  self.state = Thread::kWaiting;
  self.what = what;
  self.mask = mask;
  self.where = where;
}

void check_same_place(const std::vector<Thread*>& threads) {
  for (const Thread* thread : threads) {
    if (!same_place(*thread, *current)) fail_stuck();
  }
}

}  // namespace

void fail(const char* what, ...) {
  fprintf(stderr, "cuda emulator: ");
  if (current) print_thread(*current);
  va_list arguments;
  va_start(arguments, what);
  vfprintf(stderr, what, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  if (launch) print_kernel_name();
  abort();
}

// ---- launches -----------------------------------------------------------------------------------

// For tests: what was queued on streams, launches and memsets.
static long launches = 0, memsets = 0;
// What events tell.
static double passed = 0;
extern "C" long emulator_queued() { return launches + memsets; }

void run_grid(Kernel kernel, const cudaLaunchConfig_t& config, void (*body)(const void*),
              const void* arguments) {
  // The host's threads take turns. (Recursive: a kernel that launches another shall not hang.)
  static std::recursive_mutex turn;
  const std::lock_guard<std::recursive_mutex> lock(turn);
  if (launch) fail("a kernel launches a kernel");
  if (!first_moment) {
    first_moment = next_moment = map_memory(nullptr, kMomentBytes);
    if (__tsan_get_current_fiber) host.fiber = __tsan_get_current_fiber();
    catch_faults();
  }
  Launch this_launch;
  launch = &this_launch;
  launch->kernel = kernel;
  launch->config = config;
  launch->cluster = cluster_of(config);
  launch->body = body;
  launch->arguments = arguments;
  check_limits();
  launch->number = launches++;
  passed += volume(config.gridDim) * volume(config.blockDim);
  launch->start = new_moment();
  launch->end = new_moment();
  blockDim = config.blockDim;
  gridDim = config.gridDim;

  // Block after block in a random order: start + i * step, where step has no divisor in common with
  // their number. Two at a time, so that they interleave.
  const uint64_t clusters = volume(config.gridDim) / volume(launch->cluster);
  const uint64_t start = next_random() % clusters;
  uint64_t step = next_random() % clusters + 1;
  while (std::gcd(step, clusters) != 1) ++step;
  for (uint64_t started = 0; started < clusters || launch->live_blocks;) {
    while (started < clusters && launch->live_blocks < 2) {
      start_cluster((start + started++ * step) % clusters);
    }
    if (ready.empty()) fail_stuck();
    Thread* next = ready.back();
    ready.pop_back();
    resume(host, *next);
    std::erase_if(launch->clusters, finish);
  }
  acquire(launch->end);
  forget_moments();
  launch = nullptr;
}

void host_watches(void (*look)(const void*)) {
  watch = look;
  let_in_bystanders();
}

void meanwhile(void (*act)()) {
  other_stream = act;
  let_in_bystanders();
}

cudaError_t set_attribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  Attributes& allowed = attributes[kernel];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    allowed.any_cluster = value != 0;
    return cudaSuccess;
  }
  if (value < 0 || static_cast<size_t>(value) > kMaxShared) return cudaErrorInvalidValue;
  if (static_cast<size_t>(value) < allowed.dynamic_shared.value_or(0)) {
    fail("%d bytes of dynamic shared memory allowed, where another thread may need %zu", value,
         *allowed.dynamic_shared);
  }
  allowed.dynamic_shared = value;
  return cudaSuccess;
}

int code_version() { return setting("EMULATOR_CODE", 90); }

int blocks_per_multiprocessor(Kernel, int, size_t) { return setting("EMULATOR_OCCUPANCY", 2); }

int active_clusters(Kernel, const cudaLaunchConfig_t& config) {
  const size_t size = volume(cluster_of(config));
  if (size > static_cast<size_t>(setting("EMULATOR_CLUSTER", 16))) return 0;
  const int blocks = setting("EMULATOR_OCCUPANCY", 2) * setting("EMULATOR_MULTIPROCESSORS", 3);
  return std::max<int>(1, blocks / size);
}

// ---- from within a kernel -----------------------------------------------------------------------

bool begin_copy(const Copy& copy) {
  if (next_random() % 2) return true;
  if (current->copies_begun == kMostCopies) fail("begins more than %zu copies", kMostCopies);
  current->copies[current->copies_begun++] = {copy, current->lots_closed};
  return false;
}
void close_lot() { ++current->lots_closed; }
bool next_copy(size_t prior, Copy& copy) {
  for (size_t i = 0; i < current->copies_begun; ++i) {
    if (current->copies[i].lot + prior >= current->lots_closed) continue;
    copy = current->copies[i].copy;
    current->copies[i] = current->copies[--current->copies_begun];
    return true;
  }
  return false;
}

int lane() { return current->number % kWarp; }

int sync_block(bool predicate, Where where) {
  Thread& self = *current;
  Block& block = *self.block;
  wait_at(Collective::kSyncThreads, 0, where);
  block.votes += predicate;
  if (++block.arrived == block.threads.size()) {
    check_same_place(block.threads);
    order(block.threads);
    for (Thread* thread : block.threads) {
      thread->received = block.votes;
      wake(*thread);
    }
    block.arrived = block.votes = 0;
  }
  reschedule();
  return self.received;
}

void sync_cluster(Where where) {
  Cluster& cluster = *current->block->cluster;
  wait_at(Collective::kSyncCluster, 0, where);
  if (++cluster.arrived == cluster.blocks.size() * cluster.blocks[0]->threads.size()) {
    AsHost host_allocates;
    std::vector<Thread*> threads;
    for (const Block* block : cluster.blocks) {
      threads.insert(threads.end(), block->threads.begin(), block->threads.end());
    }
    check_same_place(threads);
    order(threads);
    for (Thread* thread : threads) wake(*thread);
    cluster.arrived = 0;
  }
  reschedule();
}

namespace {

// The lanes of mask of the current warp, if all of them wait for the same.
std::vector<Thread*> arrived_lanes(unsigned mask) {
  const std::vector<Thread*>& threads = current->block->threads;
  std::vector<Thread*> lanes;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const size_t number = current->number / kWarp * kWarp + i;
    if (number >= threads.size()) fail("lanes %#x: there is no lane %d", mask, i);
    if (!same_place(*threads[number], *current)) return {};
    lanes.push_back(threads[number]);
  }
  return lanes;
}

// Waits for the lanes of mask, of which the last calls complete(lanes).
template <class Complete>
void meet(Collective what, unsigned mask, Where where, Complete complete) {
  if (!(mask >> lane() & 1)) {
    fail("%s at %s:%u by lane %d, lanes are %#x", name_of(what), where.file_name(), where.line(),
         lane(), mask);
  }
  wait_at(what, mask, where);
  {
    AsHost host_allocates;
    const std::vector<Thread*> lanes = arrived_lanes(mask);
    if (!lanes.empty()) {
      complete(lanes);
      for (Thread* thread : lanes) wake(*thread);
    }
  }
  reschedule();
}

}  // namespace

unsigned long long sync_warp(Collective what, unsigned mask, unsigned long long value, int source,
                             Where where) {
  if (source < 0 || source >= kWarp || !(mask >> source & 1)) {
    fail("%s at %s:%u reads lane %d, lanes are %#x", name_of(what), where.file_name(), where.line(),
         source, mask);
  }
  Thread& self = *current;
  self.brought = value;
  self.source = source;
  meet(what, mask, where, [&](const std::vector<Thread*>& lanes) {
    if (what == Collective::kSyncWarp) order(lanes);
    Thread* const* warp = self.block->threads.data() + self.number / kWarp * kWarp;
    for (Thread* thread : lanes) thread->received = warp[thread->source]->brought;
  });
  return self.received;
}

unsigned vote_warp(unsigned mask, bool predicate, Where where) {
  Thread& self = *current;
  self.brought = predicate;
  meet(Collective::kVote, mask, where, [](const std::vector<Thread*>& lanes) {
    unsigned votes = 0;
    for (const Thread* thread : lanes) {
      votes |= static_cast<unsigned>(thread->brought) << thread->number % kWarp;
    }
    for (Thread* thread : lanes) thread->received = votes;
  });
  return self.received;
}

void fence(Scope scope) {
  yield();
  if (!__tsan_acquire) return;
  Thread& self = *current;
  for (const Fence& other : self.seen) {
    const bool wide = other.scope != Scope::kBlock && scope != Scope::kBlock;
    if (wide || other.block == self.block) acquire(other.moment);
  }
  const Moment moment = new_moment();
  release(moment);
  AsHost host_allocates;
  self.made.add_latest({&self, self.block, scope, moment});
}

// For tests: how many there were.
static std::atomic<long> compares_and_swaps = 0;
void count_compare_and_swap() { ++compares_and_swaps; }
extern "C" long emulator_compares_and_swaps() { return compares_and_swaps; }

void atomic_reads(const void* address) {
  yield();
  AsHost host_allocates;
  current->seen.add(launch->shown[address]);
}

void atomic_wrote(const void* address) {
  AsHost host_allocates;
  Fences& shown = launch->shown[address];
  shown.add(current->made);
  if (watch) stand_by(shown, [=] { watch(address); });
}

void* dynamic_shared() {
  if (!current) fail("shared memory on the host");
  return current->block->shared + kDynamicStart;
}

void* static_shared(const void* key, size_t bytes) {
  if (!current) fail("shared memory on the host");
  AsHost host_allocates;
  auto& variables = launch->variables;
  auto found = std::find_if(variables.begin(), variables.end(),
                            [&](const Variable& variable) { return variable.key == key; });
  if (found == variables.end()) {
    size_t offset = kStaticStart, total = bytes;
    for (const Variable& variable : variables) {
      offset +=
          (variable.bytes + kRedZone + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
      total += variable.bytes;
    }
    const std::optional<size_t>& allowed = attributes[launch->kernel].dynamic_shared;
    const size_t dynamic = allowed.value_or(launch->config.dynamicSmemBytes);
    if (total > kDefaultShared || total + dynamic > (allowed ? kMaxShared : kDefaultShared) ||
        offset + bytes > kStaticEnd) {
      fail("%zu bytes of static and %zu of dynamic shared memory", total, dynamic);
    }
    found = variables.insert(variables.end(), {key, offset, bytes});
    for (const Cluster* cluster : launch->clusters) {
      for (const Block* block : cluster->blocks) {
        if (block->exited < block->threads.size()) open_variables(*block);
      }
    }
  }
  return current->block->shared + found->offset;
}

void* map_shared(const void* pointer, unsigned rank) {
  const Block& block = *current->block;
  const size_t offset = static_cast<const char*>(pointer) - block.shared;
  if (offset >= kSharedBytes) fail("map_shared_rank of what is not the block's shared memory");
  if (rank >= cluster_blocks()) fail("map_shared_rank to block %u of the cluster", rank);
  return block.cluster->blocks[rank]->shared + offset;
}

unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_blocks() { return current->block->cluster->blocks.size(); }

}  // namespace emulator

// A volatile access is a relaxed atomic one on the device. This ThreadSanitizer learns before each.
extern "C" {
void __tsan_volatile_read4(int* address) { __tsan_atomic32_load(address, __ATOMIC_RELAXED); }
void __tsan_volatile_read8(long long* address) { __tsan_atomic64_load(address, __ATOMIC_RELAXED); }
void __tsan_volatile_write8(long long* address) {
  __tsan_atomic64_fetch_add(address, 0, __ATOMIC_RELAXED);
}
}

// ---- the host's API -----------------------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidKernelImage:
      return "device kernel image is invalid";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorFileNotFound:
      return "file not found";
    case cudaErrorSymbolNotFound:
      return "named symbol not found";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}

// A launch that fails has aborted.
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using emulator::setting;
  if (device != 0) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = setting("EMULATOR_MULTIPROCESSORS", 3);
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = setting("EMULATOR_CAPABILITY", 90) / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = setting("EMULATOR_CAPABILITY", 90) % 10;
      return cudaSuccess;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = 5120;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:  // and a block's share for the system
      *value = emulator::kMaxShared + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulator::kMaxShared;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// Each call may be amid a capture.
static thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}

// For tests: whether the default stream is captured, and how often the host has waited for a
// stream.
static bool captured = false;
static int waits = 0;
extern "C" void emulator_capture(int begins) { captured = begins != 0; }
extern "C" int emulator_waits() { return waits; }

cudaStream_t emulator_side_stream() {
  static char stream;
  return reinterpret_cast<cudaStream_t>(&stream);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = captured && !stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (captured && (!stream || capture_mode != cudaStreamCaptureModeRelaxed)) {
    return cudaErrorStreamCaptureUnsupported;
  }
  ++waits;
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = stream ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  *memory = malloc(bytes);
  return *memory ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  constexpr size_t kAlignment = 256;
  return posix_memalign(memory, kAlignment, bytes) ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  emulator::passed += bytes / sizeof(uint4);
  return cudaMemcpy(to, from, bytes, kind);
}

struct CUevent_st {
  double at;
};
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st{};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->at = emulator::passed;
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = static_cast<float>(end->at - start->at);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  strcpy(properties->name, "emulator");
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  memset(data, value, bytes);
  ++emulator::memsets;
  return cudaSuccess;
}

// ---- kernels that are loaded at run time --------------------------------------------------------

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

// Like machine code, a shared library ends where its header says that its sections end.
CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned,
                           CUlibraryOption*, void**, unsigned) {
  const auto& header = *static_cast<const Elf64_Ehdr*>(code);
  if (memcmp(header.e_ident, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  const auto size = static_cast<ssize_t>(header.e_shoff + header.e_shentsize * header.e_shnum);
  const int file = memfd_create("kernels", 0);  // stays open: a name for each library
  if (file < 0 || write(file, code, size) != size) return CUDA_ERROR_INVALID_IMAGE;
  const std::string name = "/proc/self/fd/" + std::to_string(file);
  *library = static_cast<CUlibrary>(dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL));
  return *library ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  const std::string exported = std::string(name) + "_in_library";
  *kernel = static_cast<CUkernel>(dlsym(library, exported.c_str()));
  return *kernel ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult*) {
  const std::map<std::string, void*> driver = {
      {"cuInit", reinterpret_cast<void*>(cuInit)},
      {"cuLibraryLoadData", reinterpret_cast<void*>(cuLibraryLoadData)},
      {"cuLibraryGetKernel", reinterpret_cast<void*>(cuLibraryGetKernel)}};
  *function = driver.at(name);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  const auto& library_kernel = *static_cast<const emulator::LibraryKernel*>(kernel);
  library_kernel.launch({grid, block, shared_bytes, stream}, arguments);
  return cudaSuccess;
}
