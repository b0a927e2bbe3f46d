// The pointwise engine: any loss's blocks over any operands, on the CPU.
//
// Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements. Work
// goes in fixed chunks, each summed on its own and the sums added in order, so the result has the
// same bits for any number of threads.
#include <algorithm>
#include <vector>

#include "../math/losses.h"
#include "pointwise_kernel.h"
#include "staging.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 32768;  // elements a task
constexpr int64_t kBlock = 2048;   // elements a run that is staged: a few of these fit the L1 cache

int gradients_of(const Call& call) {
  const auto wanted = [](const Output& gradient) { return gradient.data != nullptr; };
  const Output* const others = call.gradients + 1;
  if (std::any_of(others, std::end(call.gradients), wanted)) return kGradients;
  return wanted(call.gradients[0]) ? kGradient : 0;
}

// A call's block, and the constants that it takes.
template <class T>
struct Compiled {
  Block<T> block;
  std::vector<double> prepared;
  const double* constants;

  explicit Compiled(const Call& call)
      : prepared(call.kernel->constants), constants(call.parameters) {
    if (call.kernel->prepare) {
      call.kernel->prepare(call.parameters, prepared.data());
      constants = prepared.data();
    }
    const int outputs = (call.want_sum ? kSum : 0) | (call.value.data ? kValue : 0) |
                        gradients_of(call) | (call.weight.data || call.upstream.data ? kFactor : 0);
    if constexpr (std::is_same_v<T, float>) {
      block = call.kernel->float_blocks[outputs];
    } else {
      block = call.kernel->double_blocks[outputs];
    }
  }
};

// Where a block finds an operand, or leaves an output: in its own memory if it lies there as the
// block wants it, else in `scratch`.
template <class T>
bool lies_ready(const Operand& op) {
  return !op.data || (op.contiguous && is_dtype<T>(op.dtype));
}
template <class T>
bool lies_ready(const Output& out) {
  return !out.data || is_dtype<T>(out.dtype);
}
template <class T>
bool all_ready(const Call& call) {
  bool ready = lies_ready<T>(call.weight) && lies_ready<T>(call.upstream) &&
               !(call.weight.data && call.upstream.data) && lies_ready<T>(call.value);
  for (int i = 0; i < kMaxInputs; ++i) {
    ready = ready && lies_ready<T>(call.inputs[i]) && lies_ready<T>(call.gradients[i]);
  }
  return ready;
}
template <class T>
T* place(const Output& out, int64_t i, T* scratch) {
  if (!out.data) return nullptr;
  return is_dtype<T>(out.dtype) ? static_cast<T*>(out.data) + i : scratch;
}

template <class T>
Sum chunk(const Call& call, const Compiled<T>& loss, int64_t begin, int64_t end, bool& in_domain) {
  T inputs[kMaxInputs][kBlock], weight[kBlock], upstream[kBlock];
  T value[kBlock], gradients[kMaxInputs][kBlock];
  const int64_t most = all_ready<T>(call) ? kChunk : kBlock;
  Sum sum;
  for (int64_t i = begin; i < end; i += most) {
    const int64_t n = std::min(most, end - i);
    const auto staged = [&](const Operand& op, T* scratch) -> const T* {
      return op.data ? stage(op, call, i, n, scratch) : nullptr;
    };
    const T *factor = staged(call.weight, weight), *u = staged(call.upstream, upstream);
    if (factor && u) {
      for (int64_t k = 0; k < n; ++k) upstream[k] = factor[k] * u[k];
      u = upstream;
    }
    if (u) factor = u;
    Run<T> run;
    run.factor = factor;
    run.value = place(call.value, i, value);
    for (int k = 0; k < kMaxInputs; ++k) {
      run.inputs[k] = staged(call.inputs[k], inputs[k]);
      run.gradients[k] = place(call.gradients[k], i, gradients[k]);
    }
    sum.add(loss.block(loss.constants, &run, call.scale, n, &in_domain));
    const auto finish = [&](const Output& out, const T* scratch) {
      if (!lies_ready<T>(out)) narrow(scratch, n, out.dtype, out.data, i, 1);
    };
    finish(call.value, value);
    for (int k = 0; k < kMaxInputs; ++k) finish(call.gradients[k], gradients[k]);
  }
  return sum;
}

template <class T>
Result run(const Call& call) {
  Result result;
  const Compiled<T> loss(call);
  if (!loss.block) return result;  // there is nothing to write
  const int64_t chunks = (call.numel + kChunk - 1) / kChunk;
  if (chunks == 1) {
    result.sum = chunk(call, loss, 0, call.numel, result.in_domain);
    return result;
  }
  std::vector<Sum> sums(chunks);
  std::vector<char> in_domain(chunks, 1);
  parallel_for(call.threads, 0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      bool ok = true;
      sums[c] = chunk(call, loss, c * kChunk, std::min(call.numel, (c + 1) * kChunk), ok);
      in_domain[c] = ok;
    }
  });
  for (int64_t c = 0; c < chunks; ++c) {
    result.sum.add(sums[c]);
    result.in_domain = result.in_domain && in_domain[c];
  }
  return result;
}

Result pointwise(const Call& call) {
  return call.compute_in_double ? run<double>(call) : run<float>(call);
}

#define FUSEDLOSS_KERNEL(NAME, LOSS) pointwise_kernel<LOSS>(),
constexpr PointwiseKernel kLosses[] = {FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_KERNEL)};
#undef FUSEDLOSS_KERNEL

}  // namespace

const Kernels kernels{kLosses, &pointwise, &cross_entropy, &count_classes};

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
