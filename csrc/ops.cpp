// The operators torch.ops.fusedloss.*: their schemas, and shape-only kernels.
//
// Every forward operator returns `scales`, two doubles: the upstream gradient that `gradient` was
// written for (nan: it was not written), and what reduction "mean" divides by. The backward
// operators make `gradient` right for the true upstream gradient: for nothing where it is already.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "tensors.h"

namespace fusedloss {
namespace {

using at::Tensor;

Tensor meta_scales(const Tensor& like) { return at::empty({2}, like.options().dtype(at::kDouble)); }

Tensor pointwise_meta(const Tensor& input, const Tensor&, const OptionalTensor&,
                      const OptionalTensor&, std::string_view, double, int64_t, int64_t reduction,
                      at::ScalarType dtype, const Tensor&) {
  return empty_loss(input, reduction, dtype);
}

std::tuple<Tensor, Tensor, Tensor> pointwise_forward_meta(const Tensor& input, const Tensor&,
                                                          const OptionalTensor&,
                                                          const OptionalTensor&, std::string_view,
                                                          double, int64_t, int64_t reduction,
                                                          at::ScalarType dtype, const Tensor&) {
  return {empty_loss(input, reduction, dtype), empty_gradient(input), meta_scales(input)};
}

void pointwise_backward_meta_(const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&,
                              const Tensor&, const OptionalTensor&, const OptionalTensor&,
                              std::string_view, double, int64_t, int64_t, at::ScalarType,
                              const Tensor&) {}

Tensor cross_entropy_meta(const Tensor& input, const Tensor&, const OptionalTensor&, int64_t,
                          double, int64_t reduction, at::ScalarType dtype, const Tensor&) {
  return empty_row_loss(input, reduction, dtype);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_meta(const Tensor& input, const Tensor&,
                                                              const OptionalTensor&, int64_t,
                                                              double, int64_t reduction,
                                                              at::ScalarType dtype, const Tensor&) {
  return {empty_row_loss(input, reduction, dtype), empty_gradient(input), meta_scales(input)};
}

void cross_entropy_backward_meta_(const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&,
                                  const Tensor&, const OptionalTensor&, int64_t, double, int64_t,
                                  at::ScalarType, const Tensor&) {}

}  // namespace

#define FUSEDLOSS_POINTWISE_OPTIONS \
  "str loss, float parameter, int ignore_index, int reduction, ScalarType dtype"
#define FUSEDLOSS_CROSS_ENTROPY_OPTIONS \
  "int ignore_index, float label_smoothing, int reduction, ScalarType dtype"

TORCH_LIBRARY(fusedloss, m) {
  // Differentiable in input; the kernels behind Autograd compute the value only.
  m.def(
      "pointwise(Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ", Tensor prediction) -> Tensor");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor prediction) -> Tensor");

  m.def(
      "pointwise_forward(Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS
      ", Tensor prediction) -> "
      "(Tensor loss, Tensor gradient, Tensor scales)");
  m.def(
      "pointwise_backward_(Tensor(a!) gradient, Tensor grad_output, Tensor scales, bool fresh, "
      "Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ", Tensor(b!) prediction) -> ()");
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? "
      "weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor prediction) -> "
      "(Tensor loss, Tensor gradient, Tensor scales)");
  m.def(
      "cross_entropy_backward_(Tensor(a!) gradient, Tensor grad_output, Tensor scales, bool fresh, "
      "Tensor input, Tensor target, Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor(b!) prediction) -> ()");
  m.def("empty_gradient(Tensor input) -> Tensor");

  // Gradients that have a graph themselves: written in Python, by fusedloss/autograd.py.
  m.def(
      "pointwise_reference_gradient(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, Tensor? pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ") -> Tensor");
  m.def(
      "cross_entropy_reference_gradient(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS ") -> Tensor");
}

TORCH_LIBRARY_IMPL(fusedloss, CompositeExplicitAutograd, m) {
  m.impl("empty_gradient", &empty_gradient);
}

TORCH_LIBRARY_IMPL(fusedloss, Meta, m) {
  m.impl("pointwise", &pointwise_meta);
  m.impl("pointwise_forward", &pointwise_forward_meta);
  m.impl("pointwise_backward_", &pointwise_backward_meta_);
  m.impl("cross_entropy", &cross_entropy_meta);
  m.impl("cross_entropy_forward", &cross_entropy_forward_meta);
  m.impl("cross_entropy_backward_", &cross_entropy_backward_meta_);
}

}  // namespace fusedloss
