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

// What backward needs besides tensors, as one value that compiled autograd can read. A loss is a
// pointer into the table of losses.
at::IValue packed(const Arguments& a, const LossInfo& info, int64_t mask, int64_t variables) {
  std::vector<at::IValue> values{reinterpret_cast<int64_t>(&info), a.ignore_index, a.reduction,
                                 static_cast<int64_t>(a.dtype),    mask,           variables};
  values.insert(values.end(), a.parameters.begin(), a.parameters.end());
  return c10::ivalue::Tuple::create(std::move(values));
}

using ForwardSignature = std::tuple<Tensor, Tensor>(FUSEDLOSS_PARAMETERS, int64_t,
                                                    const OptionalTensor&);
using BackwardSignature = std::vector<Tensor>(const Tensor&, const Tensor&, FUSEDLOSS_PARAMETERS,
                                              int64_t);
using ReferenceSignature = std::vector<Tensor>(const Tensor&, FUSEDLOSS_PARAMETERS, int64_t);

// The gradients that the kernels write, of those that are wanted.
int64_t of_kernels(int64_t mask, const LossInfo& info) {
  return mask & ((int64_t{1} << info.gradients) - 1);
}

// Its variables are the tensors that have a gradient; to torch each one more costs time.
struct LossFunction : torch::autograd::Function<LossFunction> {
  static Tensor forward(AutogradContext* ctx, at::TensorList variables, const Arguments& a,
                        const LossInfo& info, const OptionalTensor& prediction) {
    static const auto op = find_operator<ForwardSignature>("fusedloss::loss_forward");
    const bool hooked = saves_through_hooks();
    int64_t mask = 0;
    for (size_t i = 0; i < variables.size(); ++i)
      mask |= int64_t{variables[i].requires_grad()} << i;
    at::AutoDispatchBelowADInplaceOrView below;
    auto [value, state] = a.call(op, std::tuple<>(), of_kernels(mask, info),
                                 hooked ? no_prediction(a.input) : prediction);
    if (hooked) drop_gradients(state);
    variable_list inputs{a.input, a.target, a.weight.value_or(Tensor())};
    inputs.insert(inputs.end(), a.more.begin(), a.more.end());
    ctx->save_for_backward(std::move(inputs));
    ctx->saved_data["state"] = std::move(state);
    ctx->saved_data["options"] = packed(a, info, mask, variables.size());
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const OptionalTensor weight = inputs[2].defined() ? OptionalTensor(inputs[2]) : std::nullopt;
    const Tensor state = ctx->saved_data["state"].toTensor();
    const at::ArrayRef<at::IValue> options =
        ctx->saved_data["options"].toTupleRef().elements().asArrayRef();
    c10::SmallVector<double, 4> parameters;
    for (size_t i = 6; i < options.size(); ++i) parameters.push_back(options[i].toDouble());
    const LossInfo& info = *reinterpret_cast<const LossInfo*>(options[0].toInt());
    const Tensor grad_output = loss_in(grad_outputs[0], info);
    const Arguments a{inputs[0],
                      inputs[1],
                      weight,
                      at::TensorList(inputs).slice(3),
                      info.name,
                      parameters,
                      options[1].toInt(),
                      options[2].toInt(),
                      static_cast<at::ScalarType>(options[3].toInt())};
    const int64_t mask = options[4].toInt();
    drop_gradients_of_other_memory(state, a);
    std::vector<Tensor> found;
    if (needs_reference(grad_output)) {
      static const auto op =
          find_operator<ReferenceSignature>("fusedloss::loss_reference_gradient");
      found = a.call(op, std::tie(grad_output), mask);
    } else {
      static const auto op = find_operator<BackwardSignature>("fusedloss::loss_backward");
      // Else autograd's fallback for operators without a derivative boxes every argument.
      at::AutoDispatchBelowADInplaceOrView below;
      found = a.call(op, std::tie(grad_output, state), of_kernels(mask, info));
      if (found.size() < 2 && mask == 3) found.push_back(-found[0]);  // the loss is symmetric
    }
    // One for each variable, and for every other argument of forward.
    variable_list gradients(options[5].toInt() + 3);
    auto next = found.begin();
    for (size_t i = 0; next != found.end(); ++i) {
      if (wants(mask, i)) gradients[i] = std::move(*next++);
    }
    return gradients;
  }
};

// The first inputs, up to the last one that requires a gradient and has one.
c10::SmallVector<Tensor, 2> variables_of(const Arguments& a, const LossInfo& info) {
  c10::SmallVector<Tensor, 2> variables;
  for (size_t n = info.symmetric ? 2 : info.gradients; n-- > 0;) {
    if (!a[n].requires_grad()) continue;
    for (size_t i = 0; i <= n; ++i) variables.push_back(a[i]);
    break;
  }
  return variables;
}

// Whether a symmetric loss's kernels must give target's gradient, of which input's is the negative:
// the only one that is wanted, or the one that has more digits.
bool other_gradient_comes_first(const Arguments& a) {
  const at::ScalarType input = a.input.scalar_type(), target = a.target.scalar_type();
  if (!a.target.requires_grad()) return false;
  return !a.input.requires_grad() ||
         (input != target && at::promote_types(input, target) == target);
}

Tensor differentiable_loss(FUSEDLOSS_PARAMETERS, const OptionalTensor& prediction) {
  const Arguments a{FUSEDLOSS_ARGUMENTS};
  bool wanted = false;
  for (size_t i = 0; i < a.inputs(); ++i) {
    TORCH_CHECK(
        !a[i]._fw_grad(0).defined(),
        "fusedloss: the operator has no forward-mode derivative: call the function instead");
    wanted = wanted || wants_gradient(a[i]);
  }
  if (wanted) {
    const LossInfo& info = known_loss(loss);
    if (info.symmetric && other_gradient_comes_first(a)) {
      return differentiable_loss(target, input, weight, more, loss, parameters, ignore_index,
                                 reduction, dtype, prediction);
    }
    const auto variables = variables_of(a, info);
    if (!variables.empty()) {
      return LossFunction::apply(at::TensorList(variables), a, info, prediction);
    }
  }
  static const auto op = find_operator<LossSignature>("fusedloss::loss");
  at::AutoDispatchBelowADInplaceOrView below;
  return a.call(op, std::tuple<>(), prediction);
}

// ---- shapes -------------------------------------------------------------------------------------

void check_meta(const Tensor& t) {
  TORCH_CHECK_VALUE(!t.defined() || t.is_meta(), "fusedloss: a tensor on ", t.device(),
                    " beside a meta tensor");
}

// Torch calls the shape-only kernels as soon as one tensor of a call is a meta tensor; then all
// must be.
const LossInfo& checked_meta(const Arguments& a) {
  for (size_t i = 0; i < a.inputs(); ++i) check_meta(a[i]);
  check_meta(a.weight.value_or(Tensor()));
  return known_loss(a.loss);
}

Tensor loss_meta(FUSEDLOSS_PARAMETERS, const OptionalTensor&) {
  const Arguments a{FUSEDLOSS_ARGUMENTS};
  return empty_loss(a, checked_meta(a));
}

std::tuple<Tensor, Tensor> loss_forward_meta(FUSEDLOSS_PARAMETERS, int64_t,
                                             const OptionalTensor& prediction) {
  return {loss_meta(FUSEDLOSS_ARGUMENTS, prediction), empty_state(input)};
}

Tensor loss_with_gradients_meta(const Tensor& upstream, FUSEDLOSS_PARAMETERS, int64_t mask,
                                at::TensorList) {
  check_meta(upstream);
  return loss_meta(FUSEDLOSS_ARGUMENTS, {});
}

std::vector<Tensor> loss_backward_meta(const Tensor& grad_output, const Tensor& state,
                                       FUSEDLOSS_PARAMETERS, int64_t mask) {
  const Arguments a{FUSEDLOSS_ARGUMENTS};
  const LossInfo& info = checked_meta(a);
  check_mask(mask, info);
  check_meta(grad_output);
  check_meta(state);
  return listed(empty_gradients(a, info, mask));
}

}  // namespace

#define FUSEDLOSS_SCHEMA                                                   \
  "Tensor input, Tensor target, Tensor? weight, Tensor[] more, str loss, " \
  "float[] parameters, int ignore_index, int reduction, ScalarType dtype"

TORCH_LIBRARY(fusedloss, m) {
  // A compiler may trace them; but not into a CUDA graph, whose outputs do not say what a forward
  // leaves for its backward.
  const std::vector<at::Tag> compiles{at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe};
  // Differentiable; the kernels behind Autograd compute the value only.
  m.def("loss(" FUSEDLOSS_SCHEMA ", Tensor? prediction) -> Tensor", compiles);
  // gradients: bit i says that the gradient for input i is wanted. Backward returns those.
  m.def("loss_forward(" FUSEDLOSS_SCHEMA
        ", int gradients, Tensor? prediction) -> (Tensor loss, Tensor state)",
        compiles);
  m.def("loss_backward(Tensor grad_output, Tensor state, " FUSEDLOSS_SCHEMA
        ", int gradients) -> Tensor[]",
        compiles);
  // The losses of rows, with reduction "none", and the gradients for an upstream gradient that is
  // known already. They are written into `out`, which may be the inputs themselves.
  m.def("loss_with_gradients_(Tensor upstream, " FUSEDLOSS_SCHEMA
        ", int gradients, Tensor(a!)[] out) -> Tensor");
  // Gradients that have a graph themselves: written in Python, by fusedloss/second_order.py.
  m.def("loss_reference_gradient(Tensor grad_output, " FUSEDLOSS_SCHEMA
        ", int gradients) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fusedloss, Meta, m) {
  m.impl("loss", &loss_meta);
  m.impl("loss_forward", &loss_forward_meta);
  m.impl("loss_backward", &loss_backward_meta);
  m.impl("loss_with_gradients_", &loss_with_gradients_meta);
}

TORCH_LIBRARY_IMPL(fusedloss, Autograd, m) { m.impl("loss", &differentiable_loss); }

}  // namespace fusedloss
