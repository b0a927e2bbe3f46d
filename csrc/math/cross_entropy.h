// The maths of cross-entropy, for a row whose logits have all been seen: N is float or double, or a
// CPU SIMD register of rows.
//
// Loss and gradient are formed from `sum`, which for class indices leaves the target out: 1 - p of
// the target is sum / (sum + its own share), with all its digits however confident the row is.
#pragma once

#include "vocabulary.h"

namespace fusedloss {

template <class N>
struct RowSums {
  N max;     // of the logits
  N sum;     // of e^(x - max); for class indices over all classes but the target
  N dot;     // of q (x - max); for class indices of w (x - max)
  N mass;    // of q; class probabilities only
  N logit;   // the target's, and
  N weight;  // its weight; class indices only
};

// What a gradient element is made of: e^(x - max) * factor - q * scale, but for the target's own.
template <class N>
struct RowSlope {
  N factor, scale, at_target;
};

// How targets share out a row. A class counts with q = w (keep y + spread): w its weight, y its
// share in the target, which label smoothing dilutes.
template <class T>
struct Shares {
  bool indices;    // targets are class indices, and q of `dot` and of a gradient element is w
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
    if (!indices) return row.mass * log(row.sum) - row.dot;
    const N gap = row.logit - row.max;
    // log1p keeps the digits of a small loss, where the target is the largest logit.
    const N log_sum = select(gap == N(0), log1p(row.sum), log(row.sum + exp_nonpositive(gap)));
    const N hard = N(keep) * row.weight * (log_sum - gap);
    if (!smooth) return hard;
    return hard + N(spread) * (N(weights) * log_sum - row.dot);
  }

  // Every element of the gradient times `scale`.
  template <class N>
  FUSEDLOSS_HD RowSlope<N> slope(const RowSums<N>& row, N scale) const {
    if (!indices) return {row.mass * scale / row.sum, scale, scale};
    const N at = exp_nonpositive(row.logit - row.max);
    const N total = row.sum + at;
    N mass = N(keep) * row.weight;
    N at_target = N(0) - mass * (row.sum / total);
    if (smooth) {
      mass = mass + N(spread) * N(weights);
      at_target = at_target + N(spread) * (N(weights) * (at / total) - row.weight);
    }
    return {mass * scale / total, N(spread) * scale, at_target * scale};
  }
};

}  // namespace fusedloss
