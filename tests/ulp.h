// Walks a function's domain and measures its error in units in the last place (ULP): about POINTS
// numbers, evenly by bit pattern, always with the domain's ends, zeros, subnormals and nan. The
// truth is worked out in a wider type: double for floats, long double for doubles. Prints a line
// for each function: its name, error, argument, result.
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
#include <type_traits>

namespace {

using Floats = fusedloss::Vec<float>;
using Doubles = fusedloss::Vec<double>;

template <class T>
struct Worst {
  using Limits = std::numeric_limits<T>;
  using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;
  using Key = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
  using Registers = fusedloss::Vec<T>;

  // Smaller results have the spacing of this one; by default of the smallest normal number.
  T least = Limits::min();
  double error = -1;
  T x = 0, result = 0;

  // Neighbouring numbers have neighbouring keys; both zeros have key 0.
  static Key key_of(T x) {
    const Key bits = std::bit_cast<Key>(x);
    return bits >= 0 ? bits : std::numeric_limits<Key>::min() - bits;
  }
  static T number_of(Key key) {
    return std::bit_cast<T>(key >= 0 ? key : std::numeric_limits<Key>::min() - key);
  }

  double ulps(T result, Wide truth) const {
    if (std::isnan(result) && std::isnan(truth)) return 0;
    // Half an ULP above the largest number.
    const Wide overflow =
        std::ldexp(Wide(2) - std::ldexp(Wide(1), -Limits::digits), Limits::max_exponent - 1);
    if (std::abs(truth) >= overflow) truth = std::copysign(Limits::infinity(), truth);
    if (result == truth) return 0;
    if (!std::isfinite(result) || !std::isfinite(truth)) return Limits::infinity();
    const int exponent = std::ilogb(std::max(std::abs(truth), static_cast<Wide>(least)));
    const Wide unit = std::ldexp(Wide(1), exponent - Limits::digits + 1);
    return static_cast<double>(std::abs(result - truth) / unit);
  }

  template <class Function, class Truth>
  void walk(T low, T high, int64_t points, Function function, Truth truth) {
    T arguments[Registers::size()], results[Registers::size()];
    int filled = 0;
    const auto visit = [&](T argument) {
      arguments[filled++] = argument;
      if (filled < Registers::size()) return;
      function(Registers::loadu(arguments)).store(results);
      for (int i = 0; i < filled; ++i) {
        const double e = ulps(results[i], truth(static_cast<Wide>(arguments[i])));
        if (e > error) error = e, x = arguments[i], result = results[i];
      }
      filled = 0;
    };

    // Unsigned: there are more doubles than an int64_t counts. A stride that is odd, so that the
    // mantissas differ from one power of two to the next.
    const uint64_t first = static_cast<uint64_t>(static_cast<int64_t>(key_of(low))),
                   count = static_cast<uint64_t>(static_cast<int64_t>(key_of(high))) - first,
                   stride = (count / static_cast<uint64_t>(points)) | 1;
    for (uint64_t step = 0; step <= count && step + stride > step; step += stride) {
      visit(number_of(static_cast<Key>(first + step)));
    }
    for (T magnitude :
         {T(0), Limits::denorm_min(), Limits::min() - Limits::denorm_min(), Limits::min(), T(1)}) {
      for (T special : {-magnitude, magnitude}) {
        if (low <= special && special <= high) visit(special);
      }
    }
    visit(high);
    do visit(Limits::quiet_NaN());
    while (filled);
  }

  void print(const char* function) const {
    std::printf("%s %.3f %.17g %.17g\n", function, error, x, result);
  }
};

template <class T, class Function, class Truth>
void measure(const char* name, std::initializer_list<std::type_identity_t<T>> bounds,
             int64_t points, Function function, Truth truth,
             T least = std::numeric_limits<T>::min()) {
  Worst<T> worst{.least = least};
  // Between each bound and the next.
  for (auto low = bounds.begin(); low + 1 != bounds.end(); ++low) {
    worst.walk(low[0], low[1], points / static_cast<int64_t>(bounds.size() - 1), function, truth);
  }
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
