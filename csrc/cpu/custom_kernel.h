// The interface between a compiled custom loss and the pointwise engine.
#pragma once

#include <cstdint>

#include "run.h"

namespace fusedloss::cpu {

// The version of this file, of run.h and of what the functions mean. A library of another version
// is not run.
constexpr int32_t kCustomVersion = 1;

// One run of n elements. constants: what prepare() made. Gives the sum of the values, where wanted.
template <class T>
using CustomBlock = double (*)(const double* constants, const Run<T>* run, double scale, int64_t n);

// Which block: what is wanted of the values, and whose gradients.
enum CustomWants { kWantsGradient = 1, kWantsTargetGradient = 2, kWantsSum = 4, kWantsValue = 8 };
constexpr int kCustomBlocks = 9;  // value and gradients are never wanted together

struct CustomKernel {
  int32_t version;
  int32_t parameters, constants;  // how many
  void (*prepare)(const double* parameters, double* constants);
  CustomBlock<float> float_blocks[kCustomBlocks];
  CustomBlock<double> double_blocks[kCustomBlocks];
};

// The one symbol of such a library, of type const CustomKernel* ().
#define FUSEDLOSS_CUSTOM_ENTRY fusedloss_custom_kernel

}  // namespace fusedloss::cpu
