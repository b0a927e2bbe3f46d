#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};

// _Float16 rounds to nearest even and keeps nan.
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half __double2half(double x) { return {static_cast<_Float16>(x)}; }
inline float __half2float(__half x) { return x.value; }
inline __half2 __float22half2_rn(float2 x) { return {__float2half_rn(x.x), __float2half_rn(x.y)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline unsigned short __half_as_ushort(__half x) { return std::bit_cast<unsigned short>(x); }
inline __half __ushort_as_half(unsigned short x) { return std::bit_cast<__half>(x); }
// A nan gives way to a number.
inline __half2 __hmax2(__half2 a, __half2 b) {
  const auto larger = [](__half x, __half y) {
    return __float2half_rn(std::fmax(__half2float(x), __half2float(y)));
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
