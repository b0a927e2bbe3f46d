// The row losses on CUDA.
#include "rows_contiguous.cuh"
#include "rows_strided.cuh"

namespace fusedloss::cuda {
namespace {

// A plan as the argument of cudaLaunchKernelEx.
struct LaunchConfig {
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const RowsPlan& plan, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = plan.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.smem);
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = plan.kernel == RowsPlan::Kernel::kCluster ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

int64_t max_smem() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSmem;
}

template <class Kernel>
cudaError_t allow_smem(Kernel* kernel, const RowsPlan& plan) {
  if (plan.smem <= kDefaultSmem - kStaticSmem) return cudaSuccess;
  // Always the maximum, so that no thread lowers what another has asked for.
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(max_smem()));
}

// What plan_rows asks of the current device.
template <class D>
struct RowsDevice {
  bool hard;  // has_hard_targets(call)

  int64_t sms() const { return device_attribute(cudaDevAttrMultiProcessorCount); }
  int64_t max_smem() const { return cuda::max_smem(); }
  int64_t smem_per_sm() const {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
  // Both the device and the code that runs there: a driver may have compiled it from the PTX for an
  // older device.
  bool has_clusters() const {
    cudaFuncAttributes code{};
    const auto kernel = rows_contiguous<CrossEntropyRow<float, true>, Scope::kCluster>;
    return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
           cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
  }
  // 0 where none fits, as on a slice of a device.
  int64_t active_clusters(const RowsPlan& plan) const {
    const auto kernel = hard ? rows_contiguous<CrossEntropyRow<D, true>, Scope::kCluster>
                             : rows_contiguous<CrossEntropyRow<D, false>, Scope::kCluster>;
    int count = 0;
    LaunchConfig launch(plan, nullptr);
    if (allow_smem(kernel, plan) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) != cudaSuccess) {
      cudaGetLastError();
      return 0;
    }
    return count;
  }
};

// Calls f with a value of the logits' type and the call's plan.
template <class F>
auto with_plan(const fusedloss::RowsCall& call, F&& f) {
  return with_type(call.input.dtype, [&](auto tag) {
    return f(tag, plan_rows(call, RowsDevice<decltype(tag)>{has_hard_targets(call)}));
  });
}

template <class Loss, Scope kScope>
cudaError_t run_contiguous(const fusedloss::RowsCall& call, const Launch& launch,
                           const RowsPlan& plan) {
  constexpr auto kernel = rows_contiguous<Loss, kScope>;
  if (const cudaError_t error = allow_smem(kernel, plan); error != cudaSuccess) return error;
  LaunchConfig config(plan, launch.stream);
  const RowsCall<typename Loss::Number> rows(call);
  return cudaLaunchKernelEx(&config.config, kernel, rows, launch, plan.tiling);
}

template <class Loss, bool kVectorized>
cudaError_t run_strided(const fusedloss::RowsCall& call, const Launch& launch,
                        const RowsPlan& plan) {
  const RowsCall<typename Loss::Number> rows(call);
  const auto blocks = static_cast<unsigned>(plan.blocks);
  rows_strided<Loss, kVectorized><<<blocks, plan.threads, 0, launch.stream>>>(rows, launch);
  return cudaGetLastError();
}

template <class Loss>
cudaError_t run_rows(const fusedloss::RowsCall& call, const Launch& launch, const RowsPlan& plan) {
  switch (plan.kernel) {
    case RowsPlan::Kernel::kSubWarp:
      return run_contiguous<Loss, Scope::kSubWarp>(call, launch, plan);
    case RowsPlan::Kernel::kBlock:
      return run_contiguous<Loss, Scope::kBlock>(call, launch, plan);
    case RowsPlan::Kernel::kCluster:
      return run_contiguous<Loss, Scope::kCluster>(call, launch, plan);
    case RowsPlan::Kernel::kStridedVectorized:
      return run_strided<Loss, strided_vectors(sizeof(typename Loss::Element), !Loss::kSoft)>(
          call, launch, plan);
    case RowsPlan::Kernel::kStrided:
      return run_strided<Loss, false>(call, launch, plan);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cross_entropy(const Call& call, const Launch& launch) {
  const fusedloss::RowsCall rows(call);
  return with_plan(rows, [&](auto tag, const RowsPlan& plan) {
    using D = decltype(tag);
    return has_hard_targets(rows) ? run_rows<CrossEntropyRow<D, true>>(rows, launch, plan)
                                  : run_rows<CrossEntropyRow<D, false>>(rows, launch, plan);
  });
}

}  // namespace fusedloss::cuda
