// What a forward leaves for its backward, and the prediction of the upstream gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string_view>

#include "operators.h"

namespace fusedloss {

// Two doubles: the upstream gradient 1, and full confidence in it. A CUDA graph that is being
// captured does not see how they are written: each replay would write them again.
at::Tensor new_prediction(const at::Device& device);

#if defined(FUSEDLOSS_CUDA)
// make(), on a stream of the device that no CUDA graph captures.
at::Tensor outside_of_capture(const at::Device& device, const std::function<at::Tensor()>& make);
#endif

// A call's own prediction, or, for one that has none, that of all calls like it.
at::Tensor prediction_of(const OptionalTensor& own, std::string_view loss, const at::Tensor& input,
                         int64_t reduction);

// Whose gradients are wanted.
struct Wants {
  bool input = true, target = false;
};

// Lives and dies with the memory of a forward's `scales`. So the backward operators are functions
// that return a fresh tensor, for a tracing compiler too, and yet hand over what forward has
// written: seen as an output of forward, it would be copied there.
struct Carried {
  at::Tensor gradient;         // undefined: not written, or handed over already
  at::Tensor target_gradient;  // likewise, of a loss of one's own
  at::Tensor prediction;
  at::DimVector input_sizes;
  at::ScalarType input_dtype;
  c10::weak_intrusive_ptr<c10::StorageImpl> input_storage, target_storage;
  c10::DataPtr memory;  // of the scales
};

void carry(const at::Tensor& scales, const at::Tensor& input, const at::Tensor& target,
           at::Tensor gradient, at::Tensor prediction, at::Tensor target_gradient = {});

// Lets go of the gradients that forward has written, so that backward computes them.
void drop_gradients(const at::Tensor& scales);
// The same where input or target has been given other memory since (`input.data = ...`), whose
// numbers are the ones that backward is to see. (For autograd alone: a compiler may compute both
// again.)
void drop_gradients_of_other_memory(const at::Tensor& scales, const at::Tensor& input,
                                    const at::Tensor& target);

// Null for scales that are no longer where forward left them: a copy, or a tensor without numbers.
Carried* carried(const at::Tensor& scales);

// The gradients that a backward returns, those that are wanted: forward's, or new ones.
struct BackwardGradients {
  at::Tensor gradient, target_gradient;
  bool fresh = false;  // whether one of them is new

  // Forward's are taken out of `left`, but only where they lie in memory as new ones would: input
  // and target may have been given other memory since (`input.data = ...`).
  BackwardGradients(Carried* left, const at::Tensor& input, const at::Tensor& target, Wants wants);
};

}  // namespace fusedloss
