// Hard targets whose classes are not contiguous, through shared memory: 2 N elements for value and
// gradient, where rows_strided reads the logits twice.
//
// A thread has a vector of neighbouring rows, and a slot of 16 bytes in shared memory for each of
// their classes: slot c is smem[c][threadIdx.x]. It walks them for the maximum, for the sum and for
// the gradient. In the last walk the classes of its next rows come into the slots that it frees. No
// other thread uses them, so they need no barrier.
#pragma once

#include <algorithm>

#include "rows.cuh"
#include "rows_plan.h"

namespace fusedloss::cuda {

// The slots of one thread: those of the classes, then the rows' class indices.
template <class Loss>
struct StridedSlots {
  using D = typename Loss::Element;
  using T = typename Loss::Number;
  using V = Vector16<D>;
  static constexpr int kRows = V::kSize;
  // Whether the exponentials replace the logits: they are not rounded there.
  static constexpr bool kKeepsExp = std::is_same_v<D, T>;

  V* const smem;
  const RowsCall<T>& call;
  const int classes;

  __device__ V& operator[](int c) const { return smem[c * kStridedSmemBlock]; }
  __device__ int64_t& class_index(int j) const {
    constexpr int kSize = kVectorBytes / sizeof(int64_t);
    return reinterpret_cast<int64_t*>(&(*this)[classes + j / kSize])[j % kSize];
  }

  __device__ void prefetch_indices(int64_t first_row) const {
#pragma unroll
    for (int j = 0; j < kRows; ++j) cp_async(class_index(j), call.indices + first_row + j);
  }
  __device__ void prefetch(int c, const D* logits) const {
    cp_async((*this)[c], reinterpret_cast<const V*>(logits));
  }
  __device__ void prefetch_rows(const D* logits) const {
    for (int c = 0; c < classes; ++c, logits += call.input.classes) prefetch(c, logits);
  }

  // Takes the rows' targets out of their logits. A row that is not live gets logits whose
  // exponentials are what its gradient holds: 0, or nan.
  __device__ void take_targets(typename Loss::Row (&rows)[kRows], int64_t first_row,
                               const Launch& l) const {
    const D excluded = narrow<D>(-kInfinity<T>);
    bool all_live = true;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      rows[j].target = Target(call, first_row + j, class_index(j), l);
      all_live = all_live && rows[j].target.live;
      if (!rows[j].target.live) continue;
      D& logit = (*this)[static_cast<int>(rows[j].target.index)].element[j];
      rows[j].target_logit = widen(logit);
      logit = excluded;
    }
    for (int c = 0; !all_live && c < classes; ++c) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const Target& target = rows[j].target;
        if (!target.live) (*this)[c].element[j] = target.faulty ? narrow<D>(kNan<T>) : excluded;
      }
    }
  }
  __device__ V max() const {
    V max;
    std::fill_n(max.element, kRows, narrow<D>(-kInfinity<T>));
#pragma unroll 4
    for (int c = 0; c < classes; ++c) max = max_elements(max, (*this)[c]);
    return max;
  }

  __device__ static T exponential(const V& x, int j, const T (&max)[kRows]) {
    return exp_for<D>(T(widen(x, j)) - max[j]);
  }
  // Adds kCount classes, from c on, to the rows' sums; to each other first, which rounds less
  // often.
  template <int kCount>
  __device__ void add_classes(int c, const T (&max)[kRows],
                              typename Loss::State (&states)[kRows]) const {
    T parts[kRows];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      V x = (*this)[c + u];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const T e = exponential(x, j, max);
        parts[j] = u > 0 ? parts[j] + e : e;
        if constexpr (kKeepsExp) x.element[j] = e;
      }
      if constexpr (kKeepsExp) (*this)[c + u] = x;
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) states[j].sum += parts[j];
  }
};

template <class Loss>
__global__ void __launch_bounds__(kStridedSmemBlock, kMinStridedSmemBlocks)
    rows_strided_smem(const RowsCall<typename Loss::Number> call, const Launch l) {
  using D = typename Loss::Element;
  using T = typename Loss::Number;
  using V = Vector16<D>;
  constexpr int kRows = V::kSize;
  extern __shared__ uint4 smem[];  // (classes + index vectors, kStridedSmemBlock)
  const GradientScale& s = GradientScale::of_block<true>(l);
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const Loss loss{call};
  const StridedSlots<Loss> slots{reinterpret_cast<V*>(smem) + threadIdx.x, call,
                                 static_cast<int>(call.classes)};
  const int64_t step = int64_t{gridDim.x} * kStridedSmemBlock * kRows;
  int64_t row = (int64_t{blockIdx.x} * kStridedSmemBlock + threadIdx.x) * kRows;
  if (row < call.rows) {
    slots.prefetch_indices(row);
    slots.prefetch_rows(call.template logits<D>(row));
  }
  cp_async_commit();
  double total = 0;
  for (; row < call.rows; row += step) {
    cp_async_wait(0);
    typename Loss::Row rows[kRows];
    typename Loss::State states[kRows];
    T max[kRows];
    slots.take_targets(rows, row, l);
    const V largest = slots.max();
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      states[j].max = fmax(T(widen(largest, j)), rows[j].target_logit);
      max[j] = finite_max(states[j].max);
    }
    constexpr int kUnroll = 16 / kRows;  // 16 exponentials are under way together
    int c = 0;
    for (; c + kUnroll <= slots.classes; c += kUnroll) {
      slots.template add_classes<kUnroll>(c, max, states);
    }
    for (; c < slots.classes; ++c) slots.template add_classes<1>(c, max, states);

    typename Loss::Result results[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      results[j] = loss.finish(rows[j], states[j], s.scale, row + j);
      const auto value = loss.value(rows[j], results[j]);
      if (call.value) write(call.value, call.value_dtype, row + j, value);
      total += value;
    }

    const bool has_next = row + step < call.rows;
    const D* next = call.template logits<D>(has_next ? row + step : 0);
    if (has_next) slots.prefetch_indices(row + step);
    if (s.write) {
      D* gradient = call.template gradient_of<D>(row);
#pragma unroll 2
      for (int c = 0; c < slots.classes; ++c) {
        const V x = slots[c];
        if (has_next) slots.prefetch(c, next);
        T g[kRows];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const T e = slots.kKeepsExp ? T(widen(x, j)) : slots.exponential(x, j, max);
          g[j] = c == static_cast<int>(rows[j].target.index) ? results[j].target_gradient
                                                             : loss.gradient(results[j], 0, e);
        }
        *reinterpret_cast<V*>(gradient) = pack<D>(g);
        next += call.input.classes;
        gradient += call.gradient.classes;
      }
    } else if (has_next) {
      slots.prefetch_rows(next);
    }
    cp_async_commit();
  }
  write_loss(l, total);
}

}  // namespace fusedloss::cuda
