// Prints how cross-entropy of class indices is laid over a device: kernel, classes that a thread
// holds, threads of a row in a warp, cluster, threads, stages, shared memory, blocks.
//
//   plan DTYPE ROWS CLASSES ROW_STRIDE SMOOTHING MULTIPROCESSORS SHARED_OF_BLOCK SHARED CLUSTERS
#include <cstdio>
#include <cstdlib>

#include "csrc/cuda/rows_plan.h"

namespace {

using namespace fusedloss;

struct Device {
  int64_t multiprocessors, smem_of_block, smem;
  bool clusters;

  int64_t sms() const { return multiprocessors; }
  int64_t max_smem() const { return smem_of_block - cuda::kStaticSmem; }
  int64_t smem_per_sm() const { return smem; }
  bool has_clusters() const { return clusters; }
  int64_t active_clusters(const cuda::RowsPlan& plan) const {
    const int64_t by_registers = cuda::held_threads_per_sm(cuda::kManyHeld) / plan.threads;
    const int64_t per_sm = std::min(by_registers, smem / (plan.smem + cuda::kStaticSmem));
    return multiprocessors / plan.cluster * per_sm;
  }
};

}  // namespace

int main(int, char** arguments) {
  const auto number = [&](int i) { return atoll(arguments[i]); };
  alignas(cuda::kVectorBytes) static const char memory[cuda::kVectorBytes] = {};
  Call call;
  const double smoothing = atof(arguments[5]);
  call.parameters = &smoothing;
  call.space.dims = 3;
  call.space.sizes[0] = number(2);
  call.space.sizes[1] = number(3);
  call.space.sizes[2] = 1;
  call.input.data = call.target.data = memory;
  call.input.dtype = static_cast<DType>(number(1));
  call.target.dtype = DType::kInt64;
  for (int64_t* strides : {call.input.strides, call.gradient.strides}) {
    strides[0] = number(4);
    strides[1] = strides[2] = 1;
  }
  const Device device{number(6), number(7), number(8), number(9) != 0};
  const cuda::RowsPlan plan = cuda::plan_rows(RowsCall(call), device);
  const char* const names[] = {"strided", "strided vectorized", "sub-warp", "block", "cluster"};
  printf(
      "{\"kernel\": \"%s\", \"held\": %d, \"threads_per_row\": %d, \"cluster\": %d, "
      "\"threads\": %d, \"stages\": %d, \"smem\": %lld, \"blocks\": %lld}\n",
      names[static_cast<int>(plan.kernel)], plan.held, plan.tiling.threads_per_row, plan.cluster,
      plan.threads, plan.tiling.stages, static_cast<long long>(plan.smem),
      static_cast<long long>(plan.blocks));
}
