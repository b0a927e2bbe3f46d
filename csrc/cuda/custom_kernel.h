// What a compiled loss of one's own offers the operators on CUDA.
#pragma once

#include "kernels.h"

namespace fusedloss::cuda {

struct CustomKernel {
  int32_t version;
  int32_t parameters;  // how many
  size_t (*workspace_bytes)(const Pointwise& call);
  // call: its `loss` and `parameter` are not read.
  cudaError_t (*run)(const Pointwise& call, const double* parameters, const Launch& launch);
};

// Of this file, kernels.h and engine.h: a library of another version is not run.
constexpr int32_t kCustomVersion = 1;

// The one symbol of such a library, of type const CustomKernel* ().
#define FUSEDLOSS_CUSTOM_CUDA_ENTRY fusedloss_custom_cuda_kernel

}  // namespace fusedloss::cuda
