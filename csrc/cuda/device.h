// What a launch asks of the current device and of a kernel on it. Host code.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "sizes.h"

namespace fusedloss::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// 90 for 9.0.
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Dynamic shared memory that a block can have.
inline int64_t max_smem() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStaticSmem;
}

// What a question is about, besides the kernel and the device.
struct LaunchShape {
  int threads = 0;  // of a block
  int64_t smem = 0;
  int cluster = 1;
};

// The answer of ask() about a kernel on the current device. It takes microseconds, so each device
// is asked once; a device that refuses to answer is asked again. Each type of Ask has its own
// answers.
template <class Kernel, class Ask>
int asked_once(Kernel* kernel, const LaunchShape& shape, Ask&& ask) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::tuple<Kernel*, int, int, int64_t, int>, int>;
  int device = 0;
  cudaGetDevice(&device);
  const std::tuple key(kernel, device, shape.threads, shape.smem, shape.cluster);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto at = known.find(key); at != known.end()) return at->second;
  const int answer = ask();
  if (cudaGetLastError() == cudaSuccess) known.emplace(key, answer);
  return answer;
}

// Lets blocks of a kernel have that much dynamic shared memory. Where it is refused, the launch
// says why.
template <class Kernel>
void allow_smem(Kernel* kernel, int64_t smem) {
  if (smem <= kDefaultSmem - kStaticSmem) return;
  asked_once(kernel, {}, [&] {
    // The most that there is, so that no launch lowers what another needs.
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(max_smem()));
  });
}

// Blocks of a kernel that run at once on the device. Where it refuses the kernel, the launch says
// why.
template <class Kernel>
int64_t resident_blocks(Kernel* kernel, int threads, int64_t smem = 0) {
  const int per_sm = asked_once(kernel, {threads, smem}, [&] {
    int blocks = 0;
    allow_smem(kernel, smem);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads,
                                                  static_cast<size_t>(smem));
    return blocks;
  });
  return int64_t{std::max(1, per_sm)} * device_attribute(cudaDevAttrMultiProcessorCount);
}

}  // namespace fusedloss::cuda
