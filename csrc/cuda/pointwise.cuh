// The pointwise engine on CUDA, over any loss of losses.h or custom loss.
//
// Fewest bytes for value and gradient: read input, read target, write gradient, 3 N elements. One
// kernel serves every pass, so that a gradient has the same bits from each. Contiguous operands of
// one dtype are read and written 16 bytes at a time, and factors that are one number for all
// elements join the scale; all other operands go element by element.
#pragma once

#include <algorithm>

#include "../math/eval.h"
#include "custom_parameters.cuh"
#include "fast_math.cuh"
#include "reduce.cuh"
#include "upstream.cuh"

#if !defined(__CUDACC_RTC__)  // which compiles nothing for the host
#include "device.h"
#endif

namespace fusedloss::cuda {

constexpr int kThreads = 256;              // per block
constexpr int kUnroll = 2;                 // vectors of each operand in flight per thread
constexpr int64_t kMaxOneBlock = 1 << 14;  // elements; up to here a second block does not pay

// ---- inputs outside of a loss's domain ----------------------------------------------------------

// Or-ed over vectors of x: has the highest bit of a lane unless all elements of two or four bytes
// lie in [0, 1], whose bits come first among unsigned integers. Only -0 has it without need.
template <class D, int kSize>
__device__ unsigned outside_unit(const Vector<D, kSize>& x) {
  constexpr unsigned kLanes = sizeof(D) == 2 ? 0x10001u : 1u;  // 1 in each lane of a word
  constexpr unsigned kOne = std::is_same_v<D, float>    ? 0x3f800000u
                            : std::is_same_v<D, __half> ? 0x3c00u
                                                        : 0x3f80u;
  constexpr unsigned kHighest = kLanes << (8 * sizeof(D) - 1);
  const auto* const words = reinterpret_cast<const unsigned*>(x.element);
  unsigned found = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(x) / sizeof(unsigned)); ++i) {
    // What this sum carries into the next lane is a negative number's, which the word itself shows.
    found |= words[i] | (words[i] + (kHighest - kLanes * (kOne + 1)));
  }
  return found & kHighest;
}

// Makes the input of each element that does not lie in [0, 1], or whose target does not, nan, and
// with it value and gradient. Reports the first one; position: of element 0.
template <class D, int kSize>
__device__ void check_unit(Vector<D, kSize>& x, const Vector<D, kSize>& y, const Launch& l,
                           int64_t position) {
  using T = Compute<D>;
  if constexpr (sizeof(x) == kVectorBytes && !std::is_same_v<D, double>) {
    if ((outside_unit(x) | outside_unit(y)) == 0) return;
  }
  const auto fits = [](T number) { return number >= 0 && number <= 1; };
  int wrong = -1;
  T input(0), target(0);
#pragma unroll
  for (int i = kSize - 1; i >= 0; --i) {
    const T x_i = widen(x, i), y_i = widen(y, i);
    if (fits(x_i) && fits(y_i)) continue;
    wrong = i;
    input = x_i;
    target = y_i;
    x.element[i] = narrow<D>(kNan<float>);
  }
  if (wrong < 0) return;
  const bool of_input = !fits(input);
  report_error(l, of_input ? Fault::kInputOutsideUnit : Fault::kTargetOutsideUnit, position + wrong,
               static_cast<double>(of_input ? input : target), 0);
}

// The same of elements whose variance(i) is negative.
template <class D, int kSize, class Variance>
__device__ void check_variance(Vector<D, kSize>& x, const Variance& variance, const Launch& l,
                               int64_t position) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const auto number = variance(i);
    if (!(number < 0)) continue;
    x.element[i] = narrow<D>(kNan<float>);
    report_error(l, Fault::kNegativeVariance, position + i, static_cast<double>(number), 0);
  }
}

// ---- contiguous operands of one dtype -----------------------------------------------------------

// The type that a loss is computed in.
template <class Loss, class D>
using Number = std::conditional_t<sizeof(D) == 2 && !Loss::kCustom, Quick, Compute<D>>;

// The type that the values of a few vectors are added up in. Float roundings would build up where
// many values are equal; a two-byte result does not show them.
template <class D>
using PartialSum = std::conditional_t<sizeof(D) == 4, double, Compute<D>>;

// A number for every element: a vector of them each, one for all, or none, which is 1.
template <class D>
struct Factor {
  const D* vectors = nullptr;
  const void* single = nullptr;
  DType single_dtype = DType::kFloat32;

  // What is the same for all elements.
  __device__ double number() const { return single ? read<double>(single, single_dtype, 0) : 1; }
};

// Every operand and output is contiguous and equally misaligned, or null. Pointers are to the first
// vector: elements are numbered from -head, where the head begins, to the end of the tail.
template <class D>
struct VectorizedCall {
  int64_t numel, head, vectors;
  const D *input, *target;
  Factor<D> more[kMaxInputs - 2];  // the loss's later inputs
  Factor<D> weight, upstream;
  D* value;
  D* gradients[kMaxInputs];
  // Losses of class indices, in place of target: (numel / classes). A row has at least as many
  // classes as a vector has elements.
  const int64_t* indices;
  int64_t classes, ignore_index;
};

// One-hot targets of n consecutive elements, which lie in two rows at most: 1 for the row's class,
// else 0, and nan in a row whose index is no class.
template <class N>
struct OneHot {
  int in_first_row;             // how many of the elements
  int target_at[2] = {-1, -1};  // the rows' classes as positions among the elements; -1: outside
  N elsewhere[2] = {N(0), N(0)};

  OneHot() = default;
  template <class Call>
  __device__ OneHot(const Call& c, int64_t position, int n, const Launch& l) {
    const int64_t row = quotient(position, c.classes, c.numel);
    const int64_t before = position - row * c.classes;  // elements of the first row
    in_first_row = static_cast<int>(min(c.classes - before, int64_t{n}));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t start = r * c.classes - before;  // of the row, from the first element on
      if (start >= n) break;
      const int64_t index = c.indices[row + r], at = start + index;
      if (index == c.ignore_index) continue;
      if (index >= 0 && index < c.classes) {
        if (at >= 0 && at < n) target_at[r] = static_cast<int>(at);
      } else {
        elsewhere[r] = N(kNan<float>);
        if (start >= 0) report_error(l, Fault::kTargetClass, row + r, index, c.classes);
      }
    }
  }
  __device__ N operator[](int i) const {
    // Indexed by constants only: a run-time index would move the arrays to local memory.
    const bool first = i < in_first_row;
    return i == (first ? target_at[0] : target_at[1]) ? N(1)
                                                      : (first ? elsewhere[0] : elsewhere[1]);
  }
};

// What a thread of pointwise_vectorized computes. kPlain: without value, other inputs' gradients
// than the first one's, and vectors of weight and upstream, which would take registers.
template <class Loss, class D, bool kPlain>
struct VectorizedThread {
  using T = Compute<D>;
  using N = Number<Loss, D>;
  static constexpr int kGradients = kPlain ? 1 : Loss::kGradients;
  static constexpr int kLater = Loss::kInputs > 2 ? Loss::kInputs - 2 : 0;

  const Loss loss;  // a copy, which stays in registers
  const VectorizedCall<D>& c;
  const Launch& l;
  const GradientScale& s;
  const bool weighted = !kPlain && c.weight.vectors, has_upstream = !kPlain && c.upstream.vectors;
  const bool has_value = !kPlain && c.value, write_first = s.write && c.gradients[0];
  N single[kLater + 1];  // later inputs that are one number for all elements
  // What is written is multiplied by it.
  const N scale = N(static_cast<T>((has_value ? 1 : s.scale * Loss::kSlopeUnit) *
                                   c.weight.number() * c.upstream.number()));

  __device__ VectorizedThread(const Loss& loss, const VectorizedCall<D>& c, const Launch& l,
                              const GradientScale& s)
      : loss(loss), c(c), l(l), s(s) {
#pragma unroll
    for (int j = 0; j < kLater; ++j) single[j] = N(static_cast<T>(c.more[j].number()));
  }

  // A vector of each of a loss's inputs.
  template <class V>
  struct Inputs {
    V x;
    std::conditional_t<Loss::kIndexed, OneHot<N>, V> y;
    V later[kLater + 1];  // C++ has no empty arrays
  };

  // Vector v of an operand or output.
  template <class V>
  __device__ static const V& vector(const D* p, int64_t v) {
    return reinterpret_cast<const V*>(p)[v];
  }
  template <class V>
  __device__ static V& vector(D* p, int64_t v) {
    return reinterpret_cast<V*>(p)[v];
  }

  // Vector v, whose inputs have been loaded; adds its values to sum, without what weighs all of
  // them alike.
  template <class V>
  __device__ void compute(int64_t v, Inputs<V> in, PartialSum<D>& sum) const {
    const int64_t position = c.head + v * V::kSize;
    if constexpr (Loss::kDomain == Domain::kUnitInterval) check_unit(in.x, in.y, l, position);
    if constexpr (Loss::kDomain == Domain::kVariance) {
      const auto variance = [&](int i) {
        return c.more[0].vectors ? widen(in.later[0], i) : T(single[0]);
      };
      check_variance(in.x, variance, l, position);
    }
    V w, g;
    if (weighted) w = vector<V>(c.weight.vectors, v);
    if (has_upstream) g = vector<V>(c.upstream.vectors, v);
    T results[kGradients][V::kSize];
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      T factor(1);
      if (weighted) factor = widen(w, i);
      if (has_upstream) factor = factor * widen(g, i);
      N target(0);
      if constexpr (Loss::kIndexed) {
        target = in.y[i];
      } else if constexpr (Loss::kInputs > 1) {
        target = N(widen(in.y, i));
      }
      const auto input = [&](int j) {
        if (j == 0) return N(widen(in.x, i));
        if (j == 1) return target;
        return c.more[j - 2].vectors ? N(widen(in.later[j - 2], i)) : single[j - 2];
      };
      const auto e = evaluate(loss, input) * N(factor);
      sum += T(e.value);
      results[0][i] = T(has_value ? e.value * scale : e.gradient(scale, 0));
#pragma unroll
      for (int j = 1; j < kGradients; ++j) results[j][i] = T(e.gradient(scale, j));
    }
    // A call wants values or gradients, never both.
    if (has_value || write_first) {
      vector<V>(has_value ? c.value : c.gradients[0], v) = pack<D>(results[0]);
    }
#pragma unroll
    for (int j = 1; j < kGradients; ++j) {
      if (s.write && c.gradients[j]) vector<V>(c.gradients[j], v) = pack<D>(results[j]);
    }
  }

  // kCount vectors below `end`, kThreads apart, loaded before any is computed; returns the sum of
  // their values. The head and the tail go by vectors of one element.
  template <class V, int kCount>
  __device__ PartialSum<D> batch(int64_t first, int64_t end) const {
    Inputs<V> in[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t v = first + u * kThreads;
      if (v < end) {
        in[u].x = vector<V>(c.input, v);
        if constexpr (Loss::kIndexed) {
          in[u].y = OneHot<N>(c, c.head + v * V::kSize, V::kSize, l);
        } else if constexpr (Loss::kInputs > 1) {
          in[u].y = vector<V>(c.target, v);
        }
#pragma unroll
        for (int j = 0; j < kLater; ++j) {
          if (c.more[j].vectors) in[u].later[j] = vector<V>(c.more[j].vectors, v);
        }
      }
    }
    PartialSum<D> sum(0);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t v = first + u * kThreads;
      if (v >= end) break;
      compute(v, in[u], sum);
    }
    return sum;
  }
};

// Blocks that the registers of an SM must have room for. A block loads kUnroll vectors of two
// operands a thread at a time, 16 KiB. An H200 takes 25 KB in flight per SM to be busy (4.8e12 B/s
// * 700 ns / 132 SMs), which is two blocks; the others hide the arithmetic between two loads.
// Custom losses take more registers.
template <class Loss, bool kPlain>
constexpr int kMinBlocksPerSM = (kPlain ? 4 : 3) - Loss::kCustom;

template <class Loss, class D, bool kPlain, class Given>
__device__ void compute_vectorized(const Given& given, const VectorizedCall<D>& c,
                                   const Launch& l) {
  const Loss& loss = prepared(given);
  const GradientScale s = GradientScale::of_block<Loss::kIndexed>(l);
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const VectorizedThread<Loss, D, kPlain> thread(loss, c, l, s);
  double total = 0;
  if (blockIdx.x == 0) {
    const int64_t t = threadIdx.x, tail = c.vectors * Vector16<D>::kSize;
    total += thread.template batch<Vector<D, 1>, 1>(t - c.head, 0);
    total += thread.template batch<Vector<D, 1>, 1>(tail + t, c.numel - c.head);
  }
  const int64_t stride = int64_t{gridDim.x} * kThreads * kUnroll;
  for (int64_t first = int64_t{blockIdx.x} * kThreads * kUnroll + threadIdx.x; first < c.vectors;
       first += stride) {
    total += thread.template batch<Vector16<D>, kUnroll>(first, c.vectors);
  }
  write_loss(l, total * c.weight.number());
}

template <class Loss, class D, bool kPlain>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSM<Loss, kPlain>)
    pointwise_vectorized(const Loss loss, const VectorizedCall<D> c, const Launch l) {
  compute_vectorized<Loss, D, kPlain>(loss, c, l);
}

// ---- operands of any dtype and strides ----------------------------------------------------------

// The coordinates of an element in each dimension.
struct Coordinates {
  int64_t at[kMaxDims];

  __device__ Coordinates(const Call& c, int64_t linear) {
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      at[d] = 0;
      if (d >= c.space.dims) continue;
      const int64_t size = c.space.sizes[d];
      const int64_t outer = quotient(linear, size, c.numel);
      at[d] = linear - outer * size;
      linear = outer;
    }
  }
};

template <class T>
__device__ T load(const Operand& op, const Call& c, int64_t linear, const Coordinates& coordinates,
                  const Launch& l) {
  if (op.contiguous) return read_any<T>(op.data, op.dtype, linear);
  int64_t offset = 0, class_at = 0;
#pragma unroll
  for (int d = 0; d < kMaxDims; ++d) {
    if (d >= c.space.dims) break;
    offset += coordinates.at[d] * op.strides[d];
    if (d == op.class_dim) class_at = coordinates.at[d];
  }
  if (op.class_dim < 0) return read_any<T>(op.data, op.dtype, offset);
  const int64_t target = static_cast<const int64_t*>(op.data)[offset];
  if (target == c.ignore_index) return T(0);
  if (target == class_at) return T(1);
  const int64_t classes = c.space.sizes[op.class_dim];
  if (target >= 0 && target < classes) return T(0);
  if (class_at == 0) report_error(l, Fault::kTargetClass, offset, target, classes);
  return kNan<T>;
}

template <class Loss, class T, class Given>
__device__ void compute_strided(const Given& given, const Call& c, const Launch& l) {
  const Loss& loss = prepared(given);
  const GradientScale s = GradientScale::of_block<Loss::kIndexed>(l);
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const T scale = static_cast<T>(s.scale * Loss::kSlopeUnit);
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  double total = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < c.numel; i += stride) {
    const Coordinates coordinates(c, i);
    const auto operand = [&](const Operand& op) {
      return op.data ? load<T>(op, c, i, coordinates, l) : T(1);
    };
    Vector<T, 1> inputs[Loss::kInputs];
#pragma unroll
    for (int j = 0; j < Loss::kInputs; ++j) inputs[j].element[0] = operand(c.inputs[j]);
    if constexpr (Loss::kDomain == Domain::kUnitInterval) check_unit(inputs[0], inputs[1], l, i);
    if constexpr (Loss::kDomain == Domain::kVariance) {
      check_variance(inputs[0], [&](int) { return inputs[2].element[0]; }, l, i);
    }
    const T factor = operand(c.weight) * operand(c.upstream);
    const auto e = evaluate(loss, [&](int j) { return inputs[j].element[0]; }) * factor;
    const auto store = [&](const Output& out, T x) {
      if (out.data) write(out.data, out.dtype, i, x);
    };
    store(c.value, e.value);
#pragma unroll
    for (int j = 0; j < Loss::kGradients; ++j) {
      if (s.write) store(c.gradients[j], e.gradient(scale, j));
    }
    total += e.value;
  }
  write_loss(l, total);
}

template <class Loss, class T>
__global__ void __launch_bounds__(kThreads)
    pointwise_strided(const Loss loss, const Call c, const Launch l) {
  compute_strided<Loss, T>(loss, c, l);
}

// ---- choosing and launching a kernel ------------------------------------------------------------
#if !defined(__CUDACC_RTC__)  // which compiles nothing for the host

// Blocks of a grid: no more than run at once, and than there is work for.
template <class Kernel>
unsigned pointwise_blocks(int64_t numel, Kernel* kernel) {
  if (numel <= kMaxOneBlock) return 1;
  const int64_t most = resident_blocks(kernel, kThreads);
  return static_cast<unsigned>(std::min(most, ceil_div(numel, kThreads * kUnroll)));
}

// Whether a factor is one floating-point number for all elements.
inline bool is_single(const Operand& op, const Space& space) {
  if (!op.data || op.contiguous || op.dtype > DType::kFloat16) return false;
  for (int d = 0; d < space.dims; ++d) {
    if (space.sizes[d] > 1 && op.strides[d] != 0) return false;
  }
  return true;
}

// Whether target is class indices whose class dimension is innermost, one contiguous index a row.
inline bool has_contiguous_indices(const Call& call, int64_t min_classes) {
  const int innermost = call.space.dims - 1;
  const Operand& target = call.inputs[1];
  if (target.class_dim < 0 || target.class_dim != innermost ||
      call.space.sizes[innermost] < min_classes) {
    return false;
  }
  int64_t rows = 1;
  for (int d = innermost - 1; d >= 0; --d) {
    if (call.space.sizes[d] > 1 && target.strides[d] != rows) return false;
    rows *= call.space.sizes[d];
  }
  return true;
}

// Fills c and returns true if all operands are contiguous, of type D and equally misaligned.
template <class Loss, class D>
bool vectorize(const Call& call, VectorizedCall<D>& c) {
  constexpr int kSize = Vector16<D>::kSize;
  const int misaligned = misalignment(static_cast<const D*>(call.inputs[0].data));
  const int64_t head = std::min<int64_t>(call.numel, (kSize - misaligned) % kSize);
  bool fits = call.compute_in_double == std::is_same_v<D, double> &&
              (!Loss::kIndexed || has_contiguous_indices(call, kSize));
  const auto first_vector = [&](auto* data, DType of) {
    fits = fits && (!data || (of == kDType<D> && misalignment(data) == misaligned));
    return data ? data + head : nullptr;
  };
  const auto operand = [&](const Operand& op) {
    fits = fits && (!op.data || op.contiguous);
    return first_vector(static_cast<const D*>(op.data), op.dtype);
  };
  const auto factor = [&](const Operand& op) {
    return is_single(op, call.space) ? Factor<D>{nullptr, op.data, op.dtype}
                                     : Factor<D>{operand(op)};
  };
  const auto output = [&](const Output& out) {
    return first_vector(static_cast<D*>(out.data), out.dtype);
  };
  c.numel = call.numel;
  c.head = head;
  c.vectors = (call.numel - head) / kSize;
  c.input = operand(call.inputs[0]);
  for (int i = 2; i < kMaxInputs; ++i) c.more[i - 2] = factor(call.inputs[i]);
  c.weight = factor(call.weight);
  c.upstream = factor(call.upstream);
  c.value = output(call.value);
  for (int i = 0; i < kMaxInputs; ++i) c.gradients[i] = output(call.gradients[i]);
  c.target = nullptr;
  if constexpr (Loss::kIndexed) {
    c.indices = static_cast<const int64_t*>(call.inputs[1].data);
    c.classes = call.space.sizes[call.space.dims - 1];
    c.ignore_index = call.ignore_index;
  } else {
    c.target = operand(call.inputs[1]);
  }
  return fits;
}

// Picks the kernel for a call whose input is of type D.
template <class D, class Kernels>
void launch_pointwise(const Kernels& kernels, const Call& call, const Launch& launch) {
  using Loss = typename Kernels::Loss;
  if (VectorizedCall<D> c; vectorize<Loss>(call, c)) {
    // Doubles are never hot, and whoever compiles a custom loss waits for each kernel.
    constexpr bool kHasPlain = !Loss::kCustom || !std::is_same_v<D, double>;
    const bool one_gradient = std::all_of(c.gradients + 1, c.gradients + kMaxInputs,
                                          [](const D* gradient) { return !gradient; });
    const bool plain = !c.weight.vectors && !c.upstream.vectors && !c.value && one_gradient;
    if (kHasPlain && plain) return kernels.template vectorized<kHasPlain>(c, launch);
    if constexpr (!Loss::kIndexed) return kernels.template vectorized<false>(c, launch);
  }
  return call.compute_in_double ? kernels.template strided<double>(call, launch)
                                : kernels.template strided<float>(call, launch);
}

// kernels: vectorized() and strided() launch those of a loss, over pointwise_blocks().
template <class Kernels>
cudaError_t run_pointwise(const Kernels& kernels, const Call& call, const Launch& launch) {
  with_type(call.inputs[0].dtype,
            [&](auto tag) { launch_pointwise<decltype(tag)>(kernels, call, launch); });
  return cudaGetLastError();
}

#endif  // !defined(__CUDACC_RTC__)

}  // namespace fusedloss::cuda
