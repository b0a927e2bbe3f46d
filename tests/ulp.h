// Walks a float function's domain and measures its error in units in the last place (ULP): about
// POINTS floats, evenly by bit pattern, always with the domain's ends, zeros, subnormals and nan.
// Prints a line for each function: its name, error, argument, result.
//
// Behind the header with the functions, which defines fusedloss::Vec.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>


namespace {

using Floats = fusedloss::Vec<float>;
using Limits = std::numeric_limits<float>;

// Neighbouring floats have neighbouring keys; both zeros have key 0.
int64_t key_of(float x) {
  const int64_t bits = std::bit_cast<int32_t>(x);
  return bits >= 0 ? bits : INT32_MIN - bits;
}
float float_of(int64_t key) {
  return std::bit_cast<float>(static_cast<int32_t>(key >= 0 ? key : INT32_MIN - key));
}

double ulps(float result, double truth) {
  if (std::isnan(result) && std::isnan(truth)) return 0;
  if (std::abs(truth) >= 0x1.ffffffp127) truth = std::copysign(Limits::infinity(), truth);
  if (result == truth) return 0;
  if (!std::isfinite(result) || !std::isfinite(truth)) return Limits::infinity();
  // The largest power of two in truth; below the normal floats the spacing stays.
  const double power = std::bit_cast<double>(std::bit_cast<int64_t>(truth) & 0x7ff0000000000000);
  return std::abs(result - truth) / (std::max<double>(power, Limits::min()) * 0x1p-23);
}

struct Worst {
  double error = -1;
  float x = 0, result = 0;

  template <class Function, class Truth>
  void walk(float low, float high, int64_t points, Function function, Truth truth) {
    float x[Floats::size()], result[Floats::size()];
    int filled = 0;
    const auto visit = [&](float argument) {
      x[filled++] = argument;
      if (filled < Floats::size()) return;
      function(Floats::loadu(x)).store(result);
      for (int i = 0; i < filled; ++i) {
        const double e = ulps(result[i], truth(static_cast<double>(x[i])));
        if (e > error) *this = {e, x[i], result[i]};
      }
      filled = 0;
    };

    const int64_t first = key_of(low), last = key_of(high);
    // Odd, so that the mantissas differ from one power of two to the next.
    const int64_t stride = ((last - first) / points) | 1;
    for (int64_t key = first; key <= last; key += stride) visit(float_of(key));
    for (float magnitude : {0.0f, Limits::denorm_min(), 0x1.fffffcp-127f, Limits::min(), 1.0f}) {
      for (float special : {-magnitude, magnitude}) {
        if (low <= special && special <= high) visit(special);
      }
    }
    visit(high);
    do visit(Limits::quiet_NaN());
    while (filled);
  }

  void print(const char* function) const {
    std::printf("%s %.3f %.9g %.9g\n", function, error, x, result);
  }
};

template <class Function, class Truth>
void measure(const char* name, float low, float high, int64_t points, Function function,
             Truth truth) {
  Worst worst;
  worst.walk(low, high, points, function, truth);
  worst.print(name);
}

// From the command line; 0: it is wrong, which has been said.
inline int64_t points_of(int argc, char** argv) {
  const int64_t points = argc == 2 ? std::atoll(argv[1]) : 0;
  if (points >= 1000) return points;
  std::fprintf(stderr, "usage: %s POINTS, at least 1000\n", argv[0]);
  return 0;
}

}  // namespace
