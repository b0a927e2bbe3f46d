// One pass over memory, whatever the upstream gradient: forward writes the gradient already, for a
// predicted upstream gradient; backward hands it over where the prediction was right, and has the
// same kernel compute it where it was not. The same for every device, whose Engine knows its
// kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#include "operators.h"
#include "tensors.h"

namespace fusedloss {

// ---- predictions --------------------------------------------------------------------------------

// Two doubles: the upstream gradient 1, and full confidence in it. A CUDA graph that is being
// captured does not see how they are written: each replay would write them again.
at::Tensor new_prediction(const at::Device& device);

#if defined(FUSEDLOSS_CUDA)
// make(), on a stream of the device that no CUDA graph captures.
at::Tensor outside_of_capture(const at::Device& device, const std::function<at::Tensor()>& make);
#endif

// A call's own prediction, or, for one that has none, that of all calls like it.
at::Tensor prediction_of(const OptionalTensor& own, const Arguments& a);

// ---- gradients ----------------------------------------------------------------------------------

// Those for the inputs that have one, undefined where not wanted: bit i of a mask stands for the
// i-th.
using Gradients = c10::SmallVector<at::Tensor, 2>;

inline bool wants(int64_t mask, size_t i) { return mask >> i & 1; }
// Throws where the loss gives no gradient for one of them.
void check_mask(int64_t mask, const LossInfo& info);
Gradients empty_gradients(const Arguments& a, const LossInfo& info, int64_t mask);
// Those that are wanted, in order.
std::vector<at::Tensor> listed(Gradients&& gradients);
// The same gradients out of such a list, into which a row loss's can be written. Throws where they
// do not fit, or the call is not one of reduction "none".
Gradients checked_outputs(const Arguments& a, const LossInfo& info, int64_t mask,
                          at::TensorList out);

// Lives and dies with the memory of a forward's state. So the backward operator is a function that
// returns fresh tensors, for a tracing compiler too, and yet hands over what forward has written:
// as an output of forward, a compiler would copy it.
struct SavedGradients {
  Gradients gradients;  // undefined: not written, or handed over already
  at::Tensor prediction;
  at::DimVector input_sizes;
  at::ScalarType input_dtype;
  c10::SmallVector<c10::weak_intrusive_ptr<c10::StorageImpl>, 2> storages;  // of the inputs
  c10::DataPtr memory;                                                      // of the state
};

void attach(const at::Tensor& state, const Arguments& a, Gradients gradients,
            at::Tensor prediction);
// Null for a state that is no longer where forward left it: a copy, or a tensor without numbers.
SavedGradients* saved_in(const at::Tensor& state);

// Lets go of the gradients that forward has written, so that backward computes them.
void drop_gradients(const at::Tensor& state);
// The same where an input has been given other memory since (`input.data = ...`), whose numbers
// backward must see. (For autograd alone: a compiler may compute all of them again.)
void drop_gradients_of_other_memory(const at::Tensor& state, const Arguments& a);

// The gradients that a backward returns: forward's, or new ones.
struct BackwardGradients {
  Gradients gradients;
  bool fresh = false;  // whether one of them is new

  // Forward's are taken out of `saved`, but only where they lie in memory as new ones would.
  BackwardGradients(SavedGradients* saved, const Arguments& a, const LossInfo& info, int64_t mask);
};

// ---- operators ----------------------------------------------------------------------------------

// The operators of a device. Its Engine, made of the arguments and the pass, has
//   info                            the loss, checked
//   predicts(prediction)            whether forward may write gradients for it
//   read(upstream)                  looks at the operands; upstream: with reduction "none" alone
//   compute(loss, gradients, state) forward; fills in the state
//   is_done(grad_output, state, saved, gradients)   backward: whether forward's gradients are right
//   recompute(gradients, state)     backward
//   compute_both(losses, gradients) the losses of rows, and gradients that do not wait for backward
template <class Engine>
struct Operators {
  static at::Tensor loss(FUSEDLOSS_PARAMETERS, const OptionalTensor&) {
    const Arguments a{FUSEDLOSS_ARGUMENTS};
    Engine engine(a, Pass::kValue);
    engine.read({});
    at::Tensor value = empty_loss(a, engine.info);
    engine.compute(value, {}, {});
    return value;
  }

  static std::tuple<at::Tensor, at::Tensor> forward(FUSEDLOSS_PARAMETERS, int64_t mask,
                                                    const OptionalTensor& own) {
    const Arguments a{FUSEDLOSS_ARGUMENTS};
    Engine engine(a, Pass::kForward);
    check_mask(mask, engine.info);
    at::Tensor prediction;
    Gradients gradients;
    if (!a.each()) {
      prediction = prediction_of(own, a);
      // Before any small tensor: the last step's gradient has left a hole of just this size, and a
      // loss that its caller keeps must not be the one to take a piece of it.
      if (engine.predicts(prediction)) gradients = empty_gradients(a, engine.info, mask);
    }
    engine.read({});
    at::Tensor value = empty_loss(a, engine.info), state = empty_state(input);
    engine.compute(value, gradients, state);
    attach(state, a, std::move(gradients), std::move(prediction));
    return {std::move(value), std::move(state)};
  }

  static std::vector<at::Tensor> backward(const at::Tensor& grad_output, const at::Tensor& state,
                                          FUSEDLOSS_PARAMETERS, int64_t mask) {
    const Arguments a{FUSEDLOSS_ARGUMENTS};
    Engine engine(a, Pass::kBackward);
    check_mask(mask, engine.info);
    check_pair("state", state, input);
    check_upstream(grad_output, a, engine.info.family);
    SavedGradients* saved = saved_in(state);
    BackwardGradients result(saved, a, engine.info, mask);
    if (!engine.is_done(grad_output, state, saved, result.fresh)) {
      engine.read(a.upstream(grad_output));
      engine.recompute(result.gradients, state);
    }
    return listed(std::move(result.gradients));
  }

  static at::Tensor with_gradients(const at::Tensor& upstream, FUSEDLOSS_PARAMETERS, int64_t mask,
                                   at::TensorList out) {
    const Arguments a{FUSEDLOSS_ARGUMENTS};
    Engine engine(a, Pass::kForward);
    check_upstream(upstream, a, engine.info.family);
    const Gradients gradients = checked_outputs(a, engine.info, mask, out);
    engine.read(upstream);
    at::Tensor losses = empty_loss(a, engine.info);
    engine.compute_both(losses, gradients);
    return losses;
  }

  static void add_to(torch::Library& m) {
    m.impl("loss_with_gradients_", &with_gradients);
    m.impl("loss", &loss);
    m.impl("loss_forward", &forward);
    m.impl("loss_backward", &backward);
  }
};

}  // namespace fusedloss
