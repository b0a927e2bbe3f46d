// What the kernels use of the C++ library and of CUDA's headers, for NVRTC, which comes with torch
// without them: fusedloss/_nvrtc.py includes this file first and leaves theirs empty.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;
using uintptr_t = unsigned long;

#define INFINITY __builtin_bit_cast(float, 0x7f800000)

namespace std {

template <bool kYes, class Yes, class No>
struct conditional {
  using type = Yes;
};
template <class Yes, class No>
struct conditional<false, Yes, No> {
  using type = No;
};
template <bool kYes, class Yes, class No>
using conditional_t = typename conditional<kYes, Yes, No>::type;

template <class A, class B>
inline constexpr bool is_same_v = false;
template <class A>
inline constexpr bool is_same_v<A, A> = true;
template <class Number>
inline constexpr bool is_integral_v = Number(1) / Number(2) == Number(0);

template <class>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float infinity() { return INFINITY; }
  static constexpr float quiet_NaN() { return __builtin_bit_cast(float, 0x7fc00000); }
};
template <>
struct numeric_limits<double> {
  static constexpr double infinity() { return INFINITY; }
  static constexpr double quiet_NaN() { return __builtin_bit_cast(double, 0x7ff8000000000000); }
};
template <>
struct numeric_limits<int32_t> {
  static constexpr int32_t max() { return 0x7fffffff; }
};

template <class T>
constexpr const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <class T>
constexpr void swap(T& a, T& b) {
  const T before = a;
  a = b;
  b = before;
}

template <class T, class Next>
constexpr T exchange(T& x, Next next) {
  const T before = x;
  x = next;
  return before;
}

}  // namespace std

// ---- two-byte floats ----------------------------------------------------------------------------

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __half2float(__half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
inline __half __float2half_rn(float x) {
  __half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
}
inline __half2 __float22half2_rn(float2 x) {
  __half2 narrow;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;"
      : "=r"(reinterpret_cast<unsigned&>(narrow))
      : "f"(x.y), "f"(x.x));
  return narrow;
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) {
  __nv_bfloat162 narrow;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
      : "=r"(reinterpret_cast<unsigned&>(narrow))
      : "f"(x.y), "f"(x.x));
  return narrow;
}

// The larger ones; nan is skipped.
#if __CUDA_ARCH__ >= 800
inline __half2 __hmax2(__half2 a, __half2 b) {
  __half2 max;
  asm("max.f16x2 %0, %1, %2;"
      : "=r"(reinterpret_cast<unsigned&>(max))
      : "r"(reinterpret_cast<unsigned&>(a)), "r"(reinterpret_cast<unsigned&>(b)));
  return max;
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  __nv_bfloat162 max;
  asm("max.bf16x2 %0, %1, %2;"
      : "=r"(reinterpret_cast<unsigned&>(max))
      : "r"(reinterpret_cast<unsigned&>(a)), "r"(reinterpret_cast<unsigned&>(b)));
  return max;
}
#else
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __float22half2_rn(make_float2(fmaxf(__half2float(a.x), __half2float(b.x)),
                                       fmaxf(__half2float(a.y), __half2float(b.y))));
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __float22bfloat162_rn(make_float2(fmaxf(__bfloat162float(a.x), __bfloat162float(b.x)),
                                           fmaxf(__bfloat162float(a.y), __bfloat162float(b.y))));
}
#endif

// ---- copies to shared memory --------------------------------------------------------------------

#if __CUDA_ARCH__ >= 800
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else if (bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(from) : "memory");
  }
}
inline void __pipeline_commit() { asm volatile("cp.async.commit_group;"); }
inline void __pipeline_wait_prior(size_t groups) {
  if (groups == 0) {
    asm volatile("cp.async.wait_group 0;");
  } else if (groups == 1) {
    asm volatile("cp.async.wait_group 1;");
  } else {
    asm volatile("cp.async.wait_group 2;");
  }
}
#else
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes == 16) {
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  } else if (bytes == 8) {
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  } else {
    *static_cast<unsigned*>(to) = *static_cast<const unsigned*>(from);
  }
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {}
#endif

// ---- clusters -----------------------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
namespace cooperative_groups {

struct cluster_group {
  static void sync() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  }
  static unsigned block_rank() { return __clusterRelativeBlockRank(); }
  static unsigned num_blocks() { return __clusterSizeInBlocks(); }
  template <class T>
  static T* map_shared_rank(T* pointer, int rank) {
    return static_cast<T*>(__cluster_map_shared_rank(pointer, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
#endif
