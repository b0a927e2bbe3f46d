// Tensors as the engines want them, on any device: their memory's order, and pointers into it.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine.h"
#include "math/losses.h"
#include "operators.h"

namespace fusedloss {

DType dtype_of(const at::Tensor& t);

// Memory that a caller brought along may begin between two elements: a copy does not.
at::Tensor aligned(const at::Tensor& t);

inline bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

inline int64_t class_dim(const at::Tensor& input) { return input.dim() > 1 ? 1 : 0; }

// "target[3, 4]": where the element at a linear position stands.
std::string element_name(const char* tensor, at::IntArrayRef sizes, int64_t linear);

Mean mean_of(std::string_view loss);
// What the engines call a pointwise loss whose target is class indices.
std::string_view of_classes(std::string_view loss);

// Throws unless target has input's shape, without the class dimension where it is class indices.
void check_shapes(const at::Tensor& input, const at::Tensor& target);
// The same for losses over rows, which need a class, and one weight for each class if they have
// any.
void check_rows(const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight);
// Of two doubles, as a prediction and scales are, where input is.
void check_pair(const char* name, const at::Tensor& pair, const at::Tensor& input);
// The upstream gradient of a reduction: one number, where input is.
void check_number(const at::Tensor& grad_output, const at::Tensor& input);
// Of reduction "none" over classes: one for each row.
void check_row_upstream(const at::Tensor& grad_output, const at::Tensor& input);

// Dense in the order of input's strides, else row-major: what AccumulateGrad takes without a copy.
at::Tensor empty_gradient(const at::Tensor& input);
// In input's order too, for an engine writes both alike.
at::Tensor empty_target_gradient(const at::Tensor& input, const at::Tensor& target);
// Whether a gradient, which may be undefined, lies in memory as these two would.
bool lies_like_gradient(const at::Tensor& gradient, const at::Tensor& input, at::ScalarType dtype);
// Two doubles, on input's device.
at::Tensor empty_scales(const at::Tensor& input);
// A number, or of reduction "none" every element's, or every row's, loss.
at::Tensor empty_loss(const at::Tensor& input, int64_t reduction, at::ScalarType dtype);
at::Tensor empty_row_loss(const at::Tensor& input, int64_t reduction, at::ScalarType dtype);

// The operands of a pointwise call, and the tensors that hold them.
class PointwiseOperands {
 public:
  // target: of input's shape, or class indices that are contiguous, ignored ones kIgnored.
  // most_dims: of operands that are not all contiguous; more are made so.
  PointwiseOperands(Pointwise& call, const at::Tensor& input, const at::Tensor& target,
                    const OptionalTensor& weight, const OptionalTensor& pos_weight,
                    const OptionalTensor& upstream, int most_dims);

 private:
  static constexpr size_t kOperands = 5;
  std::array<at::Tensor, kOperands> tensors_;  // undefined: absent
  std::array<Operand*, kOperands> operands_;

  void walk(Space& space, int64_t classes, int most_dims);
};

// The operands of a cross-entropy call, and the tensors that hold them.
class CrossEntropyOperands {
 public:
  // target: class indices that are contiguous, or probabilities.
  CrossEntropyOperands(CrossEntropy& call, const at::Tensor& input, const at::Tensor& target,
                       const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                       at::ScalarType dtype);

  void want_gradient(CrossEntropy& call, const at::Tensor& gradient) const;
  // Has the rows of a matrix be neighbours: (1, N) instead of (N, 1) rows outside and inside.
  void lay_rows_inside(CrossEntropy& call);
  // Per class, of the type that the call computes in; undefined: none.
  const at::Tensor& weight() const { return weight_; }

 private:
  at::Tensor input_, target_, weight_;
  bool swapped_ = false;  // a matrix whose rows are inside
};

}  // namespace fusedloss
