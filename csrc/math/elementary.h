// More functions than vocabulary.h has: elementary functions over their whole domain, infinities
// and nan included. A custom loss may call them with any number.
//
// Errors are in ULP as there, measured by tests/elementary.cpp and held by
// tests/test_vocabulary.py.
#pragma once

#include "vocabulary.h"

namespace fusedloss {

// ---- scalars ------------------------------------------------------------------------------------

FUSEDLOSS_HD bool logical_or(bool a, bool b) { return a || b; }
FUSEDLOSS_HD bool logical_not(bool a) { return !a; }
// nan where either is, as in torch.
template <class T>
FUSEDLOSS_HD T maximum(T a, T b) {
  return a != a ? a : (a > b ? a : b);
}
template <class T>
FUSEDLOSS_HD T minimum(T a, T b) {
  return a != a ? a : (a < b ? a : b);
}
// 0 for zeros and nan, as in torch.
template <class T>
FUSEDLOSS_HD T sign(T x) {
  return T(x > T(0)) - T(x < T(0));
}
// log_finite and log1p_finite have a domain; these logarithms take every number. On a GPU all of
// these are CUDA's own functions. Their documented errors in ULP are, for float and double: exp 2
// and 1, expm1, log and log1p 1, sin, cos and erf 2, tanh 2 and 1, pow 4 and 2; sqrt and quotients
// are rounded correctly.
FUSEDLOSS_HD float log(float x) { return ::logf(x); }
FUSEDLOSS_HD double log(double x) { return ::log(x); }
FUSEDLOSS_HD float log1p(float x) { return ::log1pf(x); }
FUSEDLOSS_HD double log1p(double x) { return ::log1p(x); }
FUSEDLOSS_HD float exp(float x) { return ::expf(x); }
FUSEDLOSS_HD double exp(double x) { return ::exp(x); }
FUSEDLOSS_HD float expm1(float x) { return ::expm1f(x); }
FUSEDLOSS_HD double expm1(double x) { return ::expm1(x); }
FUSEDLOSS_HD float sqrt(float x) { return ::sqrtf(x); }
FUSEDLOSS_HD double sqrt(double x) { return ::sqrt(x); }
FUSEDLOSS_HD float sin(float x) { return ::sinf(x); }
FUSEDLOSS_HD double sin(double x) { return ::sin(x); }
FUSEDLOSS_HD float cos(float x) { return ::cosf(x); }
FUSEDLOSS_HD double cos(double x) { return ::cos(x); }
FUSEDLOSS_HD float tanh(float x) { return ::tanhf(x); }
FUSEDLOSS_HD double tanh(double x) { return ::tanh(x); }
FUSEDLOSS_HD float erf(float x) { return ::erff(x); }
FUSEDLOSS_HD double erf(double x) { return ::erf(x); }
FUSEDLOSS_HD float pow(float x, float y) { return ::powf(x, y); }
FUSEDLOSS_HD double pow(double x, double y) { return ::pow(x, y); }
// A number of the type that the elements are of: a GPU is slow with doubles.
template <class T>
FUSEDLOSS_HD T like_elements_of(T, double number) {
  return static_cast<T>(number);
}
// x log(y), 0 where x is 0 and y a number, as in torch.
template <class T>
FUSEDLOSS_HD T xlogy(T x, T y) {
  return x == T(0) && y == y ? T(0) : x * log(y);
}

}  // namespace fusedloss

// ---- CPU SIMD registers -------------------------------------------------------------------------
#if defined(CPU_CAPABILITY)
namespace fusedloss {
inline namespace CPU_CAPABILITY {

template <class T>
FUSEDLOSS_HD Mask<T> logical_or(Mask<T> a, Mask<T> b) {
  return a | b;
}
template <class T>
FUSEDLOSS_HD Mask<T> logical_not(Mask<T> a) {
  return ~a;
}
template <class T>
FUSEDLOSS_HD Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select(logical_or(a > b, a != a), a, b);
}
template <class T>
FUSEDLOSS_HD Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return select(logical_or(a < b, a != a), a, b);
}
template <class T>
FUSEDLOSS_HD Vec<T> sign(Vec<T> x) {
  const Vec<T> zero(0);
  return select(x > zero, Vec<T>(1), select(x < zero, Vec<T>(-1), zero));
}
template <class T>
FUSEDLOSS_HD T like_elements_of(Vec<T>, double number) {
  return static_cast<T>(number);
}

// These are libm's, lane by lane.
#define FUSEDLOSS_LANES(NAME, FUNCTION)                            \
  FUSEDLOSS_HD Vec<double> NAME(Vec<double> x) {                   \
    return x.map([](double lane) { return std::FUNCTION(lane); }); \
  }
FUSEDLOSS_LANES(sin, sin)
FUSEDLOSS_LANES(cos, cos)
FUSEDLOSS_LANES(erf, erf)
#undef FUSEDLOSS_LANES
FUSEDLOSS_HD Vec<double> pow(Vec<double> x, Vec<double> y) {
  return x.map([](double a, double b) { return std::pow(a, b); }, y);
}

namespace detail {

using Int = Vec<int32_t>;
constexpr float kInfinity = INFINITY;

// Beyond these bounds e^x is 0, and infinite.
FUSEDLOSS_HD Reduced reduce_any(Vec<float> x) {
  return reduce_exp(clamp(x, Vec<float>(-104.0f), Vec<float>(89.0f)));
}

// e^x (1 + more), |more| small. In two steps of scaling, to reach subnormals and infinity.
FUSEDLOSS_HD Vec<float> exp_times(Vec<float> x, Vec<float> more) {
  const Reduced e = reduce_any(x);
  const Int n = e.n(), half = n >> Int(1);
  const Vec<float> first = power_of_two(half), second = power_of_two(n - half);
  const Vec<float> one(1.0f), p = e.r_expm1;
  return multiply_add(first, multiply_add(more, one + p, p), first) * second;
}

}  // namespace detail

// e^x. Error 1.1.
FUSEDLOSS_HD Vec<float> exp(Vec<float> x) {
#if defined(CPU_CAPABILITY_AVX512)
  const detail::Reduced e = detail::reduce_any(x);
  return _mm512_scalef_ps(Vec<float>(1.0f) + e.r_expm1, e.exponent);
#else
  return detail::exp_times(x, Vec<float>(0.0f));
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
  // 2^128 is no float: there the last doubling waits.
  const Int n = e.n(), beyond = (n + Int(128)) >> Int(8);
  const Vec<float> scale = power_of_two(n - beyond);
  const Vec<float> sum = multiply_add(e.r_expm1, scale, scale - Vec<float>(1.0f));
  const Vec<float> result = sum * power_of_two(beyond);
#endif
  return select(x == Vec<float>(0.0f), x, result);  // -0
}

// Natural logarithm, and log(1 + x), of every number. Error 0.9.
#if defined(CPU_CAPABILITY_AVX512)
FUSEDLOSS_HD Vec<float> log(Vec<float> x) { return log_finite(x); }
FUSEDLOSS_HD Vec<float> log1p(Vec<float> x) { return log1p_finite(x); }
#else
FUSEDLOSS_HD Vec<float> log(Vec<float> x) {
  const Vec<float> zero(0.0f), infinity(detail::kInfinity);
  const Vec<float> result = select(x == infinity, infinity, log_finite(x));
  return select(x < zero, Vec<float>(NAN), result);
}

FUSEDLOSS_HD Vec<float> log1p(Vec<float> x) {
  const Vec<float> infinity(detail::kInfinity);
  const Vec<float> result = select(x == infinity, infinity, log1p_finite(x));
  return select(x < Vec<float>(-1.0f), Vec<float>(NAN), result);
}
#endif

template <class T>
FUSEDLOSS_HD Vec<T> xlogy(Vec<T> x, Vec<T> y) {
  return select(logical_and(x == Vec<T>(0), y == y), Vec<T>(0), x * log(y));
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

namespace detail {

// sin(x + quarters pi / 2). Beyond kTurns what the reduction loses would show: libm's there.
template <class Exact>
FUSEDLOSS_HD Vec<float> sine(Vec<float> x, int quarters, Exact exact) {
  constexpr float kTurns = 1000.0f;
  const Vec<float> shifted = multiply_add(x, Vec<float>(0.636619772f), Vec<float>(kRounder));
  const Vec<float> n = shifted - Vec<float>(kRounder);
  // pi / 2 in four parts, the first three of 13 bits at most: exact products with n.
  Vec<float> r = multiply_add(n, Vec<float>(-1.5703125f), x);
  r = multiply_add(n, Vec<float>(-4.83751296997070312e-4f), r);
  r = multiply_add(n, Vec<float>(-7.549533620e-08f), r);
  r = multiply_add(n, Vec<float>(-2.563344152e-12f), r);
  const Int quadrant = cast<int32_t>(shifted) + Int(quarters);
  static constexpr float s[] = {-0.16666667f, 0.008333329f, -0.00019839295f, 2.7179399e-06f};
  static constexpr float c[] = {0.041666668f, -0.0013888883f, 2.479943e-05f, -2.7204646e-07f};
  const Vec<float> z = r * r, z2 = z * z;
  const Vec<float> of_sine = multiply_add(r * z, polynomial(z, z2, s), r);
  const Vec<float> of_cosine =
      multiply_add(z2, polynomial(z, z2, c), multiply_add(z, Vec<float>(-0.5f), Vec<float>(1.0f)));
  const auto odd = cast<float>((quadrant & Int(1)) == Int(1));
  const Vec<float> size = select(odd, of_cosine, of_sine);
  const auto negative = cast<float>((quadrant & Int(2)) == Int(2));
  const Vec<float> result = select(negative, -size, size);
  const auto far = abs(x) > Vec<float>(kTurns);
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
  const Vec<float> zero(0.0f), one(1.0f), infinity(kInfinity);
  const Vec<float> size = abs(x);
  const Split t = split_any(size);
  // n ln2 + f - f^2 / 2, each sum with what it loses beside it.
  const Vec<float> f2 = t.f * t.f, half = Vec<float>(0.5f) * f2;
  const Vec<float> most = t.high - half, lost_half = (t.high - most) - half;
  const Vec<float> lost_square = Vec<float>(-0.5f) * multiply_add(t.f, t.f, -f2);
  Vec<float> low = log_tail(t.f, t.low + lost_half);
  low = multiply_add(t.exponent, Vec<float>(kLn2Lo * kExponentUnit), low + lost_square);
  const Vec<float> high = most + low;
  low = low - (high - most);
  // What a product of y with both parts loses goes into the exponential as a factor.
  const Vec<float> product = y * high;
  const Vec<float> more = multiply_add(y, low, multiply_add(y, high, -product));
  Vec<float> result = exp_times(product, select(abs(more) < one, more, zero));
  result = select(x == x, result, x);
  // 0 and infinity, of which there is no logarithm.
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
  const Vec<float> of_negative = select(known, select(is_odd, -result, result), Vec<float>(NAN));
  return select(cast<float>(cast<int32_t>(x) < Int(0)), of_negative, result);
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss
#endif  // CPU_CAPABILITY

// ---- both ---------------------------------------------------------------------------------------
namespace fusedloss {

// x^exponent for a number that is the same for all elements: products for the usual ones.
template <class T>
FUSEDLOSS_HD T power(T x, double number) {
  const auto exponent = like_elements_of(x, number);
  if (exponent == 2) return x * x;
  if (exponent == 1) return x;
  if (exponent == 3) return x * x * x;
  if (exponent == 0.5f) return sqrt(x);
  if (exponent == 0) return T(1);
  return pow(x, T(exponent));
}

// Its derivative, where value is x^exponent; at 0 the limit.
template <class T>
FUSEDLOSS_HD T power_slope(T x, T value, double number) {
  const auto exponent = like_elements_of(x, number);
  if (exponent == 2) return x + x;
  if (exponent == 1) return T(1);
  if (exponent == 3) return T(3) * x * x;
  if (exponent == 0) return T(0);
  const T at_zero(exponent > 1 ? 0 : exponent * INFINITY);
  return select(x == T(0), at_zero, T(exponent) * value / x);
}

}  // namespace fusedloss
