// The emulator's own test: for each of its promises a kernel that keeps the rules, or one that
// breaks one of them. The first argument names the case; test_selftest.py knows what must come out.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffff;

void check(bool condition, const char* what) {
  if (condition) return;
  printf("wrong: %s\n", what);
  exit(1);
}

template <class T>
std::unique_ptr<T[]> device(size_t n) {
  return std::make_unique<T[]>(n);
}

// ---- barriers -----------------------------------------------------------------------------------

template <bool kBarrier>
__global__ void __launch_bounds__(kThreads) reverse(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = blockIdx.x + threadIdx.x;
  if (kBarrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kBarrier>
void test_barrier() {
  constexpr int kBlocks = 5;
  const auto out = device<int>(kBlocks * kThreads);
  reverse<kBarrier><<<kBlocks, kThreads>>>(out.get());
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    check(out[i] == i / kThreads + kThreads - 1 - i % kThreads, "reversed");
  }
}

// The second barrier keeps the second turn's writes from the first turn's reads.
template <bool kBarrier>
__global__ void rotate(int* out) {
  extern __shared__ uint4 shared[];
  int* const values = reinterpret_cast<int*>(shared);
  int value = threadIdx.x;
  for (int turn = 0; turn < 3; ++turn) {
    values[threadIdx.x] = value;
    __syncthreads();
    value = values[(threadIdx.x + 1) % blockDim.x];
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = value;
}

template <bool kBarrier>
void test_rotate() {
  const auto out = device<int>(kThreads);
  rotate<kBarrier><<<1, kThreads, kThreads * sizeof(int)>>>(out.get());
  for (int i = 0; i < kThreads; ++i) check(out[i] == (i + 3) % kThreads, "rotated");
}

__global__ void divergent_exit() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}
__global__ void divergent_place() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void divergent_count() {
  for (unsigned i = 0; i < 1 + threadIdx.x / 32; ++i) __syncthreads();
}
__global__ void divergent_warp() {
  if (threadIdx.x % 32 != 3) __syncwarp();
}
__global__ void divergent_mask() { __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : kAll); }
__global__ void divergent_shuffle(int* out) {
  int value = threadIdx.x;
  if (threadIdx.x % 32 < 31) value = __shfl_xor_sync(kAll, value, 1);
  out[threadIdx.x] = value;
}

template <void (*kKernel)()>
void test_launch() {
  kKernel<<<2, kThreads>>>();
}
void test_divergent_shuffle() {
  const auto out = device<int>(kThreads);
  divergent_shuffle<<<1, kThreads>>>(out.get());
}

__global__ void votes(int* out) {
  const int t = threadIdx.x;
  const int count = __syncthreads_count(t % 3 == 0);
  const int any = __syncthreads_or(t == 5), none = __syncthreads_or(t == kThreads);
  const int all = __syncthreads_and(t < kThreads), not_all = __syncthreads_and(t != 5);
  const unsigned ballot = __ballot_sync(kAll, t % 2);
  const int lane = t % 32;
  const unsigned half = lane < 16 ? 0x0000ffff : 0xffff0000;
  const bool votes =
      __any_sync(half, lane == 20) == (lane >= 16) && __all_sync(half, lane < 16) == (lane < 16);
  out[t] = count == (kThreads + 2) / 3 && any && !none && all && !not_all && ballot == 0xaaaaaaaa &&
           votes;
}
void test_votes() {
  const auto out = device<int>(kThreads);
  votes<<<1, kThreads>>>(out.get());
  for (int i = 0; i < kThreads; ++i) check(out[i], "votes");
}

// ---- shuffles -----------------------------------------------------------------------------------

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x % 32;
  bool right =
      __shfl_sync(kAll, lane, 35) == 3 && __shfl_sync(kAll, lane, 9, 8) == lane / 8 * 8 + 1;
  right &= __shfl_xor_sync(kAll, lane * 1.5, 17) == (lane ^ 17) * 1.5;
  right &= __shfl_xor_sync(kAll, lane, 16, 16) == (lane < 16 ? lane : lane - 16);
  right &= __shfl_up_sync(kAll, lane, 3) == (lane < 3 ? lane : lane - 3);
  right &= __shfl_down_sync(kAll, lane, 3, 8) == (lane % 8 > 4 ? lane : lane + 3);
  const unsigned half = lane < 16 ? 0x0000ffff : 0xffff0000;
  right &= __shfl_xor_sync(half, 1ull << lane, 8) == 1ull << (lane ^ 8);
  float sum = lane;
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  out[threadIdx.x] = right && sum == 31 * 16;
}
void test_shuffles() {
  const auto out = device<int>(kThreads);
  shuffles<<<1, kThreads>>>(out.get());
  for (int i = 0; i < kThreads; ++i) check(out[i], "shuffles");
}

__global__ void shuffle_outside_mask(int* out) {
  const int lane = threadIdx.x % 32;
  if (lane < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, lane, 16);
}
__global__ void shuffle_unnamed(int* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffff, out[threadIdx.x], 0);
}
__global__ void shuffle_lane_missing(int* out) {
  out[threadIdx.x] = __shfl_sync(kAll, out[threadIdx.x], 0);
}
template <void (*kKernel)(int*), int kBlock = kThreads>
void test_bad_shuffle() {
  const auto out = device<int>(kThreads);
  kKernel<<<1, kBlock>>>(out.get());
}

// A shuffle orders no memory; __syncwarp does.
template <bool kBarrier>
__global__ void warp_exchange(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  if (kBarrier) {
    __syncwarp();
  } else {
    __shfl_xor_sync(kAll, values[threadIdx.x], 1);
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
template <bool kBarrier>
void test_warp_exchange() {
  const auto out = device<int>(kThreads);
  warp_exchange<kBarrier><<<1, kThreads>>>(out.get());
}

// ---- between blocks -----------------------------------------------------------------------------

enum class Omit { kNothing, kReleaseFence, kAcquireFence, kBarrier, kScope };

// The last block to come adds up what all have left.
template <Omit kOmit>
__global__ void last_block_sums(float* partials, unsigned* ticket, float* sum) {
  __shared__ bool last;
  partials[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (kOmit != Omit::kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (kOmit == Omit::kScope) {
      __threadfence_block();
    } else if (kOmit != Omit::kReleaseFence) {
      __threadfence();
    }
    last = atomicAdd(ticket, 1) == gridDim.x - 1;
    if (kOmit != Omit::kAcquireFence) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) total += __ldcg(partials + i);
  *sum = total;
}

template <Omit kOmit>
void test_last_block() {
  constexpr int kBlocks = 6, kBlock = 64;
  const auto partials = device<float>(kBlocks * kBlock);
  unsigned ticket = 0;
  float sum = 0;
  for (int turn = 0; turn < 3; ++turn) {
    cudaMemsetAsync(&ticket, 0, sizeof ticket, nullptr);
    last_block_sums<kOmit><<<kBlocks, kBlock>>>(partials.get(), &ticket, &sum);
    check(ticket == kBlocks && sum == kBlocks * kBlock, "sum over blocks");
  }
}

// Every thread fences its own share, before the barrier that the atomic comes after.
__global__ void all_fence(float* partials, unsigned* ticket, float* sum) {
  partials[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicInc(ticket, 99) == gridDim.x - 1);
  __threadfence();
  if (!last || threadIdx.x != 7) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) total += partials[i];
  *sum = total;
}
void test_all_fence() {
  constexpr int kBlocks = 6, kBlock = 64;
  const auto partials = device<float>(kBlocks * kBlock);
  unsigned ticket = 0;
  float sum = 0;
  all_fence<<<kBlocks, kBlock>>>(partials.get(), &ticket, &sum);
  check(sum == kBlocks * kBlock, "sum over blocks");
}

// Blocks are not ordered, and so may not write the same place; launches are.
__global__ void all_blocks_write(int* out, int value) {
  if (threadIdx.x == 0) *out = value;
}
void test_blocks_unordered() {
  int out = 0;
  all_blocks_write<<<dim3(2, 2), 32>>>(&out, 1);
}
void test_blocks_unordered_many() {
  int out = 0;
  all_blocks_write<<<200, 32>>>(&out, 1);
}
void test_launches_ordered() {
  int out = 0;
  for (int i = 0; i < 4; ++i) all_blocks_write<<<1, 32>>>(&out, i);
  check(out == 3, "the last launch's");
}

__global__ void atomics(unsigned* counter, int* extremes, unsigned long long* wide) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(wide, 1ull << 33);
  atomicMin(&extremes[0], -i);
  atomicMax(&extremes[1], i);
  atomicInc(&counter[0], 9);
  for (unsigned old = counter[2], seen = 0;; old = seen) {
    seen = atomicCAS(&counter[1], old, old + 1);
    if (seen == old) break;
  }
  if (i == 5) atomicExch(&extremes[2], 77);
}
void test_atomics() {
  unsigned counter[3] = {};
  int extremes[3] = {};
  unsigned long long wide = 0;
  atomics<<<3, 64>>>(counter, extremes, &wide);
  check(wide == 192ull << 33, "atomicAdd");
  check(extremes[0] == -191 && extremes[1] == 191 && extremes[2] == 77, "atomicMin, Max, Exch");
  check(counter[0] == 2 && counter[1] == 192, "atomicInc, atomicCAS");
}

// What the host sees amid a launch.
struct Message {
  int ready, text;
};
Message message;

template <bool kSystem>
__global__ void tell_host(Message* m) {
  m->text = 42;
  if (kSystem) {
    __threadfence_system();
  } else {
    __threadfence();
  }
  atomicExch(&m->ready, 1);
}
template <bool kSystem>
void test_tell_host() {
  emulator::host_watches([](const void* address) {
    if (address == &message.ready) check(message.text == 42, "told");
  });
  tell_host<kSystem><<<1, 1>>>(&message);
}

// ---- another stream -----------------------------------------------------------------------------

volatile double lesson;

// Number: volatile, what single accesses of several streams at once must be.
template <class Number>
__global__ void listen(double* out) {
  __syncthreads();
  out[threadIdx.x] = const_cast<Number&>(lesson);
}
template <class Number>
void test_meanwhile() {
  const auto out = device<double>(kThreads);
  lesson = 0;
  emulator::meanwhile([] { lesson = lesson + 1; });
  listen<Number><<<1, kThreads>>>(out.get());
  emulator::meanwhile(nullptr);
  const double after = lesson;
  listen<Number><<<1, kThreads>>>(out.get());
  check(after > kThreads && lesson == after, "lessons");
  for (int i = 0; i < kThreads; ++i) check(out[i] == after, "heard at last");
}

// ---- clusters -----------------------------------------------------------------------------------

enum class Leave { kTogether, kAtOnce, kUnstarted };

template <Leave kLeave>
__global__ void neighbours(int* out) {
  __shared__ int value[kThreads];
  extern __shared__ uint4 shared[];
  const cg::cluster_group cluster = cg::this_cluster();
  value[threadIdx.x] = cluster.block_rank();
  if (threadIdx.x == 0) shared[0].x = 10 + cluster.block_rank();
  if (kLeave != Leave::kUnstarted) cluster.sync();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  out[blockIdx.x * blockDim.x + threadIdx.x] = *cluster.map_shared_rank(&value[threadIdx.x], next) +
                                               cluster.map_shared_rank(shared, next)->x;
  if (kLeave != Leave::kAtOnce) cluster.sync();
}

template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), dim3 grid, unsigned cluster, size_t shared, A... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess, "launched");
}

template <Leave kLeave>
void test_cluster() {
  constexpr int kBlocks = 12, kCluster = 4;
  const auto out = device<int>(kBlocks * kThreads);
  launch_clusters(neighbours<kLeave>, kBlocks, kCluster, sizeof(uint4), out.get());
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    check(out[i] == 10 + 2 * ((i / kThreads + 1) % kCluster), "of the next block");
  }
}

__global__ void nothing() {}
__global__ void divergent_cluster() {
  if (blockIdx.x % 2 == 0) cg::this_cluster().sync();
}
void test_divergent_cluster() { launch_clusters(divergent_cluster, 4, 2, 0); }
void test_cluster_divides() { launch_clusters(nothing, 6, 4, 0); }
void test_cluster_too_large() { launch_clusters(nothing, 32, 16, 0); }
void test_cluster_large() {
  cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  launch_clusters(nothing, 32, 16, 0);
}

// ---- memory -------------------------------------------------------------------------------------

__global__ void write_at(int* out, int64_t at) { out[at] = 1; }
void test_global_bounds() {
  const auto out = device<int>(10);
  write_at<<<1, 1>>>(out.get(), 10);
}

__global__ void static_at(int* out, int at) {
  __shared__ float first[10];
  __shared__ float second[10];
  first[at] = 1;
  __syncthreads();
  second[0] = 1;
  *out = static_cast<int>(first[at]);
}
template <int kAt>
void test_static_bounds() {
  int out = 0;
  static_at<<<1, 1>>>(&out, kAt);
}

// A compiler does not see these bounds.
__global__ void static_through(int* out, int at) {
  __shared__ int first[10];
  __shared__ int second[10];
  int* volatile chosen = at % 2 ? second : first;
  chosen[at] = 1;
  *out = chosen[at];
}
template <int kAt>
void test_static_through() {
  int out = 0;
  static_through<<<1, 1>>>(&out, kAt);
}

__global__ void dynamic_at(int* out, int at) {
  extern __shared__ uint4 shared[];
  shared[at].x = 1;
  *out = shared[at].x;
}
template <int kAt>
void test_dynamic_bounds() {
  int out = 0;
  dynamic_at<<<1, 1, 10 * sizeof(uint4)>>>(&out, kAt);
}

__global__ void load_wide(const float* in, uint4* out) {
  *out = *reinterpret_cast<const uint4*>(in);
}
template <int kOffset>
void test_alignment() {
  alignas(16) const float in[8] = {};
  uint4 out;
  load_wide<<<1, 1>>>(in + kOffset, &out);
}

template <class T>
struct Pair {
  T first, second;
};

template <class T, int kN>
__device__ void read_garbage(bool* out) {
  __shared__ Pair<T> pairs[kN][2];
  __shared__ alignas(16) double one;
  extern __shared__ uint4 shared[];
  *out = isnan(pairs[kN - 1][1].second) && isnan(one) && shared[0].w == 0xffffffff;
  pairs[kN - 1][1].second = 0;
  one = 0;
  shared[0].w = 0;
}
// Each block finds garbage, and variables of its own of the same name.
__global__ void garbage(bool* out) {
  read_garbage<float, 3>(out + 2 * blockIdx.x);
  __shared__ double one;
  out[2 * blockIdx.x + 1] = isnan(one);
}
void test_garbage() {
  bool out[8] = {};
  garbage<<<4, 1, 16>>>(out);
  for (bool found : out) check(found, "garbage");
}

// ---- limits -------------------------------------------------------------------------------------

void test_block_too_large() { nothing<<<1, 1025>>>(); }
void test_grid_empty() { nothing<<<0, 32>>>(); }
void test_shared_not_allowed() { nothing<<<1, 32, (48 << 10) + 16>>>(); }
void test_shared_allowed() {
  constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(nothing, kAttribute, (227 << 10) + 1) == cudaErrorInvalidValue,
        "too much");
  check(cudaFuncSetAttribute(nothing, kAttribute, 227 << 10) == cudaSuccess, "just enough");
  nothing<<<1, 32, 227 << 10>>>();
}
void test_static_and_dynamic() { garbage<<<1, 1, 48 << 10>>>(nullptr); }

__global__ void dimensions(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * 24 + thread] = 1;
}
void test_dimensions() {
  const auto out = device<int>(24 * 24);
  dimensions<<<dim3(2, 3, 4), dim3(4, 3, 2)>>>(out.get());
  for (int i = 0; i < 24 * 24; ++i) check(out[i], "every thread of every block");
}

// ---- numbers ------------------------------------------------------------------------------------

// Rounds x to so many bits of mantissa, no exponent being too small.
double rounded(double x, int bits, int least_exponent) {
  const int exponent = std::max(std::ilogb(x), least_exponent);
  const double unit = std::ldexp(1.0, exponent - bits);
  return std::nearbyint(x / unit) * unit;
}

void test_numbers() {
  // Between, at and beside the middles of neighbours, from subnormal to overflowing.
  for (int exponent = -30; exponent <= 15; ++exponent) {
    for (int i = 0; i < 4096; ++i) {
      for (const double beside : {0.0, 1e-9, -1e-9, 1e-14, -1e-14}) {
        const double x = std::ldexp(1 + i / 4096.0 + beside, exponent);
        const double half = rounded(x, 10, -14), bfloat = rounded(x, 7, -126);
        if (half < 65520) check(__half2float(__double2half(x)) == half, "__double2half");
        check(__bfloat162float(__double2bfloat16(x)) == bfloat, "__double2bfloat16");
        const float f = static_cast<float>(x);
        if (f != x) continue;
        if (half < 65520) check(__half2float(__float2half_rn(-f)) == -half, "__float2half_rn");
        check(__bfloat162float(__float2bfloat16_rn(-f)) == -bfloat, "__float2bfloat16_rn");
      }
    }
  }
  check(isinf(__half2float(__float2half_rn(65520))), "overflow of half");
  check(__half2float(__float2half_rn(65519.996f)) == 65504, "largest half");
  check(isinf(__bfloat162float(__float2bfloat16_rn(3.4e38f))), "overflow of bfloat16");
  check(isinf(__bfloat162float(__double2bfloat16(-1e300))), "overflow of bfloat16");
  check(isnan(__half2float(__float2half_rn(NAN))), "nan of half");
  check(isnan(__bfloat162float(__float2bfloat16_rn(__uint_as_float(0x7f800001)))),
        "nan of bfloat16");
  check(isnan(__bfloat162float(__double2bfloat16(NAN))), "nan of bfloat16");
  check(__fdividef(1, 0x1.8p126f) == 0 && __fdividef(3, 2) == 1.5f, "__fdividef");
}

// ---- speed --------------------------------------------------------------------------------------

__global__ void many_barriers(int n) {
  for (int i = 0; i < n; ++i) __syncthreads();
}
__global__ void many_shuffles(int n) {
  for (int i = 0; i < n; ++i) __shfl_xor_sync(kAll, i, 1);
}
__global__ void many_loads(const float* in, float* out, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += in[i];
  out[threadIdx.x] = sum;
}

template <class F>
double microseconds(F&& f) {
  timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  f();
  clock_gettime(CLOCK_MONOTONIC, &end);
  return (end.tv_sec - start.tv_sec) * 1e6 + (end.tv_nsec - start.tv_nsec) / 1e3;
}

void time_all() {
  const auto in = device<float>(1000), out = device<float>(1024);
  for (const int block : {256, 1024}) {
    const double first = microseconds([&] { nothing<<<1, block>>>(); });
    const double launch = microseconds([&] { nothing<<<1, block>>>(); });
    const double barriers = microseconds([&] { many_barriers<<<1, block>>>(20); });
    const double shuffles = microseconds([&] { many_shuffles<<<1, block>>>(100); });
    const double loads = microseconds([&] { many_loads<<<1, block>>>(in.get(), out.get(), 1000); });
    printf(
        "block of %4d: launch %.0f us (first %.0f), __syncthreads %.1f us, shuffle %.2f us a warp, "
        "load %.4f us\n",
        block, launch, first, (barriers - launch) / 20, (shuffles - launch) / 100 / (block / 32),
        (loads - launch) / 1000 / block);
  }
}

// -------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  void (*run)();
};

const Case kCases[] = {
    {"barrier", test_barrier<true>},
    {"barrier_missing", test_barrier<false>},
    {"rotate", test_rotate<true>},
    {"rotate_missing", test_rotate<false>},
    {"divergent_exit", test_launch<divergent_exit>},
    {"divergent_place", test_launch<divergent_place>},
    {"divergent_count", test_launch<divergent_count>},
    {"divergent_warp", test_launch<divergent_warp>},
    {"divergent_mask", test_launch<divergent_mask>},
    {"divergent_shuffle", test_divergent_shuffle},
    {"votes", test_votes},
    {"shuffles", test_shuffles},
    {"shuffle_outside_mask", test_bad_shuffle<shuffle_outside_mask>},
    {"shuffle_unnamed", test_bad_shuffle<shuffle_unnamed>},
    {"shuffle_lane_missing", test_bad_shuffle<shuffle_lane_missing, 40>},
    {"warp_exchange", test_warp_exchange<true>},
    {"warp_exchange_missing", test_warp_exchange<false>},
    {"last_block", test_last_block<Omit::kNothing>},
    {"last_block_release_fence", test_last_block<Omit::kReleaseFence>},
    {"last_block_acquire_fence", test_last_block<Omit::kAcquireFence>},
    {"last_block_barrier", test_last_block<Omit::kBarrier>},
    {"last_block_scope", test_last_block<Omit::kScope>},
    {"all_fence", test_all_fence},
    {"blocks_unordered", test_blocks_unordered},
    {"blocks_unordered_many", test_blocks_unordered_many},
    {"launches_ordered", test_launches_ordered},
    {"atomics", test_atomics},
    {"tell_host", test_tell_host<true>},
    {"tell_host_scope", test_tell_host<false>},
    {"meanwhile", test_meanwhile<volatile double>},
    {"meanwhile_plain", test_meanwhile<double>},
    {"cluster", test_cluster<Leave::kTogether>},
    {"cluster_exited", test_cluster<Leave::kAtOnce>},
    {"cluster_unstarted", test_cluster<Leave::kUnstarted>},
    {"divergent_cluster", test_divergent_cluster},
    {"cluster_divides", test_cluster_divides},
    {"cluster_too_large", test_cluster_too_large},
    {"cluster_large", test_cluster_large},
    {"global_bounds", test_global_bounds},
    {"static_bounds", test_static_bounds<10>},
    {"static_bounds_inside", test_static_bounds<9>},
    {"static_bounds_pointer", test_static_through<10>},
    {"static_bounds_below", test_static_through<-1>},
    {"dynamic_bounds", test_dynamic_bounds<10>},
    {"dynamic_bounds_below", test_dynamic_bounds<-1>},
    {"dynamic_bounds_inside", test_dynamic_bounds<9>},
    {"misaligned", test_alignment<1>},
    {"aligned", test_alignment<4>},
    {"garbage", test_garbage},
    {"block_too_large", test_block_too_large},
    {"grid_empty", test_grid_empty},
    {"shared_not_allowed", test_shared_not_allowed},
    {"shared_allowed", test_shared_allowed},
    {"static_and_dynamic", test_static_and_dynamic},
    {"dimensions", test_dimensions},
    {"numbers", test_numbers},
    {"time", time_all},
};

}  // namespace

int main(int, char** arguments) {
  for (const Case& c : kCases) {
    if (strcmp(c.name, arguments[1])) continue;
    c.run();
    printf("done\n");
    return 0;
  }
  return 2;
}
