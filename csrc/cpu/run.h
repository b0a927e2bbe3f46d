// A run of elements, of the type that it is computed in.
#pragma once

namespace fusedloss::cpu {

// factor multiplies the value and the slopes; null: 1.
template <class T>
struct Run {
  const T *input, *target, *pos_weight, *factor;
  T *value, *gradient, *target_gradient;
};

}  // namespace fusedloss::cpu
