// Arithmetic by the GPU's own approximate instructions, for operands of two bytes.
#pragma once

#include <cuda_runtime.h>

namespace fusedloss::cuda {

constexpr float kLog2e = 1.44269504f;

// 2^x. Relative error 2^-22; a subnormal result is 0.
__device__ inline float quick_exp2(float x) {
#if defined(__NVCC__) || defined(__CUDACC_RTC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return exp2f(x);
#endif
}
// e^x for x <= 0. Relative error 2^-22 + |x| 2^-23.
__device__ inline float quick_exp(float x) { return quick_exp2(x * kLog2e); }

// Single instructions, for which a subnormal number is 0.
#if defined(__NVCC__) || defined(__CUDACC_RTC__)
__device__ inline float log2_ftz(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// nan where either is.
__device__ inline float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
#else
inline float log2_ftz(float x) { return x < 0x1p-126f ? -INFINITY : log2f(x); }
inline float reciprocal_ftz(float x) { return 1 / x; }
inline float max_nan(float a, float b) { return a < b || b != b ? b : a; }
#endif

// log(p) for p = 1 - t in [0, 2], from log2(p). Relative error 2^-18: the hardware logarithm's
// error is absolute, so a polynomial replaces it near 1.
__device__ inline float quick_log(float log2_p, float t) {
  const float near_one =
      -t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 0.2f, 0.25f), 0.33333333f), 0.5f), 1.0f);
  return fabsf(t) < 0.0625f ? near_one : log2_p * 0.69314718f;
}

// -(y log(x) + (1 - y) log(1 - x)) for x and y in [0, 1], each logarithm at least -100: the
// hardware's for the smaller of x and 1 - x, t, and for the other a polynomial of log(1 - t) / -t,
// minimax on [0, 1/2]. Relative error 2^-21, and the hardware's 2^-22 of log t. nan if x is.
__device__ inline float quick_binary_entropy(float x, float y) {
  const float rest = 1 - x, t = fminf(x, rest);
  // bf16 numbers may be subnormal, but not 2^8 times as large.
  constexpr float kLn2 = 0.69314718f;
  const float log_t = fmaxf(fmaf(log2_ftz(256 * t), kLn2, -8 * kLn2), -100.0f);
  constexpr float c[] = {1.0f,          0.500024617f, 0.33212924f,  0.269662887f,
                         0.0508239307f, 0.751615286f, -1.03616583f, 1.16061294f};
  float minus_log_rest = c[7];
#pragma unroll
  for (int i = 6; i >= 0; --i) minus_log_rest = fmaf(minus_log_rest, t, c[i]);
  minus_log_rest *= t;
  const float y_of_t = x < rest ? y : 1 - y;
  return fmaf(-y_of_t, log_t + minus_log_rest, minus_log_rest);
}

// A float that computes by approximate instructions. Losses of two-byte operands use it: its errors
// are less than a hundredth of a rounding to two bytes. Under autocast the loss is a float, and has
// about 18 correct bits.
struct Quick {
  float x;

  Quick() = default;
  __device__ explicit Quick(double x_) : x(static_cast<float>(x_)) {}
  __device__ explicit Quick(float x_) : x(x_) {}
  __device__ explicit Quick(int x_) : x(static_cast<float>(x_)) {}
  __device__ explicit operator float() const { return x; }
  __device__ explicit operator double() const { return x; }

  __device__ friend Quick operator+(Quick a, Quick b) { return Quick(a.x + b.x); }
  __device__ friend Quick operator-(Quick a, Quick b) { return Quick(a.x - b.x); }
  __device__ friend Quick operator-(Quick a) { return Quick(-a.x); }
  __device__ friend Quick operator*(Quick a, Quick b) { return Quick(a.x * b.x); }
  // b normal and below 2^126, as every divisor here.
  __device__ friend Quick operator/(Quick a, Quick b) { return Quick(a.x * reciprocal_ftz(b.x)); }
  __device__ friend bool operator<(Quick a, Quick b) { return a.x < b.x; }
  __device__ friend bool operator<=(Quick a, Quick b) { return a.x <= b.x; }
  __device__ friend bool operator>(Quick a, Quick b) { return a.x > b.x; }
  __device__ friend bool operator>=(Quick a, Quick b) { return a.x >= b.x; }
  __device__ friend bool operator==(Quick a, Quick b) { return a.x == b.x; }
  __device__ friend Quick abs(Quick a) { return Quick(fabsf(a.x)); }
  __device__ friend Quick multiply_add(Quick a, Quick b, Quick c) {
    return Quick(fmaf(a.x, b.x, c.x));
  }
  // Whole floats: no instruction has their range.
  __device__ friend Quick exp(Quick a) { return Quick(expf(a.x)); }
  __device__ friend Quick log(Quick a) { return Quick(logf(a.x)); }
  __device__ friend Quick exp_nonpositive(Quick a) { return Quick(quick_exp(a.x)); }
  __device__ friend Quick clamp_min(Quick a, Quick low) { return Quick(max_nan(a.x, low.x)); }
  __device__ friend Quick log_finite(Quick a) { return Quick(quick_log(__log2f(a.x), 1 - a.x)); }
  __device__ friend Quick log1p_unit(Quick a) { return Quick(quick_log(log2_ftz(1 + a.x), -a.x)); }
  __device__ friend Quick binary_entropy(Quick x, Quick y) {
    return Quick(quick_binary_entropy(x.x, y.x));
  }
};

}  // namespace fusedloss::cuda
