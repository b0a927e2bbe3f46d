// Builds the library of a custom loss: the pointwise engine's kernels over its struct. nvcc
// compiles it where the loss is used, without torch headers.
#pragma once

#include "../math/custom.h"
#include "pointwise.cuh"

namespace fusedloss::cuda {

template <class Loss>
cudaError_t custom(const Call& call, const Launch& launch) {
  Loss loss;
  Loss::prepare(call.parameters, loss.constants);
  return run_pointwise(loss, call, launch);
}

}  // namespace fusedloss::cuda

#define FUSEDLOSS_CUSTOM_CUDA(LOSS)                                                          \
  extern "C" __attribute__((visibility("default"))) const fusedloss::cuda::CustomKernel*     \
  FUSEDLOSS_CUSTOM_CUDA_ENTRY() {                                                            \
    static constexpr fusedloss::cuda::CustomKernel kernel{                                   \
        fusedloss::cuda::kCustomVersion, LOSS::kParameters, &fusedloss::cuda::custom<LOSS>}; \
    return &kernel;                                                                          \
  }
