// The two-byte floats, and their conversion to float and back: to the nearest, ties to even, as in
// torch; nan stays nan.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

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

// Without F16C, neither direction forms a subnormal float: the CPU may be set to treat it as 0.
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
    } else if (b >= 0x38800000) {  // 2^-14, the smallest normal number
      // A number that is too large becomes infinite.
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

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define FUSEDLOSS_HALF_REGISTERS

// Integers as intrinsics have them.
using Integers = Vec<long long>;

template <class H>
FUSEDLOSS_HD Vec<float> widen_register(const H* in) {
  typedef long long Type __attribute__((vector_size(kVecBytes / 2)));
  Type bits;
  std::memcpy(&bits, in, sizeof(bits));
  if constexpr (std::is_same_v<H, BFloat16>) {
    const Integers lanes = FUSEDLOSS_INTRINSIC(cvtepu16_epi32)(bits);
    return cast<float>(cast<int32_t>(lanes) << Vec<int32_t>(16));
  } else {
    return FUSEDLOSS_INTRINSIC(cvtph_ps)(bits);
  }
}

// The bits of a bf16 in each 32-bit lane.
FUSEDLOSS_HD Integers bf16_lanes(Vec<float> x) {
  using Bits = Vec<uint32_t>;
  const Bits bits = cast<uint32_t>(x), odd = (bits >> Bits(16)) & Bits(1);
  const Bits rounded = (odd + Bits(0x7fff) + bits) >> Bits(16);
  return cast<long long>(select(x == x, cast<float>(rounded), cast<float>(Bits(0x7fc0))));
}

template <class H>
FUSEDLOSS_HD void narrow_two_registers(const float* in, H* out) {
  const auto x = Vec<float>::loadu(in), y = Vec<float>::loadu(in + Vec<float>::size());
  if constexpr (std::is_same_v<H, BFloat16>) {
    const auto both = FUSEDLOSS_INTRINSIC(packus_epi32)(bf16_lanes(x), bf16_lanes(y));
    // The pack instruction works within quarters of a register: this puts them in order.
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    Integers(_mm512_permutexvar_epi64(order, both)).store(out);
#else
    Integers(_mm256_permute4x64_epi64(both, 0xd8)).store(out);
#endif
  } else {
    constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const auto first = FUSEDLOSS_INTRINSIC(cvtps_ph)(x, kRounding);
    const auto second = FUSEDLOSS_INTRINSIC(cvtps_ph)(y, kRounding);
    std::memcpy(out, &first, sizeof(first));
    std::memcpy(out + Vec<float>::size(), &second, sizeof(second));
  }
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
