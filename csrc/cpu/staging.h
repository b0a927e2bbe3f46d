// Copies an operand of any dtype and layout into a short contiguous run of the type that an engine
// computes in, and results back to memory. Runs are short enough to stay in the L1 cache, so
// conversion and gathering cost no traffic to memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "kernels.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

// As torch reads it: whatever is not 0 is 1.
struct Bool {
  uint8_t byte;

  Bool() = default;
  explicit Bool(double x) : byte(x != 0) {}
  operator float() const { return byte != 0; }
};

template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kInt64:
      return f(int64_t{});
    case DType::kInt32:
      return f(int32_t{});
    case DType::kInt16:
      return f(int16_t{});
    case DType::kInt8:
      return f(int8_t{});
    case DType::kUInt8:
      return f(uint8_t{});
    case DType::kBool:
      return f(Bool{});
  }
}

template <class T>
constexpr bool is_dtype(DType dtype) {
  return dtype == (std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32);
}

inline int64_t bytes_of(DType dtype) {
  int64_t bytes = 0;
  with_type(dtype, [&](auto tag) { bytes = sizeof(tag); });
  return bytes;
}

template <class S>
constexpr bool is_half = std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>;

// to[i * to_stride] = from[i * from_stride]
template <class S, class D>
inline void convert(const S* from, int64_t from_stride, D* to, int64_t to_stride, int64_t n) {
  int64_t i = 0;
  if (from_stride == 0 && to_stride == 1) {  // one number for all
    std::fill_n(to, n, static_cast<D>(*from));
    return;
  }
  if (from_stride != 1 || to_stride != 1) {
    for (; i < n; ++i) to[i * to_stride] = static_cast<D>(from[i * from_stride]);
    return;
  }
  if constexpr (std::is_same_v<S, D>) {
    std::memcpy(to, from, n * sizeof(D));
    return;
  }
#if defined(FUSEDLOSS_HALF_REGISTERS)
  constexpr int64_t kLanes = Vec<float>::size();
  if constexpr (is_half<S> && std::is_same_v<D, float>) {
    for (; i + kLanes <= n; i += kLanes) widen_register(from + i).store(to + i);
  } else if constexpr (is_half<D> && std::is_same_v<S, float>) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) narrow_two_registers(from + i, to + i);
  }
#endif
  for (; i < n; ++i) to[i] = static_cast<D>(from[i]);
}

template <class T>
[[gnu::noinline]] void widen(DType dtype, const void* data, int64_t offset, int64_t stride,
                             int64_t n, T* out) {
  with_type(dtype, [&](auto tag) {
    convert(static_cast<const decltype(tag)*>(data) + offset, stride, out, 1, n);
  });
}

// Short rows, of n elements each.
template <class T>
[[gnu::noinline]] void widen_rows(DType dtype, const void* data, int64_t offset, int64_t row_stride,
                                  int64_t stride, int64_t rows, int64_t n, T* out) {
  with_type(dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(data) + offset;
    for (int64_t row = 0; row < rows; ++row, from += row_stride) {
      for (int64_t i = 0; i < n; ++i) *out++ = static_cast<T>(from[i * stride]);
    }
  });
}

template <class T>
[[gnu::noinline]] void narrow(const T* in, int64_t n, DType dtype, void* data, int64_t offset,
                              int64_t stride) {
  with_type(dtype, [&](auto tag) {
    convert(in, 1, static_cast<decltype(tag)*>(data) + offset, stride, n);
  });
}

// Elements [begin, begin + n) of a call's operand in its space's order: in place if they are
// contiguous and of type T, otherwise in scratch.
template <class T>
[[gnu::noinline]] const T* stage(const Operand& op, const Call& call, int64_t begin, int64_t n,
                                 T* scratch) {
  if (op.contiguous) {
    if (is_dtype<T>(op.dtype)) return static_cast<const T*>(op.data) + begin;
    widen(op.dtype, op.data, begin, 1, n, scratch);
    return scratch;
  }
  const Space& space = call.space;
  const int last = space.dims - 1;
  int64_t index[kMaxDims];
  int64_t rest = begin, offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % space.sizes[d];
    rest /= space.sizes[d];
    offset += index[d] * op.strides[d];
  }
  // Goes on by that many elements of a dimension.
  const auto step = [&](int d, int64_t count) {
    index[d] += count;
    offset += count * op.strides[d];
    for (; d > 0 && index[d] == space.sizes[d]; --d) {
      offset += op.strides[d - 1] - index[d] * op.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  };
  constexpr int64_t kShort = 16;
  const int64_t row = space.sizes[last];
  const bool short_rows = last > 0 && row < kShort && op.class_dim < 0;
  for (int64_t done = 0; done < n;) {
    if (short_rows && index[last] == 0 && n - done >= row) {
      const int64_t rows = std::min((n - done) / row, space.sizes[last - 1] - index[last - 1]);
      widen_rows(op.dtype, op.data, offset, op.strides[last - 1], op.strides[last], rows, row,
                 scratch + done);
      done += rows * row;
      step(last - 1, rows);
      continue;
    }
    const int64_t run = std::min(n - done, space.sizes[last] - index[last]);
    if (op.class_dim < 0) {
      widen(op.dtype, op.data, offset, op.strides[last], run, scratch + done);
    } else {
      const int64_t* classes = static_cast<const int64_t*>(op.data) + offset;
      if (op.class_dim == last) {  // one index for all of the run
        std::fill_n(scratch + done, run, T(0));
        const bool here = *classes >= index[last] && *classes < index[last] + run;
        if (here && *classes != call.ignore_index) scratch[done + *classes - index[last]] = T(1);
      } else {
        for (int64_t i = 0; i < run; ++i) {
          const int64_t at = classes[i * op.strides[last]];
          scratch[done + i] = T(at == index[op.class_dim] && at != call.ignore_index);
        }
      }
    }
    done += run;
    step(last, run);
  }
  return scratch;
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
