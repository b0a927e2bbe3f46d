// The losses of losses.h on CUDA.
#include "pointwise.cuh"

#include "../math/losses.h"

namespace fusedloss::cuda {

size_t workspace_bytes(const Pointwise& call) { return pointwise_workspace_bytes(call); }

cudaError_t pointwise(const Pointwise& call, const Launch& launch) {
#define FUSEDLOSS_RUN(NAME, LOSS) \
  if (call.loss == NAME) return run_pointwise(LOSS{{call.parameter}}, call, launch);
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_RUN)
#undef FUSEDLOSS_RUN
  return cudaErrorInvalidValue;
}

}  // namespace fusedloss::cuda
