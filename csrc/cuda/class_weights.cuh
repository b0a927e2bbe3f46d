// What a mean over class indices divides by: how many indices are not ignored, or the sum of their
// weights. The forward kernel adds them up itself, before its first row.
#pragma once

#include "reduce.cuh"
#include "vectors.cuh"

namespace fusedloss::cuda {

template <class W>
__device__ double class_weight_at(const ClassWeights& c, int64_t i) {
  const int64_t t = c.indices[i];
  if (t < 0 || t >= c.classes || t == c.ignore_index) return 0;
  return c.weight ? static_cast<const W*>(c.weight)[c.weight_is_of_rows ? i : t] : W(1);
}

// The sum, in thread 0; nan in place of 0. The grid's blocks share the work: each takes slices of
// the indices until none is left, and then waits for the slices of the others. Those are running,
// and wait for nobody, so that no block waits for one that has not started.
__device__ inline double sum_class_weights(const ClassWeights& c, const GridWorkspace& w) {
  __shared__ int64_t slice;
  for (;;) {
    if (threadIdx.x == 0) slice = atomicAdd(&w.counters->next_slice, 1u);
    __syncthreads();
    if (slice >= c.slices) break;
    const int64_t first = slice * c.slice_size, end = min(first + c.slice_size, c.n);
    double part = 0;
#pragma unroll 4
    for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
      part += c.weight_is_double ? class_weight_at<double>(c, i) : class_weight_at<float>(c, i);
    }
    part = block_sum(part);
    if (threadIdx.x == 0) {
      w.slice_sums[slice] = part;
      __threadfence();  // the sum before the count
      atomicAdd(&w.counters->slices_done, 1u);
    }
  }
  if (threadIdx.x == 0) {
    while (atomicAdd(&w.counters->slices_done, 0u) < static_cast<unsigned>(c.slices)) {
    }
  }
  __syncthreads();
  __threadfence();  // the count before the sums
  double sum = 0;
  for (int64_t i = threadIdx.x; i < c.slices; i += blockDim.x) sum += __ldcg(&w.slice_sums[i]);
  sum = block_sum(sum);
  // A mean over nothing is nan, whatever label smoothing adds to the sum.
  return sum == 0 ? kNan<double> : sum;
}

}  // namespace fusedloss::cuda
