// The table of kernels: the losses of losses.h, and the row losses.
#include "pointwise.cuh"

#include "../math/losses.h"

namespace fusedloss::cuda {
namespace {

template <class Loss>
cudaError_t run_built_in(const Call& call, const Launch& launch) {
  return run_pointwise(Loss{{Loss::kParameters ? call.parameters[0] : 0}}, call, launch);
}

#define FUSEDLOSS_KERNEL(NAME, LOSS) &run_built_in<LOSS>,
constexpr Kernel* kLosses[] = {FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_KERNEL) & cross_entropy};
#undef FUSEDLOSS_KERNEL

}  // namespace

Kernel* const* const kernels = kLosses;

size_t workspace_bytes() {
  return GridWorkspace::bytes(int64_t{device_attribute(cudaDevAttrMultiProcessorCount)} *
                              kMaxBlocksPerSM);
}

}  // namespace fusedloss::cuda
