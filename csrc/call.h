// What an engine is asked, on any device: raw pointers and numbers, no tensors and no torch header.
#pragma once

#include <cstdint>
#include <utility>

namespace fusedloss {

// What is computed and written is one of the first four; the others are only read.
enum class DType : int8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kBool
};

constexpr int kMaxDims = 8;  // an operand that strides through more dimensions is copied
constexpr int kMaxInputs = 8;
constexpr int kMaxAuxiliary = 4;

// The dimensions that a call walks, outermost first. A pointwise call has the gradient's memory
// order, a call over rows has (outer, classes, inner).
struct Space {
  int dims = 0;
  int64_t sizes[kMaxDims];
};

// One input of a call, seen through a Space. Strides count elements; 0 where it is broadcast.
struct Operand {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  bool contiguous = true;  // in the space's own order; strides are not read then
  // Class indices (kInt64) are read as one-hot rows: 1 where the position along this dimension
  // equals the index; ignore_index equals none. -1: an operand of plain numbers.
  int class_dim = -1;
  int64_t strides[kMaxDims];
};

// One result, written where data is not null.
struct Output {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t strides[3];  // of a row loss's gradient; every other output is contiguous
};

// What a call is asked for.
enum class Pass {
  kValue,     // the loss alone
  kForward,   // the loss, and the gradient where the prediction is trusted
  kBackward,  // the gradient, where forward's was written for another upstream gradient
};

struct Call {
  const double* parameters = nullptr;  // the loss's own numbers
  bool compute_in_double = false;
  int64_t ignore_index = -100;
  int64_t numel = 0;
  Space space;
  Operand inputs[kMaxInputs];  // of the loss: the first are input and target
  // A row loss has weight (classes), of the compute type, and upstream (outer, inner).
  Operand weight;
  Operand upstream;  // reduction "none": a factor of each element's, or each row's, gradient
  // Label smoothing with a weight: the weight's sum, in the engine's memory.
  const double* weight_sum = nullptr;

  Output value;                     // of each element or row
  Output gradients[kMaxInputs];     // of the inputs: slope * weight * upstream * the engine's scale
  Output auxiliary[kMaxAuxiliary];  // of each row: further results of a custom loss, no gradient
};

// ---- calls over rows ----------------------------------------------------------------------------

// A tensor of (outer, classes, inner), strides in elements. Its rows are the outer * inner vectors
// along classes.
struct Rows {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::kFloat32;
  int64_t outer = 0, classes = 0, inner = 0;  // strides

  Rows() = default;
  template <class Side>  // Operand or Output
  explicit Rows(const Side& side)
      : data(side.data),
        dtype(side.dtype),
        outer(side.strides[0]),
        classes(side.strides[1]),
        inner(side.strides[2]) {}
};

// A call of a custom row loss as the engines see it. All operands have (outer, classes, inner): a
// label, a number of each row and the weight have stride 0 along the classes, and a number of each
// class has no other stride. The gradient for a number of each row is laid out like it.
struct CustomRowsCall {
  bool compute_in_double;
  int64_t outer, classes, inner;  // sizes
  int64_t ignore_index;
  Rows inputs[kMaxInputs], gradients[kMaxInputs];
  Rows weight;    // of each row; or absent
  Rows upstream;  // of each row, with reduction "none"; or absent
  // Contiguous (outer, inner).
  Output value, auxiliary[kMaxAuxiliary];

  explicit CustomRowsCall(const Call& call)
      : compute_in_double(call.compute_in_double),
        outer(call.space.sizes[0]),
        classes(call.space.sizes[1]),
        inner(call.space.sizes[2]),
        ignore_index(call.ignore_index),
        weight(call.weight),
        upstream(call.upstream),
        value(call.value) {
    for (int i = 0; i < kMaxInputs; ++i) {
      inputs[i] = Rows(call.inputs[i]);
      gradients[i] = Rows(call.gradients[i]);
    }
    for (int i = 0; i < kMaxAuxiliary; ++i) auxiliary[i] = call.auxiliary[i];
  }

  // Makes the rows of a matrix neighbours: (1, N) instead of (N, 1) rows outside and inside.
  void lay_rows_inside() {
    std::swap(outer, inner);
    const auto lay = [](Rows& rows) { rows.inner = std::exchange(rows.outer, 0); };
    for (Rows& input : inputs) lay(input);
    for (Rows& gradient : gradients) lay(gradient);
    lay(weight);
    lay(upstream);
  }
};

// A call of cross-entropy as the row engines see it.
struct RowsCall {
  bool compute_in_double;
  int64_t outer, classes, inner;  // sizes
  Rows input, gradient;

  const int64_t* indices = nullptr;  // (outer, inner) contiguous; or null, and
  Rows probabilities;                // class probabilities, of any strides
  int64_t ignore_index;
  double label_smoothing;
  const void* weight;
  const double* weight_sum;
  const void* upstream;
  DType upstream_dtype;

  void* value;
  DType value_dtype;

  explicit RowsCall(const Call& call)
      : compute_in_double(call.compute_in_double),
        outer(call.space.sizes[0]),
        classes(call.space.sizes[1]),
        inner(call.space.sizes[2]),
        input(call.inputs[0]),
        gradient(call.gradients[0]),
        ignore_index(call.ignore_index),
        label_smoothing(call.parameters[0]),
        weight(call.weight.data),
        weight_sum(call.weight_sum),
        upstream(call.upstream.data),
        upstream_dtype(call.upstream.dtype),
        value(call.value.data),
        value_dtype(call.value.dtype) {
    const Operand& target = call.inputs[1];
    if (target.dtype == DType::kInt64) {
      indices = static_cast<const int64_t*>(target.data);
    } else {
      probabilities = Rows(target);
    }
    if (classes != 1 && inner == 1 && input.classes != 1) lay_rows_inside();
  }

  // Makes the rows of a matrix neighbours: (1, N) instead of (N, 1) rows outside and inside. What
  // lay inside may have any stride; outside it must not unalign vectors.
  void lay_rows_inside() {
    std::swap(outer, inner);
    for (Rows* rows : {&input, &gradient, &probabilities}) {
      rows->inner = rows->outer;
      rows->outer = 0;
    }
  }
};

}  // namespace fusedloss
