// The operators torch.ops.fusedloss.*, for C++ callers.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fusedloss {

using OptionalTensor = std::optional<at::Tensor>;

// What every operator takes, on any device: a loss of the table, its inputs and its options.
// `more`: its inputs besides input and target. A loss of one input is given it as target too, and
// does not read that.
#define FUSEDLOSS_PARAMETERS                                                       \
  const at::Tensor &input, const at::Tensor &target, const OptionalTensor &weight, \
      at::TensorList more, std::string_view loss, at::ArrayRef<double> parameters, \
      int64_t ignore_index, int64_t reduction, at::ScalarType dtype
#define FUSEDLOSS_ARGUMENTS \
  input, target, weight, more, loss, parameters, ignore_index, reduction, dtype

inline int64_t class_dim(const at::Tensor& input) { return input.dim() > 1 ? 1 : 0; }

// These arguments as one value. dtype is the loss's; the kernels compute in it, or in float32.
struct Arguments {
  const at::Tensor &input, &target;
  const OptionalTensor& weight;
  at::TensorList more;
  std::string_view loss;
  at::ArrayRef<double> parameters;
  int64_t ignore_index, reduction;
  at::ScalarType dtype;

  // Calls an operator that takes others before and after these arguments.
  template <class Operator, class... Before, class... After>
  auto call(const Operator& op, const std::tuple<Before...>& before, const After&... after) const {
    return std::apply(
        [&](const auto&... first) { return op.call(first..., FUSEDLOSS_ARGUMENTS, after...); },
        before);
  }

  size_t inputs() const { return 2 + more.size(); }
  const at::Tensor& operator[](size_t i) const {
    return i == 0 ? input : i == 1 ? target : more[i - 2];
  }
  bool each() const { return reduction == at::Reduction::None; }
  bool in_double() const { return dtype == at::kDouble; }
  int64_t classes() const { return input.dim() > 0 ? input.size(class_dim(input)) : 0; }
  // With each() there is one for every element or row; else it is in the state.
  OptionalTensor upstream(const at::Tensor& grad_output) const {
    return each() ? OptionalTensor(grad_output) : std::nullopt;
  }
};

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
using LossSignature = at::Tensor(FUSEDLOSS_PARAMETERS, const OptionalTensor& prediction);

// Whether autograd will ask for this tensor's gradient; if not, only the value is computed.
inline bool wants_gradient(const at::Tensor& t) {
  return at::GradMode::is_enabled() && t.requires_grad();
}

// The CPU capability whose kernels run here.
const char* cpu_capability();

#if defined(FUSEDLOSS_CUDA)
// Throws what a kernel has found wrong with its input since the last time, if it has come to light.
void raise_faults();
#endif

}  // namespace fusedloss
