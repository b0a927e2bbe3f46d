// The interface between a pointwise loss, built in or from the library of a custom one, and the
// engine: its innermost loops, compiled.
#pragma once

#include <cstdint>

#include "../call.h"

namespace fusedloss::cpu {

// The version of this file and of what the functions mean. A library of another version is not run.
constexpr int32_t kPointwiseVersion = 3;

// A run of elements, of the type that it is computed in. factor multiplies the value and the
// slopes; null: 1.
template <class T>
struct Run {
  const T* inputs[kMaxInputs];
  const T* factor;
  T* value;
  T* gradients[kMaxInputs];
};

// Computes n elements; returns the sum of the values, where wanted. constants: what prepare() made.
// Sets *in_domain to false where inputs lie outside of the loss's domain.
template <class T>
using Block = double (*)(const double* constants, const Run<T>* run, double scale, int64_t n,
                         bool* in_domain);

// Which block: the outputs, and whether there is a factor. Values and a gradient, or values and
// their sum, are never written together. kGradients: for any of the inputs that are wanted;
// kGradient, as most calls want it, for the first one alone.
enum Outputs { kGradient = 1, kGradients = 2, kSum = 4, kValue = 8, kFactor = 16 };
constexpr int kBlocks = 32;

struct PointwiseKernel {
  int32_t version;
  int32_t inputs, parameters, constants;  // how many
  // Null: the constants are the parameters.
  void (*prepare)(const double* parameters, double* constants);
  Block<float> float_blocks[kBlocks];
  Block<double> double_blocks[kBlocks];
};

// The one symbol of a custom loss's library, of type const PointwiseKernel* ().
#define FUSEDLOSS_CUSTOM_ENTRY fusedloss_custom_kernel

}  // namespace fusedloss::cpu
