// What a forward leaves for its backward, and the prediction of the upstream gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "operators.h"

namespace fusedloss {

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
  c10::DataPtr memory;  // of the scales
};

void carry(const at::Tensor& scales, at::Tensor gradient, at::Tensor prediction,
           at::Tensor target_gradient = {});

// Null for scales that are no longer where forward left them: a copy, or a tensor without numbers.
Carried* carried(const at::Tensor& scales);

}  // namespace fusedloss
