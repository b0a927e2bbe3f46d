// The largest error of each SIMD function in csrc/math that takes every number, in ULP of the true
// result, which is libm's in a wider type: see ulp.h.
//
//   elementary POINTS
#include "math/vocabulary.h"

#include "ulp.h"

namespace {

// For x > 0, by the asymptotic series from 40 on.
long double digamma(long double x) {
  long double sum = 0;
  for (; x < 40; ++x) sum -= 1 / x;
  const long double z = 1 / (x * x);
  const long double tail =
      1 / 12.0L - z * (1 / 120.0L - z * (1 / 252.0L - z * (1 / 240.0L - z / 132)));
  return std::log(x) - 1 / (2 * x) - z * tail + sum;
}
long double trigamma(long double x) {
  long double sum = 0;
  for (; x < 40; ++x) sum += 1 / (x * x);
  const long double z = 1 / (x * x);
  const long double tail =
      1 / 6.0L - z * (1 / 30.0L - z * (1 / 42.0L - z * (1 / 30.0L - z * 5 / 66)));
  return sum + 1 / x + z * (0.5L + tail / x);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t points = points_of(argc, argv);
  if (!points) return 2;
  namespace F = fusedloss;
  const float inf = std::numeric_limits<float>::infinity();
#define MEASURE(T, NAME, FUNCTION, ...)                                   \
  measure<T>(                                                             \
      NAME, {__VA_ARGS__}, points, [](auto x) { return F::FUNCTION(x); }, \
      [](auto x) { return std::FUNCTION(x); })
  MEASURE(float, "exp", exp, -inf, inf);
  MEASURE(float, "expm1", expm1, -inf, inf);
  MEASURE(float, "tanh", tanh, -inf, inf);
  MEASURE(float, "erf", erf, -inf, inf);
  MEASURE(float, "erfc", erfc, -inf, 0, 0x1p-20, 12, inf);
  MEASURE(float, "lgamma", lgamma, -inf, inf);
  MEASURE(float, "lgamma_positive", lgamma, 0, 0.5, 4, inf);
  MEASURE(float, "sin", sin, -inf, inf);
  MEASURE(float, "cos", cos, -inf, inf);
  MEASURE(float, "sqrt", sqrt, -inf, inf);
  // All doubles, and once more those where there is something to compute.
  MEASURE(double, "exp_double", exp, -inf, -750, -0x1p-20, 0x1p-20, 720, inf);
  MEASURE(double, "expm1_double", expm1, -inf, -40, -0x1p-20, 0x1p-20, 720, inf);
  MEASURE(double, "tanh_double", tanh, -inf, -20, -0x1p-20, 0x1p-20, 20, inf);
  MEASURE(double, "log_double", log, -inf, 0, 0.5, 2, inf);
  MEASURE(double, "log1p_double", log1p, -inf, -1, -0x1p-20, 0x1p-20, 4, inf);
#undef MEASURE
  measure<float>(
      "log", {-inf, inf}, points, [](Floats x) { return F::log(x); },
      [](double x) { return std::log(x); });
  measure<float>(
      "log1p", {-inf, inf}, points, [](Floats x) { return F::log1p(x); },
      [](double x) { return std::log1p(x); });
  const auto exp_minus_square = [](auto x) { return F::exp_minus_square(x); };
  const auto gauss = [](auto x) { return std::exp(-x * x); };
  measure<float>("exp_minus_square", {-inf, 0, 0x1p-20, 12, inf}, points, exp_minus_square, gauss);
  measure<double>("exp_minus_square_double", {-inf, 0, 0x1p-20, 28, inf}, points, exp_minus_square,
                  gauss);
  // Positive numbers; libm has neither function. A double digamma is exact in the units of 1.
  const auto first = [](auto x) { return F::digamma(x); };
  const auto second = [](auto x) { return F::trigamma(x); };
  measure<float>("digamma", {0, 0.5, 4, inf}, points, first, digamma);
  measure<double>("digamma_double", {0, 0.5, 4, inf}, points / 10, first, digamma, 1);
  measure<float>("trigamma", {0, 0.5, 16, inf}, points, second, trigamma);
  measure<double>("trigamma_double", {0, 0.5, 16, inf}, points / 10, second, trigamma);
  // Results far from 1 are exponents far from 0, which without fused multiply-add lose digits.
  Worst<float> pow;
  for (float y : {-2.0f, -0.7f, 0.0f, 0.3f, 1.0f, 1.7f, 2.0f, 3.0f, 8.5f, 101.0f}) {
    pow.walk(
        -inf, inf, points / 10, [=](Floats x) { return F::pow(x, Floats(y)); },
        [=](double x) { return std::pow(x, static_cast<double>(y)); });
  }
  pow.print("pow");
}
