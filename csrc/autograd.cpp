// The autograd Functions behind the differentiable operators: pointwise losses, losses of one's
// own, and cross-entropy.
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
#include <tuple>

#include "carried.h"

namespace fusedloss {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor or_undefined(const OptionalTensor& t) { return t.value_or(Tensor()); }

// What a backward needs besides its inputs, as values that compiled autograd can read.
struct Kept {
  Tensor scales;
  at::IValue loss;  // what tells one of a Function's losses from another
  int64_t ignore_index, reduction;
  at::ScalarType dtype;

  void in(AutogradContext* ctx) && {
    ctx->saved_data["scales"] = std::move(scales);
    ctx->saved_data["loss"] = std::move(loss);
    ctx->saved_data["options"] =
        std::make_tuple(ignore_index, reduction, static_cast<int64_t>(dtype));
  }
  static Kept from(AutogradContext* ctx) {
    const auto [ignore_index, reduction, dtype] =
        ctx->saved_data["options"].to<std::tuple<int64_t, int64_t, int64_t>>();
    return {ctx->saved_data["scales"].toTensor(), ctx->saved_data["loss"], ignore_index, reduction,
            static_cast<at::ScalarType>(dtype)};
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
// would stay. There the forward writes none: it has no confidence in its prediction.
bool saves_through_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }
Tensor no_prediction(const Tensor& input) {
  return at::zeros({2}, input.options().dtype(at::kDouble));
}

// ---- pointwise ----------------------------------------------------------------------------------

struct PointwiseFunction : torch::autograd::Function<PointwiseFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& pos_weight,
                        std::string_view loss, double parameter, int64_t ignore_index,
                        int64_t reduction, at::ScalarType dtype, const OptionalTensor& prediction) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
        std::string_view, double, int64_t, int64_t, at::ScalarType, const OptionalTensor&)>(
        "fusedloss::pointwise_forward");
    const bool hooked = saves_through_hooks();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, scales] = op.call(input, target, weight, pos_weight, loss, parameter, ignore_index,
                                   reduction, dtype, hooked ? no_prediction(input) : prediction);
    if (hooked) drop_gradients(scales);
    ctx->save_for_backward({input, target, or_undefined(weight), or_undefined(pos_weight)});
    Kept{std::move(scales), std::make_tuple(std::string(loss), parameter), ignore_index, reduction,
         dtype}
        .in(ctx);
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const Tensor &input = inputs[0], &target = inputs[1];
    const OptionalTensor weight = optional(inputs[2]), pos_weight = optional(inputs[3]);
    const Kept kept = Kept::from(ctx);
    const auto [loss, parameter] = kept.loss.to<std::tuple<std::string, double>>();
    drop_gradients_of_other_memory(kept.scales, input, target);
    variable_list gradients(10);
    if (needs_reference(grad_outputs[0])) {
      static const auto op =
          find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               const OptionalTensor&, std::string_view, double, int64_t, int64_t,
                               at::ScalarType)>("fusedloss::pointwise_reference_gradient");
      gradients[0] = op.call(grad_outputs[0], input, target, weight, pos_weight, loss, parameter,
                             kept.ignore_index, kept.reduction, kept.dtype);
      return gradients;
    }
    static const auto op =
        find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const OptionalTensor&, const OptionalTensor&, std::string_view, double,
                             int64_t, int64_t, at::ScalarType)>("fusedloss::pointwise_backward");
    gradients[0] = op.call(grad_outputs[0], kept.scales, input, target, weight, pos_weight, loss,
                           parameter, kept.ignore_index, kept.reduction, kept.dtype);
    return gradients;
  }
};

Tensor pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 const OptionalTensor& pos_weight, std::string_view loss, double parameter,
                 int64_t ignore_index, int64_t reduction, at::ScalarType dtype,
                 const OptionalTensor& prediction) {
  if (wants_gradient(input)) {
    return PointwiseFunction::apply(input, target, weight, pos_weight, loss, parameter,
                                    ignore_index, reduction, dtype, prediction);
  }
  static const auto op = find_operator<PointwiseSignature>("fusedloss::pointwise");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(input, target, weight, pos_weight, loss, parameter, ignore_index, reduction, dtype,
                 prediction);
}

// ---- losses of one's own ------------------------------------------------------------------------

struct CustomFunction : torch::autograd::Function<CustomFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, std::string_view loss,
                        at::ArrayRef<double> parameters, int64_t reduction, at::ScalarType dtype,
                        const OptionalTensor& prediction) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, at::ArrayRef<double>,
        int64_t, at::ScalarType, bool, bool, const OptionalTensor&)>("fusedloss::custom_forward");
    const bool hooked = saves_through_hooks();
    const bool of_input = input.requires_grad(), of_target = target.requires_grad();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, scales] = op.call(input, target, weight, loss, parameters, reduction, dtype,
                                   of_input, of_target, hooked ? no_prediction(input) : prediction);
    if (hooked) drop_gradients(scales);
    ctx->save_for_backward({input, target, or_undefined(weight)});
    Kept{std::move(scales),
         std::make_tuple(std::string(loss), parameters.vec(), of_input, of_target), 0, reduction,
         dtype}
        .in(ctx);
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const Tensor &input = inputs[0], &target = inputs[1];
    const OptionalTensor weight = optional(inputs[2]);
    const Kept kept = Kept::from(ctx);
    const auto [loss, parameters, of_input, of_target] =
        kept.loss.to<std::tuple<std::string, std::vector<double>, bool, bool>>();
    drop_gradients_of_other_memory(kept.scales, input, target);
    variable_list gradients(8);
    if (needs_reference(grad_outputs[0])) {
      static const auto op = find_operator<std::tuple<Tensor, Tensor>(
          const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, std::string_view,
          at::ArrayRef<double>, int64_t, at::ScalarType, bool, bool)>(
          "fusedloss::custom_reference_gradient");
      std::tie(gradients[0], gradients[1]) =
          op.call(grad_outputs[0], input, target, weight, loss, parameters, kept.reduction,
                  kept.dtype, of_input, of_target);
      return gradients;
    }
    static const auto op = find_operator<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
        std::string_view, at::ArrayRef<double>, int64_t, at::ScalarType, bool, bool)>(
        "fusedloss::custom_backward");
    std::tie(gradients[0], gradients[1]) =
        op.call(grad_outputs[0], kept.scales, input, target, weight, loss, parameters,
                kept.reduction, kept.dtype, of_input, of_target);
    return gradients;
  }
};

Tensor custom(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
              std::string_view loss, at::ArrayRef<double> parameters, int64_t reduction,
              at::ScalarType dtype, const OptionalTensor& prediction) {
  if (wants_gradient(input) || wants_gradient(target)) {
    return CustomFunction::apply(input, target, weight, loss, parameters, reduction, dtype,
                                 prediction);
  }
  static const auto op = find_operator<CustomSignature>("fusedloss::custom");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(input, target, weight, loss, parameters, reduction, dtype, prediction);
}

// ---- cross-entropy ------------------------------------------------------------------------------

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                        int64_t reduction, at::ScalarType dtype, const OptionalTensor& prediction) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const OptionalTensor&, int64_t, double, int64_t,
        at::ScalarType, const OptionalTensor&)>("fusedloss::cross_entropy_forward");
    const bool hooked = saves_through_hooks();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, scales] = op.call(input, target, weight, ignore_index, label_smoothing, reduction,
                                   dtype, hooked ? no_prediction(input) : prediction);
    if (hooked) drop_gradients(scales);
    ctx->save_for_backward({input, target, or_undefined(weight)});
    Kept{std::move(scales), label_smoothing, ignore_index, reduction, dtype}.in(ctx);
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const Tensor &input = inputs[0], &target = inputs[1];
    const OptionalTensor weight = optional(inputs[2]);
    const Kept kept = Kept::from(ctx);
    const double label_smoothing = kept.loss.toDouble();
    drop_gradients_of_other_memory(kept.scales, input, target);
    variable_list gradients(8);
    if (needs_reference(grad_outputs[0])) {
      static const auto op =
          find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               int64_t, double, int64_t, at::ScalarType)>(
              "fusedloss::cross_entropy_reference_gradient");
      gradients[0] = op.call(grad_outputs[0], input, target, weight, kept.ignore_index,
                             label_smoothing, kept.reduction, kept.dtype);
      return gradients;
    }
    static const auto op =
        find_operator<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const OptionalTensor&, int64_t, double, int64_t, at::ScalarType)>(
            "fusedloss::cross_entropy_backward");
    gradients[0] = op.call(grad_outputs[0], kept.scales, input, target, weight, kept.ignore_index,
                           label_smoothing, kept.reduction, kept.dtype);
    return gradients;
  }
};

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t ignore_index, double label_smoothing, int64_t reduction,
                     at::ScalarType dtype, const OptionalTensor& prediction) {
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
  m.impl("custom", &custom);
  m.impl("cross_entropy", &cross_entropy);
}

}  // namespace fusedloss
