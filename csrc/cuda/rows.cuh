// What the kernels over rows share: cross-entropy as a row loss, and what a row loss is.
//
// A row loss is a struct L that a kernel builds from its call, a RowsCall:
//   L::Element       type of logits and gradient; L::Number: what they are computed in
//   L::State         sums over part of a row; default-constructed it is the sum over nothing.
//                    add() adds a state with the same max, merge() any, reduce_warp() those of
//                    neighbouring threads
//   L::Row           a row's target and its logit
//   L::Result        what a row's state comes to: its loss, and the coefficients of its gradient
//   target_share(..) the share q of a class in the target; 0 for hard targets, which need none
//   add_class(..)    adds a class to a State, all but its exponential, which it returns
//   finish(..)       State -> Result
//   value(..)        Result -> the row's loss
//   gradient(..)     one element of the gradient
// The target's logit is left out of the sums: it is -inf there, and finish() adds it.
#pragma once

#include "../math/row_losses.h"
#include "fast_math.cuh"
#include "upstream.cuh"

namespace fusedloss::cuda {

// ---- the state of part of a row -----------------------------------------------------------------

// e^x for x <= 0, as exact as results of type D need.
template <class D>
__device__ Compute<D> exp_for(Compute<D> x) {
  if constexpr (sizeof(D) == 2) {
    return quick_exp(x);
  } else {
    return exp_nonpositive(x);
  }
}

// Sums over some of a row's classes, relative to the largest of their logits; members as in
// RowSums. D is the type of the results. kHard: one target class and no label smoothing, whose
// weighted_logits and target_mass stay 0. Otherwise a confident row's loss needs all digits of the
// small terms of the sum, hence double.
template <class D, bool kHard>
struct SoftmaxState {
  using T = Compute<D>;
  T max = -kInfinity<T>;
  // -0 plus x is x, so that the compiler leaves the first addition out.
  std::conditional_t<!kHard && std::is_same_v<D, float>, double, T> sum = -0.0;
  T weighted_logits = -0.0, target_mass = -0.0;

  __device__ void rescale(T new_max) {
    const T from = finite_max(max), to = finite_max(new_max);
    sum *= exp_for<D>(max - to);  // 0 if max is -inf
    weighted_logits += target_mass * (from - to);
    max = new_max;
  }
  __device__ void merge(SoftmaxState other) {
    const T new_max = fmax(max, other.max);
    rescale(new_max);
    other.rescale(new_max);
    add(other);
  }
  __device__ void add(const SoftmaxState& other) {
    sum += other.sum;
    weighted_logits += other.weighted_logits;
    target_mass += other.target_mass;
  }
  // Over groups of `threads` neighbouring threads of a warp; each gets the sum. a + b has the same
  // bits as b + a, so all get the same bits.
  __device__ void reduce_warp(int threads) {
    T new_max = max;
    for (int step = threads / 2; step > 0; step /= 2) {
      new_max = fmax(new_max, __shfl_xor_sync(kFullWarp, new_max, step));
    }
    rescale(new_max);
    for (int step = threads / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
      if constexpr (!kHard) {
        weighted_logits += __shfl_xor_sync(kFullWarp, weighted_logits, step);
        target_mass += __shfl_xor_sync(kFullWarp, target_mass, step);
      }
    }
  }
};

// ---- calls and targets --------------------------------------------------------------------------

template <class T>
struct RowsCall : fusedloss::RowsCall {
  int64_t rows;  // outer * inner
  // For class probabilities without class weights. A kernel would make it anew in its loops.
  fusedloss::CrossEntropyRow<T> formula;
  uintptr_t to_probabilities;  // bytes from the logits

  explicit RowsCall(const fusedloss::RowsCall& call)
      : fusedloss::RowsCall(call),
        rows(call.outer * call.inner),
        formula(false, call.label_smoothing, static_cast<double>(call.classes), 0),
        to_probabilities(reinterpret_cast<uintptr_t>(call.probabilities.data) -
                         reinterpret_cast<uintptr_t>(call.input.data)) {}

  // Where a row of an (outer, classes, inner) tensor begins.
  __device__ int64_t offset(const Rows& r, int64_t row) const {
    if (inner == 1) return row * r.outer;  // a 64-bit division takes as long as a vector
    return row / inner * r.outer + row % inner * r.inner;
  }
  template <class D>
  __device__ const D* logits(int64_t row) const {
    return static_cast<const D*>(input.data) + offset(input, row);
  }
  template <class D>
  __device__ D* gradient_of(int64_t row) const {
    void* const data = const_cast<void*>(gradient.data);
    return data ? static_cast<D*>(data) + offset(gradient, row) : nullptr;
  }
  // The logits lie as their probabilities do.
  template <class X>
  __device__ const X* probabilities_of(const X* logits) const {
    return reinterpret_cast<const X*>(reinterpret_cast<uintptr_t>(logits) + to_probabilities);
  }
  __device__ int64_t class_index(int64_t row) const {
    return indices && row < rows ? indices[row] : -1;
  }
  __device__ T class_weight(int64_t c) const {
    return weight ? static_cast<const T*>(weight)[c] : T(1);
  }
};

// The target of a row.
struct Target {
  int64_t index = -1;   // -1: class probabilities, or not live
  bool live = false;    // whether the row has a loss and a gradient
  bool faulty = false;  // if not live: both are nan; else they are 0, or there is no such row

  Target() = default;
  template <class T>
  __device__ Target(const RowsCall<T>& call, int64_t row, int64_t class_index, const Launch& l) {
    if (row >= call.rows) return;
    live = true;
    if (!call.indices) return;
    index = class_index;
    if (index >= 0 && index < call.classes && index != call.ignore_index) return;
    live = false;
    faulty = index != call.ignore_index;
    if (faulty) report_error(l, Fault::kTargetClass, row, index, call.classes);
    index = -1;
  }
  // The loss and every gradient element of a row that is not live.
  template <class T>
  __device__ T filler() const {
    return faulty ? kNan<T> : T(0);
  }
};

// ---- cross-entropy ------------------------------------------------------------------------------

template <class D, bool kHard>
struct CrossEntropyRow {
  using Element = D;
  using T = Compute<D>;
  using Number = T;
  // Type of the per-row factor. Its rounding error is common to the whole row and visible in
  // float32, hence double.
  using Factor = std::conditional_t<std::is_same_v<D, float>, double, T>;
  using State = SoftmaxState<D, kHard>;
  static constexpr bool kSoft = !kHard;
  static constexpr bool kProbabilities = false;  // see ProbabilitiesRow

  struct Row {
    Target target;
    T target_logit = 0;
    int64_t probabilities_at = 0;  // where the row begins; a kernel sets it, late to save registers
  };
  template <class N>
  using Formula = fusedloss::CrossEntropyRow<N>;
  template <class N>
  using Sums = typename Formula<N>::template State<N>;
  struct Result {
    Sums<T> sums{};
    T excess = 0, target_gap = 0, target_weight = 0, target_gradient = 0;
    T factor = 0, scale = 0;                    // of the slope, rounded
    T factor_residual = 0, scale_residual = 0;  // the rest of them; 0 where T is as wide as Factor
  };

  const RowsCall<T>& call;
  const Formula<T> formula = formula_of<T>(call);
  const Formula<Factor> exact_formula = formula_of<Factor>(call);

  template <class N>
  __device__ static Formula<N> formula_of(const RowsCall<T>& call) {
    if constexpr (kHard) return {true, 0, 1, 1};
    const double classes = static_cast<double>(call.classes);
    return {call.indices != nullptr, call.label_smoothing, classes,
            call.weight_sum ? *call.weight_sum : classes};
  }

  // logits(): where the row's logits begin; called if there is a target class.
  template <class Logits>
  __device__ Row row(int64_t row, int64_t class_index, const Launch& l, Logits&& logits) const {
    Row r{{call, row, class_index, l}};
    const int64_t c = r.target.index;
    if (c >= 0) r.target_logit = widen(logits()[c * call.input.classes]);
    return r;
  }

  // The share of class c in a row's target, times its weight.
  __device__ T target_share(const Row& row, int64_t c) const {
    if constexpr (kHard) return 0;
    const T w = call.class_weight(c);
    if (call.indices) return w;
    const Rows& r = call.probabilities;
    const T y = read<T>(r.data, r.dtype, row.probabilities_at + c * r.classes);
    return formula.target_share(y, w);
  }

  // The logit of a class lies `distance` above part.max; -inf for the target.
  __device__ T add_class(State& part, const Row& row, T q, bool is_target, T distance) const {
    if constexpr (kSoft) {
      const T above = is_target ? row.target_logit - finite_max(part.max) : distance;
      part.weighted_logits = std::fma(q, above, part.weighted_logits);
      part.target_mass += q;
    }
    return exp_for<D>(distance);
  }

  // scale: of the gradient, unless each row has its own upstream gradient.
  __device__ Result finish(const Row& row, State state, double scale, int64_t row_index) const {
    Result result;
    const Target& target = row.target;
    if (!target.live) return result;
    if (target.index >= 0) state.rescale(fmax(state.max, row.target_logit));
    const auto sums = [&](auto n) -> Sums<decltype(n)> {
      return {state.max, static_cast<decltype(n)>(state.sum), state.weighted_logits,
              state.target_mass};
    };
    result.sums = sums(T());
    result.target_weight = target.index >= 0 ? call.class_weight(target.index) : T(1);
    result.target_gap = row.target_logit - state.max;
    const T target_exp = call.indices ? exp_nonpositive(result.target_gap) : T(0);
    using Sum = decltype(state.sum);
    result.excess = static_cast<T>(formula.excess(state.sum, Sum(target_exp)));
    if (call.upstream) scale = read<Factor>(call.upstream, call.upstream_dtype, row_index);
    const auto slope =
        exact_formula.slope(sums(Factor()), Factor(target_exp), Factor(result.target_weight),
                            static_cast<Factor>(scale));
    result.target_gradient = static_cast<T>(slope.target_gradient);
    result.factor = static_cast<T>(slope.factor);
    result.scale = static_cast<T>(slope.scale);
    if constexpr (!std::is_same_v<Factor, T>) {
      result.factor_residual = residual_of(slope.factor, result.factor);
      result.scale_residual = residual_of(slope.scale, result.scale);
    }
    return result;
  }
  __device__ static T residual_of(Factor exact, T rounded) {
    return isfinite(rounded) ? static_cast<T>(exact - rounded) : T(0);
  }

  __device__ T value(const Row& row, const Result& result) const {
    return row.target.live
               ? formula.loss(result.sums, result.excess, result.target_gap, result.target_weight)
               : row.target.template filler<T>();
  }

  // At a class that is not the target and has the share q of it; e is its exponential.
  __device__ T gradient(const Result& result, T q, T e) const {
    if constexpr (kHard) return e * result.factor;
    // e * factor and q * scale nearly cancel, so the second product keeps its digits.
    T rest = -q * result.scale;
    if constexpr (!std::is_same_v<Factor, T>) {
      rest = std::fma(-q, result.scale, e * result.factor_residual - q * result.scale_residual);
    }
    return std::fma(e, result.factor, rest);
  }
};

// Class probabilities that lie as the logits do and have their dtype, and classes without weights:
// rows_contiguous brings the probabilities to shared memory too.
template <class D>
struct ProbabilitiesRow : CrossEntropyRow<D, false> {
  static constexpr bool kProbabilities = true;

  __device__ Compute<D> share_of(Compute<D> probability) const {
    return this->call.formula.target_share(probability, Compute<D>(1));
  }
};

}  // namespace fusedloss::cuda
