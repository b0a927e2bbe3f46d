// Arithmetic by the GPU's own approximate instructions, for operands of two bytes.
#pragma once

#include <cuda_runtime.h>

namespace fusedloss::cuda {

// e^x for x <= 0. Relative error 2^-22 + |x| 2^-23.
__device__ inline float quick_exp(float x) {
#if defined(__NVCC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
#else
  return expf(x);
#endif
}

// log(p) for p = 1 - t in [0, 2]. Relative error 2^-18: the hardware logarithm's error is absolute,
// so a polynomial replaces it near 1.
__device__ inline float quick_log(float p, float t) {
  const float near_one =
      -t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 0.2f, 0.25f), 0.33333333f), 0.5f), 1.0f);
  return fabsf(t) < 0.0625f ? near_one : __log2f(p) * 0.69314718f;
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
  __device__ friend Quick operator/(Quick a, Quick b) { return Quick(__fdividef(a.x, b.x)); }
  __device__ friend bool operator<(Quick a, Quick b) { return a.x < b.x; }
  __device__ friend bool operator<=(Quick a, Quick b) { return a.x <= b.x; }
  __device__ friend bool operator>(Quick a, Quick b) { return a.x > b.x; }
  __device__ friend bool operator>=(Quick a, Quick b) { return a.x >= b.x; }
  __device__ friend bool operator==(Quick a, Quick b) { return a.x == b.x; }
  __device__ friend Quick abs(Quick a) { return Quick(fabsf(a.x)); }
  __device__ friend Quick multiply_add(Quick a, Quick b, Quick c) {
    return Quick(fmaf(a.x, b.x, c.x));
  }
  __device__ friend Quick exp_nonpositive(Quick a) { return Quick(quick_exp(a.x)); }
  __device__ friend Quick log_finite(Quick a) { return Quick(quick_log(a.x, 1 - a.x)); }
  __device__ friend Quick log1p_finite(Quick a) { return Quick(quick_log(1 + a.x, -a.x)); }
  __device__ friend Quick log1p_unit(Quick a) { return log1p_finite(a); }
};

}  // namespace fusedloss::cuda
