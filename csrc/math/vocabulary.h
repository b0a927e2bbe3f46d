// The functions that a loss is written in. Each stands once for a scalar, on the host and on a GPU,
// and once for a CPU SIMD register, so that one struct in losses.h serves every engine.
//
// The float versions for SIMD registers are our own: each is as accurate as its domain in a loss
// needs, and faster than a general one. Errors are in ULP, the largest over every float of the
// domain on all CPU capabilities, by tests/vocabulary.cpp; tests/test_vocabulary.py holds them.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define FUSEDLOSS_HD __host__ __device__ __forceinline__
#else
#define FUSEDLOSS_HD inline __attribute__((always_inline))
#endif

namespace fusedloss {

// ---- scalars ------------------------------------------------------------------------------------

template <class T>
FUSEDLOSS_HD T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
template <class T>
FUSEDLOSS_HD bool logical_and(T a, T b) {
  return a && b;
}
// For a register: in all lanes.
FUSEDLOSS_HD bool all_zero(float x) { return x == 0; }
FUSEDLOSS_HD bool all_zero(double x) { return x == 0; }
// x bounded; nan stays nan, as in torch.clamp. The bounds are numbers.
template <class T>
FUSEDLOSS_HD T clamp_min(T x, T low) {
  return x < low ? low : x;
}
template <class T>
FUSEDLOSS_HD T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}
FUSEDLOSS_HD float abs(float x) { return ::fabsf(x); }
FUSEDLOSS_HD double abs(double x) { return ::fabs(x); }
// a b + c, rounded once where the hardware has an instruction for it.
FUSEDLOSS_HD float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
FUSEDLOSS_HD double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
FUSEDLOSS_HD float neg_abs(float x) { return -::fabsf(x); }
FUSEDLOSS_HD double neg_abs(double x) { return -::fabs(x); }
FUSEDLOSS_HD float exp_nonpositive(float x) { return ::expf(x); }
FUSEDLOSS_HD double exp_nonpositive(double x) { return ::exp(x); }
FUSEDLOSS_HD float log_finite(float x) { return ::logf(x); }
FUSEDLOSS_HD double log_finite(double x) { return ::log(x); }
FUSEDLOSS_HD float log1p_finite(float x) { return ::log1pf(x); }
FUSEDLOSS_HD float log1p_unit(float x) { return ::log1pf(x); }
FUSEDLOSS_HD double log1p_unit(double x) { return ::log1p(x); }
template <class T>
FUSEDLOSS_HD T ratio(T x, T y, T) {
  return x / y;
}
FUSEDLOSS_HD double log1p_finite(double x) { return ::log1p(x); }

}  // namespace fusedloss

// ---- CPU SIMD registers -------------------------------------------------------------------------
// Compiled once for each CPU capability: the inline namespace keeps the versions apart at link
// time.
#if defined(CPU_CAPABILITY)
#include "register.h"

namespace fusedloss {
inline namespace CPU_CAPABILITY {

template <class T>
FUSEDLOSS_HD Mask<T> logical_and(Mask<T> a, Mask<T> b) {
  return a & b;
}
template <class T>
FUSEDLOSS_HD bool all_zero(Vec<T> x) {
  return (x == Vec<T>(0)).all();
}
// x bounded; nan stays nan.
template <class T>
FUSEDLOSS_HD Vec<T> clamp_min(Vec<T> x, Vec<T> low) {
  return max(low, x);
}
template <class T>
FUSEDLOSS_HD Vec<T> clamp(Vec<T> x, Vec<T> low, Vec<T> high) {
  return min(high, max(low, x));
}
template <class T>
FUSEDLOSS_HD Vec<T> neg_abs(Vec<T> x) {
  return x | Vec<T>(T(-0.0));
}
template <class T>
FUSEDLOSS_HD Vec<T> abs(Vec<T> x) {
  return Vec<T>::from_bits(x.bits() & ~Vec<T>(T(-0.0)).bits());
}

// x / y, from reciprocal = 1 / y, which a loop computes once: a product and one correction. Domain
// |x| <= y, y >= 2^-128, and nan. Error 0.50 with fused multiply-add, 1.22 without; 1.26 where
// |x| < 2^-100.
template <class T>
FUSEDLOSS_HD Vec<T> ratio(Vec<T> x, Vec<T> y, Vec<T> reciprocal) {
  const Vec<T> near = x * reciprocal;
  return multiply_add(multiply_add(near, -y, x), reciprocal, near);
}

namespace detail {

// c[0] + x c[1] + x^2 c[2] + ..., by Horner's rule in x^2 over pairs: half as long a chain.
template <class T, int N>
FUSEDLOSS_HD Vec<T> polynomial(Vec<T> x, Vec<T> x2, const T (&c)[N]) {
  const auto pair = [&](int i) {
    return i + 1 < N ? multiply_add(x, Vec<T>(c[i + 1]), Vec<T>(c[i])) : Vec<T>(c[i]);
  };
  int i = (N - 1) / 2 * 2;
  Vec<T> sum = pair(i);
  while ((i -= 2) >= 0) sum = multiply_add(sum, x2, pair(i));
  return sum;
}

// Adding this rounds to an integer and leaves it in the low bits of the mantissa.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2Hi = 0.693145751953125f;  // ln 2 in 15 bits: its product with n is exact
constexpr float kLn2Lo = 1.42860682030941723e-6f;
constexpr float kMinNormal = 1.17549435e-38f;

// 2^n for n in [-126, 127], or for the integer that adding kRounder to such an n leaves.
FUSEDLOSS_HD Vec<float> power_of_two(Vec<int32_t> n) {
  return cast<float>((n + Vec<int32_t>(127)) << Vec<int32_t>(23));
}

// t = 2^n (1 + f) > 0 with f in [-1/4, 1/2], so that f is exact; and n ln 2 + f = high + low, but
// for a part of n ln 2 that log_of() adds.
struct Split {
  Vec<float> exponent, f, high, low;  // exponent: n, in units of kExponentUnit
  Vec<float> unit;                    // 2^(1 - n), of a normal t
};
#if defined(CPU_CAPABILITY_AVX512)
constexpr float kExponentUnit = 1;
#else
constexpr float kExponentUnit = 1.0f / (1 << 23);
#endif
FUSEDLOSS_HD Split combine(Vec<float> exponent, Vec<float> significand, Vec<float> unit) {
  const Vec<float> f = significand - Vec<float>(1.0f);
  const Vec<float> high = multiply_add(exponent, Vec<float>(kLn2Hi * kExponentUnit), f);
  // |n ln 2| > |f| unless n is 0: so this is all that the sum loses.
  const Vec<float> low = f - multiply_add(exponent, Vec<float>(-kLn2Hi * kExponentUnit), high);
  return {exponent, f, high, low, unit};
}

#if defined(CPU_CAPABILITY_AVX512)
FUSEDLOSS_HD Split split(Vec<float> t) {
  const Vec<float> significand = _mm512_getmant_ps(t, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  const Vec<float> n = Vec<float>(_mm512_getexp_ps(t)) - Vec<float>(_mm512_getexp_ps(significand));
  return combine(n, significand, power_of_two(cast<int32_t>(Vec<float>(kRounder + 1) - n)));
}
// The same for subnormals too; nan for nan and for t < 0.
FUSEDLOSS_HD Split split_any(Vec<float> t) { return split(t); }
#else
// `less` is subtracted from the exponent.
FUSEDLOSS_HD Split split(Vec<float> t, Vec<float> less = Vec<float>(0.0f)) {
  using Int = Vec<int32_t>;
  const Int bits = cast<int32_t>(t) - Int(0x3f400000);
  const Int exponent = bits & Int(static_cast<int32_t>(0xff800000));
  return combine(convert<float>(exponent) - less, cast<float>(cast<int32_t>(t) - exponent),
                 cast<float>(Int(0x40000000) - exponent));
}
FUSEDLOSS_HD Split split_any(Vec<float> t) {
  const auto tiny = t < Vec<float>(kMinNormal);
  return split(select(tiny, t * Vec<float>(8388608.0f), t),
               select(tiny, Vec<float>(23 / kExponentUnit), t - t));
}
#endif

// f^3 q(f) + addend, where log(1 + f) = f - f^2 / 2 + f^3 q(f), q minimax on [-1/4, 1/2].
FUSEDLOSS_HD Vec<float> log_tail(Vec<float> f, Vec<float> addend) {
  static constexpr float q[] = {0.3333334f,   -0.25000146f, 0.1999954f,   -0.16656008f, 0.1427916f,
                                -0.12724303f, 0.116690524f, -0.09064542f, 0.037402455f};
  const Vec<float> f2 = f * f;
  return multiply_add(f2 * f, polynomial(f, f2, q), addend);
}

// log(t), low being t's, or more where more than t is meant.
FUSEDLOSS_HD Vec<float> log_of(const Split& t, Vec<float> low) {
  low = multiply_add(t.exponent, Vec<float>(kLn2Lo * kExponentUnit), log_tail(t.f, low));
  return t.high + multiply_add(t.f, Vec<float>(-0.5f) * t.f, low);
}

#if defined(CPU_CAPABILITY_AVX512)
// The same where t may be 0 or infinity: high is what is meant there.
FUSEDLOSS_HD Vec<float> log_of_any(const Split& t, Vec<float> low) {
  constexpr int kInfinities = 0x08 | 0x10;
  const __mmask16 ends = _mm512_fpclass_ps_mask(t.high, kInfinities);
  return _mm512_mask_mov_ps(log_of(t, low), ends, t.high);
}
#endif

// x = n ln 2 + r with |r| <= ln(2) / 2. |x| < 2^15, or nan.
struct Reduced {
  Vec<float> exponent;  // n,
  Vec<int32_t> bits;    // and of n + kRounder
  Vec<float> r_expm1;   // e^r - 1
  FUSEDLOSS_HD Vec<int32_t> n() const { return bits - Vec<int32_t>(0x4b400000); }
};
FUSEDLOSS_HD Reduced reduce_exp(Vec<float> x) {
  const Vec<float> shifted = multiply_add(x, Vec<float>(kLog2E), Vec<float>(kRounder));
  const Vec<float> n = shifted - Vec<float>(kRounder);
  Vec<float> r = multiply_add(n, Vec<float>(-kLn2Hi), x);
  r = multiply_add(n, Vec<float>(-kLn2Lo), r);
  // e^r = 1 + r + r^2 q(r), q minimax on [-ln(2) / 2, ln(2) / 2].
  static constexpr float q[] = {0.49999994f, 0.16666521f, 0.041668255f, 0.008368663f,
                                0.0013821468f};
  const Vec<float> r2 = r * r;
  return {n, cast<int32_t>(shifted), multiply_add(r2, polynomial(r, r2, q), r)};
}

}  // namespace detail

// e^x. Domain [-inf, 0] and nan. Error 1.03; below -87.33, where e^x < 1.01 * 2^-126, it is 0.
FUSEDLOSS_HD Vec<float> exp_nonpositive(Vec<float> x) {
  using namespace detail;
  const Vec<float> low(-87.33f);
#if defined(CPU_CAPABILITY_AVX512)
  // x = n ln 2 + r with n in sixteenths: 2^floor(n), by the instruction's own rounding, times one
  // of 16 powers, times e^r = 1 + r + r^2 (q0 + q1 r), minimax on [-ln(2) / 32, ln(2) / 32].
  static constexpr float powers[] = {1.0f,        1.0442737f, 1.0905077f, 1.1387886f,
                                     1.1892071f,  1.2418578f, 1.2968396f, 1.3542556f,
                                     1.41421354f, 1.4768262f, 1.5422108f, 1.6104903f,
                                     1.6817929f,  1.7562522f, 1.8340081f, 1.9152066f};
  const Vec<float> rounder(kRounder / 16);
  const Vec<float> shifted = multiply_add(x, Vec<float>(kLog2E), rounder);
  const Vec<float> n = shifted - rounder;
  Vec<float> r = multiply_add(n, Vec<float>(-kLn2Hi), x);
  r = multiply_add(n, Vec<float>(-kLn2Lo), r);
  const Vec<float> q = multiply_add(r, Vec<float>(0.1666704f), Vec<float>(0.5000162f));
  const Vec<float> r_expm1 = multiply_add(r * r, q, r);
  const Vec<float> power =
      _mm512_permutexvar_ps(_mm512_castps_si512(shifted), Vec<float>::loadu(powers));
  // nan, as e^r - 1 is, where x is nan.
  const __mmask16 counts = _mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(counts, multiply_add(power, r_expm1, power), n);
#else
  const Reduced e = reduce_exp(x);
  const Vec<float> scale = power_of_two(e.bits);
  return select(x < low, Vec<float>(0.0f), multiply_add(e.r_expm1, scale, scale));
#endif
}

// Natural logarithm. Domain [0, FLT_MAX] with subnormals, and nan; with AVX-512 every number.
// Error 0.76 with fused multiply-add, 0.85 without.
FUSEDLOSS_HD Vec<float> log_finite(Vec<float> x) {
  using namespace detail;
#if defined(CPU_CAPABILITY_AVX512)
  const Split t = split(x);
  return log_of_any(t, t.low);
#else
  if (__builtin_expect((x >= Vec<float>(kMinNormal)).all(), 1)) {
    const Split t = split(x);
    return log_of(t, t.low);
  }
  const Split t = split_any(x);
  return select(x == Vec<float>(0.0f), Vec<float>(-INFINITY), log_of(t, t.low));
#endif
}

// log(1 + x). Domain [-1, FLT_MAX] and nan; with AVX-512 every number. Error 0.76 with fused
// multiply-add, 0.86 without.
FUSEDLOSS_HD Vec<float> log1p_finite(Vec<float> x) {
  const Vec<float> one(1.0f), sum = one + x;
  const detail::Split t = detail::split(sum);
  // What the sum lost, in half units of 1 + f, joins with the slope of log(1 + f): 1 and a minimax
  // quadratic, which may be off twice as far where f < 0 and half as much is lost.
  const Vec<float> lost = (x - (sum - one)) * t.unit;  // nan for nan
  const Vec<float> poly = multiply_add(t.f, Vec<float>(0.39996278f), Vec<float>(-0.52219665f));
  Vec<float> low = multiply_add(lost, Vec<float>(0.5f), t.low);
  low = multiply_add(lost * t.f, poly, low);
#if defined(CPU_CAPABILITY_AVX512)
  return detail::log_of_any(t, low);
#else
  const Vec<float> result = detail::log_of(t, low);
  return select(sum == Vec<float>(0.0f), Vec<float>(-INFINITY), result);
#endif
}

#if defined(CPU_CAPABILITY_AVX512)
// log(1 + x). Domain [0, 1] and nan. Error 1.32.
FUSEDLOSS_HD Vec<float> log1p_unit(Vec<float> x) {
  // 1 + x = (1 + r) / c, c from a table by the nearest of 16 to x: -log(c) + log(1 + r). Near 0 x
  // is r. Each c is a float near 1 / (1 + i / 15) whose logarithm is almost a float as well.
  static constexpr float c[] = {1.0f,        0.9374727f,  0.8823526f, 0.83336246f,
                                0.7895014f,  0.7499643f,  0.7142634f, 0.6818537f,
                                0.65216404f, 0.62499994f, 0.6000357f, 0.5769228f,
                                0.5555556f,  0.53572893f, 0.5172673f, 0.5000309f};
  static constexpr float minus_log_c[] = {0.0f,        0.06456764f, 0.12516354f, 0.1822866f,
                                          0.23635364f, 0.28772968f, 0.3365035f,  0.38294014f,
                                          0.42745915f, 0.47000372f, 0.5107661f,  0.55004686f,
                                          0.5877866f,  0.624127f,   0.65919554f, 0.69308543f};
  // log(1 + r) = r + r^2 q(r) for r in [-0.032, 0.034], q minimax over all x.
  static constexpr float q[] = {-0.50000143f, 0.33351177f, -0.24832563f};
  const __m512i nearest =
      _mm512_castps_si512(multiply_add(x, Vec<float>(15.0f), Vec<float>(detail::kRounder)));
  const Vec<float> factor = _mm512_permutexvar_ps(nearest, Vec<float>::loadu(c));
  const Vec<float> r = multiply_add(x, factor, factor - Vec<float>(1.0f));
  // Not by r^2, which may be subnormal, and so slow.
  Vec<float> poly = multiply_add(r, Vec<float>(q[2]), Vec<float>(q[1]));
  poly = r * multiply_add(r, poly, Vec<float>(q[0]));
  return Vec<float>(_mm512_permutexvar_ps(nearest, Vec<float>::loadu(minus_log_c))) +
         multiply_add(poly, r, r);
}
#else
// log(1 + x). Domain [0, 1] and nan. Error 1.97.
FUSEDLOSS_HD Vec<float> log1p_unit(Vec<float> x) {
  // = 2 atanh(s) = 2 s + s^3 q(s^2), s = x / (2 + x) in [0, 1/3], q minimax there.
  static constexpr float q[] = {0.66666675f, 0.3999889f, 0.28616595f, 0.21430741f, 0.24289557f};
  const Vec<float> s = x / (Vec<float>(2.0f) + x);
  // Below 2^-15 only 2 s counts; and subnormal numbers, which are slow, are not met.
  const Vec<float> bounded = clamp_min(s, Vec<float>(0x1p-15f));
  const Vec<float> s2 = bounded * bounded;
  return multiply_add(s2 * s, detail::polynomial(s2, s2 * s2, q), s + s);
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss

#include "double.h"
#endif  // CPU_CAPABILITY
