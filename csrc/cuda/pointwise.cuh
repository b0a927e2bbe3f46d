// The pointwise engine on CUDA: any loss of losses.h or of one's own, over any operands.
//
// Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements. One
// kernel serves every pass, so that a gradient has the same bits from each. Operands of one dtype
// that lie side by side are read and written 16 bytes at a time; any other goes element by element.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace fusedloss::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;              // packets of each operand in flight, a thread
constexpr int kBlocksPerSM = 3;         // at least as many fit an SM, and 48 KiB are in flight
constexpr int64_t kOneBlock = 1 << 14;  // up to here a second block would cost more than it helps

// One element: its value and slope (of a loss of one's own both its slopes), all times factor. What
// a loss of kUnitInterval cannot take is nan and told.
template <class Loss, class T>
__device__ auto evaluate(const Loss& loss, T x, T y, T pos_weight, T factor, const Launch& l,
                         int64_t at) {
  if constexpr (Loss::kUnitInterval) {
    const bool x_fits = x >= T(0) && x <= T(1), y_fits = y >= T(0) && y <= T(1);
    if (!x_fits || !y_fits) {
      factor = T(std::numeric_limits<float>::quiet_NaN());
      tell(l, x_fits ? Fault::kTargetOutsideUnit : Fault::kInputOutsideUnit, at,
           static_cast<double>(x_fits ? y : x), 0);
    }
  }
  if constexpr (Loss::kPosWeight) {
    return loss.eval(x, y, pos_weight) * factor;
  } else {
    return loss.eval(x, y) * factor;
  }
}

// a / b, neither above bound: a 64-bit division takes four times as long as one of 32 bits.
__device__ inline int64_t quotient(int64_t a, int64_t b, int64_t bound) {
  if (bound > std::numeric_limits<int32_t>::max()) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Whose gradients a kernel writes. Losses of one's own alone have one for target, and then may be
// asked for that alone.
template <class Loss, class Call>
struct Writes {
  bool input, target;
  __device__ Writes(const Call& c, const Scaling& s) : input(s.write), target(false) {
    if constexpr (Loss::kCustom) {
      input = input && c.gradient;
      target = s.write && c.target_gradient;
    }
  }
};

// ---- operands of one dtype, side by side --------------------------------------------------------

// What a loss is computed in.
template <class Loss, class D>
using Number = std::conditional_t<sizeof(D) == 2 && !Loss::kCustom, Quick, Compute<D>>;

// What a few packets of values are added up in. Roundings of floats would add up where many values
// are equal; to a two-byte result they are nothing.
template <class D>
using Part = std::conditional_t<sizeof(D) == 4, double, Compute<D>>;

template <class Loss, class D>
struct Flat {
  Loss loss;
  int64_t numel;
  const D *input, *target, *weight, *pos_weight, *upstream;
  D *value, *gradient, *target_gradient;
  int64_t head;     // elements before the first packet
  int64_t packets;  // that follow; the rest is the tail
  // In target's place class indices, one for each row of so many classes, a packet's or more.
  const int64_t* indices = nullptr;
  int64_t classes = 0;
};

// Targets that class indices stand for, of n elements side by side, which lie in two rows at most:
// 1 where the class is that of the row, else 0, and nan where there is no such class.
template <class N>
struct OneHot {
  int of_first;           // how many of them lie in the first row
  int hit[2] = {-1, -1};  // which of them the rows' classes are, if any of them
  N other[2] = {N(0), N(0)};

  OneHot() = default;
  template <class Call>
  __device__ OneHot(const Call& c, int64_t at, int n, const Launch& l) {
    const int64_t row = quotient(at, c.classes, c.numel);
    const int64_t before = at - row * c.classes;  // in the first row
    of_first = static_cast<int>(min(c.classes - before, int64_t{n}));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t start = r * c.classes - before;  // of the row, counted from the first of them
      if (start >= n) break;
      const int64_t index = c.indices[row + r], place = start + index;
      if (index >= 0 && index < c.classes) {
        if (place >= 0 && place < n) hit[r] = static_cast<int>(place);
      } else if (index != kIgnored) {
        other[r] = N(std::numeric_limits<float>::quiet_NaN());
        if (start >= 0) tell(l, Fault::kTargetClass, row + r, index, c.classes);
      }
    }
  }
  __device__ N operator[](int i) const {
    // By no index of its own, which would take the arrays out of their registers.
    const bool first = i < of_first;
    return i == (first ? hit[0] : hit[1]) ? N(1) : (first ? other[0] : other[1]);
  }
};

// Of the kernels that are not plain only those of one's own losses are in a hurry, with gradients
// for input and target; their registers do not fit an SM three times.
template <class Loss, bool kPlain>
constexpr int kLeastPerSM = kPlain ? kBlocksPerSM : (Loss::kCustom ? 2 : 1);

// kPlain: without weight, upstream, value and target's gradient, whose packets would take
// registers.
template <class Loss, class D, bool kPlain>
__global__ void __launch_bounds__(kThreads, kLeastPerSM<Loss, kPlain>)
    flat(const Flat<Loss, D> c, const Launch l) {
  using T = Compute<D>;
  using N = Number<Loss, D>;
  using P = Packet<D>;
  constexpr bool kIndexed = Loss::kIndexed;
  const Scaling s = Scaling::of_block(l);
  if (settled(l, s)) return;
  constexpr bool kTarget = Loss::kCustom && !kPlain;
  const Writes<Loss, Flat<Loss, D>> writes(c, s);
  const Loss loss = c.loss;
  const N scale(static_cast<T>(s.scale * Loss::kSlopeUnit));
  const int64_t packets = c.packets;
  const bool weighted = !kPlain && c.weight, has_upstream = !kPlain && c.upstream;
  const bool has_value = !kPlain && c.value;
  double total = 0;

  const auto one = [&](int64_t at) {
    T factor(1);
    if (weighted) factor = widen(c.weight[at]);
    if (has_upstream) factor = factor * widen(c.upstream[at]);
    const T p = Loss::kPosWeight ? widen(c.pos_weight[at]) : T(1);
    N y(0);
    if constexpr (kIndexed) {
      y = OneHot<N>(c, at, 1, l)[0];
    } else {
      y = N(widen(c.target[at]));
    }
    const auto e = evaluate(loss, N(widen(c.input[at])), y, N(p), N(factor), l, at);
    if (has_value) c.value[at] = narrow<D>(T(e.value));
    if (writes.input) c.gradient[at] = narrow<D>(T(e.gradient(scale)));
    if constexpr (kTarget) {
      if (writes.target) c.target_gradient[at] = narrow<D>(T(e.target_gradient(scale)));
    }
    total += T(e.value);
  };
  if (blockIdx.x == 0) {
    const int64_t t = threadIdx.x, tail = c.head + packets * P::kSize;
    if (t < c.head) one(t);
    if (tail + t < c.numel) one(tail + t);
  }

  const auto as_packets = [&](auto* p) {
    using To = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>, const P, P>;
    return p ? reinterpret_cast<To*>(p + c.head) : nullptr;
  };
  const P *const input = as_packets(c.input), *const target = as_packets(c.target),
                 *const weight = as_packets(c.weight), *const pos_weight = as_packets(c.pos_weight),
                 *const upstream = as_packets(c.upstream);
  // Values and gradients are never wanted together.
  P* const out = as_packets(has_value ? c.value : c.gradient);
  P* const target_gradient = as_packets(c.target_gradient);
  const int64_t stride = int64_t{gridDim.x} * kThreads * kUnroll;
  for (int64_t first = int64_t{blockIdx.x} * kThreads * kUnroll + threadIdx.x; first < packets;
       first += stride) {
    P x[kUnroll];
    [[maybe_unused]] P y[kUnroll];
    [[maybe_unused]] OneHot<N> rows[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + u * kThreads;
      if (at < packets) {
        x[u] = input[at];
        if constexpr (kIndexed) {
          rows[u] = OneHot<N>(c, c.head + at * P::kSize, P::kSize, l);
        } else {
          y[u] = target[at];
        }
      }
    }
    Part<D> part(0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + u * kThreads;
      if (at >= packets) break;
      P w, p, g;
      if (weighted) w = weight[at];
      if (Loss::kPosWeight) p = pos_weight[at];
      if (has_upstream) g = upstream[at];
      T results[P::kSize];
      [[maybe_unused]] T target_gradients[P::kSize];
#pragma unroll
      for (int i = 0; i < P::kSize; ++i) {
        T factor(1);
        if (weighted) factor = widen(w, i);
        if (has_upstream) factor = factor * widen(g, i);
        const T pos = Loss::kPosWeight ? widen(p, i) : T(1);
        N wanted(0);
        if constexpr (kIndexed) {
          wanted = rows[u][i];
        } else {
          wanted = N(widen(y[u], i));
        }
        const auto e = evaluate(loss, N(widen(x[u], i)), wanted, N(pos), N(factor), l,
                                c.head + at * P::kSize + i);
        part += T(e.value);
        results[i] = T(has_value ? e.value : e.gradient(scale));
        if constexpr (kTarget) target_gradients[i] = T(e.target_gradient(scale));
      }
      if (has_value || writes.input) out[at] = pack<D>(results);
      if constexpr (kTarget) {
        if (writes.target) target_gradient[at] = pack<D>(target_gradients);
      }
    }
    total += part;
  }
  finish(l, total);
}

// ---- operands of any dtype and strides ----------------------------------------------------------

struct Source {
  const void* data;
  DType dtype;
  bool contiguous;
  int class_dim;
  int64_t strides[kMaxDims];
};

struct Strided {
  int64_t numel;
  int dims;
  int64_t sizes[kMaxDims];
  Source input, target, weight, pos_weight, upstream;
  void* value;
  DType value_dtype;
  void *gradient, *target_gradient;
  DType gradient_dtype, target_gradient_dtype;
};

// Where the element at a linear position stands in each dimension.
struct Index {
  int64_t at[kMaxDims];

  __device__ Index(const Strided& c, int64_t linear) {
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      at[d] = 0;
      if (d >= c.dims) continue;
      const int64_t size = c.sizes[d];
      const int64_t outer = quotient(linear, size, c.numel);
      at[d] = linear - outer * size;
      linear = outer;
    }
  }
};

template <class T>
__device__ T fetch(const Source& s, const Strided& c, int64_t linear, const Index& index,
                   const Launch& l) {
  if (s.contiguous) return read<T>(s.data, s.dtype, linear);
  int64_t offset = 0, class_at = 0;
#pragma unroll
  for (int d = 0; d < kMaxDims; ++d) {
    if (d >= c.dims) break;
    offset += index.at[d] * s.strides[d];
    if (d == s.class_dim) class_at = index.at[d];
  }
  if (s.class_dim < 0) return read<T>(s.data, s.dtype, offset);
  const int64_t target = static_cast<const int64_t*>(s.data)[offset];
  if (target == class_at) return T(1);
  const int64_t classes = c.sizes[s.class_dim];
  if (target == kIgnored || (target >= 0 && target < classes)) return T(0);
  if (class_at == 0) {
    tell(l, Fault::kTargetClass, offset, target, classes);
  }
  return std::numeric_limits<T>::quiet_NaN();
}

template <class Loss, class T>
__global__ void __launch_bounds__(kThreads)
    strided(const Loss loss, const Strided c, const Launch l) {
  const Scaling s = Scaling::of_block(l);
  if (settled(l, s)) return;
  const Writes<Loss, Strided> writes(c, s);
  const T scale = static_cast<T>(s.scale * Loss::kSlopeUnit);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  double total = 0;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < c.numel; at += stride) {
    const Index index(c, at);
    const auto operand = [&](const Source& source) {
      return source.data ? fetch<T>(source, c, at, index, l) : T(1);
    };
    const T x = operand(c.input), y = operand(c.target);
    const T factor = operand(c.weight) * operand(c.upstream);
    const auto e = evaluate(loss, x, y, operand(c.pos_weight), factor, l, at);
    if (c.value) write(c.value, c.value_dtype, at, e.value);
    if (writes.input) write(c.gradient, c.gradient_dtype, at, e.gradient(scale));
    if constexpr (Loss::kCustom) {
      if (writes.target) {
        write(c.target_gradient, c.target_gradient_dtype, at, e.target_gradient(scale));
      }
    }
    total += e.value;
  }
  finish(l, total);
}

// ---- which of them ------------------------------------------------------------------------------

// Blocks for a call: as many as run at once, and no more than there is work for.
inline int64_t blocks_for(int64_t numel) {
  if (numel <= kOneBlock) return 1;
  const int64_t all = int64_t{device_attribute(cudaDevAttrMultiProcessorCount)} * kBlocksPerSM;
  return std::min(all, ceil_div(numel, kThreads * kUnroll));
}

// Whether target is class indices, those of neighbouring rows side by side, and so are classes.
inline bool rows_of_indices(const Pointwise& call, int64_t least_classes) {
  const int innermost = call.space.dims - 1;
  if (call.target.class_dim < 0 || call.target.class_dim != innermost ||
      call.space.sizes[innermost] < least_classes) {
    return false;
  }
  int64_t rows = 1;
  for (int d = innermost - 1; d >= 0; --d) {
    if (call.space.sizes[d] > 1 && call.target.strides[d] != rows) return false;
    rows *= call.space.sizes[d];
  }
  return true;
}

// Into c, if they lie so.
template <class Loss, class D>
bool is_flat(const Loss& loss, const Pointwise& call, Flat<Loss, D>& c) {
  constexpr DType own = std::is_same_v<D, double>          ? DType::kFloat64
                        : std::is_same_v<D, float>         ? DType::kFloat32
                        : std::is_same_v<D, __nv_bfloat16> ? DType::kBFloat16
                                                           : DType::kFloat16;
  if (call.compute_in_double != std::is_same_v<D, double>) return false;
  const D* const input = static_cast<const D*>(call.input.data);
  const auto fits = [&](const void* data, DType dtype) {
    return !data || (dtype == own && phase(static_cast<const D*>(data)) == phase(input));
  };
  if (Loss::kIndexed && !rows_of_indices(call, Packet<D>::kSize)) return false;
  for (const Operand* op :
       {&call.input, &call.target, &call.weight, &call.pos_weight, &call.upstream}) {
    if (op == &call.target && Loss::kIndexed) continue;
    if (op->data && (!op->contiguous || !fits(op->data, op->dtype))) return false;
  }
  if (!fits(call.value, call.value_dtype) || !fits(call.gradient, call.gradient_dtype) ||
      !fits(call.target_gradient, call.target_gradient_dtype)) {
    return false;
  }
  const auto pointer = [](const Operand& op) { return static_cast<const D*>(op.data); };
  const int64_t head =
      std::min<int64_t>(call.numel, (Packet<D>::kSize - phase(input)) % Packet<D>::kSize);
  c = {loss,
       call.numel,
       input,
       pointer(call.target),
       pointer(call.weight),
       pointer(call.pos_weight),
       pointer(call.upstream),
       static_cast<D*>(call.value),
       static_cast<D*>(call.gradient),
       static_cast<D*>(call.target_gradient),
       head,
       (call.numel - head) / Packet<D>::kSize};
  if (Loss::kIndexed) {
    c.target = nullptr;
    c.indices = static_cast<const int64_t*>(call.target.data);
    c.classes = call.space.sizes[call.space.dims - 1];
  }
  return true;
}

inline Strided as_strided(const Pointwise& call) {
  Strided c{};
  c.numel = call.numel;
  c.dims = call.space.dims;
  std::copy_n(call.space.sizes, c.dims, c.sizes);
  const auto source = [&](const Operand& op) {
    Source s{op.data, op.dtype, op.contiguous, op.class_dim, {}};
    if (!op.contiguous) std::copy_n(op.strides, c.dims, s.strides);
    return s;
  };
  c.input = source(call.input);
  c.target = source(call.target);
  c.weight = source(call.weight);
  c.pos_weight = source(call.pos_weight);
  c.upstream = source(call.upstream);
  c.value = call.value;
  c.value_dtype = call.value_dtype;
  c.gradient = call.gradient;
  c.gradient_dtype = call.gradient_dtype;
  c.target_gradient = call.target_gradient;
  c.target_gradient_dtype = call.target_gradient_dtype;
  return c;
}

template <class Loss>
void start(const Loss& loss, const Pointwise& call, const Launch& launch, unsigned blocks) {
  const bool done = with_type(call.input.dtype, [&](auto tag) {
    using D = decltype(tag);
    Flat<Loss, D> c;
    if (!is_flat(loss, call, c)) return false;
    // A double is in no hurry, and whoever has a loss compiled waits for each kernel.
    constexpr bool kHasPlain = !Loss::kCustom || !std::is_same_v<D, double>;
    const bool plain = kHasPlain && !c.weight && !c.upstream && !c.value && !c.target_gradient;
    if (plain) {
      flat<Loss, D, kHasPlain><<<blocks, kThreads, 0, launch.stream>>>(c, launch);
      return true;
    }
    if constexpr (!Loss::kIndexed) {
      flat<Loss, D, false><<<blocks, kThreads, 0, launch.stream>>>(c, launch);
      return true;
    }
    return false;
  });
  if (done) return;
  const Strided c = as_strided(call);
  if (call.compute_in_double) {
    strided<Loss, double><<<blocks, kThreads, 0, launch.stream>>>(loss, c, launch);
  } else {
    strided<Loss, float><<<blocks, kThreads, 0, launch.stream>>>(loss, c, launch);
  }
}

inline size_t pointwise_workspace_bytes(const Pointwise& call) {
  return Workspace::bytes(blocks_for(call.numel));
}

template <class Loss>
cudaError_t run(const Loss& loss, const Pointwise& call, const Launch& launch) {
  if (call.space.dims > kMaxDims) return cudaErrorInvalidValue;
  const int64_t blocks = blocks_for(call.numel);
  if (launch.loss) {
    if (const cudaError_t error = zero_ticket(launch, blocks); error != cudaSuccess) return error;
  }
  start(loss, call, launch, static_cast<unsigned>(blocks));
  return cudaGetLastError();
}

}  // namespace fusedloss::cuda
