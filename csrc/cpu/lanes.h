// A register's lanes, one by one: as doubles, and by the class that each of them wants.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// A class index a lane, in registers as large as those of T.
template <class T>
using Index = at::vec::int_same_size_t<T>;

#if defined(CPU_CAPABILITY_AVX512)
FUSEDLOSS_HD Mask<float> same(Vec<int32_t> a, Vec<int32_t> b) {
  return {_mm512_cmpeq_epi32_mask(a, b)};
}
FUSEDLOSS_HD Mask<double> same(Vec<int64_t> a, Vec<int64_t> b) {
  return {_mm512_cmpeq_epi64_mask(a, b)};
}
#else
FUSEDLOSS_HD Mask<float> same(Vec<int32_t> a, Vec<int32_t> b) { return simd::cast<float>(a == b); }
FUSEDLOSS_HD Mask<double> same(Vec<int64_t> a, Vec<int64_t> b) {
  return simd::cast<double>(a == b);
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
