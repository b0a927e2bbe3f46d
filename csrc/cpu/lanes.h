// Operations across the lanes of a register: their largest, their sum, and transposes.
#pragma once

#include <algorithm>
#include <iterator>

#include "../math/vocabulary.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

template <class T>
FUSEDLOSS_HD T max_lane(Vec<T> v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_max_ps(v);
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
#endif
  T lanes[Vec<T>::size()];
  v.store(lanes);
  return *std::max_element(std::begin(lanes), std::end(lanes));
}

template <class T>
double sum_of_lanes(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  double sums[4] = {};  // so that additions need not wait
  unrolled<Vec<T>::size()>([&](auto i) { sums[i % 4] += lanes[i]; });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

#if defined(CPU_CAPABILITY_AVX512)
// Transposes 16 registers.
inline void transpose(Vec<float> (&r)[16]) {
  __m512 t[16];
  // Pairs of rows, then pairs of pairs: t[4 i + k] holds rows 4 i to 4 i + 3 of the columns k, 4 +
  // k, 8 + k and 12 + k, each in a quarter.
  unrolled<8>([&](auto i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  unrolled<4>([&](auto i) {
    __m512* const q = t + 4 * i;
    const __m512 a = low(q[0], q[2]), b = high(q[0], q[2]), c = low(q[1], q[3]),
                 d = high(q[1], q[3]);
    q[0] = a, q[1] = b, q[2] = c, q[3] = d;
  });
  // Then the quarters.
  constexpr int kEven = 0x88, kOdd = 0xdd;
  unrolled<4>([&](auto k) {
    const __m512 upper_even = _mm512_shuffle_f32x4(t[k], t[4 + k], kEven),
                 upper_odd = _mm512_shuffle_f32x4(t[k], t[4 + k], kOdd),
                 lower_even = _mm512_shuffle_f32x4(t[8 + k], t[12 + k], kEven),
                 lower_odd = _mm512_shuffle_f32x4(t[8 + k], t[12 + k], kOdd);
    r[k] = _mm512_shuffle_f32x4(upper_even, lower_even, kEven);
    r[4 + k] = _mm512_shuffle_f32x4(upper_odd, lower_odd, kEven);
    r[8 + k] = _mm512_shuffle_f32x4(upper_even, lower_even, kOdd);
    r[12 + k] = _mm512_shuffle_f32x4(upper_odd, lower_odd, kOdd);
  });
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c], r < rows, c < columns.
template <class T>
void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
               int64_t columns) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t r = 0; r < rows; r += 16) {
      for (int64_t c = 0; c < columns; c += 16) {
        const int64_t height = std::min<int64_t>(16, rows - r),
                      width = std::min<int64_t>(16, columns - c);
        Vec<float> tile[16];
        unrolled<16>([&](auto i) {
          tile[i] = i < height ? Vec<float>::loadu(from + (r + i) * from_stride + c, width)
                               : Vec<float>(0.0f);
        });
        transpose(tile);
        unrolled<16>([&](auto i) {
          if (i < width) tile[i].store(to + (c + i) * to_stride + r, height);
        });
      }
    }
    return;
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
