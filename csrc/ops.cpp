// The operators torch.ops.fusedloss.*: their schemas, and shape-only kernels.
//
// Every forward operator returns `scales`, two doubles: the upstream gradient that a gradient was
// written for (nan: none was written), and what reduction "mean" divides by. That gradient is
// behind them, see carried.h. The backward operators return the gradient for the true upstream
// gradient: for nothing where it is there already. An operator without a prediction shares one.
#include <torch/library.h>

#include "tensors.h"

namespace fusedloss {
namespace {

using at::Tensor;

Tensor pointwise_meta(const Tensor& input, const Tensor&, const OptionalTensor&,
                      const OptionalTensor&, std::string_view, double, int64_t, int64_t reduction,
                      at::ScalarType dtype, const OptionalTensor&) {
  return empty_loss(input, reduction, dtype);
}

std::tuple<Tensor, Tensor> pointwise_forward_meta(const Tensor& input, const Tensor&,
                                                  const OptionalTensor&, const OptionalTensor&,
                                                  std::string_view, double, int64_t,
                                                  int64_t reduction, at::ScalarType dtype,
                                                  const OptionalTensor&) {
  return {empty_loss(input, reduction, dtype), empty_scales(input)};
}

Tensor pointwise_backward_meta(const Tensor&, const Tensor&, const Tensor& input, const Tensor&,
                               const OptionalTensor&, const OptionalTensor&, std::string_view,
                               double, int64_t, int64_t, at::ScalarType) {
  return empty_gradient(input);
}

Tensor custom_meta(const Tensor& input, const Tensor&, const OptionalTensor&, std::string_view,
                   at::ArrayRef<double>, int64_t reduction, at::ScalarType dtype,
                   const OptionalTensor&) {
  return empty_loss(input, reduction, dtype);
}

std::tuple<Tensor, Tensor> custom_forward_meta(const Tensor& input, const Tensor&,
                                               const OptionalTensor&, std::string_view,
                                               at::ArrayRef<double>, int64_t reduction,
                                               at::ScalarType dtype, bool, bool,
                                               const OptionalTensor&) {
  return {empty_loss(input, reduction, dtype), empty_scales(input)};
}

std::tuple<Tensor, Tensor> custom_backward_meta(const Tensor&, const Tensor&, const Tensor& input,
                                                const Tensor& target, const OptionalTensor&,
                                                std::string_view, at::ArrayRef<double>, int64_t,
                                                at::ScalarType, bool of_input, bool of_target) {
  return {of_input ? empty_gradient(input) : Tensor(),
          of_target ? empty_target_gradient(input, target) : Tensor()};
}

Tensor cross_entropy_meta(const Tensor& input, const Tensor&, const OptionalTensor&, int64_t,
                          double, int64_t reduction, at::ScalarType dtype, const OptionalTensor&) {
  return empty_row_loss(input, reduction, dtype);
}

std::tuple<Tensor, Tensor> cross_entropy_forward_meta(const Tensor& input, const Tensor&,
                                                      const OptionalTensor&, int64_t, double,
                                                      int64_t reduction, at::ScalarType dtype,
                                                      const OptionalTensor&) {
  return {empty_row_loss(input, reduction, dtype), empty_scales(input)};
}

Tensor cross_entropy_backward_meta(const Tensor&, const Tensor&, const Tensor& input, const Tensor&,
                                   const OptionalTensor&, int64_t, double, int64_t,
                                   at::ScalarType) {
  return empty_gradient(input);
}

void check_meta(const Tensor& t) {
  TORCH_CHECK_VALUE(!t.defined() || t.is_meta(), "fusedloss: a tensor on ", t.device(),
                    " beside a meta tensor");
}
void check_meta(const OptionalTensor& t) {
  if (t.has_value()) check_meta(*t);
}
template <class Number>
void check_meta(const Number&) {}

// A shape-only kernel. Torch calls it as soon as one tensor of a call is a meta tensor; then all
// must be.
template <auto kernel>
struct Meta;
template <class Result, class... Arguments, Result (*kernel)(Arguments...)>
struct Meta<kernel> {
  static Result call(Arguments... arguments) {
    (check_meta(arguments), ...);
    return kernel(arguments...);
  }
};

}  // namespace

#define FUSEDLOSS_POINTWISE_OPTIONS \
  "str loss, float parameter, int ignore_index, int reduction, ScalarType dtype"
#define FUSEDLOSS_CUSTOM_OPTIONS "str loss, float[] parameters, int reduction, ScalarType dtype"
#define FUSEDLOSS_CROSS_ENTROPY_OPTIONS \
  "int ignore_index, float label_smoothing, int reduction, ScalarType dtype"

TORCH_LIBRARY(fusedloss, m) {
  // A compiler may trace them; but not into a CUDA graph, whose outputs do not say what a forward
  // carries to its backward.
  const std::vector<at::Tag> compiles{at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe};

  // Differentiable in input, custom in target too; the kernels behind Autograd compute the value
  // only.
  m.def(
      "pointwise(Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ", Tensor? prediction) -> Tensor",
      compiles);
  m.def("custom(Tensor input, Tensor target, Tensor? weight, " FUSEDLOSS_CUSTOM_OPTIONS
        ", Tensor? prediction) -> Tensor",
        compiles);
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor? prediction) -> Tensor",
      compiles);

  m.def(
      "pointwise_forward(Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS
      ", Tensor? prediction) -> (Tensor loss, Tensor scales)",
      compiles);
  m.def(
      "pointwise_backward(Tensor grad_output, Tensor scales, Tensor input, Tensor target, "
      "Tensor? weight, Tensor? pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ") -> Tensor",
      compiles);
  m.def("custom_forward(Tensor input, Tensor target, Tensor? weight, " FUSEDLOSS_CUSTOM_OPTIONS
        ", bool of_input, bool of_target, Tensor? prediction) -> (Tensor loss, Tensor scales)",
        compiles);
  // The gradients that are wanted; the other is undefined.
  m.def(
      "custom_backward(Tensor grad_output, Tensor scales, Tensor input, Tensor target, "
      "Tensor? weight, " FUSEDLOSS_CUSTOM_OPTIONS
      ", bool of_input, bool of_target) -> (Tensor, Tensor)",
      compiles);
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? "
      "weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor? prediction) -> (Tensor loss, Tensor scales)",
      compiles);
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor scales, Tensor input, Tensor target, "
      "Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS ") -> Tensor",
      compiles);

  // Gradients that have a graph themselves: written in Python, by fusedloss/second_order.py.
  m.def(
      "pointwise_reference_gradient(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, Tensor? pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ") -> Tensor");
  m.def(
      "custom_reference_gradient(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, " FUSEDLOSS_CUSTOM_OPTIONS
      ", bool of_input, bool of_target) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_reference_gradient(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS ") -> Tensor");
}

TORCH_LIBRARY_IMPL(fusedloss, Meta, m) {
  m.impl("pointwise", &Meta<&pointwise_meta>::call);
  m.impl("pointwise_forward", &Meta<&pointwise_forward_meta>::call);
  m.impl("pointwise_backward", &Meta<&pointwise_backward_meta>::call);
  m.impl("custom", &Meta<&custom_meta>::call);
  m.impl("custom_forward", &Meta<&custom_forward_meta>::call);
  m.impl("custom_backward", &Meta<&custom_backward_meta>::call);
  m.impl("cross_entropy", &Meta<&cross_entropy_meta>::call);
  m.impl("cross_entropy_forward", &Meta<&cross_entropy_forward_meta>::call);
  m.impl("cross_entropy_backward", &Meta<&cross_entropy_backward_meta>::call);
}

}  // namespace fusedloss
