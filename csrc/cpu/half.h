// The two-byte floats, and their conversion to float and back: to the nearest, ties to even, as in
// torch; nan stays nan.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../math/vocabulary.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t b = std::bit_cast<uint32_t>(x);
    bits = static_cast<uint16_t>(x == x ? (b + 0x7fff + (b >> 16 & 1)) >> 16 : 0x7fc0);
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

// By hand, neither direction forms a subnormal float, which a CPU may have been told to take for 0.
struct Half {
  uint16_t bits;

  Half() = default;
#if defined(__F16C__)
  explicit Half(float x) : bits(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)) {}
  operator float() const { return _cvtsh_ss(bits); }
#else
  explicit Half(float x) {
    const uint32_t all = std::bit_cast<uint32_t>(x), b = all & 0x7fffffff;
    uint32_t half;
    if (b > 0x7f800000) {  // nan
      half = 0x7e00;
    } else if (b >=
               0x38800000) {  // 2^-14, the smallest normal number; what is too large is infinite
      half = std::min<uint32_t>((b - 0x38000000 + 0xfff + (b >> 13 & 1)) >> 13, 0x7c00);
    } else {  // the last digit of a float near 1/2 is 2^-24, the smallest number
      half = std::bit_cast<uint32_t>(std::bit_cast<float>(b) + 0.5f) - 0x3f000000;
    }
    bits = static_cast<uint16_t>(half | (all >> 16 & 0x8000));
  }
  operator float() const {
    const uint32_t exponent = bits & 0x7c00, b = (bits & 0x7fff) << 13;
    const float size =
        exponent == 0 ? static_cast<float>(bits & 0x3ff) * 0x1p-24f
                      : std::bit_cast<float>(b + (exponent == 0x7c00 ? 0x70000000 : 0x38000000));
    return std::copysign(size, bits & 0x8000 ? -1.0f : 1.0f);
  }
#endif
};

// n of them, as far as whole registers go; gives how far that is. The caller converts the rest.
template <class H>
int64_t widen_registers([[maybe_unused]] const H* in, [[maybe_unused]] int64_t n,
                        [[maybe_unused]] float* out) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  for (; i + 16 <= n; i += 16) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    if constexpr (std::is_same_v<H, BFloat16>) {
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
      _mm512_storeu_ps(out + i, _mm512_castsi512_ps(wide));
    } else {
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(h));
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    if constexpr (std::is_same_v<H, BFloat16>) {
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
      _mm256_storeu_ps(out + i, _mm256_castsi256_ps(wide));
    } else {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
    }
  }
#endif
  return i;
}

#if defined(CPU_CAPABILITY_AVX512)
// The bits of a bf16 in each lane.
inline __m512i bf16_lanes(const float* p) {
  const __m512 x = _mm512_loadu_ps(p);
  const __m512i b = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)), b);
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), _mm512_set1_epi32(0x7fc0),
                                 _mm512_srli_epi32(rounded, 16));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline __m256i bf16_lanes(const float* p) {
  const __m256 x = _mm256_loadu_ps(p);
  const __m256i b = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)), b);
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
  return _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), _mm256_srli_epi32(rounded, 16), number);
}
#endif

template <class H>
int64_t narrow_registers([[maybe_unused]] const float* in, [[maybe_unused]] int64_t n,
                         [[maybe_unused]] H* out) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)
  // The pack instruction works within quarters of a register: this puts them in order.
  const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  for (; i + 32 <= n; i += 32) {
    if constexpr (std::is_same_v<H, BFloat16>) {
      const __m512i both = _mm512_packus_epi32(bf16_lanes(in + i), bf16_lanes(in + i + 16));
      _mm512_storeu_si512(out + i, _mm512_permutexvar_epi64(order, both));
    } else {
      for (int64_t k : {i, i + 16}) {
        const __m512 x = _mm512_loadu_ps(in + k);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      }
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  for (; i + 16 <= n; i += 16) {
    if constexpr (std::is_same_v<H, BFloat16>) {
      const __m256i both = _mm256_packus_epi32(bf16_lanes(in + i), bf16_lanes(in + i + 8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm256_permute4x64_epi64(both, 0xd8));
    } else {
      for (int64_t k : {i, i + 8}) {
        const __m256 x = _mm256_loadu_ps(in + k);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k),
                         _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      }
    }
  }
#endif
  return i;
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
