// The maths of losses over rows of classes. A row loss is a reduction object: a state, what a class
// adds to it, how two states merge, and the loss and the gradient of a complete row. N is float or
// double, or a CPU SIMD register of classes or of rows.
#pragma once

#include <cmath>

#include "vocabulary.h"

namespace fusedloss {

// The max to subtract: 0 for a row that is all -inf, where x - max would be nan.
template <class N>
FUSEDLOSS_HD N finite_max(N max) {
  return max == -INFINITY ? N(0) : max;
}

// Cross-entropy of logits x. A class counts with q = w (confidence y + eps_per_class): w is its
// weight, y its share of the target, which label smoothing dilutes. T is the type of the constants.
//
// The gradient is formed from `sum`, which for class indices leaves the target out: 1 - p of the
// target is sum / (sum + target_exp), with all its digits however confident the row is. The loss
// is formed from `excess`, with all the digits of its logarithm.
template <class T>
struct CrossEntropyRow {
  using Number = T;
  using Exact = CrossEntropyRow<double>;

  bool indices;     // targets are class indices, else class probabilities
  bool smooth;      // label_smoothing > 0
  T confidence;     // 1 - label_smoothing
  T eps_per_class;  // label_smoothing / classes
  T weight_sum;     // of w over the classes

  FUSEDLOSS_HD CrossEntropyRow(bool indices_, double label_smoothing, double classes,
                               double weight_sum_)
      : indices(indices_),
        smooth(label_smoothing != 0),
        confidence(static_cast<T>(1 - label_smoothing)),
        eps_per_class(static_cast<T>(label_smoothing / classes)),
        weight_sum(static_cast<T>(weight_sum_)) {}

  // The sums over some classes of a row. For class indices q is w in the last two, which are used
  // with label smoothing only. S is the type in which exponentials are added up.
  template <class N, class S = N>
  struct State {
    N max;              // the largest logit
    S sum;              // of e^(x - max)
    N weighted_logits;  // of q (x - max)
    N target_mass;      // of q
  };
  // The coefficients of a row's gradient. For the target class, target_term takes the place of e^(x
  // - max).
  template <class N>
  struct Slope {
    N factor, scale, target_term, target_gradient;
  };

  // Whether weighted_logits and target_mass are used.
  FUSEDLOSS_HD bool sums_targets() const { return !indices || smooth; }
  template <class N>
  FUSEDLOSS_HD N target_share(N y, N w) const {
    return multiply_add(y, N(confidence), N(eps_per_class)) * w;
  }

  template <class N>
  static FUSEDLOSS_HD N exponential(N x, N max) {
    return exp_nonpositive(x - max);
  }
  // Adds a class: x <= state.max is its logit. Returns e^(x - max), which the gradient needs.
  template <class N, class S>
  static FUSEDLOSS_HD N add(State<N, S>& state, N x) {
    const N e = exponential(x, state.max);
    state.sum = state.sum + e;
    return e;
  }
  template <class N, class S>
  static FUSEDLOSS_HD void add_target(State<N, S>& state, N x, N q) {
    state.weighted_logits = state.weighted_logits + (x - state.max) * q;
    state.target_mass = state.target_mass + q;
  }

  // Rescales a state to a larger max.
  template <class N>
  static FUSEDLOSS_HD void rescale(State<N>& state, N max) {
    if (!(max > state.max)) return;
    if (state.sum != 0) state.sum *= exp_nonpositive(state.max - max);
    state.weighted_logits += state.target_mass * (finite_max(state.max) - finite_max(max));
    state.max = max;
  }
  template <class N>
  static FUSEDLOSS_HD void merge(State<N>& state, State<N> other) {
    rescale(state, other.max);
    rescale(other, state.max);
    state.sum += other.sum;
    state.weighted_logits += other.weighted_logits;
    state.target_mass += other.target_mass;
  }

  // The sum of all e^(x - max) except the largest, which is 1. In a complete row, target_gap leads
  // from max to the target's logit; target_exp is e^target_gap, or 0 for class probabilities.
  template <class N>
  static FUSEDLOSS_HD N excess(N sum, N target_exp) {
    return sum + (target_exp - N(1));
  }
  template <class N>
  FUSEDLOSS_HD N loss(const State<N>& row, N excess, N target_gap, N target_weight) const {
    const N log_sum = log1p_finite(excess);
    if (!indices) return row.target_mass * log_sum - row.weighted_logits;
    const N hard = N(confidence) * target_weight * (log_sum - target_gap);
    if (!smooth) return hard;
    return hard + N(eps_per_class) * (N(weight_sum) * log_sum - row.weighted_logits);
  }

  // Every element of the gradient is multiplied by `scale`.
  template <class N>
  FUSEDLOSS_HD Slope<N> slope(const State<N>& row, N target_exp, N target_weight, N scale) const {
    if (!indices) return {row.target_mass * scale / row.sum, scale, N(0), N(0)};
    const N hard = N(confidence) * target_weight;
    N target_mass = hard, target_term = N(0) - row.sum;
    if (smooth) {
      const N soft = N(eps_per_class) * N(weight_sum);
      target_mass = hard + soft;
      target_term =
          select(target_mass == N(0), N(0), (soft * target_exp - hard * row.sum) / target_mass);
    }
    const N factor = target_mass * scale / (row.sum + target_exp),
            class_scale = N(eps_per_class) * scale, g = target_term * factor;
    return {factor, class_scale, target_term, smooth ? g - target_weight * class_scale : g};
  }
  // e is e^(x - max). For class indices q is w, and is used with label smoothing only.
  template <class N>
  static FUSEDLOSS_HD N gradient(const Slope<N>& slope, N e) {
    return e * slope.factor;
  }
  template <class N>
  static FUSEDLOSS_HD N gradient(const Slope<N>& slope, N e, N q) {
    return gradient(slope, e) - q * slope.scale;
  }
};

}  // namespace fusedloss
