// The Python module fusedloss._C: build information, and the short way into the operators.
//
// The operators can be called as torch.ops.fusedloss.* too, and compilers do so. The short way
// saves a small call what that costs: boxed arguments, and the checks of its tensors made one by
// one in Python. It takes plain calls only, and answers None to any other; fusedloss/_dispatch.py
// has the long way, with the same conditions.
#include <ATen/ExpandUtils.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "one_pass.h"

namespace fusedloss {
namespace {

namespace py = pybind11;
using at::Tensor;

// ---- plain calls --------------------------------------------------------------------------------

#if defined(FUSEDLOSS_CUDA)
constexpr c10::DispatchKeySet kOrdinaryOnCuda({c10::DispatchKey::CUDA,
                                               c10::DispatchKey::AutogradCUDA,
                                               c10::DispatchKey::AutocastCUDA});
#else
constexpr c10::DispatchKeySet kOrdinaryOnCuda;
#endif

// The tensor, if it is an ordinary one on a device that there are kernels for: no subclass,
// wrapper, mode or other layout.
const Tensor* plain(py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return nullptr;
  const Tensor& t = THPVariable_Unpack(object.ptr());
  static const uint64_t ordinary =
      (c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                            c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU}) |
       kOrdinaryOnCuda)
          .raw_repr();
  if ((t.key_set().raw_repr() & ~ordinary) != 0 || t._fw_grad(0).defined()) return nullptr;
  return &t;
}

bool plain_context(const Tensor& input) {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return (tls.included_.raw_repr() & ~c10::default_included_set.raw_repr()) == 0 &&
         !at::impl::torch_function_mode_enabled() &&
         !at::autocast::is_autocast_enabled(input.device().type());
}

bool computes(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

OptionalTensor optional(py::handle object) {
  return object.is_none() ? std::nullopt : OptionalTensor(THPVariable_Unpack(object.ptr()));
}

// What an operand of another dtype than input's may be; each includes those before it.
enum Kind { kSame, kFloating, kSigned, kIntegers, kAny, kNone };
constexpr const char* kKinds[] = {"same", "floating", "signed", "integers", "any"};

Kind kind_of(at::ScalarType dtype) {
  if (computes(dtype)) return kFloating;
  switch (dtype) {
    case at::kLong:
    case at::kInt:
    case at::kShort:
    case at::kChar:
      return kSigned;
    case at::kByte:
      return kIntegers;
    case at::kBool:
      return kAny;
    default:
      return kNone;
  }
}

// Where the dtype of a loss comes from, if its operands have several.
enum Result { kPromoted, kOfInputs, kOfInput, kOfTarget };
constexpr const char* kResults[] = {"promoted", "inputs", "input", "target"};

struct Dtypes {
  Result result = kOfInputs;
  Kind target = kAny, others = kAny;  // what they may be
  int target_at = 1;                  // among the inputs

  Kind of_input(int i) const { return i == target_at ? target : others; }
};

// The place of a text among some.
template <size_t n>
int place_of(const std::string& text, const char* const (&all)[n]) {
  const auto found = std::find(std::begin(all), std::end(all), text);
  if (found == std::end(all)) throw py::value_error(text);
  return static_cast<int>(found - std::begin(all));
}

// The tensors of a call; `ok` while it is a plain one.
struct PlainCall {
  const Tensor *input = nullptr, *target = nullptr;
  c10::SmallVector<Tensor, 2> more;  // inputs besides those
  bool ok = true, saves = false;
  at::ScalarType dtype = at::kFloat;           // of the loss
  c10::SmallVector<at::ScalarType, 4> floats;  // of operands, where not input's

  // A loss of one input has it as target too.
  explicit PlainCall(const py::tuple& objects, size_t count) {
    c10::SmallVector<const Tensor*, 4> inputs;
    for (size_t i = 0; ok && i < count; ++i) {
      inputs.push_back(plain(PyTuple_GET_ITEM(objects.ptr(), i)));
      ok = inputs.back();
    }
    ok = ok && count > 0;
    if (!ok) return;
    input = inputs[0];
    target = inputs[count > 1 ? 1 : 0];
    ok = plain_context(*input) && computes(input->scalar_type()) && input->numel() != 0;
    for (const Tensor* t : inputs) saves = saves || wants_gradient(*t);
    for (const Tensor* t : inputs) ok = ok && joins(*t);
    for (size_t i = 2; ok && i < count; ++i) {
      ok = inputs[i]->sizes() == input->sizes();
      more.push_back(*inputs[i]);
    }
    dtype = input->scalar_type();
  }

  // Takes an operand, of this kind at the most, into the loss's dtype: see _result_dtype() in
  // fusedloss/_dispatch.py.
  void combine(const Tensor& t, Kind most, bool counts) {
    if (t.scalar_type() != input->scalar_type()) combine_other(t.scalar_type(), most, counts);
  }
  void combine_other(at::ScalarType other, Kind most, bool counts) {
    const Kind kind = kind_of(other);
    ok = ok && kind <= most;
    if (!ok) return;
    if (counts) dtype = at::promote_types(dtype, other);
    if (kind == kFloating) floats.push_back(other);
  }
  // Whether the loss is of an operand's dtype, and none has more digits than it is computed with.
  bool keeps_digits() const {
    const auto has = [&](at::ScalarType one) {
      return input->scalar_type() == one ||
             std::find(floats.begin(), floats.end(), one) != floats.end();
    };
    return floats.empty() || (has(dtype) && (dtype == at::kDouble || !has(at::kDouble)));
  }

  // An inference tensor cannot be saved for backward, and torch may do without.
  bool joins(const Tensor& t) const {
    return t.device() == input->device() && !(saves && t.is_inference());
  }

  OptionalTensor weight(py::handle object, at::IntArrayRef sizes, bool broadcasts, Kind most,
                        bool counts) {
    if (!ok || object.is_none()) return std::nullopt;
    const Tensor* w = plain(object);
    ok = w && joins(*w) && !wants_gradient(*w) &&
         (w->sizes() == sizes || (broadcasts && at::is_expandable_to(w->sizes(), sizes)));
    if (ok) combine(*w, most, counts);
    return ok ? OptionalTensor(*w) : std::nullopt;
  }

  // A loss of elements needs a target of its input's shape. gradients: for how many inputs, from
  // the first on, there is one.
  void check_elements(int gradients, const Dtypes& dtypes) {
    ok = ok && target->sizes() == input->sizes() && (gradients > 1 || !wants_gradient(*target));
    if (!ok) return;
    const bool counts = dtypes.result == kPromoted || dtypes.result == kOfInputs;
    combine(*target, dtypes.of_input(1), counts);
    if (dtypes.result == kOfTarget) dtype = target->scalar_type();
    for (int i = 0; i < static_cast<int>(more.size()); ++i) {
      ok = ok && (i + 2 < gradients || !wants_gradient(more[i]));
      combine(more[i], dtypes.of_input(i + 2), counts);
    }
  }

  // A loss of rows takes class indices, or probabilities, among which no index is ignored.
  void check_rows(int64_t ignore_index, const Dtypes& dtypes) {
    if (!ok || input->dim() == 0 || wants_gradient(*target) || classes() > (1 << 24)) {
      ok = false;
    } else if (target->scalar_type() == at::kLong) {
      at::DimVector rows(input->sizes());
      rows.erase(rows.begin() + class_dim(*input));
      ok = target->sizes() == at::IntArrayRef(rows);
    } else {
      check_elements(1, dtypes);
      // The row engines compute in double where input is.
      ok = ok && ignore_index < 0 && keeps_digits() &&
           (dtype == input->scalar_type() || dtype != at::kDouble);
    }
  }

  int64_t classes() const { return input->size(class_dim(*input)); }

  OptionalTensor class_weight(py::handle object) {
    return ok ? weight(object, {classes()}, false, kSame, false) : std::nullopt;
  }
};

// Whether the row engines can walk the dimensions behind the classes as one.
bool joins_inner_dimensions(const Tensor& input) {
  return input.dim() <= 3 || input.is_contiguous() ||
         (input.dim() == 4 && input.is_contiguous(at::MemoryFormat::ChannelsLast));
}

// What compute() returns, without the GIL.
template <class Compute>
py::object without_gil(const Compute& compute) {
  Tensor value;
  {
    py::gil_scoped_release no_gil;
    value = compute();
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(value)));
}

Tensor call_loss(const PlainCall& call, const OptionalTensor& weight, at::TensorList more,
                 std::string_view loss, at::ArrayRef<double> parameters, int64_t ignore_index,
                 int64_t reduction, at::ScalarType dtype, const OptionalTensor& prediction) {
  static const auto op = find_operator<LossSignature>("fusedloss::loss");
  return op.call(*call.input, *call.target, weight, more, loss, parameters, ignore_index, reduction,
                 dtype, prediction);
}

py::object custom(const py::tuple& inputs, py::handle weight_object, std::string_view loss,
                  const std::vector<double>& parameters, int64_t reduction, py::handle prediction) {
  PlainCall call(inputs, inputs.size());
  call.check_elements(static_cast<int>(inputs.size()), Dtypes());
  if (!call.ok || !call.keeps_digits()) return py::none();
  OptionalTensor weight = call.weight(weight_object, call.input->sizes(), true, kAny, false);
  if (!call.ok) return py::none();
  const OptionalTensor site = optional(prediction);
  return without_gil([&] {
    // A mean divides by its sum.
    if (weight) weight = weight->expand(call.input->sizes());
    return call_loss(call, weight, call.more, loss, parameters, 0, reduction, call.dtype, site);
  });
}

// ---- built-in losses ----------------------------------------------------------------------------

// A row of fusedloss/_losses.py: where the arguments of a public function stand, -1 for one that it
// does not have, and what the kernels take of them.
struct Signature {
  std::string name, at_zero, name_of_variant;
  int inputs, gradients;
  enum { kElement, kBroadcasts, kClass } weight_kind;
  double low, high;  // of the first parameter; others are bools
  std::vector<int> parameters;
  int weight, size_average, reduce, reduction, variant, ignore_index;
  Dtypes dtypes;
};

std::vector<Signature>& signatures() {
  static auto& all = *new std::vector<Signature>;
  return all;
}

size_t define(const std::string& name, const std::vector<std::string>& arguments, int inputs,
              int gradients, const std::string& weight_kind,
              const std::vector<std::string>& parameters, double low, double high,
              const std::string& at_zero, const std::string& variant, const std::string& result,
              const std::string& targets) {
  const auto at = [&](const std::string& argument) {
    const auto found = std::find(arguments.begin(), arguments.end(), argument);
    return found == arguments.end() ? -1 : static_cast<int>(found - arguments.begin());
  };
  std::vector<int> numbers;
  for (const std::string& parameter : parameters) numbers.push_back(at(parameter));
  signatures().push_back({name,
                          at_zero,
                          name + "_" + variant,
                          inputs,
                          gradients,
                          weight_kind == "class"        ? Signature::kClass
                          : weight_kind == "broadcasts" ? Signature::kBroadcasts
                                                        : Signature::kElement,
                          low,
                          high,
                          std::move(numbers),
                          at("weight"),
                          at("size_average"),
                          at("reduce"),
                          at("reduction"),
                          at(variant),
                          at("ignore_index"),
                          {static_cast<Result>(place_of(result, kResults)),
                           static_cast<Kind>(place_of(targets, kKinds)), kFloating, at("target")}});
  return signatures().size() - 1;
}

double eps_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    case at::kFloat:
      return std::numeric_limits<float>::epsilon();
    case at::kBFloat16:
      return std::numeric_limits<at::BFloat16>::epsilon();
    default:
      return std::numeric_limits<at::Half>::epsilon();
  }
}

// The options of a call, out of its arguments; `ok` while the kernels take them.
struct Options {
  bool ok = true;
  int64_t reduction = at::Reduction::Mean, ignore_index = 0;
  c10::SmallVector<double, 2> parameters;

  Options(const Signature& s, const py::tuple& args) {
    const auto at = [&](int i) { return i < 0 ? Py_None : PyTuple_GET_ITEM(args.ptr(), i); };
    ok = at(s.size_average) == Py_None && at(s.reduce) == Py_None;
    read_reduction(at(s.reduction));
    for (int i : s.parameters) read_parameter(at(i), s);
    if (s.ignore_index >= 0) read_ignore_index(at(s.ignore_index));
  }

 private:
  void read_reduction(PyObject* object) {
    const auto is = [&](const char* text) {
      return PyUnicode_CompareWithASCIIString(object, text) == 0;
    };
    if (!PyUnicode_CheckExact(object)) {
      ok = false;
    } else if (is("sum")) {
      reduction = at::Reduction::Sum;
    } else if (is("none")) {
      reduction = at::Reduction::None;
    } else {
      ok = ok && is("mean");
    }
  }
  void read_parameter(PyObject* object, const Signature& s) {
    double parameter = 0;
    if (!parameters.empty()) {
      ok = ok && PyBool_Check(object);
      return parameters.push_back(object == Py_True);
    }
    if (PyFloat_Check(object)) {
      parameter = PyFloat_AS_DOUBLE(object);
    } else if (PyLong_CheckExact(object)) {
      parameter = PyLong_AsDouble(object);
      if (PyErr_Occurred()) PyErr_Clear(), ok = false;
    } else {
      ok = false;
    }
    const bool in_domain = parameter >= s.low && parameter <= s.high;
    ok = ok && (in_domain || (parameter == 0 && !s.at_zero.empty()));
    parameters.push_back(parameter);
  }
  void read_ignore_index(PyObject* object) {
    int overflow = 0;
    ok = ok && PyLong_CheckExact(object);
    if (!ok) return;
    ignore_index = PyLong_AsLongLongAndOverflow(object, &overflow);
    ok = overflow == 0;
  }
};

// A loss of every element.
py::object elements_loss(const Signature& s, PlainCall& call, const py::tuple& args,
                         const Options& options, const OptionalTensor& prediction) {
  call.check_elements(s.gradients, s.dtypes);
  if (!call.ok) return py::none();
  const at::IntArrayRef sizes = call.input->sizes();
  const bool broadcasts = s.weight_kind == Signature::kBroadcasts;
  const bool counts = s.dtypes.result == kPromoted;
  const auto weight_at = [&](int i, Kind most) {
    return i < 0 ? std::nullopt : call.weight(args[i], sizes, broadcasts, most, counts);
  };
  const OptionalTensor weight = weight_at(s.weight, kAny);
  const std::string* name = &s.name;
  PyObject* const variant = s.variant < 0 ? Py_None : PyTuple_GET_ITEM(args.ptr(), s.variant);
  if (variant != Py_None && variant != Py_False) {
    name = &s.name_of_variant;
    if (variant != Py_True) {  // a tensor: pos_weight
      if (const OptionalTensor more = weight_at(s.variant, kSigned)) call.more.push_back(*more);
    }
  }
  if (!call.ok || !call.keeps_digits()) return py::none();
  at::ArrayRef<double> parameters = options.parameters;
  if (!s.at_zero.empty() && parameters[0] == 0) {
    name = &s.at_zero;
    parameters = {};
  }
  return without_gil([&] {
    return call_loss(call, weight, call.more, *name, parameters, 0, options.reduction, call.dtype,
                     prediction);
  });
}

// A loss of every row.
py::object rows_loss(const Signature& s, PlainCall& call, const py::tuple& args,
                     const Options& options, const OptionalTensor& prediction) {
  call.check_rows(options.ignore_index, s.dtypes);
  OptionalTensor weight = call.class_weight(args[s.weight]);
  if (!call.ok) return py::none();
  const at::ScalarType dtype = call.dtype;
  if (!s.parameters.empty()) {  // label_smoothing: cross-entropy
    if (!joins_inner_dimensions(*call.input)) return py::none();
    return without_gil([&] {
      return call_loss(call, weight, {}, s.name, options.parameters, options.ignore_index,
                       options.reduction, dtype, prediction);
    });
  }
  return without_gil([&] {
    const int64_t dim = class_dim(*call.input);
    if (weight) {
      at::DimVector sizes(call.input->dim() - dim, 1);  // behind the rows
      sizes[0] = call.classes();
      weight = weight->view(sizes);
    }
    const bool each = options.reduction == at::Reduction::None;
    // Elements that are added up to rows are rounded after that, once.
    const Tensor value =
        call_loss(call, weight, {}, s.name, eps_of(dtype), options.ignore_index, options.reduction,
                  each ? at::promote_types(dtype, at::kFloat) : dtype, prediction);
    return each ? value.sum(dim).to(dtype) : value;
  });
}

py::object loss(size_t number, const py::tuple& args, py::handle prediction) {
  const Signature& s = signatures().at(number);
  const Options options(s, args);
  if (!options.ok) return py::none();
  PlainCall call(args, s.inputs);
  const OptionalTensor site = optional(prediction);
  return s.weight_kind == Signature::kClass ? rows_loss(s, call, args, options, site)
                                            : elements_loss(s, call, args, options, site);
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::dict build_info() {
  py::list capabilities;
  capabilities.append("DEFAULT");
  const std::string_view runs = cpu_capability();
  std::string flags;
#if defined(FUSEDLOSS_BUILT_AVX2)
  capabilities.append("AVX2");
  if (runs == "AVX2") flags = FUSEDLOSS_BUILT_AVX2;
#endif
#if defined(FUSEDLOSS_BUILT_AVX512)
  capabilities.append("AVX512");
  if (runs == "AVX512") flags = FUSEDLOSS_BUILT_AVX512;
#endif
  py::dict info;
  info["version"] = FUSEDLOSS_VERSION;
  info["torch"] = FUSEDLOSS_TORCH_VERSION;
  info["compiler"] = kCompiler;
#if defined(FUSEDLOSS_CUDA)
  info["cuda"] = FUSEDLOSS_CUDA;
#else
  info["cuda"] = py::none();
#endif
  info["cpu_capabilities"] = capabilities;
  info["cpu_capability"] = runs;
  info["cpu_flags"] = flags;  // of the compiler, for that capability
  return info;
}

py::dict losses() {
  py::dict all;
  for (const LossInfo* info : built_in_losses()) {
    py::dict loss;
    loss["family"] = info->family == Family::kRows ? "rows" : "pointwise";
    loss["mean"] = info->mean == Mean::kRows      ? "rows"
                   : info->mean == Mean::kWeights ? "weights"
                                                  : "elements";
    loss["parameters"] = info->parameters;
    loss["inputs"] = info->inputs;
    loss["gradients"] = info->gradients;
    loss["symmetric"] = info->symmetric;
    loss["of_classes"] = info->of_classes ? info->of_classes->name : "";
    all[info->name.c_str()] = loss;
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "What was built and what of it runs, and the short way into torch.ops.fusedloss.*.";
  m.def("build_info", &build_info);
  m.def("define", &define, "Tells of a public function; returns its number.");
  m.def("losses", &losses, "The built-in losses of the operators: what the kernels take and give.");
  m.def("loss", &loss, "The loss of that public function, or None: not a plain call.");
  m.def("custom", &custom, "The loss, or None: not a plain call.");
  m.def(
      "new_prediction", [](const Tensor& input) { return new_prediction(input.device()); },
      "A prediction of the upstream gradient, where input is.");
  m.def("load_custom", &load_custom, "Loads a compiled loss under a name.");
#if defined(FUSEDLOSS_CUDA)
  m.def("load_custom_kernels", &load_custom_kernels, "Loads its kernels for a kind of GPU.");
  m.def("load_custom_rows_kernels", &load_custom_rows_kernels, "The same of a row loss.");
  m.def("raise_faults", &raise_faults,
        "Raises what a kernel found wrong with its input, if known.");
#endif
}

}  // namespace fusedloss
