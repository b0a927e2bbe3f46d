// Rows whose classes are not contiguous: (outer, classes, inner) with inner > 1, or any strides.
//
// A thread walks the classes of one row, or of a vector of neighbouring rows, twice; the second
// time, backwards, they come from the cache, if it holds them.
#pragma once

#include "rows.cuh"
#include "rows_plan.h"

namespace fusedloss::cuda {

// Minimum blocks per SM: left to itself the compiler would spill registers to fit in more.
template <class Loss, bool kVectorized>
constexpr int kMinStridedBlocks =
    kVectorized ? 4 : (!Loss::kSoft && sizeof(typename Loss::Element) < 8 ? 8 : 1);

// The kRows rows of a thread.
template <class Loss, int kRows>
struct StridedRows {
  using D = typename Loss::Element;
  using T = typename Loss::Number;
  static constexpr int kUnroll = kRows > 4 ? 2 : 4;  // classes in flight
  using Line = Vector<D, kRows>;                     // one class of the rows

  const Loss& loss;
  const D* const logits;  // of the first row: (classes, kRows), with strides of (input.classes, 1)
  typename Loss::Row rows[kRows];

  __device__ StridedRows(const Loss& loss_, int64_t first_row, const Launch& l)
      : loss(loss_), logits(loss.call.template logits<D>(first_row)) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      rows[j] = loss.row(first_row + j, loss.call.class_index(first_row + j), l,
                         [&] { return logits + j; });
      rows[j].probabilities_at = loss.call.offset(loss.call.probabilities, first_row + j);
    }
  }
  __device__ Line line(int64_t c) const {
    return *reinterpret_cast<const Line*>(logits + c * loss.call.input.classes);
  }

  __device__ void sum(typename Loss::State (&states)[kRows]) const {
    const int64_t classes = loss.call.classes;
    for (int64_t first = 0; first < classes; first += kUnroll) {
      Line x[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (first + k < classes) x[k] = line(first + k);
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        typename Loss::State part;
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
          if (first + k < classes && first + k != rows[j].target.index) {
            part.max = fmax(part.max, T(widen(x[k].element[j])));
          }
        }
        const T max = finite_max(part.max);
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
          if (first + k >= classes) break;
          const bool is_target = first + k == rows[j].target.index;
          if (!Loss::kSoft && is_target) continue;
          const T distance = is_target ? -kInfinity<T> : T(widen(x[k].element[j])) - max;
          const T q = loss.target_share(rows[j], first + k);
          part.sum += loss.add_class(part, rows[j], q, is_target, distance);
        }
        states[j].merge(part);
      }
    }
  }

  __device__ void write_gradient(const typename Loss::Result (&results)[kRows], D* gradient) const {
    for (int64_t c = loss.call.classes - 1; c >= 0; --c) {
      const Line x = line(c);
      Line out;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const Target& target = rows[j].target;
        const T e = exp_for<D>(T(widen(x.element[j])) - results[j].sums.max);
        T g = loss.gradient(results[j], loss.target_share(rows[j], c), e);
        if (c == target.index) g = results[j].target_gradient;
        out.element[j] = narrow<D>(target.live ? g : target.template filler<T>());
      }
      *reinterpret_cast<Line*>(gradient + c * loss.call.gradient.classes) = out;
    }
  }
};

// kVectorized: a thread has a vector of rows, whose logits are contiguous; else one row.
template <class Loss, bool kVectorized>
__global__ void __launch_bounds__(kStridedBlock, kMinStridedBlocks<Loss, kVectorized>)
    rows_strided(const RowsCall<typename Loss::Number> call, const Launch l) {
  using D = typename Loss::Element;
  constexpr int kRows = kVectorized ? Vector16<D>::kSize : 1;
  const GradientScale s = GradientScale::of_block<true>(l);
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const Loss loss{call};
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kRows;
  double total = 0;
  for (int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kRows; row < call.rows;
       row += step) {
    const StridedRows<Loss, kRows> strided(loss, row, l);
    typename Loss::State states[kRows];
    strided.sum(states);
    typename Loss::Result results[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      results[j] = loss.finish(strided.rows[j], states[j], s.scale, row + j);
      const auto value = loss.value(strided.rows[j], results[j]);
      if (call.value) write(call.value, call.value_dtype, row + j, value);
      total += value;
    }
    if (s.write) strided.write_gradient(results, call.template gradient_of<D>(row));
  }
  write_loss(l, total);
}

}  // namespace fusedloss::cuda
