// The operators on CUDA: arguments in, kernels queued on the current stream. Nothing here waits for
// the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <unordered_map>

#include "../cuda/kernels.h"
#include "one_pass.h"

// Which tensors these operators take: CPU ones where the kernels are emulated.
#if !defined(FUSEDLOSS_CUDA_KEY)
#define FUSEDLOSS_CUDA_KEY CUDA
#endif

namespace fusedloss {
namespace {

using at::Tensor;
using cuda::Fault;
using cuda::Launch;

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
std::array<std::atomic<Fault*>, cuda::kMaxDevices> faults;

Fault* fault_of(size_t device) {
  TORCH_CHECK(device < faults.size(), "fusedloss: device ", device, " is one too many");
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
  if (fault.what == Fault::kNegativeVariance) {
    TORCH_CHECK_VALUE(false, "all elements of var should be at least 0, but element ",
                      fault.position, " in memory order is ", fault.value, kWhen);
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

// ---- workspaces ---------------------------------------------------------------------------------

// A stream's kernels run one after the other, so they share one, which is never freed. A graph that
// is being captured may run beside its stream later, and has one for each of its kernels.
Tensor workspace_of(cudaStream_t stream, const at::Device& device) {
  const auto options = at::TensorOptions(device).dtype(at::kByte);
  const auto bytes = static_cast<int64_t>(cuda::workspace_bytes());
  if (is_captured(stream)) {
    Tensor workspace = at::empty({bytes}, options);
    check(cudaMemsetAsync(workspace.mutable_data_ptr(), 0, cuda::kWorkspaceCounterBytes, stream));
    return workspace;
  }
  unsigned long long id = 0;  // no later stream has it, as a later one may have the same handle
  check(cudaStreamGetId(stream, &id));
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<c10::DeviceIndex, unsigned long long>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& workspace = known[{device.index(), id}];
  if (!workspace.defined()) workspace = at::zeros({bytes}, options);
  return workspace;
}

// ---- calls --------------------------------------------------------------------------------------

// A call on the device and the current stream of its input. Memory that it drops lasts until its
// kernels have run: torch's allocator hands it on in the order of the stream.
struct CudaEngine {
  const Arguments& a;
  const LossInfo& info;

  CudaEngine(const Arguments& arguments, Pass pass)
      : a(arguments),
        info(checked(a)),
        guard_(a.input.device()),
        stream_(c10::cuda::getCurrentCUDAStream(guard_.current_device().index())) {
    if (pass != Pass::kBackward) raise_faults();
    launch_.pass = pass;
    launch_.stream = stream_;
    launch_.fault = fault_of(static_cast<size_t>(guard_.current_device().index()));
  }

  // Always: the kernel finds out whether it may trust the prediction.
  bool predicts(const Tensor& prediction) {
    // A module may let go of it while this stream, not the one it comes from, has yet to teach it.
    c10::cuda::CUDACachingAllocator::recordStream(prediction.storage().data_ptr(), stream_);
    keep_if_captured(prediction, stream_);
    launch_.prediction = prediction.mutable_data_ptr<double>();
    return true;
  }

  void read(const OptionalTensor& upstream) {
    operands_.read(call_, a, info, upstream);
    const Tensor& weight = operands_.weight();
    if (info.family == Family::kRows && !info.custom && weight.defined() && a.parameters[0] != 0) {
      smoothing_weight_ = weight.sum(at::kDouble);
      call_.weight_sum = smoothing_weight_.const_data_ptr<double>();
    }
  }

  void compute(const Tensor& result, const Gradients& gradients, Tensor state) {
    const Tensor loss = loss_in(result, info);
    write_auxiliary(call_, result, a, info);
    if (!state.defined()) state = empty_state(a.input);
    launch_.forward_state = state.mutable_data_ptr<double>();
    if (a.reduction == at::Reduction::Mean) divide_by_mean(state);
    if (a.each()) {
      write_to(call_.value, loss);
    } else {
      launch_.loss = loss.mutable_data_ptr();
      launch_.loss_dtype = dtype_of(loss);
    }
    run(gradients);
  }

  // Where there is one upstream gradient (mean and sum), the kernel finds out whether forward's
  // gradients are right for it.
  bool is_done(const Tensor& grad_output, const Tensor& state, SavedGradients* saved, bool fresh) {
    if (a.each()) return false;
    if (saved) predicts(saved->prediction);
    launch_.forward_state = state.mutable_data_ptr<double>();
    launch_.grad_output = grad_output.const_data_ptr();
    launch_.grad_output_dtype = dtype_of(grad_output);
    launch_.fresh = fresh;
    return false;
  }

  void recompute(const Gradients& gradients, const Tensor&) { run(gradients); }

  void compute_both(const Tensor& result, const Gradients& gradients) {
    write_rows(call_, result, gradients, a, info);
    launch_.pass = Pass::kBackward;  // in which a kernel asks for no prediction
    run(gradients);
  }

 private:
  void divide_by_mean(const Tensor& state) {
    launch_.normalizer = static_cast<double>(a.input.numel());
    const bool counts = operands_.indices().defined() && info.mean == Mean::kRows;
    const bool weighted = info.mean == Mean::kWeights || (info.custom_rows() && !counts);
    if (weighted && present(a.weight)) {
      state.select(0, 1).copy_(a.weight->sum(at::kDouble));
      launch_.normalizer = std::numeric_limits<double>::quiet_NaN();
    } else if (info.mean == Mean::kRows) {
      launch_.normalizer /= static_cast<double>(a.classes());
      if (counts) divide_by_class_weights();
    }
  }

  void divide_by_class_weights() {
    cuda::ClassWeights& count = launch_.class_weights;
    count.indices = operands_.indices().const_data_ptr<int64_t>();
    count.n = operands_.indices().numel();
    count.classes = a.classes();
    count.ignore_index = a.ignore_index;
    if (const Tensor& weight = operands_.weight(); weight.defined()) {
      count.weight = weight.const_data_ptr();
      count.weight_is_double = a.in_double();
      count.weight_is_of_rows = info.custom;
    }
    count.divide_into_slices();
  }

  // Queues the kernels.
  cudaError_t launch() {
    if (!info.custom) return cuda::kernels[info.number](call_, launch_);
    const cuda::CustomKernels* custom = info.cuda;
    TORCH_CHECK(custom, "fusedloss: no CUDA kernel of the loss '", a.loss,
                "' is loaded: call it once on the GPU");
    if (a.parameters.empty()) call_.parameters = nullptr;
    const auto run = info.custom_rows() ? cuda::run_custom_rows : cuda::run_custom;
    return run(*custom, call_, launch_);
  }

  void run(const Gradients& gradients) {
    for (size_t i = 0; i < gradients.size(); ++i) write_to(call_.gradients[i], gradients[i]);
    Tensor workspace;
    if (launch_.loss) {
      workspace = workspace_of(stream_, a.input.device());
      launch_.workspace = workspace.mutable_data_ptr();
    }
    check(launch());
  }

  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
  Launch launch_;
  Tensor smoothing_weight_;  // of all classes
  Operands operands_;
  Call call_;
};

}  // namespace

TORCH_LIBRARY_IMPL(fusedloss, FUSEDLOSS_CUDA_KEY, m) { Operators<CudaEngine>::add_to(m); }

}  // namespace fusedloss
