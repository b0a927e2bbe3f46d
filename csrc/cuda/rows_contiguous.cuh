// Rows whose classes are contiguous.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A row is read
// from memory once and stays in shared memory until its gradient is written, while the next rows
// are copied into the slots that it frees. A row that no cluster can hold is read twice. One kernel
// serves every pass, so that a gradient has the same bits from each.
//
// An example: 5 float32 rows of 22 classes each, row 1 begins 8 bytes behind a multiple of 16, and
// a row has 2 threads. Row 1 is
//
//   class    0 1 | 2 3 4 5 | 6 7 8 9 | 10 .. 13 | 14 .. 17 | 18 .. 21 |
//            head  vector 0  vector 1  vector 2   vector 3   vector 4      (no tail)
//   thread   0 1     0         1         0          1          0
//
// so that vectors_per_thread is 3, and thread 0 has vectors 0, 2, 4 in its slots 0, 1, 2. Slot k of
// a thread is smem[stage][k][threadIdx.x]: neighbouring threads use neighbouring banks. Head and
// tail are read from global memory, one class per thread. Class probabilities whose vectors begin
// where the logits' do have as many slots behind those of the logits.
#pragma once

#include <algorithm>

#include "rows.cuh"
#include "rows_plan.h"
#include "thread_groups.cuh"

namespace fusedloss::cuda {

constexpr int kRowUnroll = 2;  // vectors of a thread that are added up together

// A row as vectors, which begin at multiples of 16 bytes wherever the row itself begins.
template <class Loss>
struct VectorRow {
  using D = typename Loss::Element;
  using V = Vector16<D>;
  const D* logits;  // (classes)
  D* gradient;      // (classes), or null
  int head;         // classes before the first vector
  int vectors;
  int scalars;   // classes of head and tail
  bool aligned;  // the gradient's vectors begin at multiples of 16 bytes too

  __device__ VectorRow(const D* in, D* out, int classes)
      : logits(in),
        gradient(out),
        aligned(Loss::kProbabilities || misalignment(in) == misalignment(out)) {
    head = min((V::kSize - misalignment(in)) % V::kSize, classes);
    vectors = static_cast<int>(static_cast<unsigned>(classes - head) / V::kSize);
    scalars = classes - vectors * V::kSize;
  }
  // The class of a scalar, and of a vector's first element.
  __device__ int scalar_class(int s) const { return s < head ? s : s + vectors * V::kSize; }
  __device__ int first_class(int v) const { return head + v * V::kSize; }

  __device__ const V* vector(int v) const {
    return reinterpret_cast<const V*>(logits + first_class(v));
  }
  __device__ void store_gradient(int v, const V& vector) const {
    D* const out = gradient + first_class(v);
    if (aligned) {
      *reinterpret_cast<V*>(out) = vector;
      return;
    }
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) out[i] = vector.element[i];
  }
};

// The slots of one thread in shared memory: (stages, operands, vectors_per_thread), with a step of
// a block's threads. No other thread uses them, so they need no barrier.
template <class Loss>
struct RowSlots {
  using D = typename Loss::Element;
  using V = Vector16<D>;
  static constexpr int kOperands = Loss::kProbabilities ? 2 : 1;
  V* const smem;
  const RowTiling tiling;
  const RowsCall<typename Loss::Number>& call;
  int stage = 0;  // of the current row

  __device__ V& operator[](int k) const {
    return smem[(stage * kOperands * tiling.vectors_per_thread + k) * step()];
  }
  // From one slot to the next, and to that of the probabilities.
  __device__ int step() const { return static_cast<int>(blockDim.x); }
  __device__ V& probabilities(V* slot) const { return slot[tiling.vectors_per_thread * step()]; }

  __device__ bool in_smem() const { return Loss::kProbabilities || tiling.fits_in_smem; }
  __device__ void advance() { stage = stage + 1 < tiling.stages ? stage + 1 : 0; }

  // Starts to copy vector v of a row.
  __device__ void prefetch(const VectorRow<Loss>& row, int v, V* slot) const {
    cp_async(*slot, row.vector(v));
    if constexpr (Loss::kProbabilities) {
      cp_async(probabilities(slot), call.probabilities_of(row.vector(v)));
    }
  }
  // ... v and this thread's vectors behind it.
  template <class Group>
  __device__ void prefetch_row(const VectorRow<Loss>& row, const Group& group, int v,
                               V* slot) const {
    for (; v < row.vectors; v += group.size, slot += step()) prefetch(row, v, slot);
  }
  template <class Group>
  __device__ void prefetch_row(const VectorRow<Loss>& row, const Group& group) const {
    prefetch_row(row, group, group.rank, &(*this)[0]);
  }
};

// The two walks of a group's threads over a row.
template <class Loss, class Group>
struct RowWalk {
  using D = typename Loss::Element;
  using T = typename Loss::Number;
  using State = typename Loss::State;
  using V = Vector16<D>;

  const Loss& loss;
  const Group& group;
  const RowSlots<Loss>& slots;
  const typename Loss::Row& row;
  const VectorRow<Loss>& line;
  // Where the target is, if it is in a vector; far behind the last one if it is not.
  const int target_class = static_cast<int>(row.target.index);
  const unsigned behind_head = static_cast<unsigned>(target_class - line.head);
  const int target_vector = static_cast<int>(behind_head / V::kSize);
  const int target_lane = static_cast<int>(behind_head % V::kSize);
  const bool has_target = !Loss::kProbabilities && target_vector < line.vectors &&
                          group.owner(target_vector) == group.rank;

  __device__ static D excluded() { return narrow<D>(-kInfinity<T>); }
  // Leaves the target out of the sums.
  __device__ void exclude_target() const {
    if (has_target) slots[target_vector / group.size].element[target_lane] = excluded();
  }

  __device__ bool is_target(int c) const { return !Loss::kProbabilities && c == target_class; }

  // The shares in the target of a slot's classes, from c on.
  __device__ void target_shares(V* slot, int c, T (&q)[V::kSize]) const {
    V y;
    if constexpr (Loss::kProbabilities) y = slots.probabilities(slot);
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) {
      if constexpr (Loss::kProbabilities) {
        q[i] = loss.share_of(widen(y, i));
      } else {
        q[i] = loss.target_share(row, c + i);
      }
    }
  }
  __device__ T target_share(int c) const {
    if constexpr (Loss::kProbabilities)
      return loss.share_of(widen(*loss.call.probabilities_of(line.logits + c)));
    return loss.target_share(row, c);
  }

  // Adds kCount vectors of this thread, from its k-th on, whose loads are in flight together.
  template <int kCount>
  __device__ void add_vectors(State& sum, int k) const {
    V x[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int v = (k + u) * group.size + group.rank;
      x[u] = slots.in_smem() ? slots[k + u] : *line.vector(v);
      if (!slots.in_smem() && v == target_vector) set_lane(x[u], target_lane, excluded());
    }
    State part;
    if constexpr (Loss::kProbabilities) {
      part.max = sum.max;
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) part.max = fmax(part.max, max_element(x[u]));
    }
    const T max = finite_max(part.max);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int c = line.first_class((k + u) * group.size + group.rank);
      T q[V::kSize];
      target_shares(&slots[k + u], c, q);
      // A vector's classes are added to each other first, and their exponentials as a tree: if one
      // class outweighs all others, each addition to it is a rounding.
      State line{part.max};
      decltype(State::sum) e[V::kSize];
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) {
        e[i] = loss.add_class(line, row, q[i], is_target(c + i), T(widen(x[u], i)) - max);
      }
#pragma unroll
      for (int half = V::kSize / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) e[i] += e[i + half];
      }
      line.sum = e[0];
      part.add(line);
    }
    if constexpr (Loss::kProbabilities) {
      sum.add(part);
    } else {
      sum.merge(part);
    }
  }

  // The state of this thread's part of the row.
  __device__ State sum() const {
    State sum;
    if (!row.target.live) return sum;
    const int count = (line.vectors - group.rank + group.size - 1) / group.size;
    if constexpr (Loss::kProbabilities) sum.max = max_of_slots(count);
    int k = 0;
    for (; k + kRowUnroll <= count; k += kRowUnroll) add_vectors<kRowUnroll>(sum, k);
    for (; k < count; ++k) add_vectors<1>(sum, k);
    for (int s = group.rank; s < line.scalars; s += group.size) {
      const int c = line.scalar_class(s);
      State one;
      one.max = is_target(c) ? -kInfinity<T> : T(widen(line.logits[c]));
      one.sum =
          loss.add_class(one, row, target_share(c), is_target(c), one.max - finite_max(one.max));
      sum.merge(one);
    }
    return sum;
  }
  // A walk for the maximum alone is cheaper than to merge states of vectors with different ones.
  __device__ T max_of_slots(int count) const {
    V max;
    std::fill_n(max.element, V::kSize, excluded());
#pragma unroll 4
    for (int k = 0; k < count; ++k) max = max_elements(max, slots[k]);
    return max_element(max);
  }

  // Writes this thread's part of the gradient, and prefetches row `next` into the slots it frees.
  __device__ void write_gradient(const typename Loss::Result& result,
                                 const VectorRow<Loss>& next) const {
    const auto element = [&](T x, T q) {
      return loss.gradient(result, q, exp_for<D>(x - result.sums.max));
    };
    int v = group.rank;
    V* slot = &slots[0];
#pragma unroll 2
    for (; v < line.vectors; v += group.size, slot += slots.step()) {
      const V x = slots.in_smem() ? *slot : *line.vector(v);
      T g[V::kSize];
      target_shares(slot, line.first_class(v), g);
      if (v < next.vectors) slots.prefetch(next, v, slot);
      if (Loss::kProbabilities || row.target.live) {
#pragma unroll
        for (int i = 0; i < V::kSize; ++i) g[i] = element(T(widen(x, i)), g[i]);
      } else {
        std::fill_n(g, V::kSize, row.target.template filler<T>());
      }
      line.store_gradient(v, pack<D>(g));
    }
    for (int s = group.rank; s < line.scalars; s += group.size) {
      const int c = line.scalar_class(s);
      T g = row.target.template filler<T>();
      if (row.target.live) g = element(T(widen(line.logits[c])), target_share(c));
      line.gradient[c] = narrow<D>(is_target(c) ? result.target_gradient : g);
    }
    if (has_target) line.gradient[target_class] = narrow<D>(result.target_gradient);
    slots.prefetch_row(next, group, v, slot);
  }
};

template <class Loss>
constexpr int kMinRowsBlocks =
    threads_per_sm(sizeof(typename Loss::Element), !Loss::kSoft) / kRowBlock;

template <class Loss, Scope kScope>
__global__ void __launch_bounds__(kRowBlock, kMinRowsBlocks<Loss>)
    rows_contiguous(const RowsCall<typename Loss::Number> call, const Launch l,
                    const RowTiling tiling) {
  using D = typename Loss::Element;
  using State = typename Loss::State;
  extern __shared__ uint4 smem[];  // (stages, operands, vectors_per_thread, blockDim.x)
  const GradientScale& s =
      GradientScale::of_block<!Loss::kProbabilities>(l);  // in shared memory: no registers
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const Loss loss{call};
  ThreadGroup<kScope> group(tiling.threads_per_row);
  const int64_t step = group.row_stride();
  // Past the last row there are no classes.
  const auto line_of = [&](int64_t row) {
    const int64_t r = row < call.rows ? row : 0;
    return VectorRow<Loss>(call.template logits<D>(r), call.template gradient_of<D>(r),
                           row < call.rows ? static_cast<int>(call.classes) : 0);
  };
  const auto row_of = [&](int64_t row, int64_t class_index) {
    return loss.row(row, class_index, l, [&] { return call.template logits<D>(row); });
  };

  RowSlots<Loss> slots{reinterpret_cast<Vector16<D>*>(smem) + threadIdx.x, tiling, call};
  int64_t row = group.first_row() + group.row_in_block();
  for (; slots.stage < tiling.stages; ++slots.stage) {
    if (slots.in_smem()) slots.prefetch_row(line_of(row + slots.stage * step), group);
    cp_async_commit();
  }
  slots.stage = 0;
  auto current = row_of(row, call.class_index(row));
  double total = 0;
  for (; row - group.row_in_block() < call.rows; row += step) {
    const VectorRow<Loss> line = line_of(row);
    const int64_t next_index = call.class_index(row + step);
    current.probabilities_at = call.offset(call.probabilities, row);
    const RowWalk<Loss, ThreadGroup<kScope>> walk{loss, group, slots, current, line};
    cp_async_wait(tiling.stages - 1);
    if (slots.in_smem()) walk.exclude_target();
    State state = walk.sum();
    const VectorRow<Loss> next = line_of(slots.in_smem() ? row + tiling.stages * step : call.rows);
    if (!s.write) slots.prefetch_row(next, group);
    group.all_reduce(state);

    const auto result = loss.finish(current, state, s.scale, row);
    if (group.rank == 0 && row < call.rows) {
      const auto value = loss.value(current, result);
      if (call.value) write(call.value, call.value_dtype, row, value);
      total += value;
    }
    const auto following = row_of(row + step, next_index);
    if (s.write) walk.write_gradient(result, next);
    cp_async_commit();
    slots.advance();
    current = following;
  }
  group.sync_before_exit();
  write_loss(l, total);
}

}  // namespace fusedloss::cuda
