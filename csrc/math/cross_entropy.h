// The maths of cross-entropy, for a row whose logits have all been seen: N is float or double, or a
// CPU SIMD register of rows.
//
// The gradient is formed from `sum`, which for class indices leaves the target out: 1 - p of the
// target is sum / (sum + its own share), with all its digits however confident the row is. The loss
// is formed from `excess`, with all the digits of its logarithm.
#pragma once

#include "vocabulary.h"

namespace fusedloss {

template <class N>
struct RowSums {
  N max;     // of the logits
  N sum;     // of e^(x - max); for class indices over all classes but the target
  N dot;     // of q (x - max); for class indices of w (x - max)
  N mass;    // of q; class probabilities only
  N gap;     // from max to the target's logit,
  N at;      // e^gap, and
  N weight;  // the target's weight; class indices only
  N excess;  // sum + at - 1 (sum - 1 of class probabilities): what all e^(x - max) but the largest,
             // which is 1, add up to
};

// What the gradient is made of: e^(x - max) * factor - q * scale; for class indices w is q, and the
// target has `own` for its e^(x - max).
template <class N>
struct RowSlope {
  N factor, scale, own;
};

// How targets share out a row. A class counts with q = w (keep y + spread): w its weight, y its
// share in the target, which label smoothing dilutes.
template <class T>
struct Shares {
  bool indices;
  bool smooth;     // label_smoothing > 0
  T keep, spread;  // 1 - label_smoothing, label_smoothing / classes
  T weights;       // the sum of w over the classes

  FUSEDLOSS_HD Shares(bool indices_, double label_smoothing, double classes, double weight_sum)
      : indices(indices_),
        smooth(label_smoothing != 0),
        keep(static_cast<T>(1 - label_smoothing)),
        spread(static_cast<T>(label_smoothing / classes)),
        weights(static_cast<T>(weight_sum)) {}

  template <class N>
  FUSEDLOSS_HD N loss(const RowSums<N>& row) const {
    const N log_sum = log1p_finite(row.excess);
    if (!indices) return row.mass * log_sum - row.dot;
    const N hard = N(keep) * row.weight * (log_sum - row.gap);
    if (!smooth) return hard;
    return hard + N(spread) * (N(weights) * log_sum - row.dot);
  }

  // Every element of the gradient times `scale`.
  template <class N>
  FUSEDLOSS_HD RowSlope<N> slope(const RowSums<N>& row, N scale) const {
    if (!indices) return {row.mass * scale / row.sum, scale, N(0)};
    const N hard = N(keep) * row.weight;
    N mass = hard, own = N(0) - row.sum;
    if (smooth) {
      const N soft = N(spread) * N(weights);
      mass = hard + soft;
      own = select(mass == N(0), N(0), (soft * row.at - hard * row.sum) / mass);
    }
    return {mass * scale / (row.sum + row.at), N(spread) * scale, own};
  }
};

}  // namespace fusedloss
