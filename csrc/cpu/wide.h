// The lanes of a register as doubles, and sums of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../math/sum.h"
#include "../math/vocabulary.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

// The lanes of a register of T as doubles, in as many registers as they take.
template <class T>
struct Wide {
  static constexpr int kParts = sizeof(double) / sizeof(T);
  static constexpr int64_t kLanes = Vec<double>::size();
  Vec<double> part[kParts];

  static FUSEDLOSS_HD Wide load(const double* from) {
    Wide wide;
    unrolled<kParts>([&](auto p) { wide.part[p] = Vec<double>::loadu(from + p * kLanes); });
    return wide;
  }
  FUSEDLOSS_HD void store(double* to) const {
    unrolled<kParts>([&](auto p) { part[p].store(to + p * kLanes); });
  }
  FUSEDLOSS_HD void operator+=(const Wide& other) {
    unrolled<kParts>([&](auto p) { part[p] = part[p] + other.part[p]; });
  }
};

FUSEDLOSS_HD Wide<double> widen(Vec<double> x) { return {{x}}; }
FUSEDLOSS_HD Vec<double> narrow(const Wide<double>& x) { return x.part[0]; }

FUSEDLOSS_HD Wide<float> widen(Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  return {
      {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))}};
#elif defined(CPU_CAPABILITY_AVX2)
  return {
      {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}};
#else
  float lanes[Vec<float>::size()];
  double wide[Vec<float>::size()];
  x.store(lanes);
  std::copy(std::begin(lanes), std::end(lanes), wide);
  return Wide<float>::load(wide);
#endif
}

FUSEDLOSS_HD Vec<float> narrow(const Wide<float>& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.part[0])),
                            _mm512_cvtpd_ps(x.part[1]), 1);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.part[0])),
                              _mm256_cvtpd_ps(x.part[1]), 1);
#else
  double wide[Vec<float>::size()];
  float lanes[Vec<float>::size()];
  x.store(wide);
  std::copy(std::begin(wide), std::end(wide), lanes);
  return Vec<float>::loadu(lanes);
#endif
}

// A sum of registers, in doubles. If T is double, the sum has twice its digits: the rounding error
// of each addition is added up separately (Knuth's two-sum), so that sums of many equal numbers
// stay right.
template <class T>
struct RegisterSum {
  static constexpr int64_t kSize = 2 * Vec<double>::size();  // doubles in memory
  Vec<double> part[2] = {Vec<double>(0), Vec<double>(0)};

  static FUSEDLOSS_HD RegisterSum load(const double* from) {
    return {Vec<double>::loadu(from), Vec<double>::loadu(from + kSize / 2)};
  }
  FUSEDLOSS_HD void store(double* to) const {
    part[0].store(to);
    part[1].store(to + kSize / 2);
  }

  FUSEDLOSS_HD void add(Vec<T> x) {
    if constexpr (std::is_same_v<T, float>) {
      const Wide<T> wide = widen(x);
      unrolled<2>([&](auto p) { part[p] = part[p] + wide.part[p]; });
    } else {
      const Vec<T> sum = part[0] + x, added = sum - part[0];
      part[1] = part[1] + ((part[0] - (sum - added)) + (x - added));
      part[0] = sum;
    }
  }
  // Adds several registers, which need not wait for one another. Up to four floats are added as
  // floats first: equal ones lose nothing, and others two roundings, however many there are.
  template <int kCount>
  FUSEDLOSS_HD void add(const Vec<T> (&x)[kCount]) {
    if constexpr (std::is_same_v<T, float> && kCount > 1) {
      static_assert(kCount == 2 || kCount % 4 == 0);
      const auto sum_of_floats = [&](int u) __attribute__((always_inline)) {
        const Vec<T> pair = x[u] + x[u + 1];
        return widen(kCount == 2 ? pair : pair + (x[u + 2] + x[u + 3]));
      };
      Wide<T> total = sum_of_floats(0);
      unrolled<kCount / 4 - (kCount > 2)>([&](auto u) { total += sum_of_floats(4 * u + 4); });
      unrolled<2>([&](auto p) { part[p] = part[p] + total.part[p]; });
    } else {
      unrolled<kCount>([&](auto u) { add(x[u]); });
    }
  }

  // Each lane's sum.
  FUSEDLOSS_HD Wide<T> lanes() const {
    if constexpr (std::is_same_v<T, float>) {
      return {{part[0], part[1]}};
    } else {
      // The rounding error of an infinite sum means nothing.
      return {{select(part[1] == part[1], part[0] + part[1], part[0])}};
    }
  }
  void add_to(Sum& total) const {
    double all[kSize];
    store(all);
    for (int64_t k = 0; k < kSize; ++k) {
      const bool is_rounding_error = std::is_same_v<T, double> && k >= kSize / 2;
      if (!is_rounding_error || all[k] == all[k]) total.add(all[k]);  // nan beside an infinite sum
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
