// The differentiable operators, for C++ callers: typed handles, and what else ops.cpp offers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <string_view>

namespace fusedloss {

using OptionalTensor = std::optional<at::Tensor>;

using PointwiseSignature = at::Tensor(const at::Tensor& input, const at::Tensor& target,
                                      const OptionalTensor& weight,
                                      const OptionalTensor& pos_weight, std::string_view loss,
                                      double parameter, int64_t ignore_index, int64_t reduction,
                                      at::ScalarType dtype, const OptionalTensor& prediction);

using CrossEntropySignature = at::Tensor(const at::Tensor& input, const at::Tensor& target,
                                         const OptionalTensor& weight, int64_t ignore_index,
                                         double label_smoothing, int64_t reduction,
                                         at::ScalarType dtype, const OptionalTensor& prediction);

using CustomSignature = at::Tensor(const at::Tensor& input, const at::Tensor& target,
                                   const OptionalTensor& weight, std::string_view loss,
                                   at::ArrayRef<double> parameters, int64_t reduction,
                                   at::ScalarType dtype, const OptionalTensor& prediction);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Without a gradient to compute later, value only.
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
