// CUDA C++ for a plain C++ compiler. What a kernel may use of the language stands here: anything
// else does not compile. translate.py has replaced __shared__ and <<<...>>>.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __CUDACC__
#define __CUDA_ARCH__ 900

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// The running thread's.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- barriers and warp collectives --------------------------------------------------------------

inline void __syncthreads(emulator::Where where = emulator::Where::current()) {
  emulator::sync_block(false, where);
}
inline int __syncthreads_count(int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::sync_block(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::sync_block(predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Where where = emulator::Where::current()) {
  return emulator::sync_block(predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff,
                       emulator::Where where = emulator::Where::current()) {
  emulator::sync_warp(emulator::Collective::kSyncWarp, mask, 0, emulator::lane(), where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Where where = emulator::Where::current()) {
  return emulator::vote_warp(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulator::Where where = emulator::Where::current()) {
  return emulator::vote_warp(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulator::Where where = emulator::Where::current()) {
  return emulator::vote_warp(mask, predicate == 0, where) == 0;
}

namespace emulator {

// A lane outside its segment of `width` lanes reads its own value.
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside, int width, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  using Bits = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;
  if (width < 1 || width > warpSize || (width & (width - 1))) fail("shuffle of width %d", width);
  return std::bit_cast<T>(static_cast<Bits>(sync_warp(
      Collective::kShuffle, mask, std::bit_cast<Bits>(value), inside ? source : lane(), where)));
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulator::Where where = emulator::Where::current()) {
  const int segment = emulator::lane() & -width;
  return emulator::shuffle(mask, value, segment | (source & (width - 1)), true, width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulator::Where where = emulator::Where::current()) {
  const int source = emulator::lane() - static_cast<int>(delta);
  const bool inside = source >= (emulator::lane() & -width);
  return emulator::shuffle(mask, value, source, inside, width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulator::Where where = emulator::Where::current()) {
  const int source = emulator::lane() + static_cast<int>(delta);
  const bool inside = source < (emulator::lane() & -width) + width;
  return emulator::shuffle(mask, value, source, inside, width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emulator::Where where = emulator::Where::current()) {
  const int source = emulator::lane() ^ lane_mask;
  const bool inside =
      source < (emulator::lane() & -width) + width;  // an earlier segment may be read
  return emulator::shuffle(mask, value, source, inside, width, where);
}

// ---- atomics and fences -------------------------------------------------------------------------

namespace emulator {

template <class T, class Next>
T atomic(T* address, Next next) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                std::is_same_v<T, unsigned long long>);
  atomic_reads(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, next(old), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  atomic_wrote(address);
  return old;
}

}  // namespace emulator

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  // Unsigned, as the device's sums wrap.
  return emulator::atomic(address, [=](T old) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(old) + static_cast<U>(value));
  });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return value > old ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulator::atomic(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  emulator::atomic_reads(address);
  emulator::count_compare_and_swap();
  if (__atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED,
                                  __ATOMIC_RELAXED)) {
    emulator::atomic_wrote(address);
  }
  return expected;
}

inline void __threadfence_block() { emulator::fence(emulator::Scope::kBlock); }
inline void __threadfence() { emulator::fence(emulator::Scope::kDevice); }
inline void __threadfence_system() { emulator::fence(emulator::Scope::kSystem); }

// ---- memory and arithmetic ----------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

namespace emulator {

template <class A, class B>
concept Alike = (std::is_integral_v<A> && std::is_integral_v<B>) ||
                (std::is_floating_point_v<A> && std::is_floating_point_v<B>);

}  // namespace emulator

template <class A, class B>
  requires emulator::Alike<A, B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) > T(b) ? T(a) : T(b);
}
template <class A, class B>
  requires emulator::Alike<A, B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(a) < T(b) ? T(a) : T(b);
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
// Where the divisor is so large that its reciprocal is subnormal the device's is 0.
inline float __fdividef(float x, float y) {
  return std::fabs(y) > 0x1p126f && std::fabs(y) < INFINITY ? x * 0.0f : x / y;
}

// ---- launches -----------------------------------------------------------------------------------

namespace emulator {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config,
            Arguments&&... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  run_grid(
      reinterpret_cast<Kernel>(kernel), config,
      [](const void* data) {
        const auto& [function, parameters] = *static_cast<const Call*>(data);
        std::apply(function, parameters);
      },
      &call);
}

// kernel<<<grid, block, shared_bytes, stream>>>
template <class... Parameters>
auto configure(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes = 0,
               cudaStream_t stream = nullptr) {
  return [=]<class... Arguments>(Arguments&&... arguments) {
    launch(kernel, {grid, block, shared_bytes, stream}, std::forward<Arguments>(arguments)...);
  };
}

}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::launch(kernel, *config, std::forward<Arguments>(arguments)...);
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                                void** arguments) {
  [=]<size_t... I>(std::index_sequence<I...>) {
    emulator::launch(kernel, *config, *static_cast<std::decay_t<Parameters>*>(arguments[I])...);
  }(std::index_sequence_for<Parameters...>());
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return emulator::set_attribute(reinterpret_cast<emulator::Kernel>(kernel), attribute, value);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  attributes->ptxVersion = emulator::code_version();
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                          void (*kernel)(Parameters...),
                                                          int threads, size_t shared_bytes) {
  *blocks = emulator::blocks_per_multiprocessor(reinterpret_cast<emulator::Kernel>(kernel), threads,
                                                shared_bytes);
  return cudaSuccess;
}
// The same for a library's kernel.
inline const emulator::LibraryKernel& in_library(const void* kernel) {
  return *static_cast<const emulator::LibraryKernel*>(kernel);
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  in_library(kernel).launch(*config, arguments);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int value) {
  return emulator::set_attribute(in_library(kernel).kernel, attribute, value);
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                                  const cudaLaunchConfig_t* config) {
  *clusters = emulator::active_clusters(in_library(kernel).kernel, *config);
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*,
                                                                 int threads, size_t shared_bytes) {
  *blocks = emulator::blocks_per_multiprocessor(nullptr, threads, shared_bytes);
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  *clusters = emulator::active_clusters(reinterpret_cast<emulator::Kernel>(kernel), *config);
  return cudaSuccess;
}

// Exports a kernel of a library that is loaded at run time, under its name with this behind it.
#define EMULATOR_LIBRARY_KERNEL(NAME)                          \
  extern "C" __attribute__((visibility("default")))            \
  const emulator::LibraryKernel NAME##_in_library;             \
  const emulator::LibraryKernel NAME##_in_library = {          \
      reinterpret_cast<emulator::Kernel>(&NAME),               \
      [](const cudaLaunchConfig_t& config, void** arguments) { \
        cudaLaunchKernelExC(&config, NAME, arguments);         \
      }};
