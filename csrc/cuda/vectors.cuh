// Number types, and vectors of 16 bytes of them.
//
// The sources are compiled with -fmad=false, so that a gradient has the same bits from every kernel
// that computes it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "../call.h"
#include "sizes.h"

namespace fusedloss::cuda {

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
inline constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

// ---- numbers ------------------------------------------------------------------------------------

// The type that numbers of type D are computed in.
template <class D>
using Compute = std::conditional_t<std::is_same_v<D, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class D, class T>
__device__ D narrow(T x) {
  if constexpr (std::is_same_v<D, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<D, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<D>(x);
  }
}

// Floating-point types alone.
template <class D>
constexpr DType kDType = std::is_same_v<D, double>          ? DType::kFloat64
                         : std::is_same_v<D, float>         ? DType::kFloat32
                         : std::is_same_v<D, __nv_bfloat16> ? DType::kBFloat16
                                                            : DType::kFloat16;

// Calls f with a value of the floating-point type that dtype names.
template <class F>
__host__ __device__ auto with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    case DType::kFloat16:
      return f(__half{});
    default:
      return f(float{});
  }
}

// data: (> i) of dtype, a floating-point one
template <class T>
__device__ T read(const void* data, DType dtype, int64_t i) {
  return with_type(dtype, [=](auto tag) {
    return static_cast<T>(widen(static_cast<const decltype(tag)*>(data)[i]));
  });
}
// The same of any dtype. Only kernels that are not hot have so many branches.
template <class T>
__device__ T read_any(const void* data, DType dtype, int64_t i) {
  const auto at = [=](auto tag) {
    return static_cast<T>(static_cast<const decltype(tag)*>(data)[i]);
  };
  switch (dtype) {
    case DType::kInt64:
      return at(int64_t{});
    case DType::kInt32:
      return at(int32_t{});
    case DType::kInt16:
      return at(int16_t{});
    case DType::kInt8:
      return at(int8_t{});
    case DType::kUInt8:
      return at(uint8_t{});
    case DType::kBool:
      return static_cast<T>(static_cast<const uint8_t*>(data)[i] != 0);
    default:
      return read<T>(data, dtype, i);
  }
}
template <class T>
__device__ void write(void* data, DType dtype, int64_t i, T x) {
  with_type(dtype, [=](auto tag) {
    using D = decltype(tag);
    static_cast<D*>(data)[i] = narrow<D>(x);
  });
}

// a / b, neither above bound: a 64-bit division takes four times as long as one of 32 bits.
__device__ inline int64_t quotient(int64_t a, int64_t b, int64_t bound) {
  if (bound > std::numeric_limits<int32_t>::max()) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// As a tree: if one number outweighs all others, each addition to it is a rounding.
template <int kSize, class T>
__device__ T tree_sum(const T (&x)[kSize]) {
  if constexpr (kSize == 1) {
    return x[0];
  } else {
    T halves[kSize / 2];
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) halves[i] = x[i] + x[i + kSize / 2];
    return tree_sum(halves);
  }
}

// ---- vectors ------------------------------------------------------------------------------------

template <class D, int kCount>
struct alignas(kCount * sizeof(D)) Vector {
  static constexpr int kSize = kCount;
  D element[kCount];
};
template <class D>
using Vector16 = Vector<D, kVectorBytes / sizeof(D)>;

// Two of the two-byte floats.
template <class D>
using Pair = std::conditional_t<std::is_same_v<D, __half>, __half2, __nv_bfloat162>;

// Element i of a vector. bf16 pairs stay packed until used: unpacking at the load would stall on
// it.
template <class D, int kSize>
__device__ Compute<D> widen(const Vector<D, kSize>& vector, int i) {
  if constexpr (std::is_same_v<D, __nv_bfloat16> && kSize > 1) {
    const unsigned pair = reinterpret_cast<const unsigned*>(vector.element)[i / 2];
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  } else {
    return widen(vector.element[i]);
  }
}

// Sets the element at a run-time index. Plain indexing would move the vector to local memory.
template <class D>
__device__ void set_lane(Vector16<D>& vector, int lane, D x) {
#pragma unroll
  for (int i = 0; i < Vector16<D>::kSize; ++i) {
    vector.element[i] = i == lane ? x : vector.element[i];
  }
}

// Rounds the numbers of a vector; two-byte types two at a time.
template <class D, int kSize>
__device__ Vector<D, kSize> pack(const Compute<D> (&x)[kSize]) {
  Vector<D, kSize> vector;
  if constexpr (sizeof(D) == 2 && kSize > 1) {
#pragma unroll
    for (int i = 0; i < kSize; i += 2) {
      Pair<D> pair;
      if constexpr (std::is_same_v<D, __half>) {
        pair = __float22half2_rn(make_float2(x[i], x[i + 1]));
      } else {
        pair = __float22bfloat162_rn(make_float2(x[i], x[i + 1]));
      }
      vector.element[i] = pair.x;
      vector.element[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) vector.element[i] = narrow<D>(x[i]);
  }
  return vector;
}

// The larger ones of two vectors' elements; nan is skipped.
template <class D>
__device__ Vector16<D> max_elements(const Vector16<D>& a, const Vector16<D>& b) {
  Vector16<D> max;
  if constexpr (sizeof(D) == 2) {
    const auto *const x = reinterpret_cast<const Pair<D>*>(a.element),
                      *const y = reinterpret_cast<const Pair<D>*>(b.element);
#pragma unroll
    for (int i = 0; i < Vector16<D>::kSize / 2; ++i) {
      reinterpret_cast<Pair<D>*>(max.element)[i] = __hmax2(x[i], y[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Vector16<D>::kSize; ++i) max.element[i] = fmax(a.element[i], b.element[i]);
  }
  return max;
}
// The largest element; nan is skipped.
template <class D>
__device__ Compute<D> max_element(const Vector16<D>& v) {
  if constexpr (sizeof(D) == 2) {
    const auto* const x = reinterpret_cast<const Pair<D>*>(v.element);
    const Pair<D> max = __hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3]));
    return fmaxf(widen(max.x), widen(max.y));
  } else {
    D max = v.element[0];
#pragma unroll
    for (int i = 1; i < Vector16<D>::kSize; ++i) max = fmax(max, v.element[i]);
    return max;
  }
}

// Elements of type D between the last multiple of 16 bytes and p.
template <class D>
__host__ __device__ int misalignment(const D* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kVectorBytes / sizeof(D));
}

// ---- asynchronous copies to shared memory -------------------------------------------------------

// The copies that a thread starts between two commits are one group.
template <class T>  // of 4, 8 or 16 bytes
__device__ void cp_async(T& to, const T* from) {
  __pipeline_memcpy_async(&to, from, sizeof(to));
}
__device__ inline void cp_async_commit() { __pipeline_commit(); }
// Waits until at most `groups` of this thread's cp.async groups are pending. The asm is a compiler
// barrier: nothing else says that memory changed.
__device__ inline void cp_async_wait(int groups) {
  __pipeline_wait_prior(groups);
  asm volatile("" ::: "memory");
}

}  // namespace fusedloss::cuda
