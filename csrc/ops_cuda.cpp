// The operators on CUDA: tensors in, kernels queued on the current stream. Nothing here waits for
// the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <functional>
#include <limits>
#include <mutex>
#include <sstream>
#include <unordered_map>

#include "carried.h"
#include "cuda/custom_kernel.h"
#include "custom.h"
#include "tensors.h"

// Which tensors these operators take: CPU ones where the kernels are emulated.
#if !defined(FUSEDLOSS_CUDA_KEY)
#define FUSEDLOSS_CUDA_KEY CUDA
#endif

namespace fusedloss {
namespace {

using at::Tensor;
using cuda::Fault;
using cuda::Launch;
using cuda::Pass;

void check(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "fusedloss: CUDA: ", cudaGetErrorString(error));
}

// While a CUDA graph is captured, the thread may allocate and synchronize only as long as one of
// these lives.
struct RelaxedCapture {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;

  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// ---- faults -------------------------------------------------------------------------------------

// A device's; page-locked memory, so that both sides reach it. Allocated once and never freed.
constexpr size_t kMostDevices = 64;
std::array<std::atomic<Fault*>, kMostDevices> faults;

Fault* fault_of(size_t device) {
  TORCH_CHECK(device < kMostDevices, "fusedloss: device ", device, " is one too many");
  if (Fault* known = faults[device].load()) return known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (Fault* known = faults[device].load()) return known;
  void* memory = nullptr;
  const RelaxedCapture relaxed;  // the first call may be one that a CUDA graph captures
  check(cudaHostAlloc(&memory, sizeof(Fault), cudaHostAllocMapped | cudaHostAllocPortable));
  auto* fresh = new (memory) Fault{};
  faults[device].store(fresh);
  return fresh;
}

[[noreturn]] void raise(const Fault& fault) {
  constexpr const char* kWhen =
      " (In an earlier call of fusedloss, whose loss and gradient are nan there.)";
  if (fault.what == Fault::kTargetClass) {
    TORCH_CHECK_INDEX(false, "Target ", fault.index,
                      " is out of bounds. It stands at target.flatten()[", fault.position,
                      "]; there are ", fault.classes, " classes.", kWhen);
  }
  const char* name = fault.what == Fault::kInputOutsideUnit ? "input" : "target";
  TORCH_CHECK(false, "all elements of ", name, " should be between 0 and 1, but element ",
              fault.position, " in memory order is ", fault.value, kWhen);
}

}  // namespace

void raise_faults() {
  for (std::atomic<Fault*>& slot : faults) {
    Fault* const fault = slot.load();
    if (!fault) continue;
    const std::atomic_ref<int> state(fault->state);
    if (state.load(std::memory_order_acquire) != Fault::kReady) continue;
    static std::mutex mutex;  // one thread raises it
    const std::lock_guard<std::mutex> lock(mutex);
    if (state.load(std::memory_order_acquire) != Fault::kReady) continue;
    const Fault told = *fault;
    state.store(Fault::kNone, std::memory_order_release);
    raise(told);
  }
}

// ---- CUDA graphs --------------------------------------------------------------------------------

namespace {

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// A graph writes to the predictions of its capture at every replay, and nobody knows how long a
// graph lives: those predictions are never freed.
void keep_if_captured(const Tensor& prediction, cudaStream_t stream) {
  if (!is_captured(stream)) return;
  static std::mutex mutex;
  static auto& kept = *new std::unordered_map<const void*, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  kept.emplace(prediction.unsafeGetTensorImpl(), prediction);
}

}  // namespace

Tensor outside_of_capture(const at::Device& device, const std::function<Tensor()>& make) {
  if (device.type() != c10::dispatchKeyToDeviceType(c10::DispatchKey::FUSEDLOSS_CUDA_KEY)) {
    return make();
  }
  const c10::cuda::CUDAGuard guard(device);
  const c10::DeviceIndex index = guard.current_device().index();
  if (!is_captured(c10::cuda::getCurrentCUDAStream(index))) return make();
  const RelaxedCapture relaxed;
  const c10::cuda::CUDAStream side = c10::cuda::getStreamFromPool(false, index);
  Tensor made;
  {
    const c10::cuda::CUDAStreamGuard on_side(side);
    made = make();
  }
  // The captured stream must not wait for the other one, so the host does.
  check(cudaStreamSynchronize(side));
  return made;
}

namespace {

// ---- calls --------------------------------------------------------------------------------------

// A call on the device and the current stream of its input. Memory that it drops lasts until its
// kernels have run: torch's allocator hands it on in the order of the stream.
struct Call {
  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream stream;
  const Tensor& input;
  Launch launch;
  std::vector<Tensor> held;

  Call(const Tensor& input_, Pass pass)
      : guard(input_.device()),
        stream(c10::cuda::getCurrentCUDAStream(guard.current_device().index())),
        input(input_) {
    if (pass != Pass::kBackward) raise_faults();
    launch.pass = pass;
    launch.stream = stream;
    launch.fault = fault_of(static_cast<size_t>(guard.current_device().index()));
  }

  void reduces_to(const Tensor& loss) {
    launch.loss = loss.mutable_data_ptr();
    launch.loss_dtype = dtype_of(loss);
  }
  void predicts(const Tensor& prediction) {
    // A module may let go of it while this stream, not the one it comes from, has yet to teach it.
    c10::cuda::CUDACachingAllocator::recordStream(prediction.storage().data_ptr(), stream);
    keep_if_captured(prediction, stream);
    launch.prediction = prediction.mutable_data_ptr<double>();
  }
  // Where there is one upstream gradient (mean and sum), the kernel finds out whether forward's
  // gradients are right for it.
  BackwardGradients gradients_after(const Tensor& scales, const Tensor& grad_output,
                                    int64_t reduction, const Tensor& target = {},
                                    Wants wants = {}) {
    check_pair("scales", scales, input);
    Carried* left = carried(scales);
    BackwardGradients gradients(left, input, target, wants);
    if (reduction != at::Reduction::None) {
      check_number(grad_output, input);
      if (left) predicts(left->prediction);
      launch.forward_state = scales.mutable_data_ptr<double>();
      launch.grad_output = grad_output.const_data_ptr();
      launch.grad_output_dtype = dtype_of(grad_output);
      launch.fresh = gradients.fresh;
    }
    return gradients;
  }

  // The mean divides by what a kernel counts, into the second of the scales.
  void divides_by_weights_of(const Tensor& indices, int64_t classes, int64_t ignore_index,
                             const Tensor& weight) {
    cuda::ClassWeights count;
    count.indices = indices.const_data_ptr<int64_t>();
    count.n = indices.numel();
    count.classes = classes;
    count.ignore_index = ignore_index;
    if (weight.defined()) {
      count.weight = weight.const_data_ptr();
      count.weight_is_double = weight.scalar_type() == at::kDouble;
    }
    count.sum = launch.forward_state + 1;
    run(cuda::workspace_bytes(count), [&] { return cuda::sum_class_weights(count, launch); });
    divides_by_what_is_there();
  }
  void divides_by_what_is_there() { launch.normalizer = std::numeric_limits<double>::quiet_NaN(); }

  template <class Kernels>
  void run(size_t bytes, Kernels&& kernels) {
    Tensor workspace;
    if (bytes > 0) {
      workspace = at::empty({static_cast<int64_t>(bytes)}, input.options().dtype(at::kByte));
      launch.workspace = workspace.mutable_data_ptr();
    }
    check(kernels());
  }
};

// Of a forward: the gradient that it may write, and what tells the kernel whether it is to.
struct Ahead {
  Tensor prediction, scales, gradient, target_gradient;

  template <class AnyCall>
  Ahead(const OptionalTensor& own, std::string_view loss, AnyCall& call, int64_t reduction,
        const Tensor& target = {}, Wants wants = {})
      : scales(empty_scales(call.input)), input(call.input) {
    if (reduction == at::Reduction::None) return;
    prediction = prediction_of(own, loss, call.input, reduction);
    call.predicts(prediction);
    if (wants.input) gradient = empty_gradient(input);
    if (wants.target) target_gradient = empty_target_gradient(input, target);
    call.want(gradient, target_gradient);
  }

  Tensor carried_on(const Tensor& target) && {
    carry(scales, input, target, std::move(gradient), std::move(prediction),
          std::move(target_gradient));
    return std::move(scales);
  }

 private:
  const Tensor& input;
};

// ---- pointwise ----------------------------------------------------------------------------------

struct PointwiseCall : Call {
  Pointwise call;
  Tensor indices;  // contiguous, where target is class indices
  int64_t ignore_index;
  std::optional<PointwiseOperands> operands;
  // A loss of one's own, instead of the call's.
  const cuda::CustomKernel* custom = nullptr;
  at::ArrayRef<double> parameters;

  PointwiseCall(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, const OptionalTensor& upstream,
                std::string_view loss, double parameter, int64_t ignore_index_,
                at::ScalarType result, Pass pass)
      : Call(input, pass), ignore_index(ignore_index_) {
    check_shapes(input, target);
    call.loss = loss;
    call.parameter = parameter;
    call.compute_in_double = result == at::kDouble;
    Tensor wanted = target;
    if (target.scalar_type() == at::kLong) {
      check_rows(input, target, weight);
      call.loss = of_classes(loss);
      indices = aligned(target.contiguous());
      // What is wrong must not read as ignored.
      wanted = indices.clamp_min(kIgnored + 1).masked_fill_(indices.eq(ignore_index), kIgnored);
    }
    operands.emplace(call, input, wanted, weight, pos_weight, upstream, cuda::kMaxDims);
  }

  // A loss of one's own: its mean is over the weights.
  PointwiseCall(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& upstream, std::string_view loss,
                at::ArrayRef<double> parameters_, at::ScalarType result, Pass pass)
      : PointwiseCall(input, target, weight, {}, upstream, loss, 0, 0, result, pass) {
    custom = &custom_kernel<cuda::CustomKernel>(loss, parameters_);
    parameters = parameters_;
  }

  void divide(int64_t reduction, const OptionalTensor& weight, const Tensor& scales) {
    if (reduction != at::Reduction::Mean) return;
    const int64_t dim = class_dim(input);
    launch.normalizer = static_cast<double>(input.numel());
    switch (custom ? Mean::kWeights : mean_of(call.loss)) {
      case Mean::kElements:
        break;
      case Mean::kWeights:
        if (!present(weight)) break;
        scales.select(0, 1).copy_(weight->sum(at::kDouble));
        divides_by_what_is_there();
        break;
      case Mean::kRows:
        launch.normalizer /= static_cast<double>(input.size(dim));
        if (!indices.defined()) break;
        divides_by_weights_of(indices, input.size(dim), ignore_index,
                              present(weight) ? weight->to(at::kDouble).flatten() : Tensor());
    }
  }
  Tensor compute_loss(int64_t reduction, at::ScalarType dtype, const OptionalTensor& weight,
                      const Tensor& scales) {
    Tensor loss = empty_loss(input, reduction, dtype);
    launch.forward_state = scales.mutable_data_ptr<double>();
    divide(reduction, weight, scales);
    if (reduction == at::Reduction::None) {
      call.value = loss.mutable_data_ptr();
      call.value_dtype = dtype_of(loss);
    } else {
      reduces_to(loss);
    }
    run();
    return loss;
  }
  void want(const Tensor& gradient, const Tensor& target_gradient) {
    if (gradient.defined()) {
      call.gradient = gradient.mutable_data_ptr();
      call.gradient_dtype = dtype_of(gradient);
    }
    if (target_gradient.defined()) {
      call.target_gradient = target_gradient.mutable_data_ptr();
      call.target_gradient_dtype = dtype_of(target_gradient);
    }
  }
  size_t workspace_bytes() const {
    return custom ? custom->workspace_bytes(call) : cuda::workspace_bytes(call);
  }
  void run() {
    Call::run(launch.loss ? workspace_bytes() : 0, [&] {
      return custom ? custom->run(call, parameters.data(), launch) : cuda::pointwise(call, launch);
    });
  }
};

Tensor pointwise(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 const OptionalTensor& pos_weight, std::string_view loss, double parameter,
                 int64_t ignore_index, int64_t reduction, at::ScalarType dtype,
                 const OptionalTensor&) {
  PointwiseCall p(input, target, weight, pos_weight, {}, loss, parameter, ignore_index, dtype,
                  Pass::kValue);
  return p.compute_loss(reduction, dtype, weight, empty_scales(input));
}

std::tuple<Tensor, Tensor> pointwise_forward(
    const Tensor& input, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& pos_weight, std::string_view loss, double parameter, int64_t ignore_index,
    int64_t reduction, at::ScalarType dtype, const OptionalTensor& prediction) {
  PointwiseCall p(input, target, weight, pos_weight, {}, loss, parameter, ignore_index, dtype,
                  Pass::kForward);
  Ahead ahead(prediction, loss, p, reduction);
  Tensor value = p.compute_loss(reduction, dtype, weight, ahead.scales);
  return {value, std::move(ahead).carried_on(target)};
}

Tensor pointwise_backward(const Tensor& grad_output, const Tensor& scales, const Tensor& input,
                          const Tensor& target, const OptionalTensor& weight,
                          const OptionalTensor& pos_weight, std::string_view loss, double parameter,
                          int64_t ignore_index, int64_t reduction, at::ScalarType dtype) {
  const bool each = reduction == at::Reduction::None;
  PointwiseCall p(input, target, weight, pos_weight,
                  each ? OptionalTensor(grad_output) : std::nullopt, loss, parameter, ignore_index,
                  dtype, Pass::kBackward);
  BackwardGradients gradients = p.gradients_after(scales, grad_output, reduction);
  p.want(gradients.gradient, gradients.target_gradient);
  p.run();
  return std::move(gradients.gradient);
}

// ---- losses of one's own ------------------------------------------------------------------------

Tensor custom(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
              std::string_view loss, at::ArrayRef<double> parameters, int64_t reduction,
              at::ScalarType dtype, const OptionalTensor&) {
  PointwiseCall p(input, target, weight, {}, loss, parameters, dtype, Pass::kValue);
  return p.compute_loss(reduction, dtype, weight, empty_scales(input));
}

std::tuple<Tensor, Tensor> custom_forward(const Tensor& input, const Tensor& target,
                                          const OptionalTensor& weight, std::string_view loss,
                                          at::ArrayRef<double> parameters, int64_t reduction,
                                          at::ScalarType dtype, bool of_input, bool of_target,
                                          const OptionalTensor& prediction) {
  PointwiseCall p(input, target, weight, {}, loss, parameters, dtype, Pass::kForward);
  Ahead ahead(prediction, loss, p, reduction, target, {of_input, of_target});
  Tensor value = p.compute_loss(reduction, dtype, weight, ahead.scales);
  return {value, std::move(ahead).carried_on(target)};
}

std::tuple<Tensor, Tensor> custom_backward(const Tensor& grad_output, const Tensor& scales,
                                           const Tensor& input, const Tensor& target,
                                           const OptionalTensor& weight, std::string_view loss,
                                           at::ArrayRef<double> parameters, int64_t reduction,
                                           at::ScalarType dtype, bool of_input, bool of_target) {
  const bool each = reduction == at::Reduction::None;
  PointwiseCall p(input, target, weight, each ? OptionalTensor(grad_output) : std::nullopt, loss,
                  parameters, dtype, Pass::kBackward);
  BackwardGradients gradients =
      p.gradients_after(scales, grad_output, reduction, target, {of_input, of_target});
  p.want(gradients.gradient, gradients.target_gradient);
  p.run();
  return {std::move(gradients.gradient), std::move(gradients.target_gradient)};
}

// ---- cross-entropy ------------------------------------------------------------------------------

struct CrossEntropyCall : Call {
  cuda::CrossEntropyCall call;
  Tensor target;
  CrossEntropyOperands operands;

  CrossEntropyCall(const Tensor& input, const Tensor& target_, const OptionalTensor& weight,
                   int64_t ignore_index, double label_smoothing, at::ScalarType result, Pass pass)
      : Call(input, pass),
        target(target_.scalar_type() == at::kLong ? aligned(target_.contiguous()) : target_),
        operands(call, input, target, weight, ignore_index, label_smoothing, result) {
    check_rows(input, target, weight);
    if (call.weight && label_smoothing != 0) {
      held.push_back(operands.weight().sum(at::kDouble));
      call.weight_sum = held.back().const_data_ptr<double>();
    }
  }

  Tensor compute_loss(int64_t reduction, at::ScalarType dtype, const Tensor& scales) {
    Tensor loss = empty_row_loss(input, reduction, dtype);
    launch.forward_state = scales.mutable_data_ptr<double>();
    if (reduction == at::Reduction::Mean) {
      launch.normalizer = static_cast<double>(call.outer * call.inner);
      if (call.indices) {
        divides_by_weights_of(target, call.classes, call.ignore_index, operands.weight());
      }
    }
    if (reduction == at::Reduction::None) {
      call.value = loss.mutable_data_ptr();
      call.value_dtype = dtype_of(loss);
    } else {
      reduces_to(loss);
    }
    run();
    return loss;
  }
  void want(const Tensor& gradient, const Tensor&) {
    if (gradient.defined()) operands.want_gradient(call, gradient);
  }
  void run() {
    Call::run(launch.loss ? cuda::workspace_bytes(call) : 0,
              [&] { return cuda::cross_entropy(call, launch); });
  }
};

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t ignore_index, double label_smoothing, int64_t reduction,
                     at::ScalarType dtype, const OptionalTensor&) {
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype, Pass::kValue);
  return p.compute_loss(reduction, dtype, empty_scales(input));
}

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& input, const Tensor& target,
                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                 double label_smoothing, int64_t reduction,
                                                 at::ScalarType dtype,
                                                 const OptionalTensor& prediction) {
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype, Pass::kForward);
  Ahead ahead(prediction, "cross_entropy", p, reduction);
  Tensor value = p.compute_loss(reduction, dtype, ahead.scales);
  return {value, std::move(ahead).carried_on(target)};
}

Tensor cross_entropy_backward(const Tensor& grad_output, const Tensor& scales, const Tensor& input,
                              const Tensor& target, const OptionalTensor& weight,
                              int64_t ignore_index, double label_smoothing, int64_t reduction,
                              at::ScalarType dtype) {
  CrossEntropyCall p(input, target, weight, ignore_index, label_smoothing, dtype, Pass::kBackward);
  if (reduction == at::Reduction::None) {
    check_row_upstream(grad_output, input);
    p.held.push_back(aligned(grad_output.contiguous()));
    p.call.upstream = p.held.back().const_data_ptr();
    p.call.upstream_dtype = dtype_of(grad_output);
  }
  BackwardGradients gradients = p.gradients_after(scales, grad_output, reduction);
  p.want(gradients.gradient, gradients.target_gradient);
  p.run();
  return std::move(gradients.gradient);
}

}  // namespace

TORCH_LIBRARY_IMPL(fusedloss, FUSEDLOSS_CUDA_KEY, m) {
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

}  // namespace fusedloss
