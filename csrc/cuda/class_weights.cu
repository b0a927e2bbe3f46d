// What a mean over class indices divides by.
#include <algorithm>

#include "reduce.cuh"
#include "vectors.cuh"

namespace fusedloss::cuda {
namespace {

constexpr int kCountBlock = 512;           // threads
constexpr int64_t kIndicesPerThread = 32;  // before another block pays

template <class W>
__global__ void __launch_bounds__(kCountBlock)
    class_weights(const ClassWeights c, void* workspace) {
  const W* const weight = static_cast<const W*>(c.weight);
  double total = 0;
  for (int64_t i = int64_t{blockIdx.x} * kCountBlock + threadIdx.x; i < c.n;
       i += int64_t{gridDim.x} * kCountBlock) {
    const int64_t t = c.indices[i];
    if (t < 0 || t >= c.classes || t == c.ignore_index) continue;
    total += weight ? weight[t] : W(1);
  }
  double tag = 0;
  // A mean over nothing is nan, whatever label smoothing adds to the sum.
  if (grid_sum(total, tag, workspace)) *c.sum = total == 0 ? kNan<double> : total;
}

int64_t blocks_for(const ClassWeights& call) {
  return std::clamp<int64_t>(ceil_div(call.n, kCountBlock * kIndicesPerThread), 1,
                             device_attribute(cudaDevAttrMultiProcessorCount));
}

}  // namespace

size_t workspace_bytes(const ClassWeights& call) {
  return GridSumWorkspace::bytes(blocks_for(call));
}

cudaError_t sum_class_weights(const ClassWeights& call, const Launch& launch) {
  const int64_t blocks = blocks_for(call);
  if (const cudaError_t error = zero_ticket(launch, blocks); error != cudaSuccess) return error;
  const auto kernel = call.weight_is_double ? class_weights<double> : class_weights<float>;
  kernel<<<static_cast<unsigned>(blocks), kCountBlock, 0, launch.stream>>>(call, launch.workspace);
  return cudaGetLastError();
}

}  // namespace fusedloss::cuda
