// The threads that share a row: a slice of a warp, a block, or a cluster of blocks.
#pragma once

#include <cooperative_groups.h>

#include "reduce.cuh"
#include "sizes.h"

namespace fusedloss::cuda {

// All threads of a block merge their states and get the result. Each warp passes its state through
// shared memory. Two sets of them, used in turn, make one barrier per row enough: a thread that
// overwrites a set has passed the barrier after its last reading.
template <class State>
__device__ void all_reduce_block(State& state, int set) {
  constexpr int kMaxWarps = kRowBlock / kWarp;
  __shared__ alignas(16) unsigned char bytes[2 * kMaxWarps * sizeof(State)];
  State* const warp_states = reinterpret_cast<State*>(bytes) + set * kMaxWarps;
  const unsigned lane = threadIdx.x % kWarp;
  state.reduce_warp(kWarp);
  if (lane == 0) warp_states[threadIdx.x / kWarp] = state;
  __syncthreads();
  state = lane < blockDim.x / kWarp ? warp_states[lane] : State();
  state.reduce_warp(kWarp);
}

// Hardware without clusters does not declare them; there a group is a block, and is never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
template <Scope>
__device__ void this_cluster() {}
#else
constexpr bool kHasClusters = true;
template <Scope>
__device__ auto this_cluster() {
  return cooperative_groups::this_cluster();
}
#endif

template <Scope kScope>
struct ThreadGroup {
  static constexpr bool kAny = kScope == Scope::kAny;
  static constexpr bool kCluster = kHasClusters && (kAny || kScope == Scope::kCluster);
  const bool shares_warp;  // kAny: whether it is kSubWarp
  const int size, rank;    // the group's threads, a power of two in a warp, and this one among them
  int set = 0;

  // kAny: 0 threads stand for all of the block or cluster.
  __device__ explicit ThreadGroup(int threads)
      : shares_warp(threads > 0),
        size(in_warp() ? threads : blocks() * blockDim.x),
        rank(in_warp() ? threadIdx.x % threads : block_rank() * blockDim.x + threadIdx.x) {}

  __device__ bool in_warp() const {
    if constexpr (kAny) return shares_warp;
    return kScope == Scope::kSubWarp;
  }
  // The rank of the thread that has vector v of a row. A remainder takes twenty instructions.
  __device__ int owner(int v) const { return in_warp() ? v & (size - 1) : v % size; }

  // The groups of a block have neighbouring rows, and stay together: a group's rows are first_row +
  // row_in_block, and from there on every row_stride-th.
  __device__ int64_t first_row() const {
    return in_warp() ? int64_t{blockIdx.x} * blockDim.x / size : blockIdx.x / blocks();
  }
  __device__ int64_t row_stride() const {
    return in_warp() ? int64_t{gridDim.x} * blockDim.x / size : gridDim.x / blocks();
  }
  __device__ int row_in_block() const { return in_warp() ? threadIdx.x / size : 0; }

  // Merges the states of the group's threads; all get the result.
  template <class State>
  __device__ void all_reduce(State& state) {
    if constexpr (kScope == Scope::kSubWarp) return state.reduce_warp(size);
    if (in_warp()) return state.reduce_warp(size);
    all_reduce_block(state, set);
    if constexpr (kCluster) {
      if (!kAny || blocks() > 1) all_reduce_cluster(state);
    }
    set ^= 1;
  }
  // A block's shared memory ends with it: none may exit while another reads there.
  __device__ void sync_before_exit() const {
    if constexpr (kCluster) {
      if (!kAny || blocks() > 1) cluster().sync();
    }
  }

 private:
  // ... of its blocks, whose own threads have merged theirs.
  template <class State>
  __device__ void all_reduce_cluster(State& state) const {
    __shared__ alignas(16) unsigned char bytes[2 * sizeof(State)];
    State* const block_state = reinterpret_cast<State*>(bytes) + set;
    if (threadIdx.x == 0) *block_state = state;
    cluster().sync();
    // Eight lanes read the states of all blocks at once. The asm keeps a loop from finding the
    // addresses beforehand, in registers that it lacks then.
    unsigned block = threadIdx.x % kMaxClusterSize;
    asm volatile("" : "+r"(block));
    state = block < blocks() ? *cluster().map_shared_rank(block_state, block) : State();
    state.reduce_warp(kMaxClusterSize);
  }
  __device__ static auto cluster() { return this_cluster<kScope>(); }
  __device__ static unsigned blocks() {
    if constexpr (kCluster) return cluster().num_blocks();
    return 1;
  }
  __device__ static unsigned block_rank() {
    if constexpr (kCluster) return cluster().block_rank();
    return 0;
  }
};

}  // namespace fusedloss::cuda
