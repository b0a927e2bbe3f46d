// The interface of the CPU engines.
#pragma once

#include "../call.h"
#include "../math/sum.h"
#include "parallel.h"
#include "pointwise.h"

namespace fusedloss::cpu {

struct Call : fusedloss::Call {
  const PointwiseKernel* kernel = nullptr;  // of a pointwise loss
  ParallelFor threads = &run_serially;
  double scale = 1;  // every gradient element is multiplied by it
  bool want_sum = false;
};

struct Result {
  Sum sum;                // of value * weight, in an order that no thread count changes
  bool in_domain = true;  // false: inputs lie outside of the loss's domain
};

struct ClassCount {
  int64_t ignored = 0, outside = 0;  // of [0, classes), and not ignored
};

struct Kernels {
  const PointwiseKernel* losses;  // the built-in ones, in the order of the table of losses
  Result (*pointwise)(const Call& call);
  Result (*cross_entropy)(const Call& call);
  ClassCount (*count_classes)(const int64_t* index, int64_t n, int64_t classes,
                              int64_t ignore_index);
};

// Compiled once for each capability from the same files.
#define FUSEDLOSS_DECLARE_KERNELS(CAPABILITY)                                \
  namespace CAPABILITY {                                                     \
  Result cross_entropy(const Call& call);                                    \
  ClassCount count_classes(const int64_t* index, int64_t n, int64_t classes, \
                           int64_t ignore_index);                            \
  extern const Kernels kernels;                                              \
  }
FUSEDLOSS_DECLARE_KERNELS(DEFAULT)
FUSEDLOSS_DECLARE_KERNELS(AVX2)
FUSEDLOSS_DECLARE_KERNELS(AVX512)
#undef FUSEDLOSS_DECLARE_KERNELS

}  // namespace fusedloss::cpu
