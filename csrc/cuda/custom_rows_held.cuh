// Rows of a custom loss whose classes fit in registers: what rows_held.cuh is for cross-entropy.
//
// A row is read from memory once, by way of shared memory. Here a thread then keeps its classes in
// registers, and what walks keep of them, until the gradient is written: no walk reads a class
// again, and a slot in shared memory is free for the next row as soon as it is read.
//
// Classes are neighbours, every vector of a row begins at a multiple of 16 bytes, in inputs and in
// gradients, and all of these have one type. The loss has neither peaks nor numbers of a class that
// are the same for all rows. Eight neighbouring threads have neighbouring vectors, which fill a
// cache line, and vector k of a thread lies eight behind its vector k - 1. In shared memory they
// are smem[stage][warp][input][k][lane].
#pragma once

#include "custom_rows.cuh"

namespace fusedloss::cuda {

// Classes of a thread. 0: registers have no room for them.
template <class Loss, class D>
constexpr int kHeldClasses = sizeof(D) == 2   ? Loss::kHeldNarrow
                             : sizeof(D) == 4 ? Loss::kHeld
                                              : 0;

constexpr int kHeldLanes = 8;  // threads whose vectors are neighbours

// A row, and what one thread holds of it.
template <class Loss, class D>
struct HeldRow : RowFormula<Loss, D> {
  using Formula = RowFormula<Loss, D>;
  using Formula::c, Formula::kElements, Formula::kSize, Formula::label, Formula::loss, Formula::r;
  using typename Formula::Class;
  using typename Formula::Numbers;
  using typename Formula::RowAccess;
  using typename Formula::T;
  using typename Formula::V;
  static constexpr int kHeld = kHeldClasses<Loss, D>, kVectors = kHeld / kSize;
  static constexpr int kWords = (kHeld + 31) / 32;  // of a bit for each class

  const int rank;                          // of the thread, among those of its row
  int first, count;                        // the thread's first vector, and how many it has
  unsigned valid[kWords], summed[kWords];  // its classes, and those that are in the sums
  V x[kElements][kVectors];
  T kept[at_least_one(Loss::kKeptCount)][kHeld];

  template <class Group>
  __device__ HeldRow(const Loss& loss, const CustomRowsCall& c, const Group& group)
      : Formula{loss, c},
        rank(group.rank),
        first(rank / kHeldLanes * (kVectors * kHeldLanes) + rank % kHeldLanes),
        count(count_of(static_cast<int>(c.classes / kSize) - first)) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int classes = count * kSize - 32 * w;
      valid[w] = classes >= 32 ? ~0u : (1u << max(classes, 0)) - 1;
      hold(valid[w]);
    }
    hold(first);
    hold(count);
  }
  // rest: those of the row from this thread's first one on.
  __device__ static int count_of(int rest) {
    return min(max((rest + kHeldLanes - 1) / kHeldLanes, 0), kVectors);
  }

  // ---- shared memory ----

  // The thread's first slot.
  __device__ static V* stage(int s) {
    extern __shared__ uint4 smem[];
    V* at = reinterpret_cast<V*>(smem) +
            (s * blockDim.x + threadIdx.x / kWarp * kWarp) * (kElements * kVectors) +
            threadIdx.x % kWarp;
    hold_smem(at);
    return at;
  }
  __device__ static V& slot(V* stage, int i, int k) { return stage[(i * kVectors + k) * kWarp]; }

  // Vector k is behind the row's end in every row: -inf is never the largest, and whatever else is
  // computed of it is left out by its number or its bits.
  __device__ void fill_unused(V* stage) const {
    each<kElements>([&](auto i) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (k < count) continue;
        each<kSize>([&](auto e) { slot(stage, i, k).element[e] = narrow<D>(-kInfinity<float>); });
      }
    });
  }
  __device__ V* row_vectors(const Rows& r, unsigned row) const {
    return reinterpret_cast<V*>(static_cast<D*>(const_cast<void*>(r.data)) + row * r.outer) + first;
  }
  __device__ void prefetch(V* stage, unsigned row) const {
    each<kElements>([&](auto i) {
      const V* from = this->row_vectors(this->template element_input<i>(), row);
      hold(from);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (k < count) cp_async(slot(stage, i, k), from + k * kHeldLanes);
      }
    });
  }
  __device__ void load(V* stage) {
    each<kElements>([&](auto i) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) x[i][k] = slot(stage, i, k);
    });
  }

  // ---- walks ----

  // The place of the label among this thread's classes; -1: another thread has it, or none.
  __device__ int place_of_label() const {
    const unsigned place = label, v = place / kSize, q = v / kHeldLanes;
    const unsigned owner = q / kVectors * kHeldLanes + v % kHeldLanes;
    return owner == rank ? static_cast<int>(q % kVectors * kSize + place % kSize) : -1;
  }
  __device__ void leave_out(int place) {
    const unsigned bit = 1u << (place & 31);
#pragma unroll
    for (int w = 0; w < kWords; ++w) summed[w] = valid[w] & ~(place >> 5 == w ? bit : 0u);
  }
  // Hides from the compiler what it has computed of these numbers in earlier walks. It would keep
  // that for later ones, in registers that there are not.
  __device__ void forget() {
#if defined(__CUDACC_RTC__) || defined(__NVCC__)
    constexpr int kWordsOfVector = kVectorBytes / 4;
    each<kElements>([&](auto i) {
      auto* const words = reinterpret_cast<unsigned (*)[kWordsOfVector]>(x[i]);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        each<kWordsOfVector>([&](auto w) { asm("" : "+r"(words[k][w])); });
      }
    });
    each<Loss::kKeptCount>([&](auto j) {
#pragma unroll
      for (int at = 0; at < kHeld; ++at) asm("" : "+f"(kept[j][at]));
    });
#endif
  }
  __device__ void read_class(Class& one, int k, int e) const {
    each<kElements>([&](auto i) { one.x[i] = widen(x[i][k], e); });
    each<Loss::kKeptCount>([&](auto j) { one.kept[j] = kept[j][k * kSize + e]; });
  }
  // The element input of which maximum j of a level is the largest one, where a nan may be left
  // out.
  template <int kLevel>
  static constexpr int origin_of(int j) {
    for (int level = 0; level < kLevel; ++level) j += Loss::kMaxima[level];
    return Loss::kOriginOf[j];
  }
  template <int kLevel, class Terms>
  __device__ void add(Terms& total) {
    constexpr int kMaxima = Loss::kMaxima[kLevel], kSums = Loss::kSums[kLevel];
    constexpr int kChains =
        kVectors < 4 ? kVectors : 4;  // of additions, which are merged as a tree
    T sums[at_least_one(kSums)][kChains];
    if (kLevel > 0) forget();
    each<at_least_one(kSums)>([&](auto j) {
      each<kChains>([&](auto chain) { sums[j][chain] = T(-0.0); });  // -0 + x is x
    });
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const int at = k * kSize + e;
        Class one;
        read_class(one, k, e);
        T out[Formula::template kTerms<kLevel>];
        this->template terms<kLevel>(one, out);
        each<kMaxima>([&](auto j) {
          if (origin_of<kLevel>(j) < 0 && k < count) total.max[j] = larger(total.max[j], out[j]);
        });
        each<kSums>([&](auto j) {
          if (summed[at / 32] >> at % 32 & 1) sums[j][k % kChains] += out[kMaxima + j];
        });
        each<Loss::kKeptCount>([&](auto j) {
          if constexpr (leaves_kept<Loss>(kLevel, j)) kept[j][at] = one.kept[j];
        });
      }
    }
    each<kMaxima>([&](auto j) {
      if constexpr (origin_of<kLevel>(j) >= 0) total.max[j] = largest(x[origin_of<kLevel>(j)]);
    });
    each<kSums>([&](auto j) { total.sum[j] = tree_sum(sums[j]); });
  }
  __device__ T largest(const V (&x)[kVectors]) const {
    V max = x[0];
#pragma unroll
    for (int k = 1; k < kVectors; ++k) max = max_elements(max, x[k]);
    return max_element(max);
  }

  // ---- gradients ----

  template <bool kAll>
  __device__ void store(unsigned row) {
    forget();
    constexpr int kCount = kAll ? kElements : 1;
    V* to[kCount];
    bool wanted[kCount];
    each<kCount>([&](auto i) {
      const Rows& r = this->template gradient<i>();
      to[i] = this->row_vectors(r, row);
      hold(to[i]);
      wanted[i] = r.data;
    });
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      T g[kCount][kSize];
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        Class one;
        read_class(one, k, e);
        T out[kElements] = {};
        loss.template gradients<kAll>(one.x, one.w, RowAccess{r}, one.kept, out);
        each<kCount>([&](auto i) { g[i][e] = out[i]; });
      }
      each<kCount>([&](auto i) {
        const V v = pack<D>(g[i]);
        if (wanted[i] && k < count) to[i][k * kHeldLanes] = v;
      });
    }
  }
  __device__ void fill(unsigned row, D filler) const {
    V vector;
    each<kSize>([&](auto e) { vector.element[e] = filler; });
    each<kElements>([&](auto i) {
      const Rows& r = this->template gradient<i>();
      V* const to = this->row_vectors(r, row);
      for (int k = 0; k < count; ++k) {
        if (r.data) to[k * kHeldLanes] = vector;
      }
    });
  }
  // place: of the label.
  __device__ void write_gradients(unsigned row, bool live, T filler, int place) {
    if (!live) return fill(row, narrow<D>(filler));
    bool later = false;
    each<kElements>([&](auto i) { later |= i > 0 && this->template gradient<i>().data; });
    if (kElements > 1 && later) {
      store<true>(row);
    } else {
      store<kElements == 1>(row);
    }
    if constexpr (Numbers::kHasLabel) {
      if (place < 0) return;
      each<kElements>([&](auto i) {
        const Rows& to = this->template gradient<i>();
        D* const begin = static_cast<D*>(const_cast<void*>(to.data));
        if (to.data) begin[row * to.outer + label] = narrow<D>(r[Loss::kAtLabel[i]]);
      });
    }
  }
};

template <class Loss, class D>
__device__ void hold_rows(const CustomParameters<Loss>& given, const CustomRowsCall& c,
                          const Launch& l, const RowTiling& tiling) {
  using Numbers = RowNumbers<Loss>;
  using Head = RowHead<Loss, D>;
  const Loss& made = prepared(given);
  const GradientScale& s = GradientScale::of_block<Numbers::kHasLabel>(l);
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const Loss loss = made;  // a copy, which stays in registers
  ThreadGroup<Scope::kAny> group(tiling.threads_per_row);
  HeldRow<Loss, D> held(loss, c, group);
  // The plan sees to it that these fit. More bits would take registers that classes need.
  const auto rows = static_cast<unsigned>(c.outer),
             step = static_cast<unsigned>(group.row_stride());
  const auto row_in_block = static_cast<unsigned>(group.row_in_block());
  unsigned block_row = static_cast<unsigned>(group.first_row());
  const auto prefetch = [&](auto* stage, unsigned row) {
    if (row < rows) held.prefetch(stage, row);
    cp_async_commit();
  };
  for (int i = 0; i < tiling.stages; ++i) {
    held.fill_unused(held.stage(i));
    prefetch(held.stage(i), block_row + row_in_block + i * step);
  }
  int64_t next_label = Head::label_at(c, RowPlace(rows, block_row + row_in_block));
  double total = 0;
  // All threads of a block count the same, so that their shuffles meet.
  for (int i = 0; block_row < rows; block_row += step) {
    const unsigned row = block_row + row_in_block;
    const RowPlace place(rows, row);
    const Head head(c, l, s.scale, row, place, next_label);
    next_label = Head::label_at(c, RowPlace(rows, row + step));
    held.begin(head);
    const int place_of_label = held.place_of_label();
    held.leave_out(place_of_label);
    auto* const stage = held.stage(i);
    i = i + 1 < tiling.stages ? i + 1 : 0;
    cp_async_wait(tiling.stages - 1);
    held.load(stage);
    prefetch(stage, row + tiling.stages * step);
    // Whether it counts or not: a branch around a walk would cost copies of the registers.
    held.compute(group, [&](auto level, auto& terms) { held.template add<level>(terms); });
    if (group.rank == 0 && place.exists) total += held.write_numbers(head, row, place, s.write);
    if (s.write && place.exists) {
      held.write_gradients(row, head.live, head.filler(), place_of_label);
    }
  }
  group.sync_before_exit();
  write_loss(l, total);
}
// Does nothing where the loss has no such kernel: no plan takes it.
template <class Loss, class D>
__device__ void compute_held_rows(const CustomParameters<Loss>& given, const CustomRowsCall& c,
                                  const Launch& l, const RowTiling& tiling) {
  if constexpr (kHeldClasses<Loss, D> > 0) hold_rows<Loss, D>(given, c, l, tiling);
}

}  // namespace fusedloss::cuda

#define FUSEDLOSS_CUSTOM_ROWS_KERNEL(NAME, COMPUTE, D)                              \
  extern "C" __global__ void __launch_bounds__(kRowBlock, kMinCustomRowBlocks<D>)   \
      NAME(const CustomRowsCall c, const Launch l, const CustomParameters<Given> p, \
           const RowTiling tiling) {                                                \
    COMPUTE<Given, D>(p, c, l, tiling);                                             \
  }
#define FUSEDLOSS_CUSTOM_ROWS_CUDA(LOSS)                      \
  namespace fusedloss::cuda {                                 \
  using Given = LOSS;                                         \
  FUSEDLOSS_CUSTOM_ROWS_KERNELS(FUSEDLOSS_CUSTOM_ROWS_KERNEL) \
  }
