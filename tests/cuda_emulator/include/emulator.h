// What the emulator's CUDA headers ask of emulator.cpp, which plays the device.
#pragma once

#include <cstddef>
#include <source_location>

#include "cuda_runtime_api.h"

namespace emulator {

using Where = std::source_location;

// Says which kernel, block and thread did what, and aborts.
[[noreturn]] [[gnu::format(printf, 1, 2)]] void fail(const char* what, ...);

// ---- launches -----------------------------------------------------------------------------------

using Kernel = void (*)();

// Runs body(arguments) once for each thread of the grid.
void run_grid(Kernel kernel, const cudaLaunchConfig_t& config, void (*body)(const void* arguments),
              const void* arguments);
cudaError_t set_attribute(Kernel kernel, cudaFuncAttribute attribute, int value);
int code_version();
int blocks_per_multiprocessor(Kernel kernel, int threads, size_t shared_bytes);
int active_clusters(Kernel kernel, const cudaLaunchConfig_t& config);

// What a library that is loaded at run time exports for each of its kernels.
struct LibraryKernel {
  Kernel kernel;
  void (*launch)(const cudaLaunchConfig_t& config, void** arguments);
};

// From now on look(address) is called after each atomic write, as by a host thread that has just
// acquired what stands there, amid the launch. Null: no more.
void host_watches(void (*look)(const void* address));

// From now on act() is called whenever threads of a kernel change places, as by a kernel on another
// stream: ordered with nothing of the launch. Null: no more.
void meanwhile(void (*act)());

// ---- from within a kernel -----------------------------------------------------------------------

enum class Collective { kSyncThreads, kSyncWarp, kShuffle, kVote, kSyncCluster };

// Waits for the whole block; for how many threads is predicate true?
int sync_block(bool predicate, Where where);
void sync_cluster(Where where);

// Waits for the lanes of mask; the value that the lane `source` brought. It orders no memory but
// where the collective is kSyncWarp.
unsigned long long sync_warp(Collective what, unsigned mask, unsigned long long value, int source,
                             Where where);
// ... and the lanes whose predicate is true.
unsigned vote_warp(unsigned mask, bool predicate, Where where);
int lane();

// Copies that the thread has begun and not yet waited for, in lots.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
// True: it is to be made at once.
bool begin_copy(const Copy& copy);
void close_lot();
// Takes one of them out that is in none of the last `prior` closed lots; false: there is none.
bool next_copy(size_t prior, Copy& copy);

enum class Scope { kBlock, kDevice, kSystem };
void fence(Scope scope);

// A relaxed atomic operation at address reads, and has written. Such operations carry the order
// that fences before a write and after a read make.
void atomic_reads(const void* address);
void count_compare_and_swap();
void atomic_wrote(const void* address);

void* dynamic_shared();
// The block's variable of that key, which stands for its declaration.
void* static_shared(const void* key, size_t bytes);
void* map_shared(const void* pointer, unsigned rank);
unsigned cluster_rank();
unsigned cluster_blocks();

}  // namespace emulator
