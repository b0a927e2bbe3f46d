// The threads that share a row: part of a warp, a block, or a cluster of blocks.
#pragma once

#include <cooperative_groups.h>

#include "rows_plan.h"

namespace fusedloss::cuda {

// The primary template is Scope::kSubWarp: a power-of-two slice of a warp; one warp works on
// several rows. Every group has
//   size, rank              its threads, and this one among them
//   owner(v)                the rank of the thread that has vector v of a row
//   first_row, row_stride   the rows of this thread's warp: the first, and the step to the next
//   row_in_warp             this group's row among those of its warp
//   all_reduce(state)       merges the states of its threads; all get the result
//   sync_before_exit        to be called before a thread returns
template <Scope kScope, class State>
struct ThreadGroup {
  const int size, rank;

  __device__ explicit ThreadGroup(int threads) : size(threads), rank(threadIdx.x % threads) {}
  // A remainder by a run-time number takes twenty instructions.
  __device__ int owner(int v) const { return v & (size - 1); }
  __device__ int64_t first_row() const {
    return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp * (kWarp / size);
  }
  __device__ int64_t row_stride() const { return int64_t{gridDim.x} * blockDim.x / size; }
  __device__ int64_t row_in_warp() const { return threadIdx.x % kWarp / size; }
  __device__ void all_reduce(State& state) const { state.reduce_warp(size); }
  __device__ void sync_before_exit() const {}
};

// A block's warps exchange their states through shared memory. Two sets, used in turn, make one
// barrier per row enough: a thread that overwrites a set has passed the barrier after its reading.
template <class State>
struct BlockStates {
  State of_warp[2][kWarp];
};

template <class State>
__device__ void all_reduce_block(State& state, State (&of_warp)[kWarp]) {
  state.reduce_warp(kWarp);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = state;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  state = lane < blockDim.x / kWarp ? of_warp[lane] : State();
  state.reduce_warp(kWarp);
}

template <class State>
struct ThreadGroup<Scope::kBlock, State> {
  const int size = blockDim.x, rank = threadIdx.x;
  BlockStates<State>& shared;
  int set = 0;

  __device__ explicit ThreadGroup(int) : shared(storage()) {}
  __device__ int owner(int v) const { return v % size; }
  __device__ static BlockStates<State>& storage() {
    __shared__ alignas(16) unsigned char bytes[sizeof(BlockStates<State>)];
    return *reinterpret_cast<BlockStates<State>*>(bytes);
  }
  __device__ int64_t first_row() const { return blockIdx.x; }
  __device__ int64_t row_stride() const { return gridDim.x; }
  __device__ int64_t row_in_warp() const { return 0; }
  __device__ void all_reduce(State& state) {
    all_reduce_block(state, shared.of_warp[set]);
    set ^= 1;
  }
  __device__ void sync_before_exit() const {}
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// The hardware has no clusters, and none is launched: see has_clusters.
template <class State>
struct ThreadGroup<Scope::kCluster, State> : ThreadGroup<Scope::kBlock, State> {
  using ThreadGroup<Scope::kBlock, State>::ThreadGroup;
};
#else
template <class State>
struct ThreadGroup<Scope::kCluster, State> {
  const int size, rank;
  BlockStates<State>& shared;
  int set = 0;

  __device__ explicit ThreadGroup(int)
      : size(cluster().num_blocks() * blockDim.x),
        rank(cluster().block_rank() * blockDim.x + threadIdx.x),
        shared(ThreadGroup<Scope::kBlock, State>::storage()) {}
  __device__ int owner(int v) const { return v % size; }
  __device__ static cooperative_groups::cluster_group cluster() {
    return cooperative_groups::this_cluster();
  }
  __device__ int64_t first_row() const { return blockIdx.x / cluster().num_blocks(); }
  __device__ int64_t row_stride() const { return gridDim.x / cluster().num_blocks(); }
  __device__ int64_t row_in_warp() const { return 0; }
  __device__ void all_reduce(State& state) {
    __shared__ alignas(16) unsigned char bytes[2 * sizeof(State)];
    State* const of_block = reinterpret_cast<State*>(bytes) + set;
    all_reduce_block(state, shared.of_warp[set]);
    if (threadIdx.x == 0) *of_block = state;
    cluster().sync();
    state = State();
    for (unsigned b = 0; b < cluster().num_blocks(); ++b) {
      state.merge(*cluster().map_shared_rank(of_block, b));
    }
    set ^= 1;
  }
  // A block's shared memory ends with it: none may exit while another reads there.
  __device__ void sync_before_exit() const { cluster().sync(); }
};
#endif

}  // namespace fusedloss::cuda
