// What the library of a custom loss offers the operators on CUDA.
#pragma once

#include "kernels.h"

namespace fusedloss::cuda {

struct CustomKernel {
  int32_t version;
  int32_t parameters;  // how many
  size_t (*workspace_bytes)(const Pointwise& call);
  // parameters: (CustomKernel::parameters). The call's `loss` and `parameter` are not read.
  cudaError_t (*run)(const Pointwise& call, const double* parameters, const Launch& launch);
};

// The version of this file, kernels.h and engine.h. Libraries of other versions are rejected.
constexpr int32_t kCustomVersion = 1;

// The library's one symbol, of type const CustomKernel* ().
#define FUSEDLOSS_CUSTOM_CUDA_ENTRY fusedloss_custom_cuda_kernel

}  // namespace fusedloss::cuda
