// The innermost loop of the pointwise engine: one loss over a run of elements, of the type that it
// is computed in. Custom losses are compiled with it too, on the machine they run on.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../math/eval.h"
#include "../math/sum.h"
#include "pointwise.h"
#include "wide.h"

namespace fusedloss::cpu {

namespace CPU_CAPABILITY {

// What every gradient element is multiplied by: a rounded number and its residual, so that only the
// product is rounded. The residual has the same sign and is not 0: infinity times it stays
// infinity.
template <class T>
struct Scale {
  T rounded, residual = 0;

  explicit Scale(double scale) : rounded(static_cast<T>(scale)) {
    if constexpr (std::is_same_v<T, float>) {
      if (std::abs(double(rounded)) > std::abs(scale)) rounded = std::nextafter(rounded, 0.0f);
      residual = std::isfinite(scale) ? static_cast<T>(scale - rounded) : rounded;
      if (residual == 0) residual = rounded * 0x1p-40f;
    }
  }
};
template <class T>
FUSEDLOSS_HD Vec<T> operator*(Vec<T> slope, Scale<T> scale) {
  if constexpr (std::is_same_v<T, float>) {
    return multiply_add(slope, Vec<T>(scale.rounded), slope * Vec<T>(scale.residual));
  } else {
    return slope * Vec<T>(scale.rounded);
  }
}

// How many registers a loop computes side by side: only one in a custom loss's rare loops, which
// take long to compile, and in every loop of a built-in loss without AVX, where more would change
// the order in which a sum adds floats.
template <class Loss, int outputs>
constexpr int kWidth =
#if defined(CPU_CAPABILITY_DEFAULT)
    Loss::kCustom && !(outputs & kFactor) ? Loss::kUnroll : 1;
#else
    Loss::kCustom && (outputs & kFactor) ? 1 : Loss::kUnroll;
#endif

// Computes the `outputs` of the elements from `begin` to `end`, kStep registers at a time, of which
// the last may hold fewer elements only where kStep is 1. All are loaded before one is stored:
// otherwise none could be computed beside another, and each is one long chain of instructions that
// wait for each other. loss and run are copies: through a reference, members would be loaded again
// after each store.
template <int kStep, int outputs, class Loss, class T>
Sum pass(Loss loss, Run<T> run, Scale<T> scale, int64_t begin, int64_t end, Mask<T>& all_valid) {
  constexpr int64_t kLanes = Vec<T>::size();
  constexpr int kComputed = outputs & kGradients ? Loss::kGradients : outputs & kGradient ? 1 : 0;
  const bool has_factor = (outputs & kFactor) && (!Loss::kCustom || run.factor);
  RegisterSum<T> sum;
  Mask<T> valid = all_valid;
  for (int64_t i = begin; i < end; i += kStep * kLanes) {
    const int64_t count = end - i;
    const bool full = kStep > 1 || count >= kLanes;
    const auto load = [&](const T* p) __attribute__((always_inline)) {
      return full ? Vec<T>::loadu(p) : Vec<T>::loadu(p, count);
    };
    const auto store = [&](const Vec<T>& x, T* p) __attribute__((always_inline)) {
      full ? x.store(p) : x.store(p, count);
    };
    Vec<T> inputs[Loss::kInputs][kStep], factors[kStep];
    unrolled<kStep>([&](auto u) __attribute__((always_inline)) {
      const int64_t k = i + u * kLanes;
      unrolled<Loss::kInputs>(
          [&](auto j) __attribute__((always_inline)) { inputs[j][u] = load(run.inputs[j] + k); });
      if (has_factor) factors[u] = load(run.factor + k);
    });
    Vec<T> value[kStep], gradients[Loss::kGradients][kStep];
    unrolled<kStep>([&](auto u) __attribute__((always_inline)) {
      const auto input = [&](int j) __attribute__((always_inline)) { return inputs[j][u]; };
      auto at = evaluate(loss, input);
      if (has_factor) at = at * factors[u];
      value[u] = at.value;
      unrolled<kComputed>(
          [&](auto j) __attribute__((always_inline)) { gradients[j][u] = at.gradient(scale, j); });
    });
    unrolled<kStep>([&](auto u) __attribute__((always_inline)) {
      const int64_t k = i + u * kLanes;
      if constexpr (Loss::kDomain != Domain::kReal && (outputs & (kSum | kValue))) {
        const auto input = [&](int j) __attribute__((always_inline)) { return inputs[j][u]; };
        valid = logical_and(valid, lies_in_domain<Loss>(input));
      }
      if constexpr (outputs & kValue) store(value[u], run.value + k);
      unrolled<kComputed>([&](auto j) __attribute__((always_inline)) {
        if ((outputs & kGradient) || run.gradients[j]) store(gradients[j][u], run.gradients[j] + k);
      });
    });
    if constexpr (outputs & kSum) {
      if (!full) value[0] = Vec<T>::set(Vec<T>(0), value[0], count);
      sum.add(value);
    }
  }
  all_valid = valid;
  Sum total;
  if constexpr (outputs & kSum) sum.add_to(total);
  return total;
}

template <int outputs, class Loss, class T>
double block(Loss loss, Run<T> run, double gradient_scale, int64_t n,
             [[maybe_unused]] bool& in_domain) {
  const Scale<T> scale(gradient_scale * Loss::kSlopeUnit);
  constexpr int kStep = kWidth<Loss, outputs>;
  Mask<T> valid = Vec<T>(0) == Vec<T>(0);
  const int64_t whole = n - n % (kStep * Vec<T>::size());
  Sum sum = pass<kStep, outputs>(loss, run, scale, 0, whole, valid);
  if (whole < n) sum.add(pass<1, outputs>(loss, run, scale, whole, n, valid));
  // A few floats, added up as floats, can give infinity or nan where their mean is a number.
  if (kStep > 1 && !std::isfinite(sum.value())) {
    sum = pass<1, outputs>(loss, run, scale, 0, n, valid);
  }
  if constexpr (Loss::kDomain != Domain::kReal) in_domain = in_domain && valid.all();
  return sum.value();
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
