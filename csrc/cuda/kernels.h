// What csrc/torch/cuda.cpp asks of the CUDA engines. Nothing here waits for the device: whatever
// depends on data stays in device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "../call.h"
#include "sizes.h"

namespace fusedloss::cuda {

constexpr int kMaxDevices = 64;  // that a process can use

// The first input that a loss cannot take. A kernel writes it into page-locked memory, which the
// host may read at any time.
struct Fault {
  enum State : int { kNone, kBeingWritten, kReady };
  enum What : int { kTargetClass, kInputOutsideUnit, kTargetOutsideUnit, kNegativeVariance };
  int state;
  int what;
  int64_t position;  // of the class index in target, or of the element in input
  double value;      // of an element
  int64_t index;     // of a class
  int64_t classes;
};

// What the divisor of a mean over class indices is made of: the number of indices that are not
// ignored, or the sum of the weights of their classes or, in a custom loss, of their rows. An index
// out of range counts as ignored.
struct ClassWeights {
  const int64_t* indices = nullptr;  // (n); null: the divisor is known
  int64_t n = 0, classes = 0, ignore_index = -100;
  const void* weight = nullptr;  // (classes) or (n), float or double; null: 1
  bool weight_is_double = false, weight_is_of_rows = false;
  int64_t slices = 0, slice_size = 0;  // the units of work; divide_into_slices() sets them

  // A slice is what a block reads in one go, and there are no more than a block can add up so.
  void divide_into_slices() {
    constexpr int64_t kSliceSize = 1024;
    slices = std::min((n + kSliceSize - 1) / kSliceSize, kMaxSlices);
    slice_size = slices > 0 ? (n + slices - 1) / slices : 0;
  }
};

// What a kernel needs besides the call.
struct Launch {
  Pass pass = Pass::kValue;

  // One number: the sum of the values over the mean's divisor. Null for reduction "none" and in
  // backward.
  void* loss = nullptr;
  DType loss_dtype = DType::kFloat32;

  // (2): the upstream gradient that the gradient was written for (nan: it was not written), and
  // the mean's divisor. Forward writes them and backward reads them.
  double* forward_state = nullptr;
  double normalizer = 1;       // for forward_state[1]; nan: the divisor is there already
  ClassWeights class_weights;  // forward: what to divide by instead

  // (2): the predicted upstream gradient, and the confidence in it. Forward reads them and backward
  // updates them, while kernels on other streams may do the same: each number is read and written
  // whole. Null with reduction "none", whose gradient backward computes.
  volatile double* prediction = nullptr;
  const void* grad_output = nullptr;  // backward: one number; null with reduction "none"
  DType grad_output_dtype = DType::kFloat32;
  bool fresh = false;  // backward: the gradient is a new buffer; forward_state does not describe it

  Fault* fault = nullptr;     // its address on the device
  void* workspace = nullptr;  // (workspace_bytes()) of device memory, if there is a loss
  cudaStream_t stream = nullptr;
};

// A kernel's workspace begins with counters, which are 0 before and after each launch. Kernels of
// one stream may share one.
constexpr size_t kWorkspaceCounterBytes = 16;
size_t workspace_bytes();  // on the current device

using Kernel = cudaError_t(const Call& call, const Launch& launch);
// Those of the built-in losses, in the order of the table of losses.
extern Kernel* const* const kernels;

Kernel cross_entropy;

// The kernels of a custom loss, which are compiled where it is used: each one's name, the type that
// it reads or, of the last two, computes in, and whether it is for plain calls; see pointwise.cuh.
// The number is the version of this file and of call.h: what was compiled from other versions has
// no kernels of these names.
#define FUSEDLOSS_CUSTOM_VECTORIZED(X)                     \
  X(fusedloss_custom4_float64, double, false)              \
  X(fusedloss_custom4_float32, float, false)               \
  X(fusedloss_custom4_float32_plain, float, true)          \
  X(fusedloss_custom4_bfloat16, __nv_bfloat16, false)      \
  X(fusedloss_custom4_bfloat16_plain, __nv_bfloat16, true) \
  X(fusedloss_custom4_float16, __half, false)              \
  X(fusedloss_custom4_float16_plain, __half, true)
#define FUSEDLOSS_CUSTOM_STRIDED(X)               \
  X(fusedloss_custom4_strided_in_float64, double) \
  X(fusedloss_custom4_strided_in_float32, float)
constexpr int kCustomKernels = 9;
// Those of a custom row loss, with the type that the first input has; float and double also serve
// inputs of several types. The held ones keep rows in registers; see custom_rows_held.cuh. The
// number is the version of this file, of call.h and of sizes.h.
#define FUSEDLOSS_CUSTOM_ROWS_KERNELS(X)                                    \
  X(fusedloss_custom_rows2_float64, compute_rows, double)                   \
  X(fusedloss_custom_rows2_float32, compute_rows, float)                    \
  X(fusedloss_custom_rows2_bfloat16, compute_rows, __nv_bfloat16)           \
  X(fusedloss_custom_rows2_float16, compute_rows, __half)                   \
  X(fusedloss_custom_rows2_float32_held, compute_held_rows, float)          \
  X(fusedloss_custom_rows2_bfloat16_held, compute_held_rows, __nv_bfloat16) \
  X(fusedloss_custom_rows2_float16_held, compute_held_rows, __half)

// The kernels of a loss, for all devices that they were compiled for.
struct CustomKernels;
// Loads a file of them, for ever; capability: of the devices that it is for, 90 for 9.0; others:
// the same loss's for other devices. Throws std::runtime_error where that cannot be done.
const CustomKernels* load_custom(const char* file, int capability, const CustomKernels* others);
cudaError_t run_custom(const CustomKernels& kernels, const Call& call, const Launch& launch);

// The same of a custom row loss.
const CustomKernels* load_custom_rows(const char* file, int capability, const CustomRowsInfo& rows,
                                      const CustomKernels* others);
cudaError_t run_custom_rows(const CustomKernels& kernels, const Call& call, const Launch& launch);

}  // namespace fusedloss::cuda
