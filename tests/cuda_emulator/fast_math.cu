// Prints the largest errors of BCE's value and slope by approximate instructions, relative to long
// double: for every input of two bytes in [0, 1], under some targets. The emulator's logarithms and
// quotients are exact, so this is what the formula alone loses.
#include "csrc/cuda/fast_math.cuh"

#include <algorithm>
#include <cstdio>

#include "csrc/cuda/vectors.cuh"
#include "csrc/math/losses.h"

using namespace fusedloss;
using namespace fusedloss::cuda;

static double relative(double found, long double truth) {
  return static_cast<double>(truth == 0 ? std::fabs(found) : std::fabs((found - truth) / truth));
}

int main() {
  constexpr double kTargets[] = {0, 1, 0.5, 0.125, 0.875, 0x1p-14, 1 - 0x1p-8};
  double value_error = 0, slope_error = 0;
  const auto check = [&](float x) {
    const long double log_x = std::max(std::log(static_cast<long double>(x)), -100.0L);
    const long double log_rest = std::max(std::log1p(-static_cast<long double>(x)), -100.0L);
    const long double divisor = std::max((1 - static_cast<long double>(x)) * x, 1e-12L);
    for (const double y : kTargets) {
      const auto e = BCE{}.eval(Quick(x), Quick(y));
      const long double value = -(y * log_x + (1 - y) * log_rest), slope = (x - y) / divisor;
      value_error = std::max(value_error, relative(e.value.x, value));
      slope_error = std::max(slope_error, relative(e.gradient(Quick(1)).x, slope));
    }
  };
  for (unsigned short bits = 0; bits <= 0x3f80; ++bits) check(widen(__ushort_as_bfloat16(bits)));
  for (unsigned short bits = 0; bits <= 0x3c00; ++bits) check(widen(__ushort_as_half(bits)));
  printf("%g %g\n", value_error, slope_error);
}
