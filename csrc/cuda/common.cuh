// What the CUDA engines share: number types, 16-byte packets, sums over a block and over a grid,
// and the upstream gradient's prediction.
//
// The sources are compiled with -fmad=false, and so a gradient has the same bits whichever pass
// forms it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels.h"

namespace fusedloss::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- numbers ------------------------------------------------------------------------------------

// What numbers of type D are computed in.
template <class D>
using Compute = std::conditional_t<std::is_same_v<D, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class D>
__device__ D narrow(double x) {
  if constexpr (std::is_same_v<D, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<D, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<D>(x);
  }
}
template <class D>
__device__ D narrow(float x) {
  if constexpr (std::is_same_v<D, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<D, __half>) {
    return __float2half_rn(x);
  } else {
    return static_cast<D>(x);
  }
}

// f(a value of the type that dtype names), for floating-point ones.
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

template <class T>
__device__ T read(const void* data, DType dtype, int64_t at) {
  return with_type(dtype, [=](auto tag) {
    return static_cast<T>(widen(static_cast<const decltype(tag)*>(data)[at]));
  });
}
template <class T>
__device__ void write(void* data, DType dtype, int64_t at, T x) {
  with_type(dtype, [=](auto tag) {
    using D = decltype(tag);
    static_cast<D*>(data)[at] = narrow<D>(x);
  });
}

// ---- quick numbers ------------------------------------------------------------------------------

// e^x for x <= 0 by the GPU's own power of two: error 2^-22 and |x| 2^-23, relative.
__device__ inline float quick_exp(float x) {
#if defined(__NVCC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.44269504f));
  return power;
#else
  return expf(x);
#endif
}

// log(1 - t) = log(p), p = 1 - t in [0, 2]. The GPU's own logarithm has an absolute error, so near
// 1 a polynomial stands in. Error 2^-18, relative.
__device__ inline float quick_log(float p, float t) {
  const float near_one =
      -t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 0.2f, 0.25f), 0.33333333f), 0.5f), 1.0f);
  return fabsf(t) < 0.0625f ? near_one : __log2f(p) * 0.69314718f;
}

// A float whose words are the GPU's own instructions, for losses whose operands have two bytes:
// errors are less than a hundredth of a rounding to these. Under autocast the loss alone is a
// float, exact to some 18 bits.
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
  __device__ friend bool all_zero(Quick a) { return a.x == 0; }
  __device__ friend Quick abs(Quick a) { return Quick(fabsf(a.x)); }
  __device__ friend Quick neg_abs(Quick a) { return Quick(-fabsf(a.x)); }
  __device__ friend Quick exp_nonpositive(Quick a) { return Quick(quick_exp(a.x)); }
  __device__ friend Quick log_finite(Quick a) { return Quick(quick_log(a.x, 1 - a.x)); }
  __device__ friend Quick log1p_finite(Quick a) { return Quick(quick_log(1 + a.x, -a.x)); }
  __device__ friend Quick log1p_unit(Quick a) { return log1p_finite(a); }
};

// ---- packets ------------------------------------------------------------------------------------

constexpr int kPacketBytes = 16;  // the widest access to memory that one thread makes

template <class D>
struct alignas(kPacketBytes) Packet {
  static constexpr int kSize = kPacketBytes / sizeof(D);
  D element[kSize];
};

// Of a packet's numbers one. Two bf16 stay in one register: taken apart, each would have its own,
// and whatever loads a packet would wait for it.
template <class D>
__device__ Compute<D> widen(const Packet<D>& packet, int i) {
  if constexpr (std::is_same_v<D, __nv_bfloat16>) {
    const unsigned pair = reinterpret_cast<const unsigned*>(packet.element)[i / 2];
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  } else {
    return widen(packet.element[i]);
  }
}

// Sets one, at an index that the compiler does not know: it would take the packet out of its
// registers.
template <class D>
__device__ void put(Packet<D>& packet, int at, D x) {
#pragma unroll
  for (int i = 0; i < Packet<D>::kSize; ++i) packet.element[i] = i == at ? x : packet.element[i];
}

// Copies to shared memory that go on while the thread does. Those that it has begun between two
// calls of end_of_copies() are one lot.
template <class D>
__device__ void copy_ahead(Packet<D>& to, const Packet<D>* from) {
  __pipeline_memcpy_async(&to, from, sizeof(to));
}
__device__ inline void end_of_copies() { __pipeline_commit(); }
// Until no more than the last `lots` of the thread's own are under way. No other barrier tells the
// compiler that memory has changed.
__device__ inline void wait_for_copies(int lots) {
  __pipeline_wait_prior(lots);
  asm volatile("" ::: "memory");
}

// Rounds a packet's worth of numbers; two halves in one instruction.
template <class D>
__device__ Packet<D> pack(const Compute<D> (&x)[Packet<D>::kSize]) {
  Packet<D> packet;
#pragma unroll
  for (int i = 0; i < Packet<D>::kSize; i += 2) {
    if constexpr (std::is_same_v<D, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __float22bfloat162_rn(make_float2(x[i], x[i + 1]));
      packet.element[i] = pair.x;
      packet.element[i + 1] = pair.y;
    } else if constexpr (std::is_same_v<D, __half>) {
      const __half2 pair = __float22half2_rn(make_float2(x[i], x[i + 1]));
      packet.element[i] = pair.x;
      packet.element[i + 1] = pair.y;
    } else {
      packet.element[i] = x[i];
      packet.element[i + 1] = x[i + 1];
    }
  }
  return packet;
}

// The largest of a packet's numbers; nan is not looked at.
template <class D>
__device__ Compute<D> largest(const Packet<D>& p) {
  if constexpr (std::is_same_v<D, __nv_bfloat16>) {
    const auto* const x = reinterpret_cast<const __nv_bfloat162*>(p.element);
    const float2 top = __bfloat1622float2(__hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3])));
    return fmaxf(top.x, top.y);
  } else if constexpr (std::is_same_v<D, __half>) {
    const auto* const x = reinterpret_cast<const __half2*>(p.element);
    const float2 top = __half22float2(__hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3])));
    return fmaxf(top.x, top.y);
  } else {
    D top = p.element[0];
#pragma unroll
    for (int i = 1; i < Packet<D>::kSize; ++i) top = fmax(top, p.element[i]);
    return top;
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many elements of type D lie between p and the packet boundary before it.
template <class D>
__host__ __device__ int phase(const D* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kPacketBytes / sizeof(D));
}

// ---- sums ---------------------------------------------------------------------------------------

// The sum of x over the block's threads, in thread 0, always added in the same order. Between two
// calls there has to be a barrier.
__device__ inline double block_sum(double x) {
  __shared__ double warps[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  if (warp > 0) return 0;
  x = lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : 0;
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ inline bool same(double a, double b) { return a == b && signbit(a) == signbit(b); }

struct Workspace {
  unsigned* ticket;
  double2* parts;  // one a block: of the sum, and what all shall have in common

  __host__ __device__ explicit Workspace(void* p)
      : ticket(static_cast<unsigned*>(p)), parts(static_cast<double2*>(p) + 1) {}
  static size_t bytes(int64_t blocks) { return blocks > 1 ? (blocks + 1) * sizeof(double2) : 0; }
};

// The sum of x over the grid's threads: true in the one thread that has it. No order of blocks
// changes its bits: each leaves what it has, and the last to come adds all of it up. There
// `common`, a block's own, is nan unless all blocks have the same.
__device__ inline bool grid_sum(double& x, double& common, void* workspace) {
  x = block_sum(x);
  if (gridDim.x == 1) return threadIdx.x == 0;
  const Workspace w(workspace);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    w.parts[blockIdx.x] = make_double2(x, common);
    __threadfence();  // the part before the ticket
    last = atomicAdd(w.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();  // the tickets before their parts
  x = 0;
  bool agreed = true;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    const double2 part = __ldcg(&w.parts[b]);
    x += part.x;
    agreed = agreed && same(part.y, common);
  }
  x = block_sum(x);
  agreed = __syncthreads_and(agreed);
  if (threadIdx.x > 0) return false;
  if (!agreed) common = std::numeric_limits<double>::quiet_NaN();
  return true;
}

// Whether a thread of the block has told the host of a fault.
__device__ inline int& block_has_told() {
  __shared__ int told;
  return told;
}

// ---- the upstream gradient ----------------------------------------------------------------------

constexpr double kConfident = 2, kMostConfident = 3;

// What a call multiplies the gradient by.
struct Scaling {
  bool write;       // the gradient, every element times
  double scale;     // upstream / normalizer
  double upstream;  // nan: the gradient is not written
  double normalizer;

  // Meanwhile a backward on another stream may teach the prediction. So one thread of the block
  // reads it, and only once; all threads go by what that one has seen. Value and confidence need
  // not be of one teaching: any upstream gradient may be predicted, as long as scales tell which.
  __device__ static const Scaling& of_block(const Launch& l) {
    if (threadIdx.x == 0) {
      seen() = read(l);
      block_has_told() = 0;
    }
    __syncthreads();
    return seen();
  }
  __device__ static Scaling& seen() {
    __shared__ Scaling scaling;
    return scaling;
  }

 private:
  __device__ static Scaling read(const Launch& l) {
    Scaling s{false, 0, std::numeric_limits<double>::quiet_NaN(), 1};
    if (l.pass == Pass::kBackward) {
      s.upstream = l.grad_output ? cuda::read<double>(l.grad_output, l.grad_output_dtype, 0) : 1;
      if (l.grad_output) s.normalizer = l.scales[1];
      s.write = !l.grad_output || l.fresh || !same(l.scales[0], s.upstream);
    } else {
      s.normalizer = isnan(l.normalizer) ? l.scales[1] : l.normalizer;
      if (l.pass == Pass::kForward && l.prediction && l.prediction[1] >= kConfident) {
        s.upstream = l.prediction[0];
        s.write = true;
      }
    }
    if (s.write) s.scale = s.upstream / s.normalizer;
    return s;
  }
};

// True where the block has nothing to do. The first thread of the grid teaches the prediction.
__device__ inline bool settled(const Launch& l, const Scaling& s) {
  if (l.pass != Pass::kBackward) return false;
  if (l.prediction && blockIdx.x == 0 && threadIdx.x == 0) {
    volatile double* const p = l.prediction;
    if (same(p[0], s.upstream)) {
      p[1] = fmin(p[1] + 1, kMostConfident);
    } else {
      p[0] = s.upstream;
      p[1] = fmax(p[1] - 1, 0.0);
    }
  }
  return !s.write;
}

// Ends a pass that computes the loss: value is each thread's share of it. Where blocks have seen
// different predictions the gradient is patchwork: none has been written, scales say.
__device__ inline void finish(const Launch& l, double value) {
  if (l.pass == Pass::kBackward) return;
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  Scaling& s = Scaling::seen();  // once more: kept, it would take registers all the way
  if (l.loss ? !grid_sum(value, s.upstream, l.workspace) : !first) return;
  if (l.loss) write(l.loss, l.loss_dtype, 0, value / s.normalizer);
  if (l.pass == Pass::kForward) {
    l.scales[0] = s.upstream;
    if (!isnan(l.normalizer)) l.scales[1] = s.normalizer;
  }
}

// ---- faults -------------------------------------------------------------------------------------

// Tells the host of an input that cannot be, a class index or an element; the first to come is
// told. Only one thread of a block tries: where every element is wrong, atomics on the host's
// memory would take far longer than all else.
template <class Value>
__device__ void tell(const Launch& l, Fault::What what, int64_t position, Value value,
                     int64_t classes) {
  volatile int& told = block_has_told();
  if (told || atomicExch(&block_has_told(), 1)) return;
  Fault* const fault = l.fault;
  if (atomicCAS(&fault->state, int{Fault::kNone}, int{Fault::kBeingWritten}) != Fault::kNone)
    return;
  fault->what = what;
  fault->position = position;
  if constexpr (std::is_integral_v<Value>) {
    fault->index = value;
  } else {
    fault->value = value;
  }
  fault->classes = classes;
  __threadfence_system();
  atomicExch(&fault->state, int{Fault::kTold});
}

// ---- launching ----------------------------------------------------------------------------------

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Zeroes the ticket that the grid's blocks will draw from, if they are many.
inline cudaError_t zero_ticket(const Launch& launch, int64_t blocks) {
  if (blocks == 1) return cudaSuccess;
  return cudaMemsetAsync(Workspace(launch.workspace).ticket, 0, sizeof(unsigned), launch.stream);
}

}  // namespace fusedloss::cuda
