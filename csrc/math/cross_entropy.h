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
  static FUSEDLOSS_HD typename Loss::template Row<N> row(const RowSums<N>& r) {
    return {{r.max, r.sum, r.dot, r.mass}, r.gap, r.at, r.weight, r.excess};
  }
  template <class N>
  FUSEDLOSS_HD N loss(const RowSums<N>& r) const {
    return Loss::loss(row(r));
  }
  template <class N>
  FUSEDLOSS_HD RowSlope<N> slope(const RowSums<N>& r, N scale) const {
    const auto s = Loss::slope(row(r), scale);
    return {s.factor, s.scale, s.target_term};
  }
};

}  // namespace fusedloss
