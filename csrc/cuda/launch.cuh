// What every engine does on the host before a launch.
#pragma once

#include "kernels.h"
#include "reduce.cuh"

namespace fusedloss::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Zeroes grid_sum's ticket counter, if the grid needs one.
inline cudaError_t zero_ticket(const Launch& launch, int64_t blocks) {
  if (blocks == 1) return cudaSuccess;
  return cudaMemsetAsync(GridSumWorkspace(launch.workspace).ticket, 0, sizeof(unsigned),
                         launch.stream);
}

}  // namespace fusedloss::cuda
