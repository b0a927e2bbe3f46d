// The base of a custom loss's generated struct. It is like the structs of losses.h, with a
// derivative with respect to each input, and constants that are computed once a call.
//
// Such a struct is
//   struct Loss : fusedloss::CustomLoss<kInputs, kConstants> {
//     static constexpr int kParameters;
//     static constexpr Usual kUsual[];
//     FUSEDLOSS_HD static void prepare(const double* parameters, double* constants);
//     template <class T> EvalEach<T, kInputs> eval(T x, T y, ...) const;
//   };
// prepare() computes, in double, everything that depends on the parameters alone.
#pragma once

#include "eval.h"

namespace fusedloss {

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

template <int inputs, int count>
struct CustomLoss : LossTraits {
  static constexpr int kInputs = inputs;
  static constexpr int kGradients = inputs;
  static constexpr int kUnroll = inputs <= 2 ? 8 : 4;
  static constexpr bool kCustom = true;
  static constexpr int kConstants = count;
  double constants[count];
};

}  // namespace fusedloss
