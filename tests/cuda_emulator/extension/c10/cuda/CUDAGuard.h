// Stands for torch's header where tensors on the CPU stand for tensors on the one device.
#pragma once

#include <c10/core/Device.h>

#include "CUDAStream.h"

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
  c10::Device current_device() const { return c10::Device(c10::DeviceType::CUDA, 0); }
};

class CUDAStreamGuard {
 public:
  explicit CUDAStreamGuard(CUDAStream stream) : outer_(CUDAStream::current()) {
    CUDAStream::current() = stream;
  }
  CUDAStreamGuard(const CUDAStreamGuard&) = delete;
  ~CUDAStreamGuard() { CUDAStream::current() = outer_; }

 private:
  CUDAStream outer_;
};

}  // namespace c10::cuda
