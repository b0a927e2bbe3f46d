// The base of a custom loss's generated struct. It is like the structs of losses.h, with the
// derivative with respect to target as well, and constants that are computed once a call.
//
// Such a struct is
//   struct Loss : fusedloss::CustomLoss<kConstants> {
//     static constexpr int kParameters;
//     static constexpr Usual kUsual[];
//     FUSEDLOSS_HD static void prepare(const double* parameters, double* constants);
//     template <class T> CustomEval<T> eval(T x, T y) const;
//   };
// prepare() computes, in double, everything that depends on the parameters alone.
#pragma once

#include "vocabulary.h"

namespace fusedloss {

template <class T>
struct CustomEval {
  T value;
  T slope;         // derivative with respect to input,
  T target_slope;  // and to target

  FUSEDLOSS_HD CustomEval operator*(T factor) const {
    return {value * factor, slope * factor, target_slope * factor};
  }
  FUSEDLOSS_HD T gradient(auto scale) const { return slope * scale; }
  FUSEDLOSS_HD T target_gradient(auto scale) const { return target_slope * scale; }
};

// The slope, clamped to [-clip, clip]. Without a bound, the usual case, this costs one comparison.
template <class T>
FUSEDLOSS_HD T bounded(T slope, double clip) {
  return clip < INFINITY ? clamp(slope, T(-clip), T(clip)) : slope;
}

// The number that a constant has in most calls.
struct Usual {
  int constant;
  double number;
};

template <int count>
struct CustomLoss {
  static constexpr bool kUnitInterval = false;
  static constexpr double kSlopeUnit = 1;
  static constexpr bool kIndexed = false;
  static constexpr bool kPosWeight = false;
  static constexpr int kUnroll = 8;
  static constexpr bool kCustom = true;
  static constexpr int kConstants = count;
  double constants[count];
};

}  // namespace fusedloss
