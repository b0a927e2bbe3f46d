// The kernels of a custom loss, compiled where it is used: by NVRTC or nvcc, without headers of
// torch. custom.cu loads and launches them.
#pragma once

#include "../math/custom.h"
#include "pointwise.cuh"

#define FUSEDLOSS_VECTORIZED_KERNEL(NAME, D, PLAIN)                                      \
  extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocksPerSM<Given, PLAIN>)  \
      NAME(const VectorizedCall<D> c, const Launch l, const CustomParameters<Given> p) { \
    compute_vectorized<Given, D, PLAIN>(p, c, l);                                        \
  }
#define FUSEDLOSS_STRIDED_KERNEL(NAME, T)                                   \
  extern "C" __global__ void __launch_bounds__(kThreads)                    \
      NAME(const Call c, const Launch l, const CustomParameters<Given> p) { \
    compute_strided<Given, T>(p, c, l);                                     \
  }
#define FUSEDLOSS_CUSTOM_CUDA(LOSS)                        \
  namespace fusedloss::cuda {                              \
  using Given = LOSS;                                      \
  FUSEDLOSS_CUSTOM_VECTORIZED(FUSEDLOSS_VECTORIZED_KERNEL) \
  FUSEDLOSS_CUSTOM_STRIDED(FUSEDLOSS_STRIDED_KERNEL)       \
  }
