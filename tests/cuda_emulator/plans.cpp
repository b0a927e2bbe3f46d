// Prints the plan of a call over rows on a GPU with 132 SMs. Arguments: shared memory of an SM in
// KiB; the largest cluster; dtype; outer, classes and inner; the logits' strides; with class
// probabilities, their dtype, strides and bytes off the logits' alignment.
#include <cstdio>
#include <cstdlib>

#include "csrc/cuda/rows_plan.h"

using namespace fusedloss;

namespace {

struct Device {
  int64_t smem, max_cluster;

  bool is_gpu(const cuda::TunedHeld& tuned) const {
    return tuned.capability == 90 && tuned.sms == sms() && tuned.memory_bus == 5120;
  }
  int64_t sms() const { return 132; }
  int64_t max_smem() const { return smem - (1 << 10) - cuda::kStaticSmem; }
  int64_t smem_per_sm() const { return smem; }
  bool has_clusters() const { return max_cluster > 1; }
  int64_t resident_blocks(const cuda::RowsPlan& plan) const {
    return sms() * (smem_per_sm() / (plan.smem + cuda::kStaticSmem));
  }
  int64_t active_clusters(const cuda::RowsPlan& plan) const {
    return plan.cluster <= max_cluster ? sms() / plan.cluster : 0;
  }
};

}  // namespace

int main(int count, char** arguments) {
  alignas(cuda::kVectorBytes) static char memory[2 * cuda::kVectorBytes];
  int at = 0;
  const auto next = [&] { return ++at < count ? std::atoll(arguments[at]) : 0; };
  const double no_smoothing = 0;
  const int64_t smem = next() << 10;
  const Device device{smem, next()};
  Call call;
  call.parameters = &no_smoothing;
  const auto read = [&](auto& side, DType dtype) {
    side.dtype = dtype;
    for (int d = 0; d < 3; ++d) side.strides[d] = next();
  };
  const auto dtype = static_cast<DType>(next());
  call.space.dims = 3;
  for (int d = 0; d < 3; ++d) call.space.sizes[d] = next();
  Operand &input = call.inputs[0], &target = call.inputs[1];
  Output& gradient = call.gradients[0];
  read(input, dtype);
  input.data = gradient.data = memory;
  gradient.dtype = dtype;
  std::copy_n(input.strides, 3, gradient.strides);
  target.dtype = DType::kInt64;
  target.data = memory;
  if (at + 1 < count) {
    read(target, static_cast<DType>(next()));
    target.data = memory + next();
  }
  const cuda::RowsPlan plan = cuda::plan_rows(RowsCall(call), device);
  const char* const kernels[] = {
      "strided", "strided_vectorized", "strided_smem", "sub_warp", "block", "cluster"};
  printf("%s %d %d %lld %lld %d %d %d %d\n", kernels[static_cast<int>(plan.kernel)], plan.operands,
         plan.threads, static_cast<long long>(plan.smem), static_cast<long long>(plan.blocks),
         plan.held, plan.tiling.threads_per_row, plan.cluster, plan.tiling.stages);
}
