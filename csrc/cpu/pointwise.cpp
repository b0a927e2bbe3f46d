// The pointwise engine: any loss of losses.h over any operands, on the CPU.
//
// Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements. Work
// goes in fixed chunks, each summed on its own and the sums added in order, so the result has the
// same bits for any number of threads.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../math/losses.h"
#include "../math/sum.h"
#include "block.h"
#include "staging.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 32768;  // elements a task
constexpr int64_t kBlock = 2048;   // elements a run that is staged: a few of these fit the L1 cache

// A custom loss: its block is in a library, which has one for each set of outputs.
struct Custom {
  const CustomKernel* kernel;
  std::vector<double> constants;
  int wants = 0;

  explicit Custom(const Pointwise& call) : kernel(call.custom), constants(kernel->constants) {
    kernel->prepare(call.parameters, constants.data());
    wants = call.want_sum * kWantsSum + (call.value != nullptr) * kWantsValue +
            (call.gradient != nullptr) * kWantsGradient +
            (call.target_gradient != nullptr) * kWantsTargetGradient;
  }
};

using CPU_CAPABILITY::block;
template <class Want, class T>
double block(const Custom& loss, const Run<T>& run, double scale, int64_t n, bool&) {
  if constexpr (std::is_same_v<T, float>) {
    return loss.kernel->float_blocks[loss.wants](loss.constants.data(), &run, scale, n);
  } else {
    return loss.kernel->double_blocks[loss.wants](loss.constants.data(), &run, scale, n);
  }
}

template <class Loss, class Want, class T>
Sum chunk(const Pointwise& call, const Loss& loss, int64_t begin, int64_t end, bool& in_unit) {
  // Where an operand is staged; left unread by operands that lie in memory as the engine wants.
  T input[kBlock], target[kBlock], pos_weight[kBlock], weight[kBlock], upstream[kBlock];
  T value[kBlock], gradient[kBlock], target_gradient[kBlock];
  const bool has_value = Want::kValue && call.value;
  const bool has_gradient = Want::kGradient && call.gradient;
  const bool has_target_gradient = Want::kTargetGradient && call.target_gradient;
  const bool value_direct = has_value && is_dtype<T>(call.value_dtype);
  const bool gradient_direct = has_gradient && is_dtype<T>(call.gradient_dtype);
  const bool target_direct = has_target_gradient && is_dtype<T>(call.target_gradient_dtype);
  const auto lies_ready = [](const Operand& op) {
    return !op.data || (op.contiguous && is_dtype<T>(op.dtype));
  };
  const bool ready = value_direct == has_value && gradient_direct == has_gradient &&
                     target_direct == has_target_gradient && lies_ready(call.input) &&
                     lies_ready(call.target) && lies_ready(call.pos_weight) &&
                     lies_ready(call.weight) && lies_ready(call.upstream) &&
                     !(call.weight.data && call.upstream.data);
  const int64_t most = ready ? kChunk : kBlock;
  Sum sum;
  for (int64_t i = begin; i < end; i += most) {
    const int64_t n = std::min(most, end - i);
    const auto staged = [&](const Operand& op, T* scratch) -> const T* {
      return op.data ? stage(op, call.space, i, n, scratch) : nullptr;
    };
    Run<T> run{staged(call.input, input),
               staged(call.target, target),
               staged(call.pos_weight, pos_weight),
               nullptr,
               value,
               gradient,
               target_gradient};
    if constexpr (Want::kFactor) {
      run.factor = staged(call.weight, weight);
      if (const T* u = staged(call.upstream, upstream)) {
        if (run.factor) {
          for (int64_t k = 0; k < n; ++k) upstream[k] = run.factor[k] * u[k];
          u = upstream;
        }
        run.factor = u;
      }
    }
    if (value_direct) run.value = static_cast<T*>(call.value) + i;
    if (gradient_direct) run.gradient = static_cast<T*>(call.gradient) + i;
    if (target_direct) run.target_gradient = static_cast<T*>(call.target_gradient) + i;
    sum.add(block<Want>(loss, run, call.scale, n, in_unit));
    if (has_value && !value_direct) narrow(value, n, call.value_dtype, call.value, i, 1);
    if (has_gradient && !gradient_direct)
      narrow(gradient, n, call.gradient_dtype, call.gradient, i, 1);
    if (has_target_gradient && !target_direct)
      narrow(target_gradient, n, call.target_gradient_dtype, call.target_gradient, i, 1);
  }
  return sum;
}

template <class Loss, class Want, class T>
PointwiseResult run(const Pointwise& call, const Loss& loss) {
  PointwiseResult result;
  const int64_t chunks = (call.numel + kChunk - 1) / kChunk;
  if (chunks == 1) {
    result.sum = chunk<Loss, Want, T>(call, loss, 0, call.numel, result.in_unit);
    return result;
  }
  std::vector<Sum> sums(chunks);
  std::vector<char> in_unit(chunks, 1);
  parallel_for(call.threads, 0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      bool ok = true;
      sums[c] =
          chunk<Loss, Want, T>(call, loss, c * kChunk, std::min(call.numel, (c + 1) * kChunk), ok);
      in_unit[c] = ok;
    }
  });
  for (int64_t c = 0; c < chunks; ++c) {
    result.sum.add(sums[c]);
    result.in_unit = result.in_unit && in_unit[c];
  }
  return result;
}

template <class Loss, class T>
PointwiseResult choose(const Pointwise& call) {
  const Loss loss{{call.parameter}};
  const bool factor = call.weight.data || call.upstream.data;
  const auto with_factor = [&](auto sum, auto value, auto gradient) {
    return factor ? run<Loss, Wanted<sum(), value(), gradient(), false, true>, T>(call, loss)
                  : run<Loss, Wanted<sum(), value(), gradient(), false, false>, T>(call, loss);
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (call.want_sum) return call.gradient ? with_factor(yes, no, yes) : with_factor(yes, no, no);
  return call.value ? with_factor(no, yes, no) : with_factor(no, no, yes);
}

}  // namespace

PointwiseResult pointwise(const Pointwise& call) {
  if (call.custom) {
    using Any = Wanted<true, true, true, true, true>;  // the block knows
    const Custom loss(call);
    return call.compute_in_double ? run<Custom, Any, double>(call, loss)
                                  : run<Custom, Any, float>(call, loss);
  }
#define FUSEDLOSS_RUN(NAME, LOSS) \
  if (call.loss == NAME)          \
    return call.compute_in_double ? choose<LOSS, double>(call) : choose<LOSS, float>(call);
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_RUN)
#undef FUSEDLOSS_RUN
  throw std::invalid_argument("fusedloss: no pointwise loss is named " + std::string(call.loss));
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
