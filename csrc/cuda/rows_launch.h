// How plans over rows ask the current device, and are launched. Host code.
#pragma once

#include "device.h"
#include "rows_plan.h"

namespace fusedloss::cuda {

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

// 0 where none fits, as on a slice of a device.
template <class Kernel>
int active_clusters(Kernel* kernel, const RowsPlan& plan) {
  return asked_once(kernel, {plan.threads, plan.smem, plan.cluster}, [&] {
    int count = 0;
    LaunchConfig launch(plan, nullptr);
    allow_smem(kernel, plan.smem);
    cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
    return count;
  });
}

// What plans ask of the current device, whatever the kernel.
struct CurrentDevice {
  int64_t sms() const { return device_attribute(cudaDevAttrMultiProcessorCount); }
  int64_t max_smem() const { return cuda::max_smem(); }
  int64_t smem_per_sm() const {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
};

}  // namespace fusedloss::cuda
