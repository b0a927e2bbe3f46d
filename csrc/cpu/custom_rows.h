// The interface between the library of a custom row loss, which holds the loss and the engine for
// it, and whoever calls it.
#pragma once

#include <cstdint>

#include "../call.h"
#include "../math/custom_rows.h"
#include "parallel.h"

namespace fusedloss::cpu {

// The version of this file and of what the function means. A library of another version is not run.
constexpr int32_t kCustomRowsVersion = 1;

struct CustomRowsKernel {
  int32_t version;
  int32_t inputs, parameters, auxiliary;  // how many
  const Kind* kinds;
  // Writes what the call asks for and returns the sum of the rows' losses, each times its weight.
  // Every gradient element is multiplied by `scale`.
  double (*run)(const CustomRowsCall& call, const double* parameters, double scale,
                ParallelFor threads);
};

// The one symbol of such a library, of type const CustomRowsKernel* ().
#define FUSEDLOSS_CUSTOM_ROWS_ENTRY fusedloss_custom_rows

}  // namespace fusedloss::cpu
