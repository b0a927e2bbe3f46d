// Makes a custom loss's struct into a library of the CPU engine's innermost loops, which is
// compiled on the machine it runs on.
#pragma once

#include <algorithm>
#include <iterator>

#include "../math/custom.h"
#include "block.h"
#include "custom_kernel.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

// A loss of which the compiler is told the numbers of kUsual.
template <class Loss>
struct UsualLoss : Loss {
  explicit UsualLoss(const Loss& loss) : Loss(loss) {}

  template <class T>
  FUSEDLOSS_HD CustomEval<T> eval(T x, T y) const {
    Loss loss = *this;
    unrolled<std::size(Loss::kUsual)>([&](auto i) __attribute__((always_inline)) {
      constexpr Usual usual = Loss::kUsual[i];
      loss.constants[usual.constant] = usual.number;
    });
    return loss.eval(x, y);
  }
};

template <class Loss>
bool is_usual(const Loss& loss) {
  return std::all_of(std::begin(Loss::kUsual), std::end(Loss::kUsual),
                     [&](const Usual& u) { return loss.constants[u.constant] == u.number; });
}

template <class Loss, class Want, class T>
double custom_block(const double* constants, const Run<T>* run, double scale, int64_t n) {
  Loss loss;
  std::copy_n(constants, Loss::kConstants, loss.constants);
  bool in_unit = true;
  // A sum without factors, of floats, is what trains and validates: with usual numbers it is fast.
  if constexpr (Want::kSum && std::is_same_v<T, float>) {
    if (!run->factor && is_usual(loss)) {
      using Plain = Wanted<true, false, Want::kGradient, Want::kTargetGradient, false>;
      return block<Plain>(UsualLoss<Loss>(loss), *run, scale, n, in_unit);
    }
  }
  return block<Want>(loss, *run, scale, n, in_unit);
}

template <class Loss, class T, bool sum, bool value, bool input, bool target>
constexpr void add(CustomBlock<T> (&blocks)[kCustomBlocks]) {
  blocks[sum * kWantsSum + value * kWantsValue + input * kWantsGradient +
         target * kWantsTargetGradient] =
      &custom_block<Loss, Wanted<sum, value, input, target, true>, T>;
}

template <class Loss, class T>
constexpr void fill(CustomBlock<T> (&blocks)[kCustomBlocks]) {
  add<Loss, T, true, false, false, false>(blocks);
  add<Loss, T, true, false, true, false>(blocks);
  add<Loss, T, true, false, false, true>(blocks);
  add<Loss, T, true, false, true, true>(blocks);
  add<Loss, T, false, true, false, false>(blocks);
  add<Loss, T, false, false, true, false>(blocks);
  add<Loss, T, false, false, false, true>(blocks);
  add<Loss, T, false, false, true, true>(blocks);
}

template <class Loss>
constexpr CustomKernel custom_kernel() {
  CustomKernel kernel{kCustomVersion, Loss::kParameters, Loss::kConstants, &Loss::prepare, {}, {}};
  fill<Loss>(kernel.float_blocks);
  fill<Loss>(kernel.double_blocks);
  return kernel;
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu

#define FUSEDLOSS_CUSTOM(LOSS)                                                            \
  extern "C" __attribute__((visibility("default"))) const fusedloss::cpu::CustomKernel*   \
  FUSEDLOSS_CUSTOM_ENTRY() {                                                              \
    static constexpr auto kernel = fusedloss::cpu::CPU_CAPABILITY::custom_kernel<LOSS>(); \
    return &kernel;                                                                       \
  }
