// The functions of floats, for SIMD registers; vocabulary.h includes this. The functions for a
// loss's usual domain come first; they are faster. Those that follow take every number, and treat
// nan, infinities, zeros and subnormals as std does.
#pragma once

#include "register.h"

namespace fusedloss {
inline namespace CPU_CAPABILITY {
namespace detail {

using Int = Vec<int32_t>;

// Adding this rounds to an integer and leaves it in the low bits of the mantissa.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2Hi = 0.693145751953125f;  // ln 2 in 15 bits: its product with n is exact
constexpr float kLn2Lo = 1.42860682030941723e-6f;
constexpr float kMinNormal = 1.17549435e-38f;

// 2^n for n in [-126, 127], or for the integer that adding kRounder to such an n leaves.
FUSEDLOSS_HD Vec<float> power_of_two(Int n) { return cast<float>((n + Int(127)) << Int(23)); }

// t = 2^n (1 + f) > 0 with f in [-1/4, 1/2], so that f is exact; n ln 2 + f = high + low, except
// for the part of n ln 2 that log_of() adds.
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

// log(t), where low is t.low. If the argument is a little more than t, low includes what that adds
// to the logarithm.
FUSEDLOSS_HD Vec<float> log_of(const Split& t, Vec<float> low) {
  low = multiply_add(t.exponent, Vec<float>(kLn2Lo * kExponentUnit), log_tail(t.f, low));
  return t.high + multiply_add(t.f, Vec<float>(-0.5f) * t.f, low);
}

#if defined(CPU_CAPABILITY_AVX512)
// The same for a t that may be 0 or infinity: there the result is t.high.
FUSEDLOSS_HD Vec<float> log_of_any(const Split& t, Vec<float> low) {
  constexpr int kInfinities = 0x08 | 0x10;
  const __mmask16 ends = _mm512_fpclass_ps_mask(t.high, kInfinities);
  return _mm512_mask_mov_ps(log_of(t, low), ends, t.high);
}
#endif

// x = n ln 2 + r with |r| <= ln(2) / 2. |x| < 2^15, or nan.
struct Reduced {
  Vec<float> exponent;  // n,
  Int bits;             // and of n + kRounder
  Vec<float> r_expm1;   // e^r - 1
  FUSEDLOSS_HD Int n() const { return bits - Int(0x4b400000); }
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
  // False where x < low; true where x is nan, for which e^r - 1 is nan.
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
  // The sum's rounding error, in half units of 1 + f, counts times the slope of log(1 + f): 1 and a
  // minimax quadratic, which may be twice as far off where f < 0, since half as much is lost there.
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
  // Not multiplied by r^2: that may be subnormal, which is slow.
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
  // Below 2^-15 only 2 s counts. The bound keeps s2 from being subnormal, which would be slow.
  const Vec<float> bounded = clamp_min(s, Vec<float>(0x1p-15f));
  const Vec<float> s2 = bounded * bounded;
  return multiply_add(s2 * s, detail::polynomial(s2, s2 * s2, q), s + s);
}
#endif

// ---- every number -----------------------------------------------------------------------------

namespace detail {

// Below these bounds e^x is 0, and above them it is infinite.
FUSEDLOSS_HD Reduced reduce_any(Vec<float> x) {
  return reduce_exp(clamp(x, Vec<float>(-104.0f), Vec<float>(89.0f)));
}

// log(x) as a sum of two floats, of which the second is small, for a finite x > 0.
struct LogInTwo {
  Vec<float> high, low;
};
FUSEDLOSS_HD LogInTwo log_in_two(Vec<float> x) {
  const Split t = split_any(x);
  // n ln 2 + f - f^2 / 2, with the rounding error of each sum beside it.
  const Vec<float> f2 = t.f * t.f, half = Vec<float>(0.5f) * f2;
  const Vec<float> most = t.high - half, lost_half = (t.high - most) - half;
  const Vec<float> lost_square = Vec<float>(-0.5f) * multiply_add(t.f, t.f, -f2);
  Vec<float> low = log_tail(t.f, t.low + lost_half);
  low = multiply_add(t.exponent, Vec<float>(kLn2Lo * kExponentUnit), low + lost_square);
  const Vec<float> high = most + low;
  return {high, low - (high - most)};
}

// The logarithm, which is `result` where x is finite and at least `lowest`.
FUSEDLOSS_HD Vec<float> log_of_every([[maybe_unused]] Vec<float> x, [[maybe_unused]] float lowest,
                                     Vec<float> result) {
#if defined(CPU_CAPABILITY_AVX512)
  return result;  // right for every number
#else
  const Vec<float> infinity(INFINITY);
  return select(x < Vec<float>(lowest), Vec<float>(NAN), select(x == infinity, infinity, result));
#endif
}

}  // namespace detail

// e^x (1 + more) for a small |more|. It is scaled in two steps, to reach subnormals and infinity.
FUSEDLOSS_HD Vec<float> exp_times(Vec<float> x, Vec<float> more) {
  using namespace detail;
  const Reduced e = reduce_any(x);
  const Int n = e.n(), half = n >> Int(1);
  const Vec<float> first = power_of_two(half), second = power_of_two(n - half);
  const Vec<float> one(1.0f), p = e.r_expm1;
  return multiply_add(first, multiply_add(more, one + p, p), first) * second;
}

// e^x. Error 1.1.
FUSEDLOSS_HD Vec<float> exp(Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  const detail::Reduced e = detail::reduce_any(x);
  return _mm512_scalef_ps(Vec<float>(1.0f) + e.r_expm1, e.exponent);
#else
  return exp_times(x, Vec<float>(0.0f));
#endif
}

// e^x - 1. Error 1.6, and 1.7 without fused multiply-add.
FUSEDLOSS_HD Vec<float> expm1(Vec<float> x) {
  using namespace detail;
#if defined(CPU_CAPABILITY_AVX512)
  const Reduced e = reduce_any(x);  // shared with an exp(x) beside it
  const Vec<float> half(0.5f), scale = _mm512_scalef_ps(half, e.exponent);
  const Vec<float> sum = multiply_add(e.r_expm1, scale, scale - half);
  const Vec<float> result = sum + sum;
#else
  const Reduced e = reduce_exp(clamp(x, Vec<float>(-25.0f), Vec<float>(89.0f)));
  // 2^128 is not a float: there the last doubling comes at the end.
  const Int n = e.n(), beyond = (n + Int(128)) >> Int(8);
  const Vec<float> scale = power_of_two(n - beyond);
  const Vec<float> sum = multiply_add(e.r_expm1, scale, scale - Vec<float>(1.0f));
  const Vec<float> result = sum * power_of_two(beyond);
#endif
  return select(x == Vec<float>(0.0f), x, result);  // -0
}

// Natural logarithm, and log(1 + x), of every number. Error 0.9.
FUSEDLOSS_HD Vec<float> log(Vec<float> x) { return detail::log_of_every(x, 0.0f, log_finite(x)); }
FUSEDLOSS_HD Vec<float> log1p(Vec<float> x) {
  return detail::log_of_every(x, -1.0f, log1p_finite(x));
}

// Error 2.5.
FUSEDLOSS_HD Vec<float> tanh(Vec<float> x) {
  const Vec<float> two(2.0f), e = expm1(-two * abs(x));
  const Vec<float> size = -e / (two + e);
  return select(x < Vec<float>(0.0f), -size, select(x == Vec<float>(0.0f), x, size));
}

// Error 1.3, and 1.5 without fused multiply-add.
FUSEDLOSS_HD Vec<float> erf(Vec<float> x) {
  using namespace detail;
  // x + x p(x^2), and 1 - exp(-r(|x|)), both minimax.
  static constexpr float p[] = {0.1283792f,   -0.37612635f,    0.112837195f, -0.026860733f,
                                0.005204383f, -0.00081812846f, 8.535948e-05f};
  static constexpr float r[] = {-0.00014233188f, 1.1293333f,     0.6337849f,
                                0.10768884f,     -0.024630973f,  0.0039183586f,
                                -0.00035455555f, 6.9814655e-06f, 1.0657806e-06f};
  const Vec<float> one(1.0f), size = clamp(abs(x), Vec<float>(0.0f), Vec<float>(4.0f));
  const Vec<float> square = size * size;
  const Vec<float> small = multiply_add(x, polynomial(square, square * square, p), x);
  const Vec<float> big = one - exp_nonpositive(-polynomial(size, square, r));
  return select(size < Vec<float>(0.9f), small, select(x < Vec<float>(0.0f), -big, big));
}

// 1 - erf(x). Error 4.5; without fused multiply-add 69 where the result is small.
FUSEDLOSS_HD Vec<float> erfc(Vec<float> x) {
  // Beyond 1/2, e^(-x^2) t p(t - 1/2) with t = 1 / (1 + x / 2), minimax up to where it is 0.
  static constexpr float p[] = {0.510791361f,  0.687160671f,  0.558942437f,
                                0.14576596f,   -0.171970561f, -0.103522368f,
                                0.0963139087f, 0.0513126925f, -0.0616230592f};
  const Vec<float> zero(0.0f), half(0.5f), one(1.0f), size = clamp(abs(x), half, Vec<float>(11.0f));
  const Vec<float> square = size * size, lost = multiply_add(size, size, -square);
  const Vec<float> t = one / multiply_add(size, half, one);
  const Vec<float> more = multiply_add(-t, half * size, one - t);  // t (1 + more) is exact
  const Vec<float> u = multiply_add(t, more, t - half);
  const Vec<float> big = exp_times(-square, more - lost) * (t * detail::polynomial(u, u * u, p));
  return select(abs(x) < half, one - erf(x), select(x < zero, Vec<float>(2.0f) - big, big));
}

// log|gamma(x)|. Error 2.7 for positive numbers; the others have libm's function, lane by lane,
// with an error of 7.
FUSEDLOSS_HD Vec<float> lgamma(Vec<float> x) {
  const Vec<float> zero(0.0f), half(0.5f), one(1.0f), infinity(INFINITY);
  const detail::LogInTwo log = detail::log_in_two(x);
  // Below 3, (x - 1) (x - 2) times a polynomial that is minimax on [1, 3]; below 1,
  // lgamma(1 + x) - log(x).
  const auto small = x < one;
  const Vec<float> from_one = select(small, x, x - one), from_two = from_one - one;
  const Vec<float> near =
      from_one * from_two *
      horner(from_two, 0.422784328f, -0.10031727f, 0.0329656266f, -0.0123849772f, 0.00499154674f,
             -0.00210205023f, 0.000944336061f, -0.000425599923f, 0.000130587083f, -5.23886229e-05f,
             7.81938579e-05f, -3.87460823e-05f);
  // Stirling's series, minimax from 3 on: (x - 1/2) (log(x) - 1) + (log(2 pi) - 1) / 2 + ...
  const Vec<float> reciprocal = one / x, factor = x - half;
  Vec<float> rest =
      horner(reciprocal * reciprocal, 0.0833331645f, -0.00276988791f, 0.000678978511f);
  rest = multiply_add(factor, log.low, multiply_add(reciprocal, rest, Vec<float>(0.418938533f)));
  const Vec<float> far = multiply_add(factor, log.high - one, rest);
  const Vec<float> result = select(small, near - log.high, select(x < Vec<float>(3.0f), near, far));
  const auto usual = logical_and(x > zero, x < infinity);
  if (__builtin_expect(usual.all(), 1)) return result;
  return select(usual, result, x.map([](float lane) { return fusedloss::lgamma(lane); }));
}

namespace detail {

// sin(x + quarters pi / 2). Beyond kMaxReduced the reduction is not exact enough, and libm's
// function is called.
template <class Exact>
FUSEDLOSS_HD Vec<float> sine(Vec<float> x, int quarters, Exact exact) {
  constexpr float kMaxReduced = 1000.0f;
  const Vec<float> shifted = multiply_add(x, Vec<float>(0.636619772f), Vec<float>(kRounder));
  const Vec<float> n = shifted - Vec<float>(kRounder);
  // pi / 2 in four parts. The first three have at most 13 bits, so that their products with n are
  // exact.
  Vec<float> r = multiply_add(n, Vec<float>(-1.5703125f), x);
  r = multiply_add(n, Vec<float>(-4.83751296997070312e-4f), r);
  r = multiply_add(n, Vec<float>(-7.549533620e-08f), r);
  r = multiply_add(n, Vec<float>(-2.563344152e-12f), r);
  const Int quadrant = cast<int32_t>(shifted) + Int(quarters);
  static constexpr float s[] = {-0.16666667f, 0.008333329f, -0.00019839295f, 2.7179399e-06f};
  static constexpr float c[] = {0.041666668f, -0.0013888883f, 2.479943e-05f, -2.7204646e-07f};
  const Vec<float> z = r * r, z2 = z * z;
  const Vec<float> sine_of_r = multiply_add(r * z, polynomial(z, z2, s), r);
  const Vec<float> cosine_of_r =
      multiply_add(z2, polynomial(z, z2, c), multiply_add(z, Vec<float>(-0.5f), Vec<float>(1.0f)));
  const auto odd = cast<float>((quadrant & Int(1)) == Int(1));
  const Vec<float> size = select(odd, cosine_of_r, sine_of_r);
  const auto negative = cast<float>((quadrant & Int(2)) == Int(2));
  const Vec<float> result = select(negative, -size, size);
  const auto far = abs(x) > Vec<float>(kMaxReduced);
  if (__builtin_expect(far.any(), 0)) return select(far, x.map(exact), result);
  return result;
}

}  // namespace detail

// Error 1.7.
FUSEDLOSS_HD Vec<float> sin(Vec<float> x) {
  return detail::sine(x, 0, [](float lane) { return std::sin(lane); });
}
FUSEDLOSS_HD Vec<float> cos(Vec<float> x) {
  return detail::sine(x, 1, [](float lane) { return std::cos(lane); });
}

// x^y: exp(y log|x|) with the logarithm in two floats, so that a large exponent keeps its digits.
// A negative x gives nan unless y is an integer. y is finite. Error 2 for results of usual size, 8
// at x^101; without fused multiply-add the logarithm has one float's digits, and 66 there.
FUSEDLOSS_HD Vec<float> pow(Vec<float> x, Vec<float> y) {
  using namespace detail;
  const Vec<float> zero(0.0f), one(1.0f), infinity(INFINITY);
  const Vec<float> size = abs(x);
  const LogInTwo log = log_in_two(size);
  // The rounding error of y times both parts goes into the exponential as a factor.
  const Vec<float> product = y * log.high;
  const Vec<float> more = multiply_add(y, log.low, multiply_add(y, log.high, -product));
  Vec<float> result = exp_times(product, select(abs(more) < one, more, zero));
  result = select(x == x, result, x);
  // 0 and infinity have no finite logarithm.
  const Vec<float> limit = select(y < zero, infinity, zero),
                   other = select(y < zero, zero, infinity);
  result = select(size == zero, limit, select(size == infinity, other, result));
  result = select(y == zero, one, result);
  // Every float from 2^24 on is even.
  const Vec<float> bounded = clamp(y, Vec<float>(-16777216.0f), Vec<float>(16777216.0f));
  const Int whole = convert<int32_t>(bounded);
  const auto is_whole = convert<float>(whole) == bounded;
  const auto is_odd = logical_and(is_whole, cast<float>((whole & Int(1)) == Int(1)));
  const auto known = logical_or(is_whole, logical_or(size == zero, size == infinity));
  const Vec<float> for_negative = select(known, select(is_odd, -result, result), Vec<float>(NAN));
  return select(cast<float>(cast<int32_t>(x) < Int(0)), for_negative, result);
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss
