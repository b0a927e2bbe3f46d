// The largest error of each SIMD function of floats in csrc/math that has a domain, in ULP of the
// true result, which is double-precision libm's: see ulp.h.
//
//   vocabulary POINTS
#include "math/vocabulary.h"

#include <cfloat>

#include "ulp.h"

int main(int argc, char** argv) {
  const int64_t points = points_of(argc, argv);
  if (!points) return 2;
  measure<float>(
      "exp_nonpositive", {-INFINITY, 0}, points,
      [](Floats x) { return fusedloss::exp_nonpositive(x); },
      [](double x) { return x < -87.33f ? 0 : std::exp(x); });  // 0 there by its own statement
  measure<float>(
      "log_finite", {0, FLT_MAX}, points, [](Floats x) { return fusedloss::log_finite(x); },
      [](double x) { return std::log(x); });
  measure<float>(
      "log1p_finite", {-1, FLT_MAX}, points, [](Floats x) { return fusedloss::log1p_finite(x); },
      [](double x) { return std::log1p(x); });
  measure<float>(
      "log1p_unit", {0, 1}, points, [](Floats x) { return fusedloss::log1p_unit(x); },
      [](double x) { return std::log1p(x); });

  // x / beta is taken where |x| <= beta. Where |x| < 2^-100 the correction can underflow.
  const std::initializer_list<float> betas = {1e-6f, 0.01f, 0.1f, 1.0f / 9, 0.7f, 1, 1.35f, 1e4f};
  const int64_t share = points / static_cast<int64_t>(betas.size());
  Worst<float> ratio, ratio_tiny;
  for (float beta : betas) {
    const auto function = [=](Floats x) {
      return fusedloss::ratio(x, Floats(beta), Floats(1 / beta));
    };
    const auto truth = [=](double x) { return x / beta; };
    ratio.walk(-beta, -0x1p-100f, share, function, truth);
    ratio.walk(0x1p-100f, beta, share, function, truth);
    ratio_tiny.walk(-0x1p-100f, 0x1p-100f, share, function, truth);
  }
  ratio.print("ratio");
  ratio_tiny.print("ratio_tiny");
}
