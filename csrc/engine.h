// What csrc/torch/cpu.cpp and csrc/torch/cuda.cpp ask of every engine: raw pointers and numbers, no
// tensors and no torch header.
#pragma once

#include <cstdint>
#include <string_view>

namespace fusedloss {

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64 };

constexpr int kMaxDims = 64;  // torch's own bound

// The dimensions that a pointwise call walks, outermost first, the gradient's memory order.
struct Space {
  int dims = 0;
  int64_t sizes[kMaxDims];
};

// A class index that is no class, and is not to count either.
constexpr int64_t kIgnored = INT64_MIN;

// One input of a call, seen through a Space. Strides count elements; 0 where it is broadcast.
struct Operand {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  bool contiguous = true;  // in the space's own order; strides are not read then
  int64_t strides[kMaxDims];
  // Class indices (kInt64) are read as one-hot rows: 1 where the position along this dimension
  // equals the index; kIgnored equals none. -1: an operand of plain numbers.
  int class_dim = -1;
};

struct Pointwise {
  std::string_view loss;  // a name of FUSEDLOSS_POINTWISE_LOSSES
  double parameter = 0;
  bool compute_in_double = false;
  int64_t numel = 0;
  Space space;
  Operand input, target, weight, pos_weight;
  Operand upstream;  // reduction "none": a factor of each gradient element

  // Each output that is not null is written, all numel elements of it, contiguous.
  void* value = nullptr;
  DType value_dtype = DType::kFloat32;
  void* gradient = nullptr;  // slope * weight * upstream, times what the engine's call says
  DType gradient_dtype = DType::kFloat32;
  void* target_gradient = nullptr;  // likewise; custom losses alone
  DType target_gradient_dtype = DType::kFloat32;
};

// A tensor of (outer, classes, inner), strides in elements. Its rows are the outer * inner vectors
// along classes.
struct Rows {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  int64_t outer = 0, classes = 0, inner = 0;  // strides
};

struct CrossEntropy {
  bool compute_in_double = false;
  int64_t outer = 0, classes = 0, inner = 1;  // sizes
  Rows input;
  Rows gradient;  // written where data is not null

  const int64_t* indices = nullptr;  // (outer, inner) contiguous; or null, and
  Rows probabilities;                // class probabilities, of any strides
  const void* weight = nullptr;      // (classes), of the compute type; null: 1
  int64_t ignore_index = -100;
  double label_smoothing = 0;

  void* value = nullptr;  // (outer, inner), every row's loss; null: not wanted
  DType value_dtype = DType::kFloat32;
};

}  // namespace fusedloss
