// How a kernel reports an input that a loss cannot take.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "kernels.h"

namespace fusedloss::cuda {

// Shared by the block: whether one of its threads has reported an error.
__device__ inline int& block_has_reported() {
  __shared__ int reported;
  return reported;
}

// Reports a class index or an element to the host, which keeps the first report. One thread of a
// block tries: if every element is wrong, atomics on host memory would take longer than all else.
template <class Value>
__device__ void report_error(const Launch& l, Fault::What what, int64_t position, Value value,
                             int64_t classes) {
  volatile int& reported = block_has_reported();
  if (reported || atomicExch(&block_has_reported(), 1)) return;
  Fault* const fault = l.fault;
  if (atomicCAS(&fault->state, int{Fault::kNone}, int{Fault::kBeingWritten}) != Fault::kNone)
    return;
  fault->what = what;
  fault->position = position;
  if constexpr (std::is_integral_v<Value>) {
    fault->index = value;
  } else {
    fault->value = value;
  }
  fault->classes = classes;
  __threadfence_system();
  atomicExch(&fault->state, int{Fault::kReady});
}

}  // namespace fusedloss::cuda
