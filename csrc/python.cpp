// The Python module fusedloss._C: build information, and the short way into the operators.
//
// The operators are reached as torch.ops.fusedloss.* too, by tracing for one; the short way saves a
// small call what that costs: boxed arguments, and the checks of its tensors made one by one in
// Python. It takes plain calls only, and answers None to any other.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Reduction.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "carried.h"
#include "custom.h"

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

// Ours would need it in backward, and torch may do without.
bool cannot_be_saved(const Tensor& input, const Tensor& other) {
  return other.is_inference() && wants_gradient(input);
}

OptionalTensor optional(py::handle object) {
  return object.is_none() ? std::nullopt : OptionalTensor(THPVariable_Unpack(object.ptr()));
}

py::object pointwise(py::handle input_object, py::handle target_object, std::string_view loss,
                     double parameter, int64_t reduction, py::handle prediction) {
  const Tensor *input = plain(input_object), *target = plain(target_object);
  if (!input || !target || input->device() != target->device() || !plain_context(*input)) {
    return py::none();
  }
  const at::ScalarType dtype = input->scalar_type();
  if (!computes(dtype) || target->scalar_type() != dtype || input->numel() == 0 ||
      input->sizes() != target->sizes() || wants_gradient(*target) ||
      cannot_be_saved(*input, *target)) {
    return py::none();
  }
  static const auto op = find_operator<PointwiseSignature>("fusedloss::pointwise");
  const OptionalTensor site = optional(prediction);
  Tensor value;
  {
    py::gil_scoped_release no_gil;
    value = op.call(*input, *target, {}, {}, loss, parameter, 0, reduction, dtype, site);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(value)));
}

py::object custom(py::handle input_object, py::handle target_object, std::string_view loss,
                  const std::vector<double>& parameters, int64_t reduction, py::handle prediction) {
  const Tensor *input = plain(input_object), *target = plain(target_object);
  if (!input || !target || input->device() != target->device() || !plain_context(*input)) {
    return py::none();
  }
  const at::ScalarType dtype = input->scalar_type();
  if (!computes(dtype) || target->scalar_type() != dtype || input->numel() == 0 ||
      input->sizes() != target->sizes() || cannot_be_saved(*input, *target) ||
      cannot_be_saved(*target, *input)) {
    return py::none();
  }
  static const auto op = find_operator<CustomSignature>("fusedloss::custom");
  const OptionalTensor site = optional(prediction);
  Tensor value;
  {
    py::gil_scoped_release no_gil;
    value = op.call(*input, *target, {}, loss, parameters, reduction, dtype, site);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(value)));
}

py::object cross_entropy(py::handle input_object, py::handle target_object,
                         py::handle weight_object, int64_t ignore_index, double label_smoothing,
                         int64_t reduction, py::handle prediction) {
  const Tensor *input = plain(input_object), *target = plain(target_object);
  if (!input || !target || input->device() != target->device() || !plain_context(*input)) {
    return py::none();
  }
  const at::ScalarType dtype = input->scalar_type();
  const int64_t dims = input->dim();
  // Of more dimensions, the engine wants those behind the classes joined.
  const bool layout = dims == 1 || dims == 2 || dims == 3 || (dims > 3 && input->is_contiguous());
  if (!layout || !computes(dtype) || target->scalar_type() != at::kLong || input->numel() == 0 ||
      !(label_smoothing >= 0 && label_smoothing <= 1) ||
      input->size(dims > 1 ? 1 : 0) > (1 << 24)) {
    return py::none();
  }
  at::DimVector rows(input->sizes());
  rows.erase(rows.begin() + (dims > 1 ? 1 : 0));
  if (target->sizes() != at::IntArrayRef(rows) || cannot_be_saved(*input, *target)) {
    return py::none();
  }
  OptionalTensor weight;
  if (!weight_object.is_none()) {
    const Tensor* w = plain(weight_object);
    if (!w || w->device() != input->device() || w->scalar_type() != dtype || w->dim() != 1 ||
        w->size(0) != input->size(dims > 1 ? 1 : 0) || wants_gradient(*w) ||
        cannot_be_saved(*input, *w)) {
      return py::none();
    }
    weight = *w;
  }
  static const auto op = find_operator<CrossEntropySignature>("fusedloss::cross_entropy");
  const OptionalTensor site = optional(prediction);
  Tensor value;
  {
    py::gil_scoped_release no_gil;
    value = op.call(*input, *target, weight, ignore_index, label_smoothing, reduction, dtype, site);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(value)));
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
#if defined(FUSEDLOSS_CUDA)
  m.def("raise_faults", &raise_faults,
        "Raises what a kernel found wrong with its input, if known.");
#endif
}

}  // namespace fusedloss
