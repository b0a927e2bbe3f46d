// The operators torch.ops.fusedloss.*, for C++ callers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <string_view>

namespace fusedloss {

using OptionalTensor = std::optional<at::Tensor>;

// What every operator takes, on any device: a loss of the table, its inputs and its options.
// `more`: its inputs besides input and target.
using LossSignature = at::Tensor(const at::Tensor& input, const at::Tensor& target,
                                 const OptionalTensor& weight, at::TensorList more,
                                 std::string_view loss, at::ArrayRef<double> parameters,
                                 int64_t ignore_index, int64_t reduction, at::ScalarType dtype,
                                 const OptionalTensor& prediction);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

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
