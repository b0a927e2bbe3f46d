// The largest error of each float function that csrc/math/elementary.h has for SIMD registers, in
// ULP of the true result, which is double-precision libm's: see ulp.h.
//
//   elementary POINTS
#include "math/elementary.h"

#include "ulp.h"

int main(int argc, char** argv) {
  const int64_t points = points_of(argc, argv);
  if (!points) return 2;
  namespace F = fusedloss;
  const float inf = Limits::infinity();
#define MEASURE(NAME, LOW, HIGH)                                   \
  measure(                                                         \
      #NAME, LOW, HIGH, points, [](Floats x) { return F::NAME(x); }, \
      [](double x) { return std::NAME(x); })
  MEASURE(exp, -inf, inf);
  MEASURE(expm1, -inf, inf);
  MEASURE(tanh, -inf, inf);
  MEASURE(erf, -inf, inf);
  MEASURE(sin, -inf, inf);
  MEASURE(cos, -inf, inf);
  MEASURE(sqrt, -inf, inf);
#undef MEASURE
  measure(
      "log_any", -inf, inf, points, [](Floats x) { return F::log_any(x); },
      [](double x) { return std::log(x); });
  measure(
      "log1p_any", -inf, inf, points, [](Floats x) { return F::log1p_any(x); },
      [](double x) { return std::log1p(x); });
  // Results far from 1 are exponents far from 0, which without fused multiply-add lose digits.
  Worst pow;
  for (float y : {-2.0f, -0.7f, 0.0f, 0.3f, 1.0f, 1.7f, 2.0f, 3.0f, 8.5f, 101.0f}) {
    pow.walk(
        -inf, inf, points / 10, [=](Floats x) { return F::pow(x, Floats(y)); },
        [=](double x) { return std::pow(x, static_cast<double>(y)); });
  }
  pow.print("pow");
}
