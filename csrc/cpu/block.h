// The innermost loop of the pointwise engine: one loss over a run of elements, of the type that it
// is computed in. No torch header: a loss of one's own is compiled with it too, on the machine it
// runs on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../math/sum.h"
#include "../math/vocabulary.h"
#include "run.h"

namespace fusedloss::cpu {

namespace CPU_CAPABILITY {

constexpr int kUnroll = 4;        // registers with sums of their own
constexpr int64_t kShort = 2048;  // elements that are added up as T, before they go to double

// What a loop is compiled for. kFactor: whether there is a factor, or, of a loss of one's own, may
// be: it has loops enough to compile.
template <bool sum, bool value, bool gradient, bool target_gradient, bool factor>
struct Wanted {
  static constexpr bool kSum = sum, kValue = value, kGradient = gradient,
                        kTargetGradient = target_gradient, kFactor = factor;
};

// What every gradient element is multiplied by: most, and what a float loses of it, so that the
// product alone is rounded. That rest has most's sign and is not 0: infinity times it stays
// infinity.
template <class T>
struct Scale {
  T most, rest = 0;

  explicit Scale(double scale) : most(static_cast<T>(scale)) {
    if constexpr (std::is_same_v<T, float>) {
      if (std::abs(double(most)) > std::abs(scale)) most = std::nextafter(most, 0.0f);
      rest = std::isfinite(scale) ? static_cast<T>(scale - most) : most;
      if (rest == 0) rest = most * 0x1p-40f;
    }
  }
};
template <class T>
FUSEDLOSS_HD Vec<T> operator*(Vec<T> slope, Scale<T> scale) {
  if constexpr (std::is_same_v<T, float>) {
    return simd::fmadd(slope, Vec<T>(scale.most), slope * Vec<T>(scale.rest));
  } else {
    return slope * Vec<T>(scale.most);
  }
}

// One SIMD register of elements at i; adds the value to sum.
template <class Loss, class Want, class T>
FUSEDLOSS_HD void step(const Loss& loss, const Run<T>& run, Scale<T> scale, int64_t i,
                       int64_t count, Vec<T>& sum, Mask<T>& valid) {
  const bool full = count == Vec<T>::size();
  const auto load = [&](const T* p) __attribute__((always_inline)) {
    return full ? Vec<T>::loadu(p + i) : Vec<T>::loadu(p + i, count);
  };
  const auto store = [&](const Vec<T>& x, T* p) __attribute__((always_inline)) {
    if (full) {
      x.store(p + i);
    } else {
      x.store(p + i, static_cast<int>(count));
    }
  };
  const Vec<T> x = load(run.input), y = load(run.target);
  auto at = [&]() __attribute__((always_inline)) {
    if constexpr (Loss::kPosWeight) {
      return loss.eval(x, y, load(run.pos_weight));
    } else {
      return loss.eval(x, y);
    }
  }();
  if constexpr (Loss::kUnitInterval && (Want::kSum || Want::kValue)) {
    // x (1 - x) >= 0 just where 0 <= x <= 1.
    const Vec<T> zero(0), one(1);
    const auto x_fits = less_equal(zero, x * (one - x)), y_fits = less_equal(zero, y * (one - y));
    valid = both(valid, both(x_fits, y_fits));
  }
  if (Want::kFactor && (!Loss::kCustom || run.factor)) {
    at = at * load(run.factor);
  }
  if constexpr (Want::kSum) {
    sum = sum + (full ? at.value : Vec<T>::set(Vec<T>(0), at.value, count));
  }
  if constexpr (Want::kValue) store(at.value, run.value);
  if constexpr (Want::kGradient) store(at.gradient(scale), run.gradient);
  if constexpr (Want::kTargetGradient) {
    store(at.target_gradient(scale), run.target_gradient);
  }
}

// By value: what a store might have changed would be loaded, and worked out, again for each
// register.
template <class Want, class Loss, class T>
double block(Loss loss, Run<T> run, double gradient_scale, int64_t n,
             [[maybe_unused]] bool& in_unit) {
  constexpr int64_t kLanes = Vec<T>::size();
  const Scale<T> scale(gradient_scale);
  Mask<T> valid = equal(Vec<T>(0), Vec<T>(0));
  double total[kLanes] = {};
  for (int64_t i = 0; i < n;) {
    Vec<T> sums[kUnroll];
    for (Vec<T>& sum : sums) sum = Vec<T>(0);
    const int64_t end = std::min(n, i + kShort);
    for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) {
#if !defined(CPU_CAPABILITY_DEFAULT) || defined(FUSEDLOSS_NO_TORCH)  // else a register is a loop
#pragma GCC unroll 4
#endif
      for (int u = 0; u < kUnroll; ++u) {
        step<Loss, Want>(loss, run, scale, i + u * kLanes, kLanes, sums[u], valid);
      }
    }
    for (; i < end; i += kLanes) {
      step<Loss, Want>(loss, run, scale, i, std::min(kLanes, end - i), sums[0], valid);
    }
    if constexpr (Want::kSum) {
      for (int u = 1; u < kUnroll; ++u) sums[0] = sums[0] + sums[u];
      T lanes[kLanes];
      sums[0].store(lanes);
      for (int64_t k = 0; k < kLanes; ++k) total[k] += lanes[k];
    }
  }
  if constexpr (Loss::kUnitInterval) in_unit = in_unit && all(valid);
  Sum sum;
  for (double lane : total) sum.add(lane);
  return sum.value();
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
