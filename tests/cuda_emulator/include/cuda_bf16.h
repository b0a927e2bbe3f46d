#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

// To nearest even.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = std::bit_cast<unsigned>(x);
  if (x != x) return {static_cast<unsigned short>(bits >> 16 | 0x40)};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
// Rounded once: a float on the way is cut off towards zero, and odd where it is not exact.
inline __nv_bfloat16 __double2bfloat16(double x) {
  const float nearest = static_cast<float>(x);
  if (nearest == x || x != x) return __float2bfloat16_rn(nearest);
  unsigned bits = std::bit_cast<unsigned>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(x)) --bits;
  return __float2bfloat16_rn(std::bit_cast<float>(bits | 1));
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(static_cast<unsigned>(x.bits) << 16);
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) {
  return {__float2bfloat16_rn(x.x), __float2bfloat16_rn(x.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 x) {
  return {__bfloat162float(x.x), __bfloat162float(x.y)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }
// A nan gives way to a number.
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto larger = [](__nv_bfloat16 x, __nv_bfloat16 y) {
    return __float2bfloat16_rn(std::fmax(__bfloat162float(x), __bfloat162float(y)));
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
