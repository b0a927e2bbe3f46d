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
// double: exp 2 and 1, expm1, log and log1p 1, sin, cos and erf 2, tanh 2 and 1, erfc 4 and 5, pow 4
// and 2; sqrt and quotients are rounded correctly.
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
// e^(-x^2). Error 1.5 for floats and 1.1 for doubles; without fused multiply-add, which finds what x^2
// is rounded by, 45 for floats and 400 for doubles where the result is small.
template <class T>
FUSEDLOSS_HD T exp_minus_square(T x) {
  const T size = clamp(x, T(-40), T(40)), square = size * size;
  return exp_times(-square, -multiply_add(size, size, -square));
}

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
