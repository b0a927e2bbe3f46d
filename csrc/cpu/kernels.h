// The interface of the CPU engines.
#pragma once

#include "../engine.h"
#include "../math/sum.h"
#include "custom_kernel.h"
#include "parallel.h"

namespace fusedloss::cpu {

struct Pointwise : fusedloss::Pointwise {
  ParallelFor threads = &run_serially;
  double scale = 1;  // every gradient element is multiplied by it
  bool want_sum = false;
  // A custom loss, instead of `loss` and `parameter`, and its parameters.
  const CustomKernel* custom = nullptr;
  const double* parameters = nullptr;
};

struct PointwiseResult {
  Sum sum;              // of value * weight, in an order that no thread count changes
  bool in_unit = true;  // false: a loss of kUnitInterval met an element outside [0, 1], or nan
};

struct CrossEntropy : fusedloss::CrossEntropy {
  ParallelFor threads = &run_serially;
  // Which walk: row by row, for which classes has stride 1 in input and gradient, or tiles of
  // neighbouring rows, fast where inner has stride 1 or classes are few. Fixed by input, so that
  // every call on it gives the same bits.
  bool by_row = true;
  double weight_sum = 0;           // over classes
  double scale = 1;                // every gradient element is multiplied by it,
  const void* upstream = nullptr;  // and by its row's: (outer, inner), compute type; null: 1
};

struct ClassCount {
  int64_t ignored = 0, outside = 0;  // of [0, classes), and not ignored
};

// Compiled once for each capability from the same files.
#define FUSEDLOSS_DECLARE_KERNELS(CAPABILITY)                                       \
  namespace CAPABILITY {                                                            \
  ClassCount count_classes(const int64_t* index, int64_t n, int64_t classes,        \
                           int64_t ignore_index);                                   \
  PointwiseResult pointwise(const Pointwise& call);                                 \
  double cross_entropy(const CrossEntropy& call); /* the sum of the rows' losses */ \
  }
FUSEDLOSS_DECLARE_KERNELS(DEFAULT)
FUSEDLOSS_DECLARE_KERNELS(AVX2)
FUSEDLOSS_DECLARE_KERNELS(AVX512)
#undef FUSEDLOSS_DECLARE_KERNELS

}  // namespace fusedloss::cpu
