// The operators torch.ops.fusedloss.*: their schemas, their shape-only kernels, and the autograd
// Function behind the differentiable one.
//
// loss_forward returns the loss and a state, two doubles: the upstream gradient that a gradient was
// written for (nan: none was written), and what reduction "mean" divides by. The gradient is behind
// them, see one_pass.h. loss_backward returns the gradients for the true upstream gradient: for
// nothing where they are there already. A call without a prediction shares one.
//
// In C++, since a Python Function costs as much as a whole step of a small eager loss.
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "one_pass.h"

namespace fusedloss {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- autograd -----------------------------------------------------------------------------------

// create_graph goes through the reference, since its gradient has a graph itself, and so do batches
// of upstream gradients (is_grads_batched), which the kernels do not take.
bool needs_reference(const Tensor& grad_output) {
  static const c10::DispatchKeySet wrappers({c10::DispatchKey::FuncTorchBatched,
                                             c10::DispatchKey::FuncTorchGradWrapper,
                                             c10::DispatchKey::Batched});
  return at::GradMode::is_enabled() || grad_output.key_set().has_any(wrappers);
}

// Checkpointing and offloading take what is saved away until backward: a gradient written already
// would stay. There forward writes none: it has no confidence in its prediction.
bool saves_through_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }
Tensor no_prediction(const Tensor& input) {
  return at::zeros({2}, input.options().dtype(at::kDouble));
}

// Bit i: the gradient for input i is wanted, and the loss gives it.
int64_t wanted_gradients(const Tensor& input, const Tensor& target, const LossInfo& info) {
  return input.requires_grad() | (target.requires_grad() && info.target_gradient) << 1;
}

// What backward needs besides tensors, as one value that compiled autograd can read. A loss is a
// pointer into the table of losses.
struct Options {
  const LossInfo* loss;
  int64_t ignore_index, reduction;
  at::ScalarType dtype;
  int64_t mask;
  c10::SmallVector<double, 4> parameters;

  at::IValue packed() const {
    std::vector<at::IValue> values{reinterpret_cast<int64_t>(loss), ignore_index, reduction,
                                   static_cast<int64_t>(dtype), mask};
    values.insert(values.end(), parameters.begin(), parameters.end());
    return c10::ivalue::Tuple::create(std::move(values));
  }
  static Options unpacked(const at::IValue& value) {
    const auto& values = value.toTupleRef().elements();
    Options options{
        reinterpret_cast<const LossInfo*>(values[0].toInt()), values[1].toInt(), values[2].toInt(),
        static_cast<at::ScalarType>(values[3].toInt()),       values[4].toInt(), {}};
    for (size_t i = 5; i < values.size(); ++i) options.parameters.push_back(values[i].toDouble());
    return options;
  }
};

struct LossFunction : torch::autograd::Function<LossFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, at::TensorList more, std::string_view loss,
                        at::ArrayRef<double> parameters, int64_t ignore_index, int64_t reduction,
                        at::ScalarType dtype, const OptionalTensor& prediction) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const OptionalTensor&, at::TensorList, std::string_view,
        at::ArrayRef<double>, int64_t, int64_t, at::ScalarType, int64_t, const OptionalTensor&)>(
        "fusedloss::loss_forward");
    const bool hooked = saves_through_hooks();
    const LossInfo& info = known_loss(loss);
    const int64_t mask = wanted_gradients(input, target, info);
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, state] =
        op.call(input, target, weight, more, loss, parameters, ignore_index, reduction, dtype, mask,
                hooked ? no_prediction(input) : prediction);
    if (hooked) drop_gradients(state);
    variable_list inputs{input, target, weight.value_or(Tensor())};
    inputs.insert(inputs.end(), more.begin(), more.end());
    ctx->save_for_backward(std::move(inputs));
    ctx->saved_data["state"] = std::move(state);
    ctx->saved_data["options"] =
        Options{&info, ignore_index, reduction, dtype, mask, {parameters.begin(), parameters.end()}}
            .packed();
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const Tensor &input = inputs[0], &target = inputs[1], &grad_output = grad_outputs[0];
    const OptionalTensor weight = inputs[2].defined() ? OptionalTensor(inputs[2]) : std::nullopt;
    const at::TensorList more = at::TensorList(inputs).slice(3);
    const Tensor state = ctx->saved_data["state"].toTensor();
    const auto [info, ignore_index, reduction, dtype, mask, parameters] =
        Options::unpacked(ctx->saved_data["options"]);
    drop_gradients_of_other_memory(state, input, target);
    std::vector<Tensor> found;
    if (needs_reference(grad_output)) {
      static const auto op = find_operator<std::vector<Tensor>(
          const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, at::TensorList,
          std::string_view, at::ArrayRef<double>, int64_t, int64_t, at::ScalarType, int64_t)>(
          "fusedloss::loss_reference_gradient");
      found = op.call(grad_output, input, target, weight, more, info->name, parameters,
                      ignore_index, reduction, dtype, mask);
    } else {
      static const auto op = find_operator<std::vector<Tensor>(
          const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
          at::TensorList, std::string_view, at::ArrayRef<double>, int64_t, int64_t, at::ScalarType,
          int64_t)>("fusedloss::loss_backward");
      // Else autograd's fallback for operators without a derivative boxes every argument.
      at::AutoDispatchBelowADInplaceOrView below;
      found = op.call(grad_output, state, input, target, weight, more, info->name, parameters,
                      ignore_index, reduction, dtype, mask);
    }
    // One for every argument of forward, and every tensor in `more`.
    variable_list gradients(9 + more.size());
    auto next = found.begin();
    for (size_t i = 0; i < 2; ++i) {
      if (wants(mask, i)) gradients[i] = std::move(*next++);
    }
    return gradients;
  }
};

Tensor differentiable_loss(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                           at::TensorList more, std::string_view loss,
                           at::ArrayRef<double> parameters, int64_t ignore_index, int64_t reduction,
                           at::ScalarType dtype, const OptionalTensor& prediction) {
  if (at::GradMode::is_enabled() && wanted_gradients(input, target, known_loss(loss))) {
    return LossFunction::apply(input, target, weight, more, loss, parameters, ignore_index,
                               reduction, dtype, prediction);
  }
  static const auto op = find_operator<LossSignature>("fusedloss::loss");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(input, target, weight, more, loss, parameters, ignore_index, reduction, dtype,
                 prediction);
}

// ---- shapes -------------------------------------------------------------------------------------

void check_meta(const Tensor& t) {
  TORCH_CHECK_VALUE(!t.defined() || t.is_meta(), "fusedloss: a tensor on ", t.device(),
                    " beside a meta tensor");
}

// Torch calls the shape-only kernels as soon as one tensor of a call is a meta tensor; then all
// must be.
const LossInfo& checked_meta(const Arguments& a) {
  for (const Tensor& t : {a.input, a.target, a.weight.value_or(Tensor())}) check_meta(t);
  for (const Tensor& t : a.more) check_meta(t);
  return known_loss(a.loss);
}

Tensor loss_meta(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 at::TensorList more, std::string_view loss, at::ArrayRef<double> parameters,
                 int64_t ignore_index, int64_t reduction, at::ScalarType dtype,
                 const OptionalTensor&) {
  const Arguments a{input, target, weight, more, loss, parameters, ignore_index, reduction, dtype};
  return empty_loss(a, checked_meta(a).family);
}

std::tuple<Tensor, Tensor> loss_forward_meta(const Tensor& input, const Tensor& target,
                                             const OptionalTensor& weight, at::TensorList more,
                                             std::string_view loss, at::ArrayRef<double> parameters,
                                             int64_t ignore_index, int64_t reduction,
                                             at::ScalarType dtype, int64_t,
                                             const OptionalTensor& prediction) {
  return {loss_meta(input, target, weight, more, loss, parameters, ignore_index, reduction, dtype,
                    prediction),
          empty_state(input)};
}

std::vector<Tensor> loss_backward_meta(const Tensor& grad_output, const Tensor& state,
                                       const Tensor& input, const Tensor& target,
                                       const OptionalTensor& weight, at::TensorList more,
                                       std::string_view loss, at::ArrayRef<double> parameters,
                                       int64_t ignore_index, int64_t reduction,
                                       at::ScalarType dtype, int64_t mask) {
  const Arguments a{input, target, weight, more, loss, parameters, ignore_index, reduction, dtype};
  check_mask(mask, checked_meta(a));
  check_meta(grad_output);
  check_meta(state);
  return listed(empty_gradients(a, mask));
}

}  // namespace

#define FUSEDLOSS_CALL                                                     \
  "Tensor input, Tensor target, Tensor? weight, Tensor[] more, str loss, " \
  "float[] parameters, int ignore_index, int reduction, ScalarType dtype"

TORCH_LIBRARY(fusedloss, m) {
  // A compiler may trace them; but not into a CUDA graph, whose outputs do not say what a forward
  // leaves for its backward.
  const std::vector<at::Tag> compiles{at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe};
  // Differentiable; the kernels behind Autograd compute the value only.
  m.def("loss(" FUSEDLOSS_CALL ", Tensor? prediction) -> Tensor", compiles);
  // gradients: bit i says that the gradient for input i is wanted. Backward returns those.
  m.def("loss_forward(" FUSEDLOSS_CALL
        ", int gradients, Tensor? prediction) -> (Tensor loss, Tensor state)",
        compiles);
  m.def("loss_backward(Tensor grad_output, Tensor state, " FUSEDLOSS_CALL
        ", int gradients) -> Tensor[]",
        compiles);
  // Gradients that have a graph themselves: written in Python, by fusedloss/second_order.py.
  m.def("loss_reference_gradient(Tensor grad_output, " FUSEDLOSS_CALL
        ", int gradients) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fusedloss, Meta, m) {
  m.impl("loss", &loss_meta);
  m.impl("loss_forward", &loss_forward_meta);
  m.impl("loss_backward", &loss_backward_meta);
}

TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) { m.impl("loss", &differentiable_loss); }

}  // namespace fusedloss
