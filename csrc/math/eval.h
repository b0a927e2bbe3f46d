// What a loss's struct gives for one element, and what it says of itself.
//
// eval(input, target, ...) gives the value and the derivatives together: T is float or double, or a
// CPU SIMD register of them. An engine must know besides
//   kInputs         how many inputs eval takes
//   kGradients      for how many of them, from the first on, it gives a derivative
//   kSymmetric      whether eval(y, x) has the same value and the opposite slope
//   kParameters     how many `parameters` it has: beta, delta, eps ...
//   kDomain         what the inputs must be. The engines check it on the way, by in_domain(inputs)
//   of
//                   the struct, and on a GPU give an input of nan, which makes value and slopes nan
//   kSlopeUnit      the engine multiplies eval's slopes by it
//   kIndexed        target is class indices, which eval sees as one-hot rows
//   kUnroll         how many SIMD registers the CPU engine computes side by side, as measured:
//                   one is a chain of instructions that wait for each other, and too many do not
//                   fit the CPU's registers
//   kMean           what reduction "mean" divides by
//   kCustom         a custom loss, see custom.h
#pragma once

#include "vocabulary.h"

namespace fusedloss {

// A loss at one point: its value, and its derivative with respect to input.
template <class T>
struct Eval {
  T value;
  T slope;

  FUSEDLOSS_HD Eval operator*(T factor) const { return {value * factor, slope * factor}; }
  // What goes to memory: the slope times a number that is the same for all elements.
  FUSEDLOSS_HD T gradient(auto scale, int = 0) const { return slope * scale; }
};

// The same where the derivative is numerator / divisor. The division comes last, as in torch: this
// saves a rounding for targets of 0 and 1.
template <class T>
struct EvalQuotient {
  T value;
  T numerator, divisor;

  FUSEDLOSS_HD EvalQuotient operator*(T factor) const {
    return {value * factor, numerator * factor, divisor};
  }
  FUSEDLOSS_HD T gradient(auto scale, int = 0) const { return numerator * scale / divisor; }
};

// A loss whose derivative is 0 for most elements, which then skip the division.
template <class T>
struct EvalSparse : EvalQuotient<T> {
  FUSEDLOSS_HD EvalSparse operator*(T factor) const { return {EvalQuotient<T>::operator*(factor)}; }
  FUSEDLOSS_HD T gradient(auto scale, int = 0) const {
    const T scaled = this->numerator * scale;
    return all_zero(this->numerator) ? scaled : scaled / this->divisor;
  }
};

// A loss that depends on a row's target class alone: elements of other classes contribute 0,
// whatever their weight and scale. y: 1 for the target class, 0 for others.
template <class T>
struct EvalOfClass : EvalQuotient<T> {
  T y;

  FUSEDLOSS_HD EvalOfClass operator*(T factor) const {
    const auto other = y == T(0);
    return {{select(other, T(0), this->value * factor),
             select(other, this->numerator, this->numerator * factor), this->divisor},
            y};
  }
  FUSEDLOSS_HD T gradient(auto scale, int = 0) const {
    if (all_zero(y)) return this->numerator;
    return select(y == T(0), this->numerator, EvalQuotient<T>::gradient(scale));
  }
};

// A loss that has a derivative with respect to each of its inputs.
template <class T, int kInputs>
struct EvalEach {
  T value;
  T slopes[kInputs];

  FUSEDLOSS_HD EvalEach operator*(T factor) const { return times(factor); }
  FUSEDLOSS_HD T gradient(auto scale, int input) const { return slopes[input] * scale; }

 private:
  template <class... Products>
  FUSEDLOSS_HD EvalEach times(T factor, Products... products) const {
    if constexpr (sizeof...(products) == kInputs) {
      return {value * factor, {products...}};
    } else {
      return times(factor, products..., slopes[sizeof...(products)] * factor);
    }
  }
};

// eval() of a loss, whose inputs get(i) are.
template <class Loss, class Get, class... Inputs>
FUSEDLOSS_HD auto evaluate(const Loss& loss, const Get& get, Inputs... inputs) {
  if constexpr (sizeof...(inputs) == Loss::kInputs) {
    return loss.eval(inputs...);
  } else {
    return evaluate(loss, get, inputs..., get(sizeof...(inputs)));
  }
}
// The same of in_domain().
template <class Loss, class Get, class... Inputs>
FUSEDLOSS_HD auto lies_in_domain(const Get& get, Inputs... inputs) {
  if constexpr (sizeof...(inputs) == Loss::kInputs) {
    return Loss::in_domain(inputs...);
  } else {
    return lies_in_domain<Loss>(get, inputs..., get(sizeof...(inputs)));
  }
}

enum class Mean {
  kElements,  // the number of elements
  kWeights,   // the sum of the weights, where there are any
  kRows,      // the number of rows (samples), or the sum of the weights of their classes
};

enum class Domain {
  kReal,
  kUnitInterval,  // input and target lie in [0, 1]
  kVariance,      // the third input is not negative
};

struct LossTraits {
  static constexpr Mean kMean = Mean::kElements;
  static constexpr bool kSymmetric = false;
  static constexpr Domain kDomain = Domain::kReal;
  static constexpr double kSlopeUnit = 1;
  static constexpr int kParameters = 0;
  static constexpr int kInputs = 2;
  static constexpr int kGradients = 1;
  static constexpr bool kIndexed = false;
  static constexpr int kUnroll = 4;
  static constexpr bool kCustom = false;
};

// A built-in loss.
struct PointwiseLoss : LossTraits {
  double parameters[2];

  static PointwiseLoss with(const double* given, int count) {
    PointwiseLoss loss{};
    for (int i = 0; i < count; ++i) loss.parameters[i] = given[i];
    return loss;
  }
};

}  // namespace fusedloss
