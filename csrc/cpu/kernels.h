// What csrc/ops.cpp asks of the CPU engines: raw pointers and numbers, no tensors.
#pragma once

#include <cstdint>
#include <string_view>

namespace fusedloss::cpu {

enum class DType : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64 };

constexpr int kMaxDims = 64;  // torch's own bound

// The dimensions that a pointwise call walks, outermost first, the gradient's memory order.
struct Space {
  int dims = 0;
  int64_t sizes[kMaxDims];
};

// One input of a call, seen through a Space. Strides count elements; 0 where it is broadcast.
struct Operand {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  bool contiguous = true;  // in the space's own order; strides are not read then
  int64_t strides[kMaxDims];
  // Class indices (kInt64) are read as one-hot rows: 1 where the position along this dimension
  // equals the index. -1: an operand of plain numbers.
  int class_dim = -1;
};

struct Pointwise {
  std::string_view loss;  // a name of FUSEDLOSS_POINTWISE_LOSSES
  double parameter = 0;
  bool compute_in_double = false;
  int64_t numel = 0;
  Space space;
  Operand input, target, weight, pos_weight;

  // Each output that is not null is written, all numel elements of it, contiguous.
  void* value = nullptr;
  DType value_dtype = DType::kFloat32;
  void* gradient = nullptr;  // slope * weight * scale * upstream
  DType gradient_dtype = DType::kFloat32;
  double scale = 1;
  Operand upstream;

  bool want_sum = false;
};

struct PointwiseResult {
  double sum = 0;       // of value * weight, in an order that no thread count changes
  bool in_unit = true;  // false: a loss of kUnitInterval met an element outside [0, 1], or nan
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
  // Which walk: row by row, for which classes has stride 1 in input and gradient, or tiles of
  // neighbouring rows, fast where inner has stride 1. Fixed by input, so that every call on it
  // gives the same bits.
  bool by_row = true;

  const int64_t* indices = nullptr;  // (outer, inner) contiguous and within range; or null, and
  Rows probabilities;                // class probabilities, of any strides
  const void* weight = nullptr;      // (classes), of the compute type; null: 1
  double weight_sum = 0;             // over classes
  int64_t ignore_index = -100;
  double label_smoothing = 0;

  void* value = nullptr;  // (outer, inner), every row's loss; null: not wanted
  DType value_dtype = DType::kFloat32;
  double scale = 1;                // every gradient element is multiplied by it,
  const void* upstream = nullptr;  // and by its row's: (outer, inner), compute type; null: 1
};

// Compiled once for each capability from the same files.
#define FUSEDLOSS_DECLARE_KERNELS(CAPABILITY)                                       \
  namespace CAPABILITY {                                                            \
  PointwiseResult pointwise(const Pointwise& call);                                 \
  double cross_entropy(const CrossEntropy& call); /* the sum of the rows' losses */ \
  }
FUSEDLOSS_DECLARE_KERNELS(DEFAULT)
FUSEDLOSS_DECLARE_KERNELS(AVX2)
FUSEDLOSS_DECLARE_KERNELS(AVX512)
#undef FUSEDLOSS_DECLARE_KERNELS

}  // namespace fusedloss::cpu
