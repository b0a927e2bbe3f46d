// The operators torch.ops.fusedloss.*: schemas, shape-only kernels, and what turns tensors into the
// engines' calls.
//
// Every forward operator returns `scales`, two doubles: the upstream gradient that `gradient` was
// written for (nan: it was not written), and what reduction "mean" divides by. The backward
// operators make `gradient` right for the true upstream gradient: for nothing where it is already.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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
#include <numeric>
#include <sstream>

#include "cpu/kernels.h"
#include "math/losses.h"
#include "math/sum.h"
#include "operators.h"

namespace fusedloss {
namespace {

using at::Tensor;

// ---- CPU capability -----------------------------------------------------------------------------

struct Kernels {
  const char* capability;
  decltype(&cpu::DEFAULT::pointwise) pointwise;
  decltype(&cpu::DEFAULT::cross_entropy) cross_entropy;
};
#define FUSEDLOSS_KERNELS(CAPABILITY) \
  Kernels { #CAPABILITY, &cpu::CAPABILITY::pointwise, &cpu::CAPABILITY::cross_entropy }

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

// ---- tensors ------------------------------------------------------------------------------------

cpu::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return cpu::DType::kFloat64;
    case at::kFloat:
      return cpu::DType::kFloat32;
    case at::kBFloat16:
      return cpu::DType::kBFloat16;
    case at::kHalf:
      return cpu::DType::kFloat16;
    case at::kLong:
      return cpu::DType::kInt64;
    default:
      TORCH_CHECK_TYPE(false, "fusedloss: dtype ", t.scalar_type(), " is not supported");
  }
}

// Memory that a caller brought along may begin between two elements: a copy does not.
Tensor aligned(const Tensor& t) {
  const bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
  return fits ? t : t.clone(at::MemoryFormat::Preserve);
}

bool present(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// Dense in the order of input's strides, else row-major: what AccumulateGrad takes without a copy.
Tensor empty_dense_like(const Tensor& input, at::ScalarType dtype) {
  return at::empty_like(input, input.options().dtype(dtype),
                        input.is_non_overlapping_and_dense() ? at::MemoryFormat::Preserve
                                                             : at::MemoryFormat::Contiguous);
}
Tensor empty_gradient(const Tensor& input) { return empty_dense_like(input, input.scalar_type()); }

// Large tensors are allocated before small ones: the last step's gradient has left a hole of just
// this size, and a loss that its caller keeps must not be the one to take a piece of it.
//
// Page faults are half of the time it takes to fill a large fresh tensor; huge pages make 512 times
// fewer of them.
void advise_huge_pages([[maybe_unused]] const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kWorthwhile = size_t{4} << 20, kPage = 4096;
  if (fresh.nbytes() < kWorthwhile) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (begin + fresh.nbytes()) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

std::string element_name(const char* tensor, at::IntArrayRef sizes, int64_t linear) {
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0;) {
    index[d] = linear % sizes[d];
    linear /= sizes[d];
  }
  std::ostringstream name;
  name << tensor << "[";
  for (size_t d = 0; d < index.size(); ++d) name << (d ? ", " : "") << index[d];
  name << "]";
  return name.str();
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
// Two doubles: the upstream gradient that the last backward saw, and how often of late it was the
// one predicted, 0 to 3. Like a branch predictor's counter: forward writes the gradient at 2 and 3.
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

Tensor pack_scales(const Tensor& like, double upstream, double normalizer) {
  Tensor scales = at::empty({2}, like.options().dtype(at::kDouble));
  scales.mutable_data_ptr<double>()[0] = upstream;
  scales.mutable_data_ptr<double>()[1] = normalizer;
  return scales;
}

// ---- pointwise ----------------------------------------------------------------------------------

Mean mean_of(std::string_view loss) {
#define FUSEDLOSS_MEAN(NAME, LOSS) \
  if (loss == NAME) return LOSS::kMean;
  FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_MEAN)
#undef FUSEDLOSS_MEAN
  TORCH_CHECK_VALUE(false, "fusedloss: no pointwise loss is named '", loss, "'");
}

int64_t class_dim(const Tensor& input) { return input.dim() > 1 ? 1 : 0; }

// Of class indices input's without the class dimension, else input's.
void check_shapes(const Tensor& input, const Tensor& target) {
  at::DimVector expected(input.sizes());
  if (target.scalar_type() == at::kLong) {
    TORCH_CHECK_VALUE(input.dim() > 0, "fusedloss: input of shape () has no class dimension");
    expected.erase(expected.begin() + class_dim(input));
  }
  TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef(expected), "fusedloss: target of shape ",
                    target.sizes(), " does not fit input of shape ", input.sizes());
}

// Class indices as the engines want them: contiguous, ignored ones -1, the rest within range; and
// the sum of the weights of those not ignored.
struct Classes {
  Tensor indices;
  double weight_sum = 0;
};

constexpr double kOutOfRange = -std::numeric_limits<double>::infinity();

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

Classes check_classes(const Tensor& target, int64_t classes, const Tensor& weight,
                      int64_t ignore_index) {
  Classes result{aligned(target.contiguous())};
  const int64_t* index = result.indices.const_data_ptr<int64_t>();
  const Tensor wide = weight.defined() ? weight.to(at::kDouble).contiguous() : Tensor();
  const double* w = wide.defined() ? wide.const_data_ptr<double>() : nullptr;
  const int64_t n = target.numel();
  constexpr int64_t kChunk = 32768;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  // Of each chunk: the sum of its weights, or kOutOfRange.
  c10::SmallVector<double, 4> sums(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t *begin = index + c * kChunk, *end = index + std::min(n, (c + 1) * kChunk);
      int64_t ignored = 0, outside = 0;
      for (const int64_t* t = begin; t != end; ++t) {
        const bool ignore = *t == ignore_index;
        ignored += ignore;
        outside += !ignore & (static_cast<uint64_t>(*t) >= static_cast<uint64_t>(classes));
      }
      if (outside) {
        sums[c] = kOutOfRange;
      } else if (!w) {
        sums[c] = static_cast<double>(end - begin - ignored);
      } else {
        Sum sum;
        for (const int64_t* t = begin; t != end; ++t) sum.add(*t == ignore_index ? 0 : w[*t]);
        sums[c] = sum.value();
      }
    }
  });
  Sum total;
  for (double sum : sums) {
    if (sum == kOutOfRange) throw_out_of_range(target, result.indices, classes, ignore_index);
    total.add(sum);
  }
  result.weight_sum = total.value();
  return result;
}

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
  Mean mean;
  Tensor input, target;
  std::vector<Tensor> held;
  double class_weight_sum = 0;  // kRows with class indices

  PointwiseCall(const Tensor& input_, const Tensor& target_, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, const OptionalTensor& upstream,
                std::string_view loss, double parameter, int64_t ignore_index,
                at::ScalarType result)
      : mean(mean_of(loss)), input(aligned(input_)), target(aligned(target_)) {
    call.loss = loss;
    call.parameter = parameter;
    call.compute_in_double = result == at::kDouble;
    call.numel = input.numel();
    const bool classes = target.scalar_type() == at::kLong;
    check_shapes(input, target);
    if (classes) {
      const int64_t dim = class_dim(input);
      const Classes checked =
          check_classes(target, input.size(dim), present(weight) ? weight->reshape({-1}) : Tensor(),
                        ignore_index);
      class_weight_sum = checked.weight_sum;
      // -1 is no class, whatever number ignore_index is.
      target = checked.indices.masked_fill(checked.indices.eq(ignore_index), -1)
                   .unsqueeze(dim)
                   .expand(input.sizes());
    }
    std::array<const Tensor*, 5> tensors{&input, &target, nullptr, nullptr, nullptr};
    const auto expand = [&](const OptionalTensor& t) -> const Tensor* {
      if (!present(t)) return nullptr;
      held.push_back(aligned(*t).expand(input.sizes()));
      return &held.back();
    };
    held.reserve(3);
    tensors[2] = expand(weight);
    tensors[3] = expand(pos_weight);
    tensors[4] = expand(upstream);
    std::array<cpu::Operand*, 5> operands{&call.input, &call.target, &call.weight, &call.pos_weight,
                                          &call.upstream};
    bool flat = !classes;
    for (size_t k = 0; k < tensors.size(); ++k) {
      if (!tensors[k]) continue;
      operands[k]->data = tensors[k]->const_data_ptr();
      operands[k]->dtype = dtype_of(*tensors[k]);
      flat = flat && tensors[k]->is_contiguous();
    }
    if (!flat) walk(tensors, operands, classes ? class_dim(input) : -1);
  }

  // Finds the order of dimensions in which input, or else a row-major gradient, lies in memory, and
  // how each operand strides along it.
  void walk(const std::array<const Tensor*, 5>& tensors,
            const std::array<cpu::Operand*, 5>& operands, int64_t classes) {
    std::vector<int64_t> order(input.dim());
    std::iota(order.begin(), order.end(), 0);
    if (input.is_non_overlapping_and_dense()) {
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return input.stride(a) > input.stride(b); });
    }
    cpu::Space& space = call.space;
    for (int64_t d : order) {
      if (input.size(d) == 1 && d != classes) continue;
      // A dimension continues the one outside it where every operand steps evenly over both.
      const int last = space.dims - 1;
      bool joins = last >= 0 && classes < 0;
      for (size_t k = 0; joins && k < tensors.size(); ++k) {
        joins = !tensors[k] || operands[k]->strides[last] == tensors[k]->stride(d) * input.size(d);
      }
      if (!joins) {
        space.sizes[space.dims++] = 1;
      }
      space.sizes[space.dims - 1] *= input.size(d);
      if (d == classes) call.target.class_dim = space.dims - 1;
      for (size_t k = 0; k < tensors.size(); ++k) {
        if (tensors[k]) operands[k]->strides[space.dims - 1] = tensors[k]->stride(d);
      }
    }
    if (space.dims == 0) space.sizes[space.dims++] = 1;  // one element: strides are not used
    for (size_t k = 0; k < tensors.size(); ++k) {
      if (!tensors[k]) continue;
      int64_t step = 1;
      bool contiguous = operands[k]->class_dim < 0;
      for (int d = space.dims - 1; d >= 0; --d) {
        contiguous = contiguous && (space.sizes[d] == 1 || operands[k]->strides[d] == step);
        step *= space.sizes[d];
      }
      operands[k]->contiguous = contiguous;
    }
  }

  double normalizer(int64_t reduction, const OptionalTensor& weight) const {
    if (reduction != at::Reduction::Mean) return 1;
    switch (mean) {
      case Mean::kWeights:
        if (present(weight)) return weight->sum(at::kDouble).item<double>();
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

  cpu::PointwiseResult run() { return kernels().pointwise(call); }
};

Tensor empty_loss(const Tensor& input, int64_t reduction, at::ScalarType dtype) {
  if (reduction != at::Reduction::None) return at::empty({}, input.options().dtype(dtype));
  return empty_dense_like(input, dtype);
}

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
  if (!each) set_scalar(loss, result.sum / normalizer);
}

Tensor pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 const OptionalTensor& pos_weight, std::string_view loss, double parameter,
                 int64_t ignore_index, int64_t reduction, at::ScalarType dtype, const Tensor&) {
  PointwiseCall p(input, target, weight, pos_weight, {}, loss, parameter, ignore_index, dtype);
  Tensor value = empty_loss(input, reduction, dtype);
  write_loss(p, value, reduction, p.normalizer(reduction, weight));
  return value;
}

std::tuple<Tensor, Tensor, Tensor> pointwise_forward(
    const Tensor& input, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& pos_weight, std::string_view loss, double parameter, int64_t ignore_index,
    int64_t reduction, at::ScalarType dtype, const Tensor& prediction) {
  Tensor gradient = empty_gradient(input);  // first: see advise_huge_pages
  PointwiseCall p(input, target, weight, pos_weight, {}, loss, parameter, ignore_index, dtype);
  const double normalizer = p.normalizer(reduction, weight);
  const double upstream = predict(prediction);
  Tensor value = empty_loss(input, reduction, dtype);
  if (!std::isnan(upstream)) {
    advise_huge_pages(gradient);
    p.call.gradient = gradient.mutable_data_ptr();
    p.call.gradient_dtype = dtype_of(gradient);
    p.call.scale = upstream / normalizer;
  }
  write_loss(p, value, reduction, normalizer);
  return {value, gradient, pack_scales(input, upstream, normalizer)};
}

void pointwise_backward_(const Tensor& gradient, const Tensor& grad_output, const Tensor& scales,
                         bool fresh, const Tensor& input, const Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& pos_weight,
                         std::string_view loss, double parameter, int64_t ignore_index,
                         int64_t reduction, at::ScalarType dtype, const Tensor& prediction) {
  const double* scale = scales.const_data_ptr<double>();
  const bool each = reduction == at::Reduction::None;
  const double upstream = each ? 1 : scalar(grad_output);
  if (!each) {
    learn(prediction, upstream);
    if (!fresh && same(scale[0], upstream)) return;
  }
  PointwiseCall p(input, target, weight, pos_weight,
                  each ? OptionalTensor(grad_output) : std::nullopt, loss, parameter, ignore_index,
                  dtype);
  advise_huge_pages(gradient);
  p.call.gradient = gradient.mutable_data_ptr();
  p.call.gradient_dtype = dtype_of(gradient);
  p.call.scale = upstream / scale[1];
  p.run();
}

// ---- cross-entropy ------------------------------------------------------------------------------

// (N, C, d1, ...) as (N, C, d), without a copy where the inner dimensions step evenly.
Tensor join_inner(const Tensor& t) { return t.dim() <= 3 ? t : t.flatten(2); }

// Of a tensor of (C), (N, C) or (N, C, d); a dimension that it has not is of size 1, whose stride
// nothing reads.
cpu::Rows rows_of(const Tensor& t) {
  cpu::Rows rows;
  rows.data = t.const_data_ptr();
  rows.dtype = dtype_of(t);
  rows.outer = t.dim() > 1 ? t.stride(0) : 1;
  rows.classes = t.stride(class_dim(t));
  rows.inner = t.dim() > 2 ? t.stride(2) : 1;
  return rows;
}

struct CrossEntropyCall {
  cpu::CrossEntropy call;
  std::vector<Tensor> held;

  CrossEntropyCall(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                   int64_t ignore_index, double label_smoothing, at::ScalarType result) {
    const bool wide = result == at::kDouble;
    call.compute_in_double = wide;
    call.ignore_index = ignore_index;
    call.label_smoothing = label_smoothing;
    held.reserve(4);
    const Tensor& rows = hold(join_inner(aligned(input)));
    call.outer = rows.dim() > 1 ? rows.size(0) : 1;
    call.classes = rows.size(class_dim(rows));
    call.inner = rows.dim() > 2 ? rows.size(2) : 1;
    call.input = rows_of(rows);
    if (target.scalar_type() == at::kLong) {
      call.indices = hold(aligned(target.contiguous())).const_data_ptr<int64_t>();
    } else {
      call.probabilities = rows_of(hold(join_inner(aligned(target))));
    }
    if (present(weight)) {
      const Tensor w = hold(aligned(weight->to(wide ? at::kDouble : at::kFloat).contiguous()));
      call.weight = w.const_data_ptr();
      call.weight_sum = label_smoothing == 0 ? 0 : w.sum(at::kDouble).item<double>();
    } else {
      call.weight_sum = static_cast<double>(call.classes);
    }
    // A gradient has its input's strides, or is row-major where input is not dense.
    call.by_row = call.classes == 1 || (call.input.classes == 1 &&
                                        (call.inner == 1 || input.is_non_overlapping_and_dense()));
    if (!call.by_row && call.inner == 1) {
      // A transposed matrix: its rows lie side by side.
      swapped = true;
      std::swap(call.outer, call.inner);
      for (cpu::Rows* r : {&call.input, &call.probabilities}) std::swap(r->outer, r->inner);
    }
  }
  bool swapped = false;

  const Tensor& hold(Tensor t) {
    held.push_back(std::move(t));
    return held.back();
  }

  void want_gradient(const Tensor& gradient, double scale) {
    call.gradient = rows_of(join_inner(gradient));
    TORCH_CHECK(call.gradient.data == gradient.const_data_ptr(),
                "fusedloss: the dimensions of input behind the classes must be joinable");
    if (swapped) std::swap(call.gradient.outer, call.gradient.inner);
    call.scale = scale;
  }

  double run() { return kernels().cross_entropy(call); }
};

// What reduction "mean" divides by; checks the class indices on the way.
double cross_entropy_normalizer(const Tensor& input, const Tensor& target,
                                const OptionalTensor& weight, int64_t ignore_index,
                                int64_t reduction) {
  check_shapes(input, target);
  const int64_t classes = input.size(class_dim(input));
  TORCH_CHECK_VALUE(!present(weight) || weight->sizes() == at::IntArrayRef{classes},
                    "fusedloss: ", classes, " classes need a weight of shape (", classes, "), not ",
                    present(weight) ? weight->sizes() : at::IntArrayRef{});
  double sum = static_cast<double>(input.numel()) / static_cast<double>(classes);
  if (target.scalar_type() == at::kLong) {
    sum = check_classes(target, classes, present(weight) ? *weight : Tensor(), ignore_index)
              .weight_sum;
  }
  return reduction == at::Reduction::Mean ? sum : 1;
}

// Shapes without the class dimension.
Tensor empty_rows(const Tensor& input, int64_t reduction, at::ScalarType dtype) {
  c10::SymDimVector sizes;
  if (reduction == at::Reduction::None) {
    for (int64_t d = 0; d < input.dim(); ++d) {
      if (d != class_dim(input)) sizes.push_back(input.sym_size(d));
    }
  }
  return at::empty_symint(sizes, input.options().dtype(dtype));
}

Tensor write_loss(CrossEntropyCall& p, const Tensor& input, int64_t reduction, at::ScalarType dtype,
                  double normalizer) {
  Tensor value = empty_rows(input, reduction, dtype);
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
                     at::ScalarType dtype, const Tensor&) {
  const double normalizer =
      cross_entropy_normalizer(input, target, weight, ignore_index, reduction);
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype);
  return write_loss(p, input, reduction, dtype, normalizer);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(
    const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t ignore_index,
    double label_smoothing, int64_t reduction, at::ScalarType dtype, const Tensor& prediction) {
  Tensor gradient = empty_gradient(input);  // first: see advise_huge_pages
  const double normalizer =
      cross_entropy_normalizer(input, target, weight, ignore_index, reduction);
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype);
  const double upstream = reduction == at::Reduction::None ? kNotWritten : predict(prediction);
  if (!std::isnan(upstream)) {
    advise_huge_pages(gradient);
    p.want_gradient(gradient, upstream / normalizer);
  }
  Tensor value = write_loss(p, input, reduction, dtype, normalizer);
  return {value, gradient, pack_scales(input, upstream, normalizer)};
}

void cross_entropy_backward_(const Tensor& gradient, const Tensor& grad_output,
                             const Tensor& scales, bool fresh, const Tensor& input,
                             const Tensor& target, const OptionalTensor& weight,
                             int64_t ignore_index, double label_smoothing, int64_t reduction,
                             at::ScalarType dtype, const Tensor& prediction) {
  const double* scale = scales.const_data_ptr<double>();
  const bool each = reduction == at::Reduction::None;
  const double upstream = each ? 1 : scalar(grad_output);
  if (!each) {
    learn(prediction, upstream);
    if (!fresh && same(scale[0], upstream)) return;
  }
  // Once more: memory that a target shares may have changed unseen, and an index leads to memory.
  cross_entropy_normalizer(input, target, weight, ignore_index, reduction);
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype);
  if (each) {
    const at::ScalarType computes = dtype == at::kDouble ? at::kDouble : at::kFloat;
    p.call.upstream = p.hold(grad_output.to(computes).contiguous()).const_data_ptr();
  }
  advise_huge_pages(gradient);
  p.want_gradient(gradient, upstream / scale[1]);
  p.run();
}

// ---- shape-only kernels -------------------------------------------------------------------------

Tensor meta_scales(const Tensor& like) { return at::empty({2}, like.options().dtype(at::kDouble)); }

Tensor pointwise_meta(const Tensor& input, const Tensor&, const OptionalTensor&,
                      const OptionalTensor&, std::string_view, double, int64_t, int64_t reduction,
                      at::ScalarType dtype, const Tensor&) {
  return empty_loss(input, reduction, dtype);
}

std::tuple<Tensor, Tensor, Tensor> pointwise_forward_meta(const Tensor& input, const Tensor&,
                                                          const OptionalTensor&,
                                                          const OptionalTensor&, std::string_view,
                                                          double, int64_t, int64_t reduction,
                                                          at::ScalarType dtype, const Tensor&) {
  return {empty_loss(input, reduction, dtype), empty_gradient(input), meta_scales(input)};
}

void pointwise_backward_meta_(const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&,
                              const Tensor&, const OptionalTensor&, const OptionalTensor&,
                              std::string_view, double, int64_t, int64_t, at::ScalarType,
                              const Tensor&) {}

Tensor cross_entropy_meta(const Tensor& input, const Tensor&, const OptionalTensor&, int64_t,
                          double, int64_t reduction, at::ScalarType dtype, const Tensor&) {
  return empty_rows(input, reduction, dtype);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_meta(const Tensor& input, const Tensor&,
                                                              const OptionalTensor&, int64_t,
                                                              double, int64_t reduction,
                                                              at::ScalarType dtype, const Tensor&) {
  return {empty_rows(input, reduction, dtype), empty_gradient(input), meta_scales(input)};
}

void cross_entropy_backward_meta_(const Tensor&, const Tensor&, const Tensor&, bool, const Tensor&,
                                  const Tensor&, const OptionalTensor&, int64_t, double, int64_t,
                                  at::ScalarType, const Tensor&) {}

}  // namespace

#define FUSEDLOSS_POINTWISE_OPTIONS \
  "str loss, float parameter, int ignore_index, int reduction, ScalarType dtype"
#define FUSEDLOSS_CROSS_ENTROPY_OPTIONS \
  "int ignore_index, float label_smoothing, int reduction, ScalarType dtype"

TORCH_LIBRARY(fusedloss, m) {
  // Differentiable in input; the kernels behind Autograd compute the value only.
  m.def(
      "pointwise(Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ", Tensor prediction) -> Tensor");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor prediction) -> Tensor");

  m.def(
      "pointwise_forward(Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS
      ", Tensor prediction) -> "
      "(Tensor loss, Tensor gradient, Tensor scales)");
  m.def(
      "pointwise_backward_(Tensor(a!) gradient, Tensor grad_output, Tensor scales, bool fresh, "
      "Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ", Tensor(b!) prediction) -> ()");
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? "
      "weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor prediction) -> "
      "(Tensor loss, Tensor gradient, Tensor scales)");
  m.def(
      "cross_entropy_backward_(Tensor(a!) gradient, Tensor grad_output, Tensor scales, bool fresh, "
      "Tensor input, Tensor target, Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS
      ", Tensor(b!) prediction) -> ()");
  m.def("empty_gradient(Tensor input) -> Tensor");

  // Gradients that have a graph themselves: written in Python, by fusedloss/autograd.py.
  m.def(
      "pointwise_reference_gradient(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, Tensor? pos_weight, " FUSEDLOSS_POINTWISE_OPTIONS ") -> Tensor");
  m.def(
      "cross_entropy_reference_gradient(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, " FUSEDLOSS_CROSS_ENTROPY_OPTIONS ") -> Tensor");
}

#define FUSEDLOSS_REGISTER(M, SUFFIX)                      \
  M.impl("pointwise", &pointwise##SUFFIX);                 \
  M.impl("pointwise_forward", &pointwise_forward##SUFFIX); \
  M.impl("cross_entropy", &cross_entropy##SUFFIX);         \
  M.impl("cross_entropy_forward", &cross_entropy_forward##SUFFIX);

TORCH_LIBRARY_IMPL(fusedloss, CompositeExplicitAutograd, m) {
  m.impl("empty_gradient", &empty_gradient);
}

TORCH_LIBRARY_IMPL(fusedloss, CPU, m) {
  FUSEDLOSS_REGISTER(m, )
  m.impl("pointwise_backward_", &pointwise_backward_);
  m.impl("cross_entropy_backward_", &cross_entropy_backward_);
}

TORCH_LIBRARY_IMPL(fusedloss, Meta, m) {
  FUSEDLOSS_REGISTER(m, _meta)
  m.impl("pointwise_backward_", &pointwise_backward_meta_);
  m.impl("cross_entropy_backward_", &cross_entropy_backward_meta_);
}

const char* cpu_capability() { return kernels().capability; }

}  // namespace fusedloss
