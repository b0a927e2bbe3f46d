// The Python module fusedloss._C: build information, and the short way into the operators.
//
// The operators are reached as torch.ops.fusedloss.* too, by tracing for one; the short way saves a
// small call what that costs: boxed arguments, and the checks of its tensors made one by one in
// Python. It takes plain calls only, and answers None to any other.
#include <ATen/ExpandUtils.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>

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

// The tensors of a call; `ok` while it is a plain one.
struct PlainCall {
  const Tensor *input, *target;
  bool ok, saves;

  PlainCall(py::handle input_object, py::handle target_object)
      : input(plain(input_object)), target(plain(target_object)) {
    ok = input && target && plain_context(*input) && computes(input->scalar_type()) &&
         input->numel() != 0;
    saves = ok && (wants_gradient(*input) || wants_gradient(*target));
    ok = ok && joins(*input) && joins(*target);
  }

  at::ScalarType dtype() const { return input->scalar_type(); }

  // An inference tensor cannot be saved for backward, and torch may do without.
  bool joins(const Tensor& t) const {
    return t.device() == input->device() && !(saves && t.is_inference());
  }

  OptionalTensor weight(py::handle object, at::IntArrayRef sizes, bool broadcasts) {
    if (!ok || object.is_none()) return std::nullopt;
    const Tensor* w = plain(object);
    ok = w && joins(*w) && w->scalar_type() == dtype() && !wants_gradient(*w) &&
         (w->sizes() == sizes || (broadcasts && at::is_expandable_to(w->sizes(), sizes)));
    return ok ? OptionalTensor(*w) : std::nullopt;
  }

  // A loss of elements needs a target like its input.
  void check_target(bool takes_gradient) {
    ok = ok && target->scalar_type() == dtype() && target->sizes() == input->sizes() &&
         (takes_gradient || !wants_gradient(*target));
  }

  // A loss of rows takes class indices, or probabilities, among which no index is ignored.
  void check_rows(int64_t ignore_index) {
    if (!ok || input->dim() == 0 || wants_gradient(*target) || classes() > (1 << 24)) {
      ok = false;
    } else if (target->scalar_type() == at::kLong) {
      at::DimVector rows(input->sizes());
      rows.erase(rows.begin() + class_dim(*input));
      ok = target->sizes() == at::IntArrayRef(rows);
    } else {
      check_target(false);
      ok = ok && ignore_index < 0;
    }
  }

  int64_t classes() const { return input->size(class_dim(*input)); }

  OptionalTensor class_weight(py::handle object) {
    return ok ? weight(object, {classes()}, false) : std::nullopt;
  }
};

constexpr int64_t kMaxClassDims = 8;  // of an input with class indices, on any device

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

py::object pointwise(py::handle input, py::handle target, py::handle weight_object,
                     py::handle pos_weight_object, bool weight_broadcasts, std::string_view loss,
                     double parameter, int64_t reduction, py::handle prediction) {
  PlainCall call(input, target);
  call.check_target(false);
  if (!call.ok) return py::none();
  const at::IntArrayRef sizes = call.input->sizes();
  const OptionalTensor weight = call.weight(weight_object, sizes, weight_broadcasts);
  const OptionalTensor pos_weight = call.weight(pos_weight_object, sizes, weight_broadcasts);
  if (!call.ok) return py::none();
  const OptionalTensor site = optional(prediction);
  return without_gil([&] {
    const at::ArrayRef<double> parameters(&parameter, known_loss(loss).parameters);
    const auto more = pos_weight ? at::TensorList(*pos_weight) : at::TensorList();
    return call_loss(call, weight, more, loss, parameters, 0, reduction, call.dtype(), site);
  });
}

py::object custom(py::handle input, py::handle target, py::handle weight_object,
                  std::string_view loss, const std::vector<double>& parameters, int64_t reduction,
                  py::handle prediction) {
  PlainCall call(input, target);
  call.check_target(true);
  if (!call.ok) return py::none();
  OptionalTensor weight = call.weight(weight_object, call.input->sizes(), true);
  if (!call.ok) return py::none();
  const OptionalTensor site = optional(prediction);
  return without_gil([&] {
    // A mean divides by its sum.
    if (weight) weight = weight->expand(call.input->sizes());
    return call_loss(call, weight, {}, loss, parameters, 0, reduction, call.dtype(), site);
  });
}

py::object cross_entropy(py::handle input, py::handle target, py::handle weight_object,
                         int64_t ignore_index, double label_smoothing, int64_t reduction,
                         py::handle prediction) {
  PlainCall call(input, target);
  call.check_rows(ignore_index);
  const OptionalTensor weight = call.class_weight(weight_object);
  if (!call.ok || !(label_smoothing >= 0 && label_smoothing <= 1)) return py::none();
  // The engine wants the dimensions behind the classes joined.
  const int64_t dims = call.input->dim();
  if (dims > 3 && !call.input->is_contiguous() &&
      !(dims == 4 && call.input->is_contiguous(at::MemoryFormat::ChannelsLast))) {
    return py::none();
  }
  const OptionalTensor site = optional(prediction);
  return without_gil([&] {
    return call_loss(call, weight, {}, "cross_entropy", label_smoothing, ignore_index, reduction,
                     call.dtype(), site);
  });
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

py::object log_loss(py::handle input, py::handle target, py::handle weight_object,
                    int64_t ignore_index, int64_t reduction, py::handle prediction) {
  PlainCall call(input, target);
  call.check_rows(ignore_index);
  OptionalTensor weight = call.class_weight(weight_object);
  if (!call.ok || call.input->dim() > kMaxClassDims) return py::none();
  const OptionalTensor site = optional(prediction);
  return without_gil([&] {
    const int64_t dim = class_dim(*call.input);
    if (weight) {
      at::DimVector sizes(call.input->dim() - dim, 1);  // behind the rows
      sizes[0] = call.classes();
      weight = weight->view(sizes);
    }
    const bool each = reduction == at::Reduction::None;
    // Elements that are added up to rows are rounded after that, once.
    const at::ScalarType dtype = each ? at::promote_types(call.dtype(), at::kFloat) : call.dtype();
    const Tensor value = call_loss(call, weight, {}, "log_loss", eps_of(call.dtype()), ignore_index,
                                   reduction, dtype, site);
    return each ? value.sum(dim).to(call.dtype()) : value;
  });
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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "What was built and what of it runs, and the short way into torch.ops.fusedloss.*.";
  m.def("build_info", &build_info);
  m.def("pointwise", &pointwise, "The loss, or None: not a plain call.");
  m.def("custom", &custom, "The loss, or None: not a plain call.");
  m.def(
      "new_prediction", [](const Tensor& input) { return new_prediction(input.device()); },
      "A prediction of the upstream gradient, where input is.");
  m.def("load_custom", &load_custom, "Loads a compiled loss under a name.");
  m.def("cross_entropy", &cross_entropy, "The loss, or None: not a plain call.");
  m.def("log_loss", &log_loss, "The loss, or None: not a plain call.");
#if defined(FUSEDLOSS_CUDA)
  m.def("raise_faults", &raise_faults,
        "Raises what a kernel found wrong with its input, if known.");
#endif
}

}  // namespace fusedloss
