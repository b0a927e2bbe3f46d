// Sums over a block and over a grid, with the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "kernels.h"
#include "sizes.h"

namespace fusedloss::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum of x over the block's threads, in thread 0. Two calls need a barrier between them.
__device__ inline double block_sum(double x) {
  __shared__ double warps[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  if (warp > 0) return 0;
  x = lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : 0;
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

__device__ inline bool same_sign_and_value(double a, double b) {
  return a == b && signbit(a) == signbit(b);
}

// A launch's device memory. The block that finishes last leaves the counters 0 for the next launch.
struct GridWorkspace {
  struct Counters {
    unsigned blocks_done, next_slice, slices_done, unused;

    __device__ void reset() {
      next_slice = slices_done = 0;
      atomicExch(&blocks_done, 0u);  // other blocks have counted without a fence behind it
    }
  };
  static_assert(sizeof(Counters) == kWorkspaceCounterBytes);
  Counters* counters;
  double* slice_sums;  // (kMaxSlices)
  double2* parts;      // (blocks): the block's sum and its tag

  __device__ explicit GridWorkspace(void* p)
      : counters(static_cast<Counters*>(p)),
        slice_sums(reinterpret_cast<double*>(counters + 1)),
        parts(reinterpret_cast<double2*>(slice_sums + kMaxSlices)) {}
  static size_t bytes(int64_t blocks) {
    return sizeof(Counters) + kMaxSlices * sizeof(double) + blocks * sizeof(double2);
  }
};

// The sum of x over the grid's threads. True in the one thread that has it: every block stores its
// part, and the last one to finish adds them in order. There `tag` becomes nan unless all blocks
// passed the same one.
__device__ inline bool grid_sum(double& x, double& tag, const GridWorkspace& w) {
  x = block_sum(x);
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) w.counters->reset();
    return threadIdx.x == 0;
  }
  __shared__ bool last;
  if (threadIdx.x == 0) {
    w.parts[blockIdx.x] = make_double2(x, tag);
    __threadfence();  // the part before the ticket
    last = atomicAdd(&w.counters->blocks_done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();  // the tickets before their parts
  if (threadIdx.x == 0) w.counters->reset();
  x = 0;
  bool agreed = true;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    const double2 part = __ldcg(&w.parts[b]);
    x += part.x;
    agreed = agreed && same_sign_and_value(part.y, tag);
  }
  x = block_sum(x);
  agreed = __syncthreads_and(agreed);
  if (threadIdx.x > 0) return false;
  if (!agreed) tag = std::numeric_limits<double>::quiet_NaN();
  return true;
}

}  // namespace fusedloss::cuda
