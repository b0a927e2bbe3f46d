// The operators on the CPU: tensors in, the engines' calls out.
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

#include "carried.h"
#include "cpu/kernels.h"
#include "custom.h"
#include "math/sum.h"
#include "tensors.h"

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

// Large tensors are allocated before small ones: the last step's gradient has left a hole of just
// this size, and a loss that its caller keeps must not be the one to take a piece of it.
//
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

constexpr double kConfident = 2, kMostConfident = 3;
constexpr double kNotWritten = std::numeric_limits<double>::quiet_NaN();

double load(double* p) { return std::atomic_ref<double>(*p).load(std::memory_order_relaxed); }
void store(double* p, double v) { std::atomic_ref<double>(*p).store(v, std::memory_order_relaxed); }

bool same(double a, double b) { return a == b && std::signbit(a) == std::signbit(b); }

double predict(const Tensor& prediction) {
  double* p = prediction.mutable_data_ptr<double>();
  return load(p + 1) >= kConfident ? load(p) : kNotWritten;
}

void learn(const Tensor& prediction, double upstream) {
  double* p = prediction.mutable_data_ptr<double>();
  const double confidence = load(p + 1);
  if (same(load(p), upstream)) {
    store(p + 1, std::min(confidence + 1, kMostConfident));
  } else {
    store(p, upstream);
    store(p + 1, std::max(confidence - 1, 0.0));
  }
}

// Of a forward: the upstream gradient that it expects, and the gradients to write for it, if any.
struct Ahead {
  Tensor prediction, gradient, target_gradient;
  double upstream = kNotWritten;

  Ahead(const OptionalTensor& own, std::string_view loss, const Tensor& input, int64_t reduction,
        const Tensor& target = {}, Wants wants = {}) {
    if (reduction == at::Reduction::None) return;
    prediction = prediction_of(own, loss, input, reduction);
    upstream = predict(prediction);
    if (std::isnan(upstream)) return;
    if (wants.input) gradient = empty_gradient(input);
    if (wants.target) target_gradient = empty_target_gradient(input, target);
  }

  Tensor scales(const Tensor& input, const Tensor& target, double normalizer) && {
    Tensor scales = empty_scales(input);
    scales.mutable_data_ptr<double>()[0] = upstream;
    scales.mutable_data_ptr<double>()[1] = normalizer;
    carry(scales, input, target, std::move(gradient), std::move(prediction),
          std::move(target_gradient));
    return scales;
  }
};

// A backward's gradients, which may be right already for the true upstream gradient.
struct Behind : BackwardGradients {
  double upstream = 1;
  bool done = false;

  Behind(const Tensor& grad_output, const Tensor& scales, const Tensor& input, int64_t reduction,
         const Tensor& target = {}, Wants wants = {})
      : BackwardGradients(left_at(scales, input), input, target, wants) {
    if (reduction == at::Reduction::None) return;
    check_number(grad_output, input);
    upstream = scalar(grad_output);
    if (const Carried* left = carried(scales)) learn(left->prediction, upstream);
    done = !fresh && same(scales.const_data_ptr<double>()[0], upstream);
  }
  static Carried* left_at(const Tensor& scales, const Tensor& input) {
    check_pair("scales", scales, input);
    return carried(scales);
  }
};

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
  // Of each chunk: the sum of its weights, or nothing, if an index is out of range.
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

// A pointwise call and the tensors that its pointers lead to.
struct PointwiseCall {
  cpu::Pointwise call;
  Tensor input, target;
  double class_weight_sum = 0;  // kRows with class indices
  std::optional<PointwiseOperands> operands;

  PointwiseCall(const Tensor& input_, const Tensor& target_, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, const OptionalTensor& upstream,
                std::string_view loss, double parameter, int64_t ignore_index,
                at::ScalarType result)
      : input(input_), target(target_) {
    call.threads = &on_torch_threads;
    check_shapes(input, target);
    call.loss = loss;
    call.parameter = parameter;
    call.compute_in_double = result == at::kDouble;
    if (target.scalar_type() == at::kLong) {
      check_rows(input, target, weight);
      call.loss = of_classes(loss);
      const Classes checked =
          check_classes(target, input.size(class_dim(input)),
                        present(weight) ? weight->reshape({-1}) : Tensor(), ignore_index);
      class_weight_sum = checked.weight_sum;
      target = checked.indices.masked_fill(checked.indices.eq(ignore_index), kIgnored);
    }
    operands.emplace(call, input, target, weight, pos_weight, upstream, kMaxDims);
  }

  // A loss of one's own: its mean is over the weights.
  PointwiseCall(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& upstream, std::string_view loss,
                at::ArrayRef<double> parameters, at::ScalarType result)
      : PointwiseCall(input, target, weight, {}, upstream, loss, 0, 0, result) {
    call.custom = &custom_kernel<cpu::CustomKernel>(loss, parameters);
    call.parameters = parameters.data();
  }

  double normalizer(int64_t reduction, const OptionalTensor& weight) const {
    if (reduction != at::Reduction::Mean) return 1;
    switch (call.custom ? Mean::kWeights : mean_of(call.loss)) {
      case Mean::kWeights:
        if (present(weight)) return sum_of(*weight);
        break;
      case Mean::kRows:
        if (target.scalar_type() == at::kLong) return class_weight_sum;
        return static_cast<double>(input.numel()) /
               static_cast<double>(input.size(class_dim(input)));
      case Mean::kElements:
        break;
    }
    return static_cast<double>(input.numel());
  }

  void want_gradient(const Tensor& gradient, double scale) {
    advise_huge_pages(gradient);
    call.gradient = gradient.mutable_data_ptr();
    call.gradient_dtype = dtype_of(gradient);
    call.scale = scale;
  }

  void want_target_gradient(const Tensor& gradient, double scale) {
    advise_huge_pages(gradient);
    call.target_gradient = gradient.mutable_data_ptr();
    call.target_gradient_dtype = dtype_of(gradient);
    call.scale = scale;
  }

  // Those of an Ahead or Behind.
  template <class Gradients>
  void want_gradients(const Gradients& g, double scale) {
    if (g.gradient.defined()) want_gradient(g.gradient, scale);
    if (g.target_gradient.defined()) want_target_gradient(g.target_gradient, scale);
  }

  cpu::PointwiseResult run() { return kernels().pointwise(call); }
};

void write_loss(PointwiseCall& p, const Tensor& loss, int64_t reduction, double normalizer) {
  const bool each = reduction == at::Reduction::None;
  if (each) {
    advise_huge_pages(loss);
    p.call.value = loss.mutable_data_ptr();
    p.call.value_dtype = dtype_of(loss);
  }
  p.call.want_sum = !each;
  const cpu::PointwiseResult result = p.run();
  if (!result.in_unit) find_outside_unit(p.input, p.target);
  if (!each) set_scalar(loss, result.sum.divided_by(normalizer));
}

Tensor pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 const OptionalTensor& pos_weight, std::string_view loss, double parameter,
                 int64_t ignore_index, int64_t reduction, at::ScalarType dtype,
                 const OptionalTensor&) {
  PointwiseCall p(input, target, weight, pos_weight, {}, loss, parameter, ignore_index, dtype);
  Tensor value = empty_loss(input, reduction, dtype);
  write_loss(p, value, reduction, p.normalizer(reduction, weight));
  return value;
}

std::tuple<Tensor, Tensor> pointwise_forward(
    const Tensor& input, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& pos_weight, std::string_view loss, double parameter, int64_t ignore_index,
    int64_t reduction, at::ScalarType dtype, const OptionalTensor& prediction) {
  Ahead ahead(prediction, loss, input, reduction);  // first: see advise_huge_pages
  PointwiseCall p(input, target, weight, pos_weight, {}, loss, parameter, ignore_index, dtype);
  const double normalizer = p.normalizer(reduction, weight);
  Tensor value = empty_loss(input, reduction, dtype);
  if (ahead.gradient.defined()) p.want_gradient(ahead.gradient, ahead.upstream / normalizer);
  write_loss(p, value, reduction, normalizer);
  return {value, std::move(ahead).scales(input, target, normalizer)};
}

Tensor pointwise_backward(const Tensor& grad_output, const Tensor& scales, const Tensor& input,
                          const Tensor& target, const OptionalTensor& weight,
                          const OptionalTensor& pos_weight, std::string_view loss, double parameter,
                          int64_t ignore_index, int64_t reduction, at::ScalarType dtype) {
  Behind behind(grad_output, scales, input, reduction);
  if (!behind.done) {
    const bool each = reduction == at::Reduction::None;
    PointwiseCall p(input, target, weight, pos_weight,
                    each ? OptionalTensor(grad_output) : std::nullopt, loss, parameter,
                    ignore_index, dtype);
    p.want_gradient(behind.gradient, behind.upstream / scales.const_data_ptr<double>()[1]);
    p.run();
  }
  return std::move(behind.gradient);
}

// ---- losses of one's own ------------------------------------------------------------------------

Tensor custom(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
              std::string_view loss, at::ArrayRef<double> parameters, int64_t reduction,
              at::ScalarType dtype, const OptionalTensor&) {
  PointwiseCall p(input, target, weight, {}, loss, parameters, dtype);
  Tensor value = empty_loss(input, reduction, dtype);
  write_loss(p, value, reduction, p.normalizer(reduction, weight));
  return value;
}

std::tuple<Tensor, Tensor> custom_forward(const Tensor& input, const Tensor& target,
                                          const OptionalTensor& weight, std::string_view loss,
                                          at::ArrayRef<double> parameters, int64_t reduction,
                                          at::ScalarType dtype, bool of_input, bool of_target,
                                          const OptionalTensor& prediction) {
  Ahead ahead(prediction, loss, input, reduction, target, {of_input, of_target});
  PointwiseCall p(input, target, weight, {}, loss, parameters, dtype);
  const double normalizer = p.normalizer(reduction, weight);
  Tensor value = empty_loss(input, reduction, dtype);
  p.want_gradients(ahead, ahead.upstream / normalizer);
  write_loss(p, value, reduction, normalizer);
  return {value, std::move(ahead).scales(input, target, normalizer)};
}

std::tuple<Tensor, Tensor> custom_backward(const Tensor& grad_output, const Tensor& scales,
                                           const Tensor& input, const Tensor& target,
                                           const OptionalTensor& weight, std::string_view loss,
                                           at::ArrayRef<double> parameters, int64_t reduction,
                                           at::ScalarType dtype, bool of_input, bool of_target) {
  Behind behind(grad_output, scales, input, reduction, target, {of_input, of_target});
  if (!behind.done) {
    const bool each = reduction == at::Reduction::None;
    PointwiseCall p(input, target, weight, each ? OptionalTensor(grad_output) : std::nullopt, loss,
                    parameters, dtype);
    p.want_gradients(behind, behind.upstream / scales.const_data_ptr<double>()[1]);
    p.run();
  }
  return {std::move(behind.gradient), std::move(behind.target_gradient)};
}

// ---- cross-entropy ------------------------------------------------------------------------------

struct CrossEntropyCall {
  cpu::CrossEntropy call;
  CrossEntropyOperands operands;
  Tensor upstream;

  CrossEntropyCall(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                   int64_t ignore_index, double label_smoothing, at::ScalarType result)
      : operands(call, input,
                 target.scalar_type() == at::kLong ? aligned(target.contiguous()) : target, weight,
                 ignore_index, label_smoothing, result) {
    call.threads = &on_torch_threads;
    call.weight_sum = static_cast<double>(call.classes);
    if (call.weight) {
      call.weight_sum = label_smoothing == 0 ? 0 : sum_of(operands.weight());
    }
    // A gradient has its input's strides, or is row-major where input is not dense.
    call.by_row = call.classes == 1 || (call.input.classes == 1 &&
                                        (call.inner == 1 || input.is_non_overlapping_and_dense()));
    // Nor are rows neighbours where they are fewer than a register holds, or further apart than
    // their classes.
    // What a row costs beside its elements is worth more than to have these side by side.
    constexpr int64_t kFew = 128, kRows = 16;
    if (call.classes > kFew && (call.inner < kRows || call.input.classes < call.input.inner)) {
      call.by_row = true;
    }
    if (call.by_row && call.classes > 1 && call.classes <= kFew &&
        call.outer * call.inner >= kRows) {
      if (call.inner == 1) operands.lay_rows_inside(call);
      call.by_row = false;
    }
  }

  void want_gradient(const Tensor& gradient, double scale) {
    advise_huge_pages(gradient);
    operands.want_gradient(call, gradient);
    call.scale = scale;
  }

  double run() { return kernels().cross_entropy(call); }
};

// What reduction "mean" divides by; checks the class indices on the way.
double cross_entropy_normalizer(const Tensor& input, const Tensor& target,
                                const OptionalTensor& weight, int64_t ignore_index,
                                int64_t reduction) {
  check_rows(input, target, weight);
  const int64_t classes = input.size(class_dim(input));
  double sum = static_cast<double>(input.numel()) / static_cast<double>(classes);
  if (target.scalar_type() == at::kLong) {
    sum = check_classes(target, classes, present(weight) ? *weight : Tensor(), ignore_index)
              .weight_sum;
  }
  return reduction == at::Reduction::Mean ? sum : 1;
}

Tensor write_loss(CrossEntropyCall& p, const Tensor& input, int64_t reduction, at::ScalarType dtype,
                  double normalizer) {
  Tensor value = empty_row_loss(input, reduction, dtype);
  if (reduction == at::Reduction::None) {
    p.call.value = value.mutable_data_ptr();
    p.call.value_dtype = dtype_of(value);
  }
  const double sum = p.run();
  // A mean over nothing is nan, whatever label smoothing adds up beside it.
  const double mean = normalizer == 0 ? std::numeric_limits<double>::quiet_NaN() : sum / normalizer;
  if (reduction != at::Reduction::None) set_scalar(value, mean);
  return value;
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t ignore_index, double label_smoothing, int64_t reduction,
                     at::ScalarType dtype, const OptionalTensor&) {
  const double normalizer =
      cross_entropy_normalizer(input, target, weight, ignore_index, reduction);
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype);
  return write_loss(p, input, reduction, dtype, normalizer);
}

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                 double label_smoothing, int64_t reduction,
                                                 at::ScalarType dtype,
                                                 const OptionalTensor& prediction) {
  Ahead ahead(prediction, "cross_entropy", input, reduction);  // first: see advise_huge_pages
  const double normalizer =
      cross_entropy_normalizer(input, target, weight, ignore_index, reduction);
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype);
  if (ahead.gradient.defined()) p.want_gradient(ahead.gradient, ahead.upstream / normalizer);
  Tensor value = write_loss(p, input, reduction, dtype, normalizer);
  return {value, std::move(ahead).scales(input, target, normalizer)};
}

Tensor cross_entropy_backward(const Tensor& grad_output, const Tensor& scales, const Tensor& input,
                              const Tensor& target, const OptionalTensor& weight,
                              int64_t ignore_index, double label_smoothing, int64_t reduction,
                              at::ScalarType dtype) {
  Behind behind(grad_output, scales, input, reduction);
  if (!behind.done) {
    // Once more: memory that a target shares may have changed unseen, and an index leads to memory.
    cross_entropy_normalizer(input, target, weight, ignore_index, reduction);
    CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype);
    if (reduction == at::Reduction::None) {
      check_row_upstream(grad_output, input);
      const at::ScalarType computes = dtype == at::kDouble ? at::kDouble : at::kFloat;
      p.upstream = grad_output.to(computes).contiguous();
      p.call.upstream = p.upstream.const_data_ptr();
    }
    p.want_gradient(behind.gradient, behind.upstream / scales.const_data_ptr<double>()[1]);
    p.run();
  }
  return std::move(behind.gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) {
  m.impl("pointwise", &pointwise);
  m.impl("pointwise_forward", &pointwise_forward);
  m.impl("pointwise_backward", &pointwise_backward);
  m.impl("custom", &custom);
  m.impl("custom_forward", &custom_forward);
  m.impl("custom_backward", &custom_backward);
  m.impl("cross_entropy", &cross_entropy);
  m.impl("cross_entropy_forward", &cross_entropy_forward);
  m.impl("cross_entropy_backward", &cross_entropy_backward);
}

const char* cpu_capability() { return kernels().capability; }

}  // namespace fusedloss
