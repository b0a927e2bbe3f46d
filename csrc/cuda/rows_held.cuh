// Rows of class indices whose exponentials fit in registers.
//
// As in rows_contiguous a row is read from memory once, by way of shared memory. Here a thread then
// keeps the exponentials of its classes in registers until the gradient is written: one for each
// class instead of two, and a slot in shared memory is free for the next row as soon as it is read.
// The threads of a row agree on its largest logit first, and on the sum of its exponentials next,
// so that nothing is rescaled.
//
// Every vector of a row begins at a multiple of 16 bytes, in the logits and in the gradient. Vector
// k of a thread lies kThreads vectors behind its vector k - 1; a warp's vectors are neighbours.
// In shared memory they are smem[stage][warp][k][lane], where they differ by constants.
#pragma once

#include "rows.cuh"
#include "rows_plan.h"
#include "thread_groups.cuh"

namespace fusedloss::cuda {

// ---- sums over the threads of a row -------------------------------------------------------------

// Merges the numbers of `threads` neighbouring threads of a warp.
template <class Merge>
__device__ float reduce_lanes(float x, int threads, Merge&& merge) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (step < threads) x = merge(x, __shfl_xor_sync(kFullWarp, x, step));
  }
  return x;
}

// States for ThreadGroup::all_reduce.
struct RowMax {
  float value = -kInfinity<float>;
  __device__ void reduce_warp(int threads) {
    value = reduce_lanes(value, threads, [](float a, float b) { return fmaxf(a, b); });
  }
};
struct RowSum {
  float value = 0;
  __device__ void reduce_warp(int threads) {
    value = reduce_lanes(value, threads, [](float a, float b) { return a + b; });
  }
};

// ---- exponentials -------------------------------------------------------------------------------

// The e^(x - max) of a row are (*this)(x) * correction, as exact as results of type D need.
//
// For two-byte types x - max and its product with log2(e) are one multiply-add. Its third operand
// is rounded, by as much as the correction says.
template <class D>
struct RowExp {
  static constexpr bool kQuick = sizeof(D) == 2;
  float max, slope = kLog2e, shift = 0, correction = 1;

  __device__ explicit RowExp(float max_) : max(finite_max(max_)) {
    if constexpr (kQuick) {
      // A bf16 of 2^15 or more lies at least 2^7 above the next one: the exponential is 1 or 0, to
      // any base. With this slope the shift neither overflows nor is rounded.
      if (std::is_same_v<D, __nv_bfloat16> && fabsf(max) >= 0x1p15f) slope = 1;
      shift = max * slope;
      correction = quick_exp2(fmaf(-max, slope, shift));
    }
  }
  __device__ float operator()(float x) const {
    return kQuick ? quick_exp2(fmaf(x, slope, -shift)) : exp_nonpositive(x - max);
  }
};

// ---- the vectors of a thread --------------------------------------------------------------------

// kThreads: threads of a row in a warp.
template <class D, int kVectors, int kThreads>
struct HeldVectors {
  using V = Vector16<D>;
  const int first;  // the thread's first vector
  const int rest;   // vectors of the row from that one on
  V* const smem;    // the thread's first slot

  // rank: of the thread, among those of its row.
  __device__ HeldVectors(int rank, int64_t classes, void* slots)
      : first(rank / kThreads * (kVectors * kThreads) + rank % kThreads),
        rest(static_cast<int>(classes / V::kSize) - first),
        smem(static_cast<V*>(slots) + threadIdx.x / kWarp * (kVectors * kWarp) +
             threadIdx.x % kWarp) {}

  __device__ V* stage(int i) const { return smem + i * kVectors * static_cast<int>(blockDim.x); }

  // Vector k is behind the row's end in every row: a class there counts nothing.
  __device__ void fill_unused(V* stage) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (k * kThreads >= rest) std::fill_n(stage[k * kWarp].element, V::kSize, excluded());
    }
  }
  // Starts to copy the vectors of a row, the first of which is at `from`.
  __device__ void prefetch(V* stage, const V* from) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (k * kThreads < rest) cp_async(stage[k * kWarp], from + k * kThreads);
    }
  }
  __device__ static void load(V (&x)[kVectors], const V* stage) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) x[k] = stage[k * kWarp];
  }
  // The thread that has class c, and where.
  __device__ static int owner(int c) {
    const unsigned v = static_cast<unsigned>(c) / V::kSize;
    return v / (kVectors * kThreads) * kThreads + v % kThreads;
  }
  __device__ static D& element(V* stage, int c) {
    const unsigned u = c, k = u / (V::kSize * kThreads) % kVectors;
    return stage[k * kWarp].element[u % V::kSize];
  }
  __device__ static D excluded() { return narrow<D>(-kInfinity<float>); }

  __device__ static float max(const V (&x)[kVectors]) {
    V max = x[0];
#pragma unroll
    for (int k = 1; k < kVectors; ++k) max = max_elements(max, x[k]);
    return max_element(max);
  }
  // Returns their sum.
  __device__ static float exponentials(float (&e)[kVectors][V::kSize], const V (&x)[kVectors],
                                       const RowExp<D>& exp) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) e[k][i] = exp(widen(x[k], i));
      sum += tree_sum(e[k]);
    }
    return sum;
  }

  // gradient: of the row, factor * e.
  __device__ void store(D* gradient, const float (&e)[kVectors][V::kSize], float factor) const {
    V* const to = reinterpret_cast<V*>(gradient) + first;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float g[V::kSize];
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) g[i] = e[k][i] * factor;
      if (k * kThreads < rest) to[k * kThreads] = pack<D>(g);
    }
  }
  __device__ void fill(D* gradient, D x) const {
    V* const to = reinterpret_cast<V*>(gradient) + first;
    V vector;
    std::fill_n(vector.element, V::kSize, x);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (k * kThreads < rest) to[k * kThreads] = vector;
    }
  }
};

// Waits for the oldest of as many copies of rows. The instruction takes a constant.
__device__ inline void wait_for_oldest(int stages) {
  if (stages == 1) {
    cp_async_wait(0);
  } else {
    cp_async_wait(kMaxHeldStages - 1);
  }
}

// A row of a matrix. RowsCall::offset() would test once a row whether it is one.
template <class D>
__device__ D* row_at(const Rows& r, int row) {
  return static_cast<D*>(const_cast<void*>(r.data)) + row * r.outer;
}

// A row's target and its logit, in two registers.
struct HeldTarget {
  static constexpr int kNone = -1, kFaulty = -2;
  int class_index;
  float logit;

  template <class Row>
  __device__ explicit HeldTarget(const Row& row)
      : class_index(row.target.live ? static_cast<int>(row.target.index)
                                    : (row.target.faulty ? kFaulty : kNone)),
        logit(row.target_logit) {}
  template <class Row>
  __device__ Row row() const {
    Row row;
    row.target.live = class_index >= 0;
    row.target.faulty = class_index == kFaulty;
    row.target.index = row.target.live ? class_index : -1;
    row.target_logit = logit;
    return row;
  }
};

// kHeld: classes of a thread. kThreads: threads of a row in a warp.
template <class D, Scope kScope, int kHeld, int kThreads>
__global__ void __launch_bounds__(kRowBlock, held_threads_per_sm(kHeld) / kRowBlock)
    rows_held(const RowsCall<float> call, const Launch l, const RowTiling tiling) {
  using Loss = CrossEntropyRow<D, true>;
  using V = Vector16<D>;
  constexpr int kVectors = kHeld / V::kSize;
  extern __shared__ uint4 smem[];                             // (stages, warps, kVectors, kWarp)
  const GradientScale& s = GradientScale::of_block<true>(l);  // in shared memory: no registers
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const Loss loss{call};
  ThreadGroup<kScope> group(kThreads);
  const HeldVectors<D, kVectors, kThreads> vectors(group.rank, call.classes, smem);
  // The plan sees to it that these fit. More bits would take registers that exponentials need.
  const int rows = static_cast<int>(call.rows), step = static_cast<int>(group.row_stride());
  const unsigned vectors_per_step = step * static_cast<unsigned>(call.input.outer / V::kSize);
  const auto target_of = [&](int row, int64_t class_index) {
    return HeldTarget(loss.row(row, class_index, l, [&] { return row_at<D>(call.input, row); }));
  };

  // All threads of a block count the same, so that their shuffles meet.
  int block_row = static_cast<int>(group.first_row());
  const auto row_behind = [&](int count) {
    return block_row + group.row_in_block() + count * step;
  };
  const V* from = reinterpret_cast<const V*>(row_at<D>(call.input, row_behind(0))) + vectors.first;
  const auto prefetch = [&](V* stage, int row) {
    if (row < rows) vectors.prefetch(stage, from);
    cp_async_commit();
    from += vectors_per_step;
  };
  for (int i = 0; i < tiling.stages; ++i) {
    vectors.fill_unused(vectors.stage(i));
    prefetch(vectors.stage(i), row_behind(i));
  }
  auto target = target_of(row_behind(0), call.class_index(row_behind(0)));
  double total = 0;
  for (int i = 0; block_row < rows; block_row += step) {
    const int row = row_behind(0);
    const int64_t next_index = call.class_index(row_behind(1));
    const bool has_target = vectors.owner(target.class_index) == group.rank;
    V* const stage = vectors.stage(i);
    i = i + 1 < tiling.stages ? i + 1 : 0;
    wait_for_oldest(tiling.stages);
    if (has_target) vectors.element(stage, target.class_index) = vectors.excluded();
    V x[kVectors];
    vectors.load(x, stage);
    prefetch(stage, row_behind(tiling.stages));

    RowMax max{vectors.max(x)};
    group.all_reduce(max);
    const auto next_target = target_of(row_behind(1), next_index);
    typename Loss::State state{fmaxf(max.value, target.logit)};
    const RowExp<D> exp(state.max);
    float e[kVectors][V::kSize];
    RowSum sum{vectors.exponentials(e, x, exp)};
    group.all_reduce(sum);
    state.sum = sum.value * exp.correction;

    const auto current = target.template row<typename Loss::Row>();
    const auto result = loss.finish(current, state, s.scale, row);
    if (group.rank == 0 && row < rows) {
      const float value = loss.value(current, result);
      if (call.value) write(call.value, call.value_dtype, row, value);
      total += value;
    }
    if (s.write && row < rows) {
      D* const gradient = row_at<D>(call.gradient, row);
      if (current.target.live) {
        vectors.store(gradient, e, result.factor * exp.correction);
        if (has_target) gradient[target.class_index] = narrow<D>(result.target_gradient);
      } else {
        vectors.fill(gradient, narrow<D>(current.target.template filler<float>()));
      }
    }
    target = next_target;
  }
  group.sync_before_exit();
  write_loss(l, total);
}

}  // namespace fusedloss::cuda
