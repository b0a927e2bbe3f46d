// The autograd Functions behind the differentiable operators: pointwise losses, and cross-entropy.
//
// The forward pass writes the gradient already, for a predicted upstream gradient. Backward hands
// it over where the prediction was right, and has the same kernel compute it from the saved inputs
// where it was not: the gradient that a caller sees is the same, bit for bit, either way.
//
// In C++, since a Python Function costs as much as a whole step of a small eager loss.
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "operators.h"

namespace fusedloss {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }

// What a backward needs besides its inputs.
struct Saved : torch::CustomClassHolder {
  Tensor gradient;  // leaves with the first backward: autograd is its only owner then
  Tensor scales, prediction;
  std::string loss;      // pointwise
  double parameter = 0;  // of the loss, or label_smoothing
  int64_t ignore_index = 0, reduction = 0;
  at::ScalarType dtype = at::kFloat;

  void keep(AutogradContext* ctx) {
    ctx->saved_data["saved"] = c10::IValue::make_capsule(
        c10::intrusive_ptr<torch::CustomClassHolder>::unsafe_steal_from_new(this));
  }
  static Saved& of(AutogradContext* ctx) {
    // A capsule holds only what keep() put there.
    return static_cast<Saved&>(*ctx->saved_data["saved"].toCapsule());
  }
  // The buffer that forward filled, or, in a second backward, a fresh one.
  Tensor take_gradient(const Tensor& input, bool& fresh) {
    static const auto empty_gradient =
        find_operator<Tensor(const Tensor&)>("fusedloss::empty_gradient");
    fresh = !gradient.defined();
    return fresh ? empty_gradient.call(input) : std::move(gradient);
  }
};

// Through the reference go create_graph, since its gradient has a graph itself, and batches of
// upstream gradients (is_grads_batched), which the kernels do not take.
bool needs_reference(const Tensor& grad_output) {
  static const c10::DispatchKeySet wrappers({c10::DispatchKey::FuncTorchBatched,
                                             c10::DispatchKey::FuncTorchGradWrapper,
                                             c10::DispatchKey::Batched});
  return at::GradMode::is_enabled() || grad_output.key_set().has_any(wrappers);
}

// Checkpointing and offloading take what is saved away until backward: a gradient written already
// would stay. There the forward writes none.
bool saves_through_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }
Tensor no_prediction(const Tensor& input) {
  return at::zeros({2}, input.options().dtype(at::kDouble));
}

// ---- pointwise ----------------------------------------------------------------------------------

struct PointwiseFunction : torch::autograd::Function<PointwiseFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& pos_weight,
                        std::string_view loss, double parameter, int64_t ignore_index,
                        int64_t reduction, at::ScalarType dtype, const Tensor& prediction) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
        std::string_view, double, int64_t, int64_t, at::ScalarType, const Tensor&)>(
        "fusedloss::pointwise_forward");
    const bool hooked = saves_through_hooks();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, gradient, scales] =
        op.call(input, target, weight, pos_weight, loss, parameter, ignore_index, reduction, dtype,
                hooked ? no_prediction(input) : prediction);
    ctx->save_for_backward({input, target, or_undefined(weight), or_undefined(pos_weight)});
    auto* saved = new Saved;
    if (!hooked) saved->gradient = std::move(gradient);
    saved->scales = std::move(scales);
    saved->prediction = prediction;
    saved->loss = loss;
    saved->parameter = parameter;
    saved->ignore_index = ignore_index;
    saved->reduction = reduction;
    saved->dtype = dtype;
    saved->keep(ctx);
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const Tensor &input = inputs[0], &target = inputs[1];
    const OptionalTensor weight = optional(inputs[2]), pos_weight = optional(inputs[3]);
    Saved& saved = Saved::of(ctx);
    variable_list gradients(10);
    if (needs_reference(grad_outputs[0])) {
      static const auto op =
          find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               const OptionalTensor&, std::string_view, double, int64_t, int64_t,
                               at::ScalarType)>("fusedloss::pointwise_reference_gradient");
      gradients[0] = op.call(grad_outputs[0], input, target, weight, pos_weight, saved.loss,
                             saved.parameter, saved.ignore_index, saved.reduction, saved.dtype);
      return gradients;
    }
    static const auto op = find_operator<void(
        const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&, const Tensor&,
        const OptionalTensor&, const OptionalTensor&, std::string_view, double, int64_t, int64_t,
        at::ScalarType, const Tensor&)>("fusedloss::pointwise_backward_");
    bool fresh;
    gradients[0] = saved.take_gradient(input, fresh);
    op.call(gradients[0], grad_outputs[0], saved.scales, fresh, input, target, weight, pos_weight,
            saved.loss, saved.parameter, saved.ignore_index, saved.reduction, saved.dtype,
            saved.prediction);
    return gradients;
  }
};

Tensor pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 const OptionalTensor& pos_weight, std::string_view loss, double parameter,
                 int64_t ignore_index, int64_t reduction, at::ScalarType dtype,
                 const Tensor& prediction) {
  if (wants_gradient(input)) {
    return PointwiseFunction::apply(input, target, weight, pos_weight, loss, parameter,
                                    ignore_index, reduction, dtype, prediction);
  }
  static const auto op = find_operator<PointwiseSignature>("fusedloss::pointwise");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(input, target, weight, pos_weight, loss, parameter, ignore_index, reduction, dtype,
                 prediction);
}

// ---- cross-entropy ------------------------------------------------------------------------------

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                        int64_t reduction, at::ScalarType dtype, const Tensor& prediction) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const OptionalTensor&, int64_t, double, int64_t,
        at::ScalarType, const Tensor&)>("fusedloss::cross_entropy_forward");
    const bool hooked = saves_through_hooks();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, gradient, scales] =
        op.call(input, target, weight, ignore_index, label_smoothing, reduction, dtype,
                hooked ? no_prediction(input) : prediction);
    ctx->save_for_backward({input, target, or_undefined(weight)});
    auto* saved = new Saved;
    if (!hooked) saved->gradient = std::move(gradient);
    saved->scales = std::move(scales);
    saved->prediction = prediction;
    saved->parameter = label_smoothing;
    saved->ignore_index = ignore_index;
    saved->reduction = reduction;
    saved->dtype = dtype;
    saved->keep(ctx);
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const Tensor &input = inputs[0], &target = inputs[1];
    const OptionalTensor weight = optional(inputs[2]);
    Saved& saved = Saved::of(ctx);
    variable_list gradients(8);
    if (needs_reference(grad_outputs[0])) {
      static const auto op =
          find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               int64_t, double, int64_t, at::ScalarType)>(
              "fusedloss::cross_entropy_reference_gradient");
      gradients[0] = op.call(grad_outputs[0], input, target, weight, saved.ignore_index,
                             saved.parameter, saved.reduction, saved.dtype);
      return gradients;
    }
    static const auto op =
        find_operator<void(const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&,
                           const Tensor&, const OptionalTensor&, int64_t, double, int64_t,
                           at::ScalarType, const Tensor&)>("fusedloss::cross_entropy_backward_");
    bool fresh;
    gradients[0] = saved.take_gradient(input, fresh);
    op.call(gradients[0], grad_outputs[0], saved.scales, fresh, input, target, weight,
            saved.ignore_index, saved.parameter, saved.reduction, saved.dtype, saved.prediction);
    return gradients;
  }
};

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t ignore_index, double label_smoothing, int64_t reduction,
                     at::ScalarType dtype, const Tensor& prediction) {
  if (wants_gradient(input)) {
    return CrossEntropyFunction::apply(input, target, weight, ignore_index, label_smoothing,
                                       reduction, dtype, prediction);
  }
  static const auto op = find_operator<CrossEntropySignature>("fusedloss::cross_entropy");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(input, target, weight, ignore_index, label_smoothing, reduction, dtype,
                 prediction);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) {
  m.impl("pointwise", &pointwise);
  m.impl("cross_entropy", &cross_entropy);
}

}  // namespace fusedloss
