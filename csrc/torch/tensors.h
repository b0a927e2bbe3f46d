// The arguments of a call, checked, and tensors as the engines want them: pointers and strides.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <vector>

#include "../call.h"
#include "../losses.h"
#include "operators.h"

namespace fusedloss {

DType dtype_of(const at::Tensor& t);

// Memory that a caller brought along may begin between two elements: a copy does not.
at::Tensor aligned(const at::Tensor& t);

inline bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// "target[3, 4]": where the element at a linear position stands.
std::string element_name(const char* tensor, at::IntArrayRef sizes, int64_t linear);

// Throws where there is no loss of this name.
const LossInfo& known_loss(std::string_view name);
// The loss that a kernel computes. Throws where the arguments do not fit it: shapes, devices, and
// how many inputs and parameters there are.
const LossInfo& checked(const Arguments& a);
// Whether target is class indices: to other losses an integer is a number.
inline bool takes_indices(const Arguments& a, const LossInfo& info) {
  return info.of_classes && a.target.scalar_type() == at::kLong;
}
// Throws unless there are two doubles, as in a prediction and a state, on input's device.
void check_pair(const char* name, const at::Tensor& pair, const at::Tensor& input);
// Throws unless grad_output is what autograd gives: a number; for each(), one for every element or
// every row.
void check_upstream(const at::Tensor& grad_output, const Arguments& a, Family family);

// A gradient for one of a call's inputs, or an element's losses: dense in the order of input's
// strides, else row-major, which is what AccumulateGrad takes without a copy.
at::Tensor empty_like_input(const at::Tensor& input, at::ScalarType dtype);
// Whether a gradient, which may be undefined, lies in memory as that one would.
bool lies_like_input(const at::Tensor& gradient, const at::Tensor& input, at::ScalarType dtype);
// What a forward leaves for its backward: see operators.cpp.
at::Tensor empty_state(const at::Tensor& input);
// A number, or for each() the loss of every element or every row. Auxiliary results lie behind it:
// (1 + n * rows) numbers in all, or (1 + n, ...) for each().
at::Tensor empty_loss(const Arguments& a, const LossInfo& info);
// The loss alone, and auxiliary result k, in what empty_loss() makes. The former serves for the
// gradient of such a result, too.
at::Tensor loss_in(const at::Tensor& result, const LossInfo& info);
at::Tensor auxiliary_in(const at::Tensor& result, const Arguments& a, const LossInfo& info, int k);

// A call's operands, and the tensors that hold them.
class Operands {
 public:
  // Fills in the call, but for its outputs. upstream: with reduction "none" alone.
  void read(Call& call, const Arguments& a, const LossInfo& info, const OptionalTensor& upstream);

  // Contiguous; undefined where neither target is class indices nor an input is a label.
  const at::Tensor& indices() const { return indices_; }
  // The weight of the classes, or of the rows of a custom loss: contiguous and of the type that the
  // call computes in; undefined: none.
  const at::Tensor& weight() const { return weight_; }

 private:
  void read_elements(Call& call, const Arguments& a, const OptionalTensor& upstream);
  void read_rows(Call& call, const Arguments& a, const OptionalTensor& upstream);
  void read_custom_rows(Call& call, const Arguments& a, const LossInfo& info,
                        const OptionalTensor& upstream);
  void coalesce_dimensions(Space& space, int64_t classes);
  void copy_in(at::IntArrayRef order, Space& space, int64_t classes);

  // An operand of the call, and the tensor that it reads. The first two are input and target.
  struct Held {
    Operand* operand;
    at::Tensor tensor;
  };
  c10::SmallVector<Held, 4> held_;
  at::Tensor indices_, weight_;
};

// Has a call write a tensor: empty, and laid out as empty_like_input() does.
void write_to(Output& output, const at::Tensor& t);
void write_auxiliary(Call& call, const at::Tensor& result, const Arguments& a,
                     const LossInfo& info);
// Has a call of a row loss write all of the result, with reduction "none", and gradients that lie
// in memory in any way.
void write_rows(Call& call, const at::Tensor& result, at::ArrayRef<at::Tensor> gradients,
                const Arguments& a, const LossInfo& info);

}  // namespace fusedloss
