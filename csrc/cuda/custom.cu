// Loads and launches the kernels of custom losses, which custom.cuh and custom_rows_held.cuh make.
#include <cuda.h>

#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>

#include "../math/custom.h"
#include "pointwise.cuh"
#include "rows_launch.h"

namespace fusedloss::cuda {

struct CustomKernels {
  int capability;
  const CustomKernels* others;
  CustomRowsInfo rows;
  const void* handles[kCustomKernels];
};

namespace {

#define FUSEDLOSS_KERNEL_NAME(NAME, ...) #NAME,
constexpr const char* kNames[] = {FUSEDLOSS_CUSTOM_VECTORIZED(FUSEDLOSS_KERNEL_NAME)
                                      FUSEDLOSS_CUSTOM_STRIDED(FUSEDLOSS_KERNEL_NAME)};
constexpr const char* kRowNames[] = {FUSEDLOSS_CUSTOM_ROWS_KERNELS(FUSEDLOSS_KERNEL_NAME)};
#undef FUSEDLOSS_KERNEL_NAME
static_assert(std::size(kNames) == kCustomKernels);

// The places of kernels among these names.
template <class D, bool kPlain>
constexpr int kVectorized =
    std::is_same_v<D, double> ? 0 : 2 * static_cast<int>(kDType<D>) - 1 + kPlain;
template <class T>
constexpr int kStrided = std::is_same_v<T, double> ? kCustomKernels - 2 : kCustomKernels - 1;

// The driver's errors have the numbers of the runtime's.
void check(int error, const char* file) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("fusedloss: " + std::string(file) + " does not load: " +
                           cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// A function of the driver. The extension is not linked to it, since there may be none.
template <class Function>
Function* driver(const char* name, const char* file) {
  constexpr unsigned kVersion = 12000;  // CUDA 12.0 was the first to have all of these functions
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result), file);
  if (!found) check(cudaErrorInsufficientDriver, file);
  return reinterpret_cast<Function*>(found);
}

// As run_pointwise() takes a loss: by the addresses of a launch's three arguments.
struct Launcher {
  using Loss = CustomLoss<2, 1>;  // like every custom loss, but for its formulas and inputs
  const CustomKernels& kernels;
  const double* parameters;

  template <bool kPlain, class D>
  void vectorized(const VectorizedCall<D>& c, const Launch& l) const {
    launch(kVectorized<D, kPlain>, c, l);
  }
  template <class T>
  void strided(const Call& c, const Launch& l) const {
    launch(kStrided<T>, c, l);
  }

 private:
  template <class C>
  void launch(int kernel, const C& call, const Launch& l) const {
    const void* const handle = kernels.handles[kernel];
    const unsigned blocks = pointwise_blocks(call.numel, handle);
    const void* arguments[] = {&call, &l, parameters};
    cudaLaunchKernel(handle, blocks, kThreads, const_cast<void**>(arguments), 0, l.stream);
  }
};

// Those that the current device runs best: compiled for its generation, and no later a model.
const CustomKernels* of_device(const CustomKernels* kernels) {
  const int model = capability(), generation = model / 10 * 10;
  const CustomKernels* best = nullptr;
  for (; kernels; kernels = kernels->others) {
    const int capability = kernels->capability;
    const bool runs = capability >= generation && capability <= model;
    if (runs && (!best || capability > best->capability)) best = kernels;
  }
  return best;
}

// What plan_custom_rows() asks of the current device.
struct CustomRowsDevice : CurrentDevice {
  const CustomKernels& kernels;
  DType dtype;

  // Those that hold rows in registers stand behind the others; there is none of double.
  const void* kernel(const RowsPlan& plan) const {
    return kernels.handles[static_cast<int>(dtype) + (plan.held > 0 ? 3 : 0)];
  }
  int64_t max_smem() const { return cuda::max_smem() - (kCustomStaticSmem - kStaticSmem); }
  bool has_clusters() const { return kernels.capability >= 90; }
  int64_t active_clusters(const RowsPlan& plan) const {
    return cuda::active_clusters(kernel(plan), plan);
  }
};

template <size_t count>
const CustomKernels* load(const char* file, int capability, const CustomKernels* others,
                          const CustomRowsInfo& rows, const char* const (&names)[count]) {
  std::ifstream in(file, std::ios::binary);
  const std::string code{std::istreambuf_iterator<char>(in), {}};
  if (code.empty()) check(cudaErrorFileNotFound, file);
  check(driver<decltype(cuInit)>("cuInit", file)(0), file);
  const auto load = driver<decltype(cuLibraryLoadData)>("cuLibraryLoadData", file);
  const auto get_kernel = driver<decltype(cuLibraryGetKernel)>("cuLibraryGetKernel", file);
  CUlibrary library;
  check(load(&library, code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0), file);
  auto loaded = std::make_unique<CustomKernels>();
  loaded->capability = capability;
  loaded->others = others;
  loaded->rows = rows;
  for (size_t i = 0; i < count; ++i) {
    CUkernel kernel;
    check(get_kernel(&kernel, library, names[i]), file);
    loaded->handles[i] = kernel;
  }
  return loaded.release();
}

}  // namespace

const CustomKernels* load_custom(const char* file, int capability, const CustomKernels* others) {
  return load(file, capability, others, {}, kNames);
}
const CustomKernels* load_custom_rows(const char* file, int capability, const CustomRowsInfo& rows,
                                      const CustomKernels* others) {
  return load(file, capability, others, rows, kRowNames);
}

cudaError_t run_custom(const CustomKernels& kernels, const Call& call, const Launch& launch) {
  const CustomKernels* const mine = of_device(&kernels);
  if (!mine) return cudaErrorNoKernelImageForDevice;
  return run_pointwise(Launcher{*mine, call.parameters}, call, launch);
}

cudaError_t run_custom_rows(const CustomKernels& kernels, const Call& call, const Launch& launch) {
  const CustomKernels* const mine = of_device(&kernels);
  if (!mine) return cudaErrorNoKernelImageForDevice;
  const CustomRowsCall rows(call);
  if (rows.classes > kMaxClasses) return cudaErrorInvalidValue;
  const CustomRowsDevice device{{}, *mine, read_dtype(rows, mine->rows.elements)};
  const RowsPlan plan = plan_custom_rows(rows, mine->rows, device);
  const void* const kernel = device.kernel(plan);
  allow_smem(kernel, plan.smem);
  const LaunchConfig config(plan, launch.stream);
  const double none = 0;  // in the place of a loss's parameters that has none
  const void* const parameters = call.parameters ? call.parameters : &none;
  const void* arguments[] = {&rows, &launch, parameters, &plan.tiling};
  return cudaLaunchKernelExC(&config.config, kernel, const_cast<void**>(arguments));
}

}  // namespace fusedloss::cuda
