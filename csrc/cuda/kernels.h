// What csrc/ops_cuda.cpp asks of the CUDA engines. Nothing here waits for the device: whatever
// depends on data stays in its memory.
#pragma once

#include <cuda_runtime_api.h>

#include "../engine.h"

namespace fusedloss::cuda {

// More dimensions than these a strided operand must not have.
constexpr int kMaxDims = 8;

// The first input that a loss cannot take. A kernel writes it into page-locked memory; the host
// looks there whenever it likes.
struct Fault {
  enum State : int { kNone, kBeingWritten, kTold };
  enum What : int { kTargetClass, kInputOutsideUnit, kTargetOutsideUnit };
  int state;
  int what;
  int64_t position;  // linear: of a class index among its like, else of an element of input
  double value;      // of an element
  int64_t index;     // of a class
  int64_t classes;
};

enum class Pass {
  kValue,     // the loss
  kForward,   // the loss, and the gradient where the prediction is trusted
  kBackward,  // the gradient, where forward's was written for another upstream gradient
};

// What a call of any engine needs besides its operands.
struct Launch {
  Pass pass = Pass::kValue;

  // The loss, one number: the sum of the values over what the mean divides by. Null: reduction
  // "none", or backward.
  void* loss = nullptr;
  DType loss_dtype = DType::kFloat32;

  // Two doubles: the upstream gradient that the gradient was written for (nan: it was not), and
  // what the mean divides by. Forward writes them and backward reads them.
  double* scales = nullptr;
  double normalizer = 1;  // what scales[1] shall be; nan: it is there already

  // Two doubles: the predicted upstream gradient, and the confidence in it. Forward reads them,
  // backward teaches them, and passes on other streams do so at the same time: each access is one,
  // and of all of a number. Null with reduction "none", of which backward computes the gradient.
  volatile double* prediction = nullptr;
  const void* grad_output = nullptr;  // backward: one number; null with reduction "none"
  DType grad_output_dtype = DType::kFloat32;
  bool fresh = false;  // backward: the gradient is a new buffer, whatever scales say

  Fault* fault = nullptr;     // the device's address of it
  void* workspace = nullptr;  // workspace_bytes() of device memory, if any; holds nothing before
  cudaStream_t stream = nullptr;
};

struct CrossEntropyCall : CrossEntropy {
  // Label smoothing: the sum of weight, in device memory. Null: there is no weight.
  const double* weight_sum = nullptr;
  const void* upstream = nullptr;  // reduction "none": (outer, inner), each row's upstream gradient
  DType upstream_dtype = DType::kFloat32;
};

size_t workspace_bytes(const Pointwise& call);
size_t workspace_bytes(const CrossEntropy& call);
cudaError_t pointwise(const Pointwise& call, const Launch& launch);
cudaError_t cross_entropy(const CrossEntropyCall& call, const Launch& launch);

// What a mean over class indices divides by, into *sum: how many are not ignored, or the sum of
// their weights (of type float or double); nan in place of 0. An index out of range counts for
// nothing.
struct ClassWeights {
  const int64_t* indices = nullptr;
  int64_t n = 0, classes = 0, ignore_index = -100;
  const void* weight = nullptr;
  bool weight_is_double = false;
  double* sum = nullptr;
};
size_t workspace_bytes(const ClassWeights& call);
cudaError_t sum_class_weights(const ClassWeights& call, const Launch& launch);

}  // namespace fusedloss::cuda
