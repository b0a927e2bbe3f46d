// The functions that a loss is written in: for a scalar, on the host and on a GPU, and for a CPU
// SIMD register, so that one struct in losses.h serves every engine.
//
// The versions for SIMD registers are our own: float.h and double.h. Errors are in ULP, the largest
// over every float of the domain on all CPU capabilities, measured by tests/vocabulary.cpp and
// tests/elementary.cpp; tests/test_vocabulary.py holds them.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define FUSEDLOSS_HD __host__ __device__ __forceinline__
#else
#define FUSEDLOSS_HD inline __attribute__((always_inline))
#endif

// ---- scalars ------------------------------------------------------------------------------------
namespace fusedloss {

template <class T>
FUSEDLOSS_HD T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
FUSEDLOSS_HD bool logical_and(bool a, bool b) { return a && b; }
FUSEDLOSS_HD bool logical_or(bool a, bool b) { return a || b; }
FUSEDLOSS_HD bool logical_not(bool a) { return !a; }
// For a register: in all lanes.
template <class T>
FUSEDLOSS_HD bool all_zero(T x) {
  return x == T(0);
}
// x bounded; nan stays nan, as in torch.clamp. The bounds are numbers.
template <class T>
FUSEDLOSS_HD T clamp_min(T x, T low) {
  return x < low ? low : x;
}
template <class T>
FUSEDLOSS_HD T clamp(T x, T low, T high) {
  return x < low ? low : (x > high ? high : x);
}
// x / y. A register needs reciprocal = 1 / y for it.
template <class T>
FUSEDLOSS_HD T ratio(T x, T y, T /* reciprocal */) {
  return x / y;
}

// On a GPU these are CUDA's own functions. Their documented errors in ULP are, for float and
// double: exp 2 and 1, expm1, log and log1p 1, sin, cos and erf 2, tanh 2 and 1, erfc 4 and 5, pow
// 4 and 2, lgamma of a positive number 6 and 4; sqrt and quotients are rounded correctly.
#define FUSEDLOSS_SCALAR(NAME, FUNCTION)                        \
  FUSEDLOSS_HD float NAME(float x) { return ::FUNCTION##f(x); } \
  FUSEDLOSS_HD double NAME(double x) { return ::FUNCTION(x); }
FUSEDLOSS_SCALAR(abs, fabs)
FUSEDLOSS_SCALAR(sqrt, sqrt)
FUSEDLOSS_SCALAR(exp, exp)
FUSEDLOSS_SCALAR(exp_nonpositive, exp)
FUSEDLOSS_SCALAR(expm1, expm1)
FUSEDLOSS_SCALAR(log, log)
FUSEDLOSS_SCALAR(log_finite, log)
FUSEDLOSS_SCALAR(log1p, log1p)
FUSEDLOSS_SCALAR(log1p_finite, log1p)
FUSEDLOSS_SCALAR(log1p_unit, log1p)
FUSEDLOSS_SCALAR(sin, sin)
FUSEDLOSS_SCALAR(cos, cos)
FUSEDLOSS_SCALAR(tanh, tanh)
FUSEDLOSS_SCALAR(erf, erf)
FUSEDLOSS_SCALAR(erfc, erfc)
#undef FUSEDLOSS_SCALAR
FUSEDLOSS_HD float pow(float x, float y) { return ::powf(x, y); }
FUSEDLOSS_HD double pow(double x, double y) { return ::pow(x, y); }
// a b + c, rounded once where the hardware has an instruction for it.
FUSEDLOSS_HD float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
FUSEDLOSS_HD double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }
// -|x|
template <class T>
FUSEDLOSS_HD T neg_abs(T x) {
  return -abs(x);
}
// A number in the type of x's elements: a GPU is slow with doubles.
template <class T>
FUSEDLOSS_HD T like_elements_of(T, double number) {
  return static_cast<T>(number);
}
// e^x (1 + more) for a small |more|.
template <class T>
FUSEDLOSS_HD T exp_times(T x, T more) {
  const T e = exp(x);
  return multiply_add(e, more, e);
}
// e^(-x^2). Error 1.3 for floats and 1.5 for doubles. Without fused multiply-add, which finds what
// x^2 is rounded by, 65 and 520 where the result is small.
template <class T>
FUSEDLOSS_HD T exp_minus_square(T x) {
  const T size = clamp(x, T(-40), T(40)), square = size * size;
  return exp_times(-square, -multiply_add(size, size, -square));
}

// log|gamma(x)|. The functions of C that have no suffix write to a variable of the whole process.
FUSEDLOSS_HD float lgamma(float x) {
#if defined(__CUDA_ARCH__)
  return ::lgammaf(x);
#else
  int sign;
  return ::lgammaf_r(x, &sign);
#endif
}
FUSEDLOSS_HD double lgamma(double x) {
#if defined(__CUDA_ARCH__)
  return ::lgamma(x);
#else
  int sign;
  return ::lgamma_r(x, &sign);
#endif
}

// first + x (second + x (...))
template <class T, class First, class... More>
FUSEDLOSS_HD T horner(T x, First first, More... more) {
  if constexpr (sizeof...(more) == 0) {
    return T(first);
  } else {
    return multiply_add(x, horner(x, more...), T(first));
  }
}

// The derivative of lgamma for x > 0, in the precision of float or of double.
template <class T>
FUSEDLOSS_HD T digamma_positive(T x, float) {
  const T one(1), reciprocal = one / x, square = reciprocal * reciprocal;
  // Its root is at 1 + root + 1.24e-8; beside it the function is a polynomial, minimax on [1, 2].
  const T root(0.461632133f), from_one = select(x < one, x, x - one);
  const T slope = horner(from_one - T(0.5f), 0.951055884f, -0.423627466f, 0.240538388f,
                         -0.148399964f, 0.0951174051f, -0.0620400012f, 0.0393618196f,
                         -0.0258723572f, 0.0239243302f, -0.0162213296f);
  const T near = ((from_one - root) - T(1.24381499e-8f)) * slope;
  // From 2 on minimax.
  const T tail =
      square * horner(square, 0.0833323896f, -0.00830013491f, 0.00356146693f, -0.00182888168f);
  const T far = log(x) - multiply_add(reciprocal, T(0.5f), tail);
  return select(x < one, near - reciprocal, select(x < T(2), near, far));
}
template <class T>
FUSEDLOSS_HD T digamma_positive(T x, double) {
  // The asymptotic series is exact from 10 on: 1 / x + ... + 1 / (x + 9) leads there.
  const T one(1), ten(10);
  const auto below = x < ten;
  const T far = select(below, x + ten, x), reciprocal = one / far;
  const T square = reciprocal * reciprocal;
  const T tail = square * horner(square, 1.0 / 12, -1.0 / 120, 1.0 / 252, -1.0 / 240, 1.0 / 132,
                                 -691.0 / 32760, 1.0 / 12);
  const T result = log(far) - multiply_add(reciprocal, T(0.5), tail);
  T sum(0);
  for (int i = 9; i >= 0; --i) sum = sum + one / (x + T(i));
  return select(below, result - sum, result);
}
// The derivative of that.
template <class T>
FUSEDLOSS_HD T trigamma_positive(T x) {
  const T one(1), ten(10);
  const auto below = x < ten;
  const T far = select(below, x + ten, x), reciprocal = one / far;
  const T square = reciprocal * reciprocal;
  T sum = square * horner(square, 1.0 / 6, -1.0 / 30, 1.0 / 42, -1.0 / 30, 5.0 / 66, -691.0 / 2730,
                          7.0 / 6, -3617.0 / 510);
  sum = reciprocal + reciprocal * multiply_add(reciprocal, T(0.5), sum);
  for (int i = 9; i >= 0; --i) {
    const T term = one / (x + T(i));
    sum = select(below, multiply_add(term, term, sum), sum);
  }
  return sum;
}

// For every number, as in torch: at 0 infinite by its sign, nan at the other poles.
template <class T>
FUSEDLOSS_HD T digamma_scalar(T x) {
  constexpr double kPi = 3.14159265358979324;
  if (x > 0) return digamma_positive(x, x);
  if (x == 0) return -1 / x;
  const T rest = x - ::rint(x);
  return rest == 0 ? rest / rest : digamma_positive(1 - x, x) - T(kPi) / ::tan(T(kPi) * rest);
}
// Infinite at the poles.
template <class T>
FUSEDLOSS_HD T trigamma_scalar(T x) {
  constexpr double kPi = 3.14159265358979324;
  if (x > 0) return trigamma_positive(x);
  const T root = T(kPi) / ::sin(T(kPi) * (x - ::rint(x)));
  return root * root - trigamma_positive(1 - x);
}

// The first and the second derivative of lgamma. Error for positive floats 2.7 and 4.6; for
// positive doubles 8 units of the last place of 1, or of the result if that is larger, and 4.3. A
// reflection leads from the others there.
FUSEDLOSS_HD float digamma(float x) { return digamma_scalar(x); }
FUSEDLOSS_HD double digamma(double x) { return digamma_scalar(x); }
FUSEDLOSS_HD float trigamma(float x) { return trigamma_scalar(x); }
FUSEDLOSS_HD double trigamma(double x) { return trigamma_scalar(x); }

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
FUSEDLOSS_HD Mask<T> logical_or(Mask<T> a, Mask<T> b) {
  return a | b;
}
template <class T>
FUSEDLOSS_HD Mask<T> logical_not(Mask<T> a) {
  return ~a;
}
template <class T>
FUSEDLOSS_HD bool all_zero(Vec<T> x) {
  return (x == Vec<T>(0)).all();
}
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
template <class T>
FUSEDLOSS_HD T like_elements_of(Vec<T>, double number) {
  return static_cast<T>(number);
}

// Scalars replace the lanes that are not positive.
template <class T>
FUSEDLOSS_HD Vec<T> digamma(Vec<T> x) {
  const Vec<T> result = digamma_positive(x, T());
  const auto positive = x > Vec<T>(0);
  if (__builtin_expect(positive.all(), 1)) return result;
  return select(positive, result, x.map([](T lane) { return fusedloss::digamma(lane); }));
}
template <class T>
FUSEDLOSS_HD Vec<T> trigamma(Vec<T> x) {
  const Vec<T> result = trigamma_positive(x);
  const auto positive = x > Vec<T>(0);
  if (__builtin_expect(positive.all(), 1)) return result;
  return select(positive, result, x.map([](T lane) { return fusedloss::trigamma(lane); }));
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

}  // namespace detail
}  // namespace CPU_CAPABILITY
}  // namespace fusedloss

#include "double.h"
#include "float.h"
#endif  // CPU_CAPABILITY

// ---- both ---------------------------------------------------------------------------------------
namespace fusedloss {

// nan where either is, as in torch.
template <class T>
FUSEDLOSS_HD T maximum(T a, T b) {
  return select(logical_or(a > b, a != a), a, b);
}
template <class T>
FUSEDLOSS_HD T minimum(T a, T b) {
  return select(logical_or(a < b, a != a), a, b);
}
// 0 for zeros and nan, as in torch.
template <class T>
FUSEDLOSS_HD T sign(T x) {
  const T zero(0);
  return select(x > zero, T(1), select(x < zero, T(-1), zero));
}
// x log(y), 0 where x is 0 and y a number, as in torch.
template <class T>
FUSEDLOSS_HD T xlogy(T x, T y) {
  return select(logical_and(x == T(0), y == y), T(0), x * log(y));
}

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

// The derivative of power(x, number), which is `value`; at 0 the limit.
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
