// The functions of doubles, for SIMD registers; vocabulary.h includes this. They take every number,
// and treat nan, infinities, zeros and subnormals as std does. Errors are in ULP, measured by
// tests/elementary.cpp and held by tests/test_vocabulary.py.
#pragma once

#include "register.h"

namespace fusedloss {
inline namespace CPU_CAPABILITY {
namespace detail {

using Double = Vec<double>;
using Long = Vec<int64_t>;

constexpr double kDoubleRounder = 0x1.8p52;   // as kRounder in float.h
constexpr double kLn2High = 0x1.62e42feep-1;  // ln 2 in 32 bits: its product with n is exact
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;

// 2^n for n in [-1022, 1023].
FUSEDLOSS_HD Double power_of_two(Double n) {
  const Long bits = cast<int64_t>(n + Double(kDoubleRounder));
  return cast<double>((bits + Long(1023)) << Long(52));
}

// a + b, and the sum's rounding error. fast_two_sum requires |a| >= |b|.
struct TwoSum {
  Double sum, error;
};
FUSEDLOSS_HD TwoSum fast_two_sum(Double a, Double b) {
  const Double sum = a + b;
  return {sum, b - (sum - a)};
}
FUSEDLOSS_HD TwoSum two_sum(Double a, Double b) {
  const Double sum = a + b, from_b = sum - a;
  return {sum, (a - (sum - from_b)) + (b - from_b)};
}

// x = n ln 2 + r with |r| <= ln(2) / 2, and e^r - 1 = r + more. |x| < 2^20, or nan.
struct ReducedDouble {
  Double n, r, more;
};
FUSEDLOSS_HD ReducedDouble reduce_exp(Double x) {
  const Double rounder(kDoubleRounder);
  const Double n = multiply_add(x, Double(1.4426950408889634), rounder) - rounder;
  const Double near = multiply_add(n, Double(-kLn2High), x), rest = n * Double(kLn2Low);
  const Double r = near - rest, lost = (near - r) - rest;
  // e^r = 1 + r + r^2 / 2 + r^3 q(r), q minimax on [-ln(2) / 2, ln(2) / 2].
  static constexpr double q[] = {
      0.16666666666666669,    0.041666666666666664,   0.008333333333330062,   0.0013888888888886552,
      0.00019841269863053618, 2.4801587317144498e-05, 2.7557268459997064e-06, 2.755728296954995e-07,
      2.510038549551032e-08,  2.0911236630261545e-09};
  // The rounding error of r counts e^r times; only 1 + r of that is large enough to matter.
  const Double r2 = r * r, slope = multiply_add(lost, r, lost);
  const Double tail = multiply_add(r2 * r, polynomial(r, r2, q), slope);
  return {n, r, multiply_add(r2, Double(0.5), tail)};
}

// (e^x - 1) / 2 in two doubles; half, because e^x may be 2^1024.
FUSEDLOSS_HD TwoSum half_expm1(Double x) {
  const ReducedDouble e = reduce_exp(clamp(x, Double(-40), Double(710)));
  const Double scale = power_of_two(e.n - Double(1));
  const TwoSum whole = two_sum(scale, Double(-0.5));
  const TwoSum most = two_sum(whole.sum, scale * e.r);
  return fast_two_sum(most.sum, most.error + multiply_add(scale, e.more, whole.error));
}

// log(x) + addend, for a normal x > 0; addend is small beside x - 1, unless x is 1. `less` is
// subtracted from the exponent of x.
FUSEDLOSS_HD Double log_normal(Double x, Double less, Double addend) {
  // x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)].
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000;
  typedef uint64_t Unsigned __attribute__((vector_size(kVecBytes)));
  const Long bits = cast<int64_t>(x);
  const Long exponent = (bits + Long(kOne - kRootHalf)) & Long(0x7ff0000000000000);
  // In the last bits of 2^52 the integer becomes a number.
  const Long digits = (Long::Type)((Unsigned)(Long::Type)exponent >> 52);
  const Double n = cast<double>(digits | Long(0x4330000000000000)) - (Double(0x1p52 + 1023) + less);
  const Double f = cast<double>(bits - (exponent - Long(kOne))) - Double(1);
  // log(1 + f) = f - h + s (h + s^2 q(s^2)), h = f^2 / 2, s = f / (2 + f), q minimax.
  static constexpr double q[] = {0.666666666666667,   0.3999999999989938, 0.28571428626031065,
                                 0.22222211125723262, 0.1818288978615799, 0.15331699634642276,
                                 0.146167211662876};
  const Double s = f / (Double(2) + f), h = Double(0.5) * f * f;
  const Double s2 = s * s, tail = s2 * polynomial(s2, s2 * s2, q);
  const TwoSum near = fast_two_sum(f, -h), most = fast_two_sum(n * Double(kLn2High), near.sum);
  const Double low = multiply_add(s, h + tail, multiply_add(n, Double(kLn2Low), addend));
  return most.sum + (most.error + (near.error + low));
}

// The logarithm of any t: `result` where t is positive and finite.
FUSEDLOSS_HD Double log_or_special(Double t, Double result) {
  const Double zero(0), infinity(INFINITY);
  const Double special = select(t == zero, -infinity, select(t < zero, Double(NAN), t));
  return select((t > zero) & (t < infinity), result, special);
}

}  // namespace detail

// e^x. Error 0.80.
FUSEDLOSS_HD Vec<double> exp(Vec<double> x) {
  using namespace detail;
  const ReducedDouble e = reduce_exp(clamp(x, Double(-746), Double(710)));
  const Double r_expm1 = e.r + e.more;
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_pd(Double(1) + r_expm1, e.n);
#else
  // In two steps, to reach subnormals and infinity.
  const Double rounder(kDoubleRounder);
  const Double half = multiply_add(e.n, Double(0.5), rounder) - rounder;
  const Double first = power_of_two(half);
  return multiply_add(first, r_expm1, first) * power_of_two(e.n - half);
#endif
}
FUSEDLOSS_HD Vec<double> exp_nonpositive(Vec<double> x) { return exp(x); }

// e^x - 1. Error 0.85.
FUSEDLOSS_HD Vec<double> expm1(Vec<double> x) {
  const Vec<double> half = detail::half_expm1(x).sum;
  return select(abs(x) < Vec<double>(0x1p-54), x, half + half);
}

// Natural logarithm. Error 0.75.
FUSEDLOSS_HD Vec<double> log(Vec<double> x) {
  using namespace detail;
  const auto tiny = x < Double(0x1p-1022);
  const Double normal = select(tiny, x * Double(0x1p54), x);
  return log_or_special(x, log_normal(normal, select(tiny, Double(54), Double(0)), Double(0)));
}

// log(1 + x). Error 0.75.
FUSEDLOSS_HD Vec<double> log1p(Vec<double> x) {
  using namespace detail;
  const Double one(1), zero(0);
  const TwoSum t = fast_two_sum(max(one, x), min(one, x));
  const Double result = log_or_special(t.sum, log_normal(t.sum, zero, t.error / t.sum));
  return select(x == zero, x, result);  // -0
}
FUSEDLOSS_HD Vec<double> log_finite(Vec<double> x) { return log(x); }
FUSEDLOSS_HD Vec<double> log1p_finite(Vec<double> x) { return log1p(x); }
FUSEDLOSS_HD Vec<double> log1p_unit(Vec<double> x) { return log1p(x); }

// Error 0.75 with fused multiply-add; without, it is libm's.
FUSEDLOSS_HD Vec<double> tanh(Vec<double> x) {
#if defined(__FMA__)
  using namespace detail;
  // -m / (1 + m), m = (e^(-2 |x|) - 1) / 2, and the rounding error of this quotient.
  const TwoSum m = half_expm1(Double(-2) * abs(x));
  const TwoSum divisor = fast_two_sum(Double(1), m.sum);
  const Double near = -m.sum / divisor.sum;
  const Double rest = multiply_add(-near, divisor.sum, -m.sum) - m.error;
  const Double size = near + multiply_add(-near, divisor.error + m.error, rest) / divisor.sum;
  const Double sign = x & Double(-0.0);
  return select(abs(x) < Double(0x1p-28), x, size | sign);
#else
  return x.map([](double lane) { return std::tanh(lane); });
#endif
}

// libm computes these, lane by lane.
#define FUSEDLOSS_LANES(NAME)                            \
  FUSEDLOSS_HD Vec<double> NAME(Vec<double> x) {         \
    return x.map([](double a) { return std::NAME(a); }); \
  }
FUSEDLOSS_LANES(sin)
FUSEDLOSS_LANES(cos)
FUSEDLOSS_LANES(erf)
FUSEDLOSS_LANES(erfc)
#undef FUSEDLOSS_LANES
FUSEDLOSS_HD Vec<double> lgamma(Vec<double> x) {
  return x.map([](double lane) { return fusedloss::lgamma(lane); });
}
FUSEDLOSS_HD Vec<double> pow(Vec<double> x, Vec<double> y) {
  return x.map([](double a, double b) { return std::pow(a, b); }, y);
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss
