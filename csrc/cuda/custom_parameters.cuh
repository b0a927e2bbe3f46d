// A custom loss in a kernel.
#pragma once

#include <cuda_runtime.h>

#include "sizes.h"

namespace fusedloss::cuda {

// A custom loss as a kernel is given it. Nothing of it need be known where a kernel is launched but
// the address of its parameters.
template <class Loss>
struct CustomParameters {
  double numbers[Loss::kParameters > 0 ? Loss::kParameters : 1];
};

// The loss that a kernel was given. A custom one is made in shared memory, and is there after the
// block's next barrier: a thread computes its constants while the first one reads the prediction.
template <class Loss>
__device__ const Loss& prepared(const Loss& given) {
  return given;
}
template <class Loss>
__device__ const Loss& prepared(const CustomParameters<Loss>& given) {
  __shared__ Loss loss;
  if (threadIdx.x == (blockDim.x > kWarp ? kWarp : 0)) Loss::prepare(given.numbers, loss.constants);
  return loss;
}

}  // namespace fusedloss::cuda
