// Makes a loss's struct into the blocks that the pointwise engine runs. A custom loss is compiled
// with this file on the machine it runs on.
#pragma once

#include <algorithm>
#include <iterator>

#include "../math/custom.h"
#include "block.h"
#include "pointwise.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

// A custom loss of which the compiler is told the numbers of kUsual.
template <class Loss>
struct UsualLoss : Loss {
  explicit UsualLoss(const Loss& loss) : Loss(loss) {}

  template <class... T>
  FUSEDLOSS_HD auto eval(T... inputs) const {
    Loss loss = *this;
    unrolled<std::size(Loss::kUsual)>([&](auto i) __attribute__((always_inline)) {
      constexpr Usual usual = Loss::kUsual[i];
      loss.constants[usual.constant] = usual.number;
    });
    return loss.eval(inputs...);
  }
};

template <class Loss>
bool is_usual(const Loss& loss) {
  return std::all_of(std::begin(Loss::kUsual), std::end(Loss::kUsual),
                     [&](const Usual& u) { return loss.constants[u.constant] == u.number; });
}

template <class Loss, int outputs, class T>
double run_block(const double* constants, const Run<T>* run, double scale, int64_t n,
                 bool* in_domain) {
  if constexpr (!Loss::kCustom) {
    return block<outputs>(Loss{PointwiseLoss::with(constants, Loss::kParameters)}, *run, scale, n,
                          *in_domain);
  } else {
    Loss loss;
    std::copy_n(constants, Loss::kConstants, loss.constants);
    // A sum without factors, of floats, is what trains and validates: with usual numbers it is
    // fast.
    if constexpr ((outputs & kSum) && std::is_same_v<T, float>) {
      if (!run->factor && is_usual(loss)) {
        return block<outputs & ~kFactor>(UsualLoss<Loss>(loss), *run, scale, n, *in_domain);
      }
    }
    return block<outputs>(loss, *run, scale, n, *in_domain);
  }
}

// A custom loss has one block for calls with and without a factor, so that there are fewer to
// compile.
template <class Loss, int outputs, class T>
constexpr void add(Block<T> (&blocks)[kBlocks]) {
  constexpr int with_factor = outputs | kFactor, alone = Loss::kCustom ? with_factor : outputs;
  blocks[outputs] = &run_block<Loss, alone, T>;
  blocks[with_factor] = &run_block<Loss, with_factor, T>;
}
template <class Loss, class T>
constexpr void fill(Block<T> (&blocks)[kBlocks]) {
  add<Loss, kSum>(blocks);
  add<Loss, kSum | kGradient>(blocks);
  add<Loss, kValue>(blocks);
  add<Loss, kGradient>(blocks);
  if constexpr (Loss::kGradients > 1) {
    add<Loss, kSum | kGradients>(blocks);
    add<Loss, kGradients>(blocks);
  }
}

template <class Loss>
constexpr PointwiseKernel pointwise_kernel() {
  PointwiseKernel kernel{kPointwiseVersion, Loss::kInputs, Loss::kParameters, 0, nullptr, {}, {}};
  if constexpr (Loss::kCustom) {
    kernel.constants = Loss::kConstants;
    kernel.prepare = &Loss::prepare;
  }
  fill<Loss>(kernel.float_blocks);
  fill<Loss>(kernel.double_blocks);
  return kernel;
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu

#define FUSEDLOSS_CUSTOM(LOSS)                                                               \
  extern "C" __attribute__((visibility("default"))) const fusedloss::cpu::PointwiseKernel*   \
  FUSEDLOSS_CUSTOM_ENTRY() {                                                                 \
    static constexpr auto kernel = fusedloss::cpu::CPU_CAPABILITY::pointwise_kernel<LOSS>(); \
    return &kernel;                                                                          \
  }
