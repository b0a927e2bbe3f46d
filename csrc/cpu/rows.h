// A call of cross-entropy, and its two walks. Loss is a struct of row_losses.h, T the type that it
// is computed in.
#pragma once

#include "../math/row_losses.h"
#include "row_walks.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

// ---- a call -------------------------------------------------------------------------------------

struct RowsCall : fusedloss::RowsCall {
  const ParallelFor threads;
  const double scale;  // every gradient element is multiplied by it

  explicit RowsCall(const Call& call)
      : fusedloss::RowsCall(call), threads(call.threads), scale(call.scale) {}
};

template <class Loss>
struct RowProblem {
  using T = typename Loss::Number;
  const RowsCall& call;
  const Loss loss;
  const typename Loss::Exact exact;
  const T* const weight;
  // Whether every e^(x - max) is added in double: a class of large weight multiplies the sum of the
  // small ones, unless only the target counts, with the same weight.
  const bool exact_sums;

  explicit RowProblem(const RowsCall& c)
      : call(c),
        loss(c.indices, c.label_smoothing, double(c.classes), weight_sum(c)),
        exact(c.indices, c.label_smoothing, double(c.classes), weight_sum(c)),
        weight(static_cast<const T*>(c.weight)),
        exact_sums(weight && loss.sums_targets()) {}

  static double weight_sum(const RowsCall& c) {
    return c.weight_sum ? *c.weight_sum : double(c.classes);
  }
  T class_weight(int64_t c) const { return weight ? weight[c] : T(1); }
  // What the gradients of the rows [first, first + n) are multiplied by.
  void read_scales(int64_t first, int64_t n, double* scales) const {
    with_type(call.upstream_dtype, [&](auto tag) {
      const auto* const upstream = static_cast<const decltype(tag)*>(call.upstream) + first;
      for (int64_t i = 0; i < n; ++i) scales[i] = call.scale * double(static_cast<T>(upstream[i]));
    });
  }
};

// Both walks write what the call asks for and return the sum of the rows' losses. This one goes row
// by row, for classes that lie side by side.
template <class Loss>
double rows_contiguous(const RowsCall& call);
// Goes by tiles of neighbouring rows, for rows that lie side by side or have few classes.
template <class Loss>
double rows_tiled(const RowsCall& call);

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
