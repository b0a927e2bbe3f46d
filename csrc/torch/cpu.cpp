// The operators on the CPU: arguments in, calls of the engines out.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/masked_fill.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>

#include "../cpu/kernels.h"
#include "../math/sum.h"
#include "one_pass.h"

namespace fusedloss {
namespace {

using at::Tensor;

// ---- CPU capability -----------------------------------------------------------------------------

struct Kernels {
  const char* capability;
  decltype(&cpu::DEFAULT::pointwise) pointwise;
  decltype(&cpu::DEFAULT::cross_entropy) cross_entropy;
  decltype(&cpu::DEFAULT::count_classes) count_classes;
};
#define FUSEDLOSS_KERNELS(CAPABILITY)                                          \
  Kernels {                                                                    \
    #CAPABILITY, &cpu::CAPABILITY::pointwise, &cpu::CAPABILITY::cross_entropy, \
        &cpu::CAPABILITY::count_classes                                        \
  }

// For what torch's own kernels run with: the CPU's best, or less by ATEN_CPU_CAPABILITY.
const Kernels& kernels() {
  static const Kernels chosen = [] {
    [[maybe_unused]] const std::string torch_runs = at::get_cpu_capability();
#if defined(FUSEDLOSS_BUILT_AVX512)
    if (torch_runs == "AVX512") return FUSEDLOSS_KERNELS(AVX512);
#endif
#if defined(FUSEDLOSS_BUILT_AVX2)
    if (torch_runs == "AVX512" || torch_runs == "AVX2") return FUSEDLOSS_KERNELS(AVX2);
#endif
    return FUSEDLOSS_KERNELS(DEFAULT);
  }();
  return chosen;
}
#undef FUSEDLOSS_KERNELS

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

// Class indices as the engines want them: contiguous, and within range but for those to ignore; and
// the sum of the weights of those not ignored.
struct Classes {
  Tensor indices;
  double weight_sum = 0;
};

[[noreturn]] void throw_out_of_range(const Tensor& target, const Tensor& indices, int64_t classes,
                                     int64_t ignore_index) {
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t* bad = std::find_if(index, index + indices.numel(), [=](int64_t t) {
    return (t < 0 || t >= classes) && t != ignore_index;
  });
  TORCH_CHECK_INDEX(false, "Target ", *bad, " is out of bounds. It stands at ",
                    element_name("target", target.sizes(), bad - index), "; there are ", classes,
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

Classes check_classes(const Tensor& target, int64_t classes, const Tensor& weight,
                      int64_t ignore_index) {
  Classes result{aligned(target.contiguous())};
  const int64_t* index = result.indices.const_data_ptr<int64_t>();
  const Tensor w = weight.defined() ? aligned(weight.contiguous()) : weight;
  const int64_t n = target.numel();
  constexpr int64_t kChunk = 32768;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  // The sum of each chunk's weights; none where an index is out of range.
  c10::SmallVector<std::optional<double>, 4> sums(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t *begin = index + c * kChunk, *end = index + std::min(n, (c + 1) * kChunk);
      const auto [ignored, outside] =
          kernels().count_classes(begin, end - begin, classes, ignore_index);
      if (outside) continue;
      if (!w.defined()) {
        sums[c] = static_cast<double>(end - begin - ignored);
      } else {
        Sum sum;
        with_numbers(w, [&](const auto* number) {
          for (const int64_t* t = begin; t != end; ++t) {
            sum.add(*t == ignore_index ? 0 : static_cast<double>(number[*t]));
          }
        });
        sums[c] = sum.value();
      }
    }
  });
  Sum total;
  for (const std::optional<double> sum : sums) {
    if (!sum) throw_out_of_range(target, result.indices, classes, ignore_index);
    total.add(*sum);
  }
  result.weight_sum = total.value();
  return result;
}

// ---- pointwise ----------------------------------------------------------------------------------

[[noreturn]] void throw_outside_unit(const char* name, const Tensor& t, int64_t linear) {
  TORCH_CHECK(false, "all elements of ", name, " should be between 0 and 1, but ",
              element_name(name, t.sizes(), linear), " is ",
              scalar(t.contiguous().view(-1)[linear]));
}

// Names the first element outside [0, 1]; the engine has found that there is one.
void find_outside_unit(const Tensor& input, const Tensor& target) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"input", input},
                                std::pair<const char*, const Tensor&>{"target", target}}) {
    const Tensor inside = at::logical_and(t.ge(0), t.le(1)).contiguous().view(-1);
    const bool* first = inside.const_data_ptr<bool>();
    const bool* found = std::find(first, first + inside.numel(), false);
    if (found != first + inside.numel()) throw_outside_unit(name, t, found - first);
  }
}

// ---- calls --------------------------------------------------------------------------------------

struct CpuEngine {
  const Arguments& a;
  const LossInfo& info;

  CpuEngine(const Arguments& arguments, Pass) : a(arguments), info(checked(a)) {
    pointwise_.threads = rows_.threads = &on_torch_threads;
  }

  bool predicts(const Tensor& prediction) {
    predicted_ = predict(prediction);
    return !std::isnan(predicted_);
  }

  void read(const OptionalTensor& upstream) {
    target_ = a.target;
    if (a.indices()) {
      Classes classes =
          check_classes(a.target, a.classes(),
                        present(a.weight) ? a.weight->reshape({-1}) : Tensor(), a.ignore_index);
      class_weights_ = classes.weight_sum;
      target_ = std::move(classes.indices);
    }
    if (info.family == Family::kRows) {
      read_rows(upstream);
    } else {
      read_elements(upstream);
    }
  }

  void compute(const Tensor& loss, const Gradients& gradients, const Tensor& state) {
    const double divisor = a.reduction == at::Reduction::Mean ? mean_divisor() : 1;
    write(gradients, predicted_ / divisor);
    if (a.each()) {
      advise_huge_pages(loss);
      pointwise_.value = rows_.value = loss.mutable_data_ptr();
      pointwise_.value_dtype = rows_.value_dtype = dtype_of(loss);
    }
    const Sum sum = run(!a.each());
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
    write(gradients, upstream_ / state.const_data_ptr<double>()[1]);
    run(false);
  }

 private:
  void read_elements(const OptionalTensor& upstream) {
    if (a.indices()) target_ = target_.masked_fill(target_.eq(a.ignore_index), kIgnored);
    pointwise_.loss = info.name;
    if (info.custom()) {
      pointwise_.custom = info.cpu;
      pointwise_.parameters = a.parameters.data();
      TORCH_CHECK(pointwise_.custom, "fusedloss: no CPU kernel of the loss '", a.loss,
                  "' is loaded: call it once on the CPU");
    }
    elements_.emplace(pointwise_, a, target_, upstream, kMaxDims);
  }

  void read_rows(const OptionalTensor& upstream) {
    row_operands_.emplace(rows_, a, target_);
    rows_.weight_sum = static_cast<double>(rows_.classes);
    if (rows_.weight) {
      rows_.weight_sum = rows_.label_smoothing == 0 ? 0 : sum_of(row_operands_->weight());
    }
    if (present(upstream)) {
      row_upstream_ = upstream->to(a.in_double() ? at::kDouble : at::kFloat).contiguous();
      rows_.upstream = row_upstream_.const_data_ptr();
    }
    choose_walk();
  }

  // Row by row, or tiles of neighbouring rows.
  void choose_walk() {
    // A gradient has its input's strides, or is row-major where input is not dense.
    rows_.by_row =
        rows_.classes == 1 ||
        (rows_.input.classes == 1 && (rows_.inner == 1 || a.input.is_non_overlapping_and_dense()));
    // Rows are no neighbours where they are fewer than a register holds, or further apart than
    // their classes. With few classes, what a row costs beside its elements is worth more than to
    // have these side by side.
    constexpr int64_t kFew = 128, kRows = 16;
    if (rows_.classes > kFew && (rows_.inner < kRows || rows_.input.classes < rows_.input.inner)) {
      rows_.by_row = true;
    }
    if (rows_.by_row && rows_.classes > 1 && rows_.classes <= kFew &&
        rows_.outer * rows_.inner >= kRows) {
      if (rows_.inner == 1) row_operands_->lay_rows_inside(rows_);
      rows_.by_row = false;
    }
  }

  double mean_divisor() const {
    if (info.mean == Mean::kWeights && present(a.weight)) return sum_of(*a.weight);
    const auto elements = static_cast<double>(a.input.numel());
    if (info.mean != Mean::kRows) return elements;
    return a.indices() ? class_weights_ : elements / static_cast<double>(a.classes());
  }

  void write(const Gradients& gradients, double scale) {
    for (const Tensor& gradient : gradients) {
      if (gradient.defined()) advise_huge_pages(gradient);
    }
    pointwise_.scale = rows_.scale = scale;
    if (info.family == Family::kPointwise) {
      write_to(pointwise_, gradients);
    } else if (gradients[0].defined()) {
      row_operands_->write_to(rows_, gradients[0]);
    }
  }

  // The sum of the losses, where it is wanted.
  Sum run(bool want_sum) {
    if (info.family == Family::kRows) {
      Sum sum;
      sum.add(kernels().cross_entropy(rows_));
      return sum;
    }
    pointwise_.want_sum = want_sum;
    const cpu::PointwiseResult result = kernels().pointwise(pointwise_);
    if (!result.in_unit) find_outside_unit(a.input, a.target);
    return result.sum;
  }

  double predicted_ = kNaN;   // the upstream gradient that forward writes gradients for
  double upstream_ = 1;       // the true one
  double class_weights_ = 0;  // of the targets that are not ignored
  Tensor target_, row_upstream_;
  cpu::Pointwise pointwise_;
  cpu::CrossEntropy rows_;
  std::optional<PointwiseOperands> elements_;
  std::optional<CrossEntropyOperands> row_operands_;
};

}  // namespace

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { Operators<CpuEngine>::add_to(m); }

const char* cpu_capability() { return kernels().capability; }

}  // namespace fusedloss
