// The names by which the CUDA engine knows the parts of row_losses.h.
#pragma once

#include "row_losses.h"

namespace fusedloss {

template <class N>
struct RowSums {
  N max, sum, dot, mass, gap, at, weight, excess;
};

template <class N>
struct RowSlope {
  N factor, scale, own;
};

template <class T>
struct Shares : CrossEntropyRow<T> {
  using Loss = CrossEntropyRow<T>;
  using Loss::Loss;
  T keep = Loss::confidence, spread = Loss::eps_per_class;

  template <class N>
  FUSEDLOSS_HD N loss(const RowSums<N>& r) const {
    return Loss::template loss<N>({r.max, r.sum, r.dot, r.mass}, r.excess, r.gap, r.weight);
  }
  template <class N>
  FUSEDLOSS_HD RowSlope<N> slope(const RowSums<N>& r, N scale) const {
    const auto s = Loss::template slope<N>({r.max, r.sum, r.dot, r.mass}, r.at, r.weight, scale);
    return {s.factor, s.scale, s.target_term};
  }
};

}  // namespace fusedloss
