// The upstream gradient that a kernel multiplies by: in forward the predicted one, in backward the
// true one, which also updates the prediction.
#pragma once

#include "class_weights.cuh"
#include "errors.cuh"
#include "reduce.cuh"
#include "vectors.cuh"

namespace fusedloss::cuda {

constexpr double kTrustedConfidence = 2, kMaxConfidence = 3;

// What a call multiplies the gradient by.
struct GradientScale {
  bool write;       // whether the gradient is written
  double scale;     // of every element: upstream / divisor
  double upstream;  // nan: the gradient is not written
  double divisor;   // what the mean divides by; 1 for a sum

  // One thread of the block reads the prediction, once, since a backward on another stream may
  // update it at any time. Value and confidence may come from two updates: any upstream gradient
  // may be predicted, because forward_state names it. kIndexed: targets may be class indices, which
  // a mean has to count.
  template <bool kIndexed>
  __device__ static const GradientScale& of_block(const Launch& l) {
    double class_weights = 0;
    const bool counts = kIndexed && l.class_weights.indices;
    if (counts) class_weights = sum_class_weights(l.class_weights, GridWorkspace(l.workspace));
    if (threadIdx.x == 0) {
      GradientScale& s = shared_instance() = read(l);
      if (counts) s.divisor = class_weights;
      if (s.write) s.scale = s.upstream / s.divisor;
      block_has_reported() = 0;
    }
    __syncthreads();
    return shared_instance();
  }
  __device__ static GradientScale& shared_instance() {
    __shared__ GradientScale scale;
    return scale;
  }

 private:
  __device__ static GradientScale read(const Launch& l) {
    GradientScale s{false, 0, kNan<double>, 1};
    if (l.pass == Pass::kBackward) {
      s.upstream = l.grad_output ? cuda::read<double>(l.grad_output, l.grad_output_dtype, 0) : 1;
      if (l.grad_output) s.divisor = l.forward_state[1];
      s.write = !l.grad_output || l.fresh || !same_sign_and_value(l.forward_state[0], s.upstream);
    } else {
      s.divisor = isnan(l.normalizer) ? l.forward_state[1] : l.normalizer;
      if (l.pass == Pass::kForward && l.prediction && l.prediction[1] >= kTrustedConfidence) {
        s.upstream = l.prediction[0];
        s.write = true;
      }
    }
    return s;
  }
};

// In backward the first thread of the grid updates the prediction.
__device__ inline void update_predictor(const Launch& l, const GradientScale& s) {
  if (l.pass != Pass::kBackward || !l.prediction || blockIdx.x > 0 || threadIdx.x > 0) return;
  volatile double* const p = l.prediction;
  if (same_sign_and_value(p[0], s.upstream)) {
    p[1] = fmin(p[1] + 1, kMaxConfidence);
  } else {
    p[0] = s.upstream;
    p[1] = fmax(p[1] - 1, 0.0);
  }
}

// Whether this is a backward whose gradient is already right.
__device__ inline bool can_skip(const Launch& l, const GradientScale& s) {
  return l.pass == Pass::kBackward && !s.write;
}

// Ends a pass that computes the loss; value is this thread's part of the sum. Blocks may have read
// different predictions. forward_state then says that the gradient was not written.
__device__ inline void write_loss(const Launch& l, double value) {
  if (l.pass == Pass::kBackward) return;
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  GradientScale& s = GradientScale::shared_instance();  // read again here to save registers
  if (l.loss ? !grid_sum(value, s.upstream, GridWorkspace(l.workspace)) : !first) return;
  if (l.loss) write(l.loss, l.loss_dtype, 0, value / s.divisor);
  if (l.pass == Pass::kForward) {
    l.forward_state[0] = s.upstream;
    if (!isnan(l.normalizer)) l.forward_state[1] = s.divisor;
  }
}

}  // namespace fusedloss::cuda
