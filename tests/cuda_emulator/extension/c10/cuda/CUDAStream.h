// Stands for torch's header: the default stream, and one to turn to from it.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t stream = nullptr;
  operator cudaStream_t() const { return stream; }

  static CUDAStream& current() {
    static thread_local CUDAStream stream;
    return stream;
  }
};

inline CUDAStream getCurrentCUDAStream(c10::DeviceIndex) { return CUDAStream::current(); }
inline CUDAStream getStreamFromPool(bool, c10::DeviceIndex) { return {emulator_side_stream()}; }

}  // namespace c10::cuda
