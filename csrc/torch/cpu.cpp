// The operators on the CPU: arguments in, calls of the engines out.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logical_and.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>

#include "../cpu/custom_rows.h"
#include "../cpu/kernels.h"
#include "../math/sum.h"
#include "one_pass.h"

namespace fusedloss {
namespace {

using at::Tensor;

// ---- CPU capability -----------------------------------------------------------------------------

// Those for what torch's own kernels run with: the CPU's best, or less by ATEN_CPU_CAPABILITY.
struct Capability {
  const char* name;
  const cpu::Kernels& kernels;

  static const Capability& instance() {
    static const Capability chosen = [] {
      [[maybe_unused]] const std::string torch_runs = at::get_cpu_capability();
#if defined(FUSEDLOSS_BUILT_AVX512)
      if (torch_runs == "AVX512") return Capability{"AVX512", cpu::AVX512::kernels};
#endif
#if defined(FUSEDLOSS_BUILT_AVX2)
      if (torch_runs == "AVX512" || torch_runs == "AVX2") {
        return Capability{"AVX2", cpu::AVX2::kernels};
      }
#endif
      return Capability{"DEFAULT", cpu::DEFAULT::kernels};
    }();
    return chosen;
  }
};
const cpu::Kernels& kernels() { return Capability::instance().kernels; }

// The engines' threads are torch's.
void on_torch_threads(int64_t begin, int64_t end, int64_t grain,
                      void (*body)(void* context, int64_t first, int64_t last), void* context) {
  at::parallel_for(begin, end, grain,
                   [=](int64_t first, int64_t last) { body(context, first, last); });
}

// ---- memory -------------------------------------------------------------------------------------

// Page faults are half of the time it takes to fill a large fresh tensor; huge pages make 512 times
// fewer of them. From 32 MiB on, the largest that glibc's mmap threshold grows to: smaller memory
// has mostly been used before, and to find huge pages amid small ones takes the kernel
// milliseconds.
void advise_huge_pages([[maybe_unused]] const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthwhile = size_t{32} << 20, kPage = 4096;
  if (fresh.nbytes() < kWorthwhile) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (begin + fresh.nbytes()) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

double scalar(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return *t.const_data_ptr<double>();
    case at::kFloat:
      return *t.const_data_ptr<float>();
    case at::kBFloat16:
      return *t.const_data_ptr<at::BFloat16>();
    default:
      return *t.const_data_ptr<at::Half>();
  }
}

void set_scalar(const Tensor& t, double value) {
  switch (t.scalar_type()) {
    case at::kDouble:
      *t.mutable_data_ptr<double>() = value;
      break;
    case at::kFloat:
      *t.mutable_data_ptr<float>() = static_cast<float>(value);
      break;
    case at::kBFloat16:
      *t.mutable_data_ptr<at::BFloat16>() = static_cast<float>(value);
      break;
    default:
      *t.mutable_data_ptr<at::Half>() = static_cast<float>(value);
  }
}

// ---- the prediction of the upstream gradient ----------------------------------------------------
// The confidence is like a branch predictor's counter: forward writes the gradient at 2 and 3.
// Threads may race on it; a torn pair costs a recomputation, never a wrong gradient.

constexpr double kConfident = 2, kMaxConfidence = 3;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double load(double* p) { return std::atomic_ref<double>(*p).load(std::memory_order_relaxed); }
void store(double* p, double v) { std::atomic_ref<double>(*p).store(v, std::memory_order_relaxed); }

bool same(double a, double b) { return a == b && std::signbit(a) == std::signbit(b); }

double predict(const Tensor& prediction) {
  double* p = prediction.mutable_data_ptr<double>();
  return load(p + 1) >= kConfident ? load(p) : kNaN;
}

void update_prediction(const Tensor& prediction, double upstream) {
  double* p = prediction.mutable_data_ptr<double>();
  const double confidence = load(p + 1);
  if (same(load(p), upstream)) {
    store(p + 1, std::min(confidence + 1, kMaxConfidence));
  } else {
    store(p, upstream);
    store(p + 1, std::max(confidence - 1, 0.0));
  }
}

// ---- class indices ------------------------------------------------------------------------------

[[noreturn]] void throw_out_of_range(const Tensor& indices, int64_t classes, int64_t ignore_index) {
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t* bad = std::find_if(index, index + indices.numel(), [=](int64_t t) {
    return (t < 0 || t >= classes) && t != ignore_index;
  });
  TORCH_CHECK_INDEX(false, "Target ", *bad, " is out of bounds. It stands at ",
                    element_name("target", indices.sizes(), bad - index), "; there are ", classes,
                    " classes.");
}

// Calls what(pointer) with a tensor's numbers, which are contiguous.
template <class What>
void with_numbers(const Tensor& t, const What& what) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.scalar_type(), "fusedloss",
                                  [&] { what(t.const_data_ptr<scalar_t>()); });
}

// Without what it costs to have torch add up few.
double sum_of(const Tensor& t) {
  constexpr int64_t kFew = 1024;
  if (t.numel() > kFew || !t.is_contiguous() || !t.is_floating_point()) {
    return t.sum(at::kDouble).item<double>();
  }
  Sum sum;
  with_numbers(aligned(t), [&](const auto* number) {
    for (int64_t i = 0; i < t.numel(); ++i) sum.add(static_cast<double>(number[i]));
  });
  return sum.value();
}

// The weights, of classes or `of_rows`, of the targets that are not ignored; throws where a target
// is no class.
double sum_weights(const Arguments& a, const Tensor& indices, const Tensor& weight, bool of_rows) {
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t n = indices.numel(), classes = a.classes();
  constexpr int64_t kChunk = 32768;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  // The sum of each chunk's weights; none where an index is out of range.
  c10::SmallVector<std::optional<double>, 4> sums(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t *begin = index + c * kChunk, *end = index + std::min(n, (c + 1) * kChunk);
      const auto [ignored, outside] =
          kernels().count_classes(begin, end - begin, classes, a.ignore_index);
      if (outside) continue;
      if (!weight.defined()) {
        sums[c] = static_cast<double>(end - begin - ignored);
      } else {
        Sum sum;
        with_numbers(weight, [&](const auto* number) {
          for (const int64_t* t = begin; t != end; ++t) {
            const int64_t i = of_rows ? t - index : *t;
            sum.add(*t == a.ignore_index ? 0 : static_cast<double>(number[i]));
          }
        });
        sums[c] = sum.value();
      }
    }
  });
  Sum total;
  for (const std::optional<double> sum : sums) {
    if (!sum) throw_out_of_range(indices, classes, a.ignore_index);
    total.add(*sum);
  }
  return total.value();
}

// ---- pointwise ----------------------------------------------------------------------------------

[[noreturn]] void throw_outside_unit(const char* name, const Tensor& t, int64_t linear) {
  TORCH_CHECK(false, "all elements of ", name, " should be between 0 and 1, but ",
              element_name(name, t.sizes(), linear), " is ",
              t.contiguous().view(-1)[linear].item<double>());
}

void find_outside_unit(const Tensor& input, const Tensor& target) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"input", input},
                                std::pair<const char*, const Tensor&>{"target", target}}) {
    const Tensor inside = at::logical_and(t.ge(0), t.le(1)).contiguous().view(-1);
    const bool* first = inside.const_data_ptr<bool>();
    const bool* found = std::find(first, first + inside.numel(), false);
    if (found != first + inside.numel()) throw_outside_unit(name, t, found - first);
  }
}

// Names the first element outside of the loss's domain; the engine has found that there is one.
void throw_outside_domain(const Arguments& a, const LossInfo& info) {
  if (info.domain == Domain::kVariance) {
    const Tensor variance = a[2].contiguous().view(-1);
    const int64_t first = variance.lt(0).nonzero()[0].item<int64_t>();
    TORCH_CHECK_VALUE(false, "all elements of var should be at least 0, but ",
                      element_name("var", a[2].sizes(), first), " is ",
                      variance[first].item<double>());
  }
  find_outside_unit(a.input, a.target);
}

// ---- calls --------------------------------------------------------------------------------------

struct CpuEngine {
  const Arguments& a;
  const LossInfo& info;

  CpuEngine(const Arguments& arguments, Pass) : a(arguments), info(checked(a)) {
    call_.threads = &on_torch_threads;
  }

  bool predicts(const Tensor& prediction) {
    predicted_ = predict(prediction);
    return !std::isnan(predicted_);
  }

  void read(const OptionalTensor& upstream) {
    operands_.read(call_, a, info, upstream);
    const Tensor& weight = operands_.weight();
    if (const Tensor& indices = operands_.indices(); indices.defined()) {
      weights_ = sum_weights(a, indices, weight, info.custom);
    }
    if (info.custom_rows()) {
      rows_kernel_ = info.cpu_rows;
      check_loaded(rows_kernel_);
    } else if (info.family == Family::kRows) {
      if (weight.defined() && a.parameters[0] != 0) {
        smoothing_weight_ = sum_of(weight);
        call_.weight_sum = &smoothing_weight_;
      }
    } else {
      call_.kernel = info.custom ? info.cpu.load() : &kernels().losses[info.number];
      check_loaded(call_.kernel);
    }
  }

  void compute(const Tensor& result, const Gradients& gradients, const Tensor& state) {
    const Tensor loss = loss_in(result, info);
    write_auxiliary(call_, result, a, info);
    const double divisor = a.reduction == at::Reduction::Mean ? mean_divisor() : 1;
    call_.want_sum = !a.each();
    if (a.each()) {
      advise_huge_pages(loss);
      write_to(call_.value, loss);
    }
    const Sum sum = run(gradients, predicted_ / divisor);
    // A mean over no rows is nan, whatever label smoothing adds up beside it.
    const bool empty = divisor == 0 && info.family == Family::kRows;
    if (!a.each()) set_scalar(loss, empty ? kNaN : sum.divided_by(divisor));
    if (!state.defined()) return;
    state.mutable_data_ptr<double>()[0] = predicted_;
    state.mutable_data_ptr<double>()[1] = divisor;
  }

  bool is_done(const Tensor& grad_output, const Tensor& state, SavedGradients* saved, bool fresh) {
    upstream_ = 1;
    if (a.each()) return false;
    upstream_ = scalar(grad_output);
    if (saved) update_prediction(saved->prediction, upstream_);
    return !fresh && same(state.const_data_ptr<double>()[0], upstream_);
  }

  void recompute(const Gradients& gradients, const Tensor& state) {
    run(gradients, upstream_ / state.const_data_ptr<double>()[1]);
  }

  void compute_both(const Tensor& result, const Gradients& gradients) {
    write_rows(call_, result, gradients, a, info);
    run(gradients, 1);
  }

 private:
  void check_loaded(const void* kernel) const {
    TORCH_CHECK(kernel, "fusedloss: no CPU kernel of the loss '", a.loss,
                "' is loaded: call it once on the CPU");
  }

  double mean_divisor() const {
    if (info.mean == Mean::kWeights && present(a.weight)) return sum_of(*a.weight);
    const auto elements = static_cast<double>(a.input.numel());
    if (info.mean != Mean::kRows) return elements;
    if (operands_.indices().defined()) return weights_;
    if (info.custom && present(a.weight)) return sum_of(*a.weight);
    return elements / static_cast<double>(a.classes());
  }

  // Returns the sum of the losses, where it is wanted.
  Sum run(const Gradients& gradients, double scale) {
    for (const Tensor& gradient : gradients) {
      if (gradient.defined()) advise_huge_pages(gradient);
    }
    for (size_t i = 0; i < gradients.size(); ++i) write_to(call_.gradients[i], gradients[i]);
    call_.scale = scale;
    if (rows_kernel_) {
      Sum sum;
      sum.add(rows_kernel_->run(CustomRowsCall(call_), call_.parameters, scale, call_.threads));
      return sum;
    }
    const bool rows = info.family == Family::kRows;
    const auto [sum, in_domain] =
        rows ? kernels().cross_entropy(call_) : kernels().pointwise(call_);
    if (!in_domain) throw_outside_domain(a, info);
    return sum;
  }

  double predicted_ = kNaN;      // the upstream gradient that forward writes gradients for
  double upstream_ = 1;          // the true one
  double weights_ = 0;           // of the targets that are not ignored
  double smoothing_weight_ = 0;  // of all classes
  Operands operands_;
  cpu::Call call_;
  const cpu::CustomRowsKernel* rows_kernel_ = nullptr;  // of a custom row loss
};

}  // namespace

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { Operators<CpuEngine>::add_to(m); }

const char* cpu_capability() { return Capability::instance().name; }

}  // namespace fusedloss
