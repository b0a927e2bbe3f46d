// The pointwise engine: any loss of losses.h over any operands, on the CPU.
//
// Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements. Work
// goes in fixed chunks, each summed on its own and the sums added in order, so the result has the
// same bits for any number of threads.
#include <ATen/Parallel.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "../math/losses.h"
#include "../math/sum.h"
#include "staging.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 32768;  // elements a task: ATen's own grain
constexpr int64_t kBlock = 2048;   // elements a run: a few of these fit the L1 cache
constexpr int kUnroll = 4;         // registers with sums of their own

// Pointers of one run. factor multiplies the value and the slope; null: 1.
template <class T>
struct Run {
  const T *input, *target, *pos_weight, *factor;
  T* value;
  T* gradient;
};

// One SIMD register of elements at i; adds the value to sum.
template <class Loss, bool kSum, bool kValue, bool kGradient, bool kFactor, class T>
FUSEDLOSS_HD void step(const Loss& loss, const Run<T>& run, T scale, int64_t i, int64_t count,
                       Vec<T>& sum, Vec<T>& valid) {
  const bool full = count == Vec<T>::size();
  const auto load = [&](const T* p) {
    return full ? Vec<T>::loadu(p + i) : Vec<T>::loadu(p + i, count);
  };
  const Vec<T> x = load(run.input), y = load(run.target);
  Eval<Vec<T>> at;
  if constexpr (Loss::kPosWeight) {
    at = loss.eval(x, y, load(run.pos_weight));
  } else {
    at = loss.eval(x, y);
  }
  if constexpr (Loss::kUnitInterval && (kSum || kValue)) {
    // x (1 - x) >= 0 just where 0 <= x <= 1.
    const Vec<T> zero(0), one(1);
    valid = valid & both(x * (one - x) >= zero, y * (one - y) >= zero);
  }
  if constexpr (kFactor) {
    const Vec<T> factor = load(run.factor);
    at.value = at.value * factor;
    at.slope = at.slope * factor;
  }
  if constexpr (kSum) {
    sum = sum + (full ? at.value : Vec<T>::set(Vec<T>(0), at.value, count));
  }
  if constexpr (kValue) at.value.store(run.value + i, static_cast<int>(count));
  if constexpr (kGradient) {
    const Vec<T> gradient = at.slope * Vec<T>(scale);
    if (full) {
      gradient.store(run.gradient + i);
    } else {
      gradient.store(run.gradient + i, static_cast<int>(count));
    }
  }
}

// By value: what a store might have changed would be loaded, and worked out, again for each
// register.
template <class Loss, bool kSum, bool kValue, bool kGradient, bool kFactor, class T>
double block(Loss loss, Run<T> run, T scale, int64_t n, bool& in_unit) {
  constexpr int64_t kLanes = Vec<T>::size();
  Vec<T> sums[kUnroll];
  for (Vec<T>& sum : sums) sum = Vec<T>(0);
  Vec<T> valid = Vec<T>(0) == Vec<T>(0);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
#if !defined(CPU_CAPABILITY_DEFAULT)  // there a register is a loop itself
#pragma GCC unroll 4
#endif
    for (int u = 0; u < kUnroll; ++u) {
      step<Loss, kSum, kValue, kGradient, kFactor>(loss, run, scale, i + u * kLanes, kLanes,
                                                   sums[u], valid);
    }
  }
  for (; i < n; i += kLanes) {
    step<Loss, kSum, kValue, kGradient, kFactor>(loss, run, scale, i, std::min(kLanes, n - i),
                                                 sums[0], valid);
  }
  if constexpr (Loss::kUnitInterval) in_unit = in_unit && valid.zero_mask() == 0;
  if constexpr (!kSum) return 0;
  for (int u = 1; u < kUnroll; ++u) sums[0] = sums[0] + sums[u];
  T lanes[kLanes];
  sums[0].store(lanes);
  double total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

template <class Loss, bool kSum, bool kValue, bool kGradient, bool kFactor, class T>
double chunk(const Pointwise& call, const Loss& loss, int64_t begin, int64_t end, bool& in_unit) {
  // Where an operand is staged; left unread by operands that lie in memory as the engine wants.
  T input[kBlock], target[kBlock], pos_weight[kBlock], weight[kBlock], upstream[kBlock];
  T value[kBlock], gradient[kBlock];
  const bool value_direct = kValue && is_dtype<T>(call.value_dtype);
  const bool gradient_direct = kGradient && is_dtype<T>(call.gradient_dtype);
  double sum = 0;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const auto staged = [&](const Operand& op, T* scratch) -> const T* {
      return op.data ? stage(op, call.space, i, n, scratch) : nullptr;
    };
    Run<T> run{staged(call.input, input),
               staged(call.target, target),
               staged(call.pos_weight, pos_weight),
               nullptr,
               value,
               gradient};
    if constexpr (kFactor) {
      run.factor = staged(call.weight, weight);
      if (const T* u = staged(call.upstream, upstream)) {
        if (run.factor) {
          for (int64_t k = 0; k < n; ++k) upstream[k] = run.factor[k] * u[k];
          u = upstream;
        }
        run.factor = u;
      }
    }
    if (value_direct) run.value = static_cast<T*>(call.value) + i;
    if (gradient_direct) run.gradient = static_cast<T*>(call.gradient) + i;
    sum += block<Loss, kSum, kValue, kGradient, kFactor>(loss, run, static_cast<T>(call.scale), n,
                                                         in_unit);
    if (kValue && !value_direct) narrow(value, n, call.value_dtype, call.value, i, 1);
    if (kGradient && !gradient_direct)
      narrow(gradient, n, call.gradient_dtype, call.gradient, i, 1);
  }
  return sum;
}

template <class Loss, bool kSum, bool kValue, bool kGradient, bool kFactor, class T>
PointwiseResult run(const Pointwise& call) {
  const Loss loss{{call.parameter}};
  PointwiseResult result;
  const int64_t chunks = (call.numel + kChunk - 1) / kChunk;
  if (chunks == 1) {
    result.sum =
        chunk<Loss, kSum, kValue, kGradient, kFactor, T>(call, loss, 0, call.numel, result.in_unit);
    return result;
  }
  std::vector<double> sums(chunks);
  std::vector<char> in_unit(chunks, 1);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      bool ok = true;
      sums[c] = chunk<Loss, kSum, kValue, kGradient, kFactor, T>(
          call, loss, c * kChunk, std::min(call.numel, (c + 1) * kChunk), ok);
      in_unit[c] = ok;
    }
  });
  Sum sum;
  for (int64_t c = 0; c < chunks; ++c) {
    sum.add(sums[c]);
    result.in_unit = result.in_unit && in_unit[c];
  }
  result.sum = sum.value();
  return result;
}

template <class Loss, class T>
PointwiseResult choose(const Pointwise& call) {
  const bool factor = call.weight.data || call.upstream.data;
  const auto with_factor = [&](auto sum, auto value, auto gradient) {
    return factor ? run<Loss, sum(), value(), gradient(), true, T>(call)
                  : run<Loss, sum(), value(), gradient(), false, T>(call);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (call.want_sum) return call.gradient ? with_factor(yes, no, yes) : with_factor(yes, no, no);
  return call.value ? with_factor(no, yes, no) : with_factor(no, no, yes);
}

}  // namespace

PointwiseResult pointwise(const Pointwise& call) {
#define FUSEDLOSS_RUN(NAME, LOSS) \
  if (call.loss == NAME)          \
    return call.compute_in_double ? choose<LOSS, double>(call) : choose<LOSS, float>(call);
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_RUN)
#undef FUSEDLOSS_RUN
  throw std::invalid_argument("fusedloss: no pointwise loss is named " + std::string(call.loss));
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
