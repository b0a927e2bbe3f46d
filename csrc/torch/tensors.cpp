#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/accumulate.h>
#include <c10/util/strides.h>

#include <algorithm>
#include <numeric>
#include <sstream>

namespace fusedloss {

using at::Tensor;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kLong:
      return DType::kInt64;
    case at::kInt:
      return DType::kInt32;
    case at::kShort:
      return DType::kInt16;
    case at::kChar:
      return DType::kInt8;
    case at::kByte:
      return DType::kUInt8;
    case at::kBool:
      return DType::kBool;
    default:
      TORCH_CHECK_TYPE(false, "fusedloss: dtype ", t.scalar_type(), " is not supported");
  }
}

Tensor aligned(const Tensor& t) {
  const bool fits = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
  return fits ? t : t.clone(at::MemoryFormat::Preserve);
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

static void check_device(const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK_VALUE(t.device() == input.device(), "fusedloss: ", name, " on ", t.device(),
                    " for input on ", input.device());
}

static at::DimVector row_sizes(const Tensor& input) {
  at::DimVector sizes(input.sizes());
  sizes.erase(sizes.begin() + class_dim(input));
  return sizes;
}

static void check_count(const Arguments& a, const char* what, size_t there, int wanted) {
  TORCH_CHECK_VALUE(there == static_cast<size_t>(wanted), "fusedloss: '", a.loss, "' has ", wanted,
                    " ", what, ", and the call ", there);
}

static void check_floating(const Arguments& a) {
  TORCH_CHECK_TYPE(a.input.is_floating_point(), "fusedloss: input's dtype ", a.input.scalar_type(),
                   " is not supported");
}

// One weight for each class.
static void check_class_weight(const Arguments& a) {
  TORCH_CHECK_VALUE(a.classes() > 0, "fusedloss: input of shape ", a.input.sizes(),
                    " has no classes");
  if (!present(a.weight)) return;
  TORCH_CHECK_VALUE(a.weight->numel() == a.classes(), "fusedloss: ", a.classes(),
                    " classes need a weight of shape (", a.classes(), "), not ", a.weight->sizes());
  check_device("weight", *a.weight, a.input);
}

const LossInfo& known_loss(std::string_view name) {
  const LossInfo* info = find_loss(name);
  TORCH_CHECK(info, "fusedloss: no loss '", name,
              "' is known: import the module that defines it, and call it once");
  return *info;
}

// Each tensor of a custom row loss has the shape of its kind, and the weight that of the rows.
static void check_custom_rows(const Arguments& a, const LossInfo& info) {
  TORCH_CHECK_VALUE(a.classes() > 0, "fusedloss: input of shape ", a.input.sizes(),
                    " has no classes");
  const at::DimVector rows = row_sizes(a.input);
  const int64_t classes = a.classes();
  for (size_t i = 0; i < a.inputs(); ++i) {
    const Kind kind = info.kind(i);
    const at::IntArrayRef expected = kind == Kind::kElement    ? a.input.sizes()
                                     : kind == Kind::kPerClass ? at::IntArrayRef(classes)
                                                               : at::IntArrayRef(rows);
    TORCH_CHECK_VALUE(a[i].sizes() == expected, "fusedloss: input ", i, " of '", a.loss,
                      "' has shape ", a[i].sizes(), ", and with input 0 of shape ", a.input.sizes(),
                      " it needs ", expected);
    TORCH_CHECK_TYPE(kind != Kind::kLabel || a[i].scalar_type() == at::kLong, "fusedloss: input ",
                     i, " of '", a.loss, "' has dtype ", a[i].scalar_type(),
                     ", and a label needs int64");
    check_device("another input", a[i], a.input);
  }
  if (!present(a.weight)) return;
  TORCH_CHECK_VALUE(a.weight->sizes() == at::IntArrayRef(rows), "fusedloss: weight of shape ",
                    a.weight->sizes(), " does not fit input of shape ", a.input.sizes());
  check_device("weight", *a.weight, a.input);
}

const LossInfo& checked(const Arguments& a) {
  const LossInfo& info = known_loss(a.loss);
  check_count(a, "parameters", a.parameters.size(), info.parameters);
  check_count(a, "inputs", a.inputs(), std::max(info.inputs, 2));
  if (info.custom_rows()) {
    check_floating(a);
    check_custom_rows(a, info);
    return info;
  }
  check_device("target", a.target, a.input);
  at::DimVector expected(a.input.sizes());
  const bool indices = takes_indices(a, info);
  check_floating(a);
  TORCH_CHECK_TYPE(!info.of_classes || indices || a.target.is_floating_point(),
                   "fusedloss: target's dtype ", a.target.scalar_type(), " is not supported");
  if (indices) {
    TORCH_CHECK_VALUE(a.input.dim() > 0, "fusedloss: input of shape () has no class dimension");
    expected = row_sizes(a.input);
  }
  TORCH_CHECK_VALUE(a.target.sizes() == at::IntArrayRef(expected), "fusedloss: target of shape ",
                    a.target.sizes(), " does not fit input of shape ", a.input.sizes());
  for (int i = 2; i < info.gradients; ++i) {
    TORCH_CHECK_VALUE(a[i].sizes() == a.input.sizes(), "fusedloss: input ", i, " of '", a.loss,
                      "' has shape ", a[i].sizes(), ", and input 0 ", a.input.sizes());
  }
  if (indices || info.family == Family::kRows) check_class_weight(a);
  return indices ? *info.of_classes : info;
}

void check_pair(const char* name, const Tensor& pair, const Tensor& input) {
  check_device(name, pair, input);
  TORCH_CHECK_VALUE(pair.scalar_type() == at::kDouble && pair.numel() == 2 && pair.is_contiguous(),
                    "fusedloss: ", name, " of ", pair.sizes(), " ", pair.scalar_type(),
                    ", not of two contiguous doubles");
}

void check_upstream(const Tensor& grad_output, const Arguments& a, Family family) {
  check_device("grad_output", grad_output, a.input);
  if (!a.each()) {
    TORCH_CHECK_VALUE(grad_output.numel() == 1 && grad_output.is_floating_point(),
                      "fusedloss: grad_output of shape ", grad_output.sizes(), " and dtype ",
                      grad_output.scalar_type(), " is not one real number");
  } else if (family == Family::kRows) {
    TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(row_sizes(a.input)),
                      "fusedloss: grad_output of shape ", grad_output.sizes(),
                      " does not fit input of shape ", a.input.sizes());
  }
}

// ---- results ------------------------------------------------------------------------------------

Tensor empty_like_input(const Tensor& input, at::ScalarType dtype) {
  return at::empty_like(input, input.options().dtype(dtype),
                        input.is_non_overlapping_and_dense() ? at::MemoryFormat::Preserve
                                                             : at::MemoryFormat::Contiguous);
}

bool lies_like_input(const Tensor& gradient, const Tensor& input, at::ScalarType dtype) {
  return gradient.defined() && gradient.scalar_type() == dtype &&
         gradient.device() == input.device() && gradient.sizes() == input.sizes() &&
         (input.is_non_overlapping_and_dense() ? gradient.strides() == input.strides()
                                               : gradient.is_contiguous());
}

Tensor empty_state(const Tensor& input) {
  return at::empty({2}, input.options().dtype(at::kDouble));
}

Tensor empty_loss(const Arguments& a, const LossInfo& info) {
  if (a.each() && info.family == Family::kPointwise) return empty_like_input(a.input, a.dtype);
  c10::SymDimVector sizes;
  c10::SymInt rows = 1;
  for (int64_t d = 0; d < a.input.dim(); ++d) {
    if (d == class_dim(a.input)) continue;
    rows *= a.input.sym_size(d);
    if (a.each()) sizes.push_back(a.input.sym_size(d));
  }
  if (info.auxiliary) sizes.insert(sizes.begin(), 1 + info.auxiliary * (a.each() ? 1 : rows));
  return at::empty_symint(sizes, a.input.options().dtype(a.dtype));
}

Tensor loss_in(const Tensor& result, const LossInfo& info) {
  return info.auxiliary ? result.select(0, 0) : result;
}

Tensor auxiliary_in(const Tensor& result, const Arguments& a, const LossInfo& info, int k) {
  if (a.each()) return result.select(0, 1 + k);
  const int64_t rows = (result.numel() - 1) / info.auxiliary;
  return result.narrow(0, 1 + k * rows, rows);
}

// ---- operands -----------------------------------------------------------------------------------

void write_to(Output& output, const Tensor& t) {
  if (!t.defined()) return;
  output.data = t.mutable_data_ptr();
  output.dtype = dtype_of(t);
}

void write_auxiliary(Call& call, const Tensor& result, const Arguments& a, const LossInfo& info) {
  for (int k = 0; k < info.auxiliary; ++k) {
    write_to(call.auxiliary[k], auxiliary_in(result, a, info, k));
  }
}

void Operands::read(Call& call, const Arguments& a, const LossInfo& info,
                    const OptionalTensor& upstream) {
  call.parameters = a.parameters.data();
  call.compute_in_double = a.in_double();
  call.ignore_index = a.ignore_index;
  call.numel = a.input.numel();
  const bool indices = takes_indices(a, info);
  if (indices) indices_ = aligned(a.target.contiguous());
  const bool rows = info.family == Family::kRows;
  if (present(a.weight) && (rows || indices)) {
    weight_ = aligned(a.weight->to(a.in_double() ? at::kDouble : at::kFloat).contiguous());
  }
  if (info.custom_rows()) {
    read_custom_rows(call, a, info, upstream);
  } else if (rows) {
    read_rows(call, a, upstream);
  } else {
    read_elements(call, a, upstream);
  }
  for (const auto& [operand, tensor] : held_) {
    operand->data = tensor.const_data_ptr();
    operand->dtype = dtype_of(tensor);
  }
}

void Operands::read_elements(Call& call, const Arguments& a, const OptionalTensor& upstream) {
  const Tensor& input = a.input;
  const bool classes = indices_.defined();
  const auto hold = [&](Operand& operand, const char* name, const Tensor& t) {
    check_device(name, t, input);
    const Tensor there = aligned(t);
    const bool fits = there.sizes() == input.sizes();  // to expand takes time
    held_.push_back({&operand, fits ? there : there.expand(input.sizes())});
  };
  hold(call.inputs[0], "input", input);
  hold(call.inputs[1], "target", classes ? indices_.unsqueeze(class_dim(input)) : a.target);
  for (size_t i = 2; i < a.inputs(); ++i) hold(call.inputs[i], "another input", a[i]);
  if (present(a.weight)) hold(call.weight, "weight", *a.weight);
  if (present(upstream)) hold(call.upstream, "grad_output", *upstream);
  const bool flat = !classes && std::all_of(held_.begin(), held_.end(), [](const Held& held) {
    return held.tensor.is_contiguous();
  });
  if (!flat) coalesce_dimensions(call.space, classes ? class_dim(input) : -1);
}

// Finds the order of dimensions in which input, or else a row-major gradient, lies in memory, and
// how each operand strides along it.
void Operands::coalesce_dimensions(Space& space, int64_t classes) {
  const Tensor& input = held_[0].tensor;
  int& class_dim_of_target = held_[1].operand->class_dim;
  std::vector<int64_t> order(input.dim());
  std::iota(order.begin(), order.end(), 0);
  if (input.is_non_overlapping_and_dense()) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return input.stride(a) > input.stride(b); });
  }
  for (int64_t d : order) {
    if (input.size(d) == 1 && d != classes) continue;
    // A dimension continues the one outside it where every operand steps evenly over both.
    const int last = space.dims - 1;
    bool joins = last >= 0 && d != classes && class_dim_of_target != last;
    for (const auto& [operand, tensor] : held_) {
      joins = joins && operand->strides[last] == tensor.stride(d) * input.size(d);
    }
    if (!joins && space.dims == kMaxDims) return copy_in(order, space, classes);
    if (!joins) space.sizes[space.dims++] = 1;
    space.sizes[space.dims - 1] *= input.size(d);
    if (d == classes) class_dim_of_target = space.dims - 1;
    for (const auto& [operand, tensor] : held_) operand->strides[space.dims - 1] = tensor.stride(d);
  }
  if (space.dims == 0) space.sizes[space.dims++] = 1;  // one element: strides are not used
  for (const auto& [operand, tensor] : held_) {
    int64_t step = 1;
    operand->contiguous = operand->class_dim < 0;
    for (int d = space.dims - 1; d >= 0; --d) {
      if (space.sizes[d] != 1 && operand->strides[d] != step) operand->contiguous = false;
      step *= space.sizes[d];
    }
  }
}

// Copies the operands into that order, where all but class indices are contiguous.
void Operands::copy_in(at::IntArrayRef order, Space& space, int64_t classes) {
  for (Held& held : held_) held.tensor = held.tensor.permute(order).contiguous();
  if (classes < 0) return;
  const auto dim = std::find(order.begin(), order.end(), classes) - order.begin();
  const at::IntArrayRef sizes = held_[0].tensor.sizes();
  held_[1].tensor = held_[1].tensor.select(dim, 0).contiguous();
  const int64_t outer = c10::multiply_integers(sizes.slice(0, dim));
  const int64_t inner = c10::multiply_integers(sizes.slice(dim + 1));
  space = {3, {outer, sizes[dim], inner}};
  Operand& target = *held_[1].operand;
  target.contiguous = false;
  target.class_dim = 1;
  std::copy_n(std::array{inner, int64_t{0}, int64_t{1}}.begin(), 3, target.strides);
}

// (N, C, d1, ...) as (N, C, d), without a copy where the inner dimensions step evenly.
static Tensor join_inner(const Tensor& t) { return t.dim() <= 3 ? t : t.flatten(2); }

// The sizes or strides of (C), (N, C) or (N, C, d). Nothing reads a missing dimension's stride.
static void set_numbers(int64_t* numbers, at::IntArrayRef of) {
  const auto dims = of.size();
  numbers[0] = dims > 1 ? of[0] : 1;
  numbers[1] = of[dims > 1 ? 1 : 0];
  numbers[2] = dims > 2 ? of[2] : 1;
}

// joined: what join_inner() makes of input. Gradients lie as empty_like_input() lays them out.
static void set_gradient_strides(Output& gradient, const Tensor& input, const Tensor& joined) {
  const bool dense = input.is_non_overlapping_and_dense();
  TORCH_CHECK(!dense || joined.const_data_ptr() == input.const_data_ptr(),
              "fusedloss: the dimensions of input behind the classes must be joinable");
  set_numbers(gradient.strides,
              dense ? joined.strides() : at::IntArrayRef(c10::contiguous_strides(joined.sizes())));
}

void Operands::read_rows(Call& call, const Arguments& a, const OptionalTensor& upstream) {
  const Tensor all = aligned(a.input), input = join_inner(all);
  const bool indices = indices_.defined();
  const Tensor target = indices ? indices_ : join_inner(aligned(a.target));
  held_ = {{&call.inputs[0], input}, {&call.inputs[1], target}};
  if (weight_.defined()) held_.push_back({&call.weight, weight_});
  if (present(upstream)) held_.push_back({&call.upstream, aligned(upstream->contiguous())});
  call.space.dims = 3;
  set_numbers(call.space.sizes, input.sizes());
  set_numbers(call.inputs[0].strides, input.strides());
  if (!indices) set_numbers(call.inputs[1].strides, target.strides());
  set_gradient_strides(call.gradients[0], all, input);
}

void write_rows(Call& call, const Tensor& result, at::ArrayRef<Tensor> gradients,
                const Arguments& a, const LossInfo& info) {
  write_to(call.value, loss_in(result, info));
  write_auxiliary(call, result, a, info);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor& t = gradients[i];
    if (!t.defined() || info.kind(i) != Kind::kElement) continue;
    const Tensor joined = join_inner(t);
    TORCH_CHECK_VALUE(joined.const_data_ptr() == t.const_data_ptr(),
                      "fusedloss: the dimensions of an output behind the classes must be joinable");
    set_numbers(call.gradients[i].strides, joined.strides());
  }
}

void Operands::read_custom_rows(Call& call, const Arguments& a, const LossInfo& info,
                                const OptionalTensor& upstream) {
  const int64_t dim = class_dim(a.input);
  const auto hold = [&](Operand& operand, const Tensor& t, Kind kind) {
    const bool element = kind == Kind::kElement;
    const Tensor there = element                   ? join_inner(t)
                         : kind == Kind::kPerClass ? t
                                                   : join_inner(t.unsqueeze(dim));
    held_.push_back({&operand, there});
    if (kind == Kind::kPerClass) {
      std::copy_n(std::array{int64_t{0}, there.stride(0), int64_t{0}}.begin(), 3, operand.strides);
    } else {
      set_numbers(operand.strides, there.strides());
      if (!element) operand.strides[1] = 0;
    }
  };
  const Tensor input = aligned(a.input);
  for (size_t i = 0; i < a.inputs(); ++i) {
    const Kind kind = info.kind(i);
    const Tensor t = i == 0 ? input : aligned(kind == Kind::kLabel ? a[i].contiguous() : a[i]);
    if (kind == Kind::kLabel) indices_ = t;
    hold(call.inputs[i], t, kind);
  }
  if (weight_.defined()) hold(call.weight, weight_, Kind::kPerRow);
  if (present(upstream)) hold(call.upstream, aligned(*upstream), Kind::kPerRow);
  const Tensor joined = held_[0].tensor;
  call.space.dims = 3;
  set_numbers(call.space.sizes, joined.sizes());
  for (size_t i = 0; i < a.inputs(); ++i) {
    if (info.kind(i) == Kind::kElement) {
      set_gradient_strides(call.gradients[i], input, joined);
    } else {  // contiguous, as of a number of each row
      std::copy_n(std::array{call.space.sizes[2], int64_t{0}, int64_t{1}}.begin(), 3,
                  call.gradients[i].strides);
    }
  }
}

}  // namespace fusedloss
