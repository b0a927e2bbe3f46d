// The kernel of a custom row loss whose rows are in shared memory; most of those that begin at
// multiples of 16 bytes are in registers instead, by custom_rows_held.cuh. Both are compiled where
// they are used: by NVRTC or nvcc, without headers of torch. custom.cu loads and launches them.
//
// Fewest bytes for value and gradients: read each element input, write each gradient that is
// wanted. The threads that share a row copy its element inputs into shared memory, side by side,
// and walk over them there: once a level, and once for the gradients, while the next row is copied
// into the slots that this one frees. What a level adds up goes through all of these threads, and
// each of them computes the row numbers that follow. Kept values have slots of their own where
// there is room, else they are computed again; exponentials of two-byte rows always are, since that
// takes less than to share a row among more threads. A row that no cluster can hold is read once a
// walk. The same kernel serves every pass, so that a gradient has the same bits from each, unless
// the caller's own memory for gradients begins elsewhere.
//
// A slot is 16 bytes of an input, and begins where a vector of the first input does: a row that
// begins behind a multiple of 16 bytes has a first slot that is not whole, and its last one need
// not be. Where vectors of an input lie otherwise, its elements are copied one at a time. So are
// those of rows whose classes are not neighbours; there a thread has a row of its own, and
// neighbouring threads read neighbouring rows.
#pragma once

#include "../math/custom_rows.h"
#include "custom_parameters.cuh"
#include "fast_math.cuh"
#include "thread_groups.cuh"
#include "upstream.cuh"

namespace fusedloss::cuda {

// ---- what is known of a loss --------------------------------------------------------------------

// A number that the compiler knows.
template <int i>
struct Constant {
  static constexpr int value = i;
  __device__ constexpr operator int() const { return i; }
};
// Calls f(Constant<0>()) to f(Constant<count - 1>()).
template <int count, class F>
__device__ __forceinline__ void each(F&& f) {
  if constexpr (count > 0) {
    each<count - 1>(f);
    f(Constant<count - 1>());
  }
}

// What the compiler would compute anew in a loop, to save a register.
__device__ __forceinline__ void hold(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void hold(unsigned& x) { asm volatile("" : "+r"(x)); }
template <class V>
__device__ __forceinline__ void hold([[maybe_unused]] V*& global) {
#if defined(__CUDACC_RTC__) || defined(__NVCC__)
  asm volatile("" : "+l"(global));
  __builtin_assume(__isGlobal(global));
#endif
}

// The same of a pointer to shared memory.
template <class V>
__device__ __forceinline__ void hold_smem([[maybe_unused]] V*& p) {
#if defined(__CUDACC_RTC__) || defined(__NVCC__)
  auto at = static_cast<unsigned>(__cvta_generic_to_shared(p));
  hold(at);
  p = static_cast<V*>(__cvta_shared_to_generic(at));
#endif
}

constexpr int at_least_one(int count) { return count > 0 ? count : 1; }  // C++ has no empty arrays

// Whether the walk of a level reads kept value j, or the walk of `from` leaves one for later.
template <class Loss>
constexpr bool reads_kept(int level, int j) {
  return j < Loss::kKeptCount && Loss::kKept[j].from < level && Loss::kKept[j].until >= level;
}
template <class Loss>
constexpr bool leaves_kept(int from, int j) {
  return j < Loss::kKeptCount && Loss::kKept[j].from == from;
}
template <class Loss>
constexpr bool leaves_kept(int from) {
  for (int j = 0; j < Loss::kKeptCount; ++j) {
    if (leaves_kept<Loss>(from, j)) return true;
  }
  return false;
}

// ---- what threads merge -------------------------------------------------------------------------

// The larger one; nan where either is.
__device__ inline float larger(float a, float b) { return max_nan(a, b); }
__device__ inline double larger(double a, double b) { return a < b || b != b ? b : a; }

// Calls merge(step) for each distance at which `threads` neighbouring threads of a warp merge.
template <class Merge>
__device__ __forceinline__ void each_step(int threads, Merge&& merge) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (step < threads) merge(step);
  }
}

// The maxima and sums of a level over some of a row's classes.
template <class T, class Sum, int kMaxima, int kSums>
struct LevelTerms {
  T max[at_least_one(kMaxima)];
  Sum sum[at_least_one(kSums)];

  __device__ LevelTerms() {
    each<at_least_one(kMaxima)>([&](auto j) { max[j] = -kInfinity<T>; });
    each<at_least_one(kSums)>([&](auto j) { sum[j] = 0; });
  }
  __device__ void reduce_warp(int threads) {
    each_step(threads, [&](int step) {
      each<kMaxima>(
          [&](auto j) { max[j] = larger(max[j], __shfl_xor_sync(kFullWarp, max[j], step)); });
      each<kSums>([&](auto j) { sum[j] += __shfl_xor_sync(kFullWarp, sum[j], step); });
    });
  }
};

// The classes where peaks are first.
template <int count>
struct FirstClasses {
  int first[at_least_one(count)];

  __device__ FirstClasses() {
    each<at_least_one(count)>([&](auto p) { first[p] = std::numeric_limits<int32_t>::max(); });
  }
  __device__ void reduce_warp(int threads) {
    each_step(threads, [&](int step) {
      each<count>(
          [&](auto p) { first[p] = min(first[p], __shfl_xor_sync(kFullWarp, first[p], step)); });
    });
  }
};

// ---- a row --------------------------------------------------------------------------------------

// Where a row is: position of (outer, inner).
struct RowPlace {
  int64_t outer, inner;
  bool exists;  // otherwise the place is that of the first row

  // A row of a matrix.
  template <class Index>
  __device__ RowPlace(Index rows, Index row)
      : outer(row < rows ? row : 0), inner(0), exists(row < rows) {}
  __device__ RowPlace(const CustomRowsCall& c, int64_t rows, int64_t row) : RowPlace(rows, row) {
    if (c.inner <= 1) return;
    const int64_t place = outer;
    outer = quotient(place, c.inner, rows);
    inner = place - outer * c.inner;
  }
  __device__ int64_t operator()(const Rows& r) const { return outer * r.outer + inner * r.inner; }
};

// What is known of a row before its first walk.
template <class Loss, class D>
struct RowHead {
  using T = Compute<D>;
  using Numbers = RowNumbers<Loss>;
  T numbers[Numbers::kFirst];
  T weight = 1;
  int label = -1;       // -1: there is none, or the row does not count
  bool live = false;    // whether the row has a loss and a gradient
  bool faulty = false;  // if not live: both are nan; else they are 0, or there is no such row

  // Reads nothing that depends on a label but for label_at().
  __device__ static int64_t label_at(const CustomRowsCall& c, const RowPlace& place) {
    if constexpr (Numbers::kHasLabel) {
      const Rows& labels = c.inputs[place_of<Loss>(Kind::kLabel, 0)];
      if (place.exists) return static_cast<const int64_t*>(labels.data)[place(labels)];
    }
    return -1;
  }
  __device__ RowHead(const CustomRowsCall& c, const Launch& l, double scale, int64_t row,
                     const RowPlace& place, int64_t index) {
    each<Numbers::kFirst>([&](auto i) { numbers[i] = T(0); });
    if (!place.exists) return;
    live = true;
    if constexpr (Numbers::kHasLabel) {
      live = index >= 0 && index < c.classes && index != c.ignore_index;
      faulty = !live && index != c.ignore_index;
      if (faulty) report_error(l, Fault::kTargetClass, row, index, c.classes);
      if (!live) return;
      label = static_cast<int>(index);
    }
    const auto number = [&](const Rows& r) { return read<T>(r.data, r.dtype, place(r)); };
    if (c.weight.data) scale *= weight = number(c.weight);
    if (c.upstream.data) scale *= number(c.upstream);
    numbers[Numbers::kScale] = static_cast<T>(scale);
    numbers[Numbers::kClasses] = static_cast<T>(c.classes);
    each<Numbers::kPerRows>([&](auto i) {
      constexpr int kInput = place_of<Loss>(Kind::kPerRow, i);
      numbers[Numbers::kOfRow + i] = number(c.inputs[kInput]);
    });
    if constexpr (Numbers::kHasLabel) {
      each<Numbers::kElements>([&](auto i) {
        const Rows& r = c.inputs[place_of<Loss>(Kind::kElement, i)];
        const int64_t at = place(r) + label * r.classes;
        if constexpr (sizeof(D) == 2) {  // all inputs have this type then
          numbers[Numbers::kAtLabel + i] = widen(static_cast<const D*>(r.data)[at]);
        } else {
          numbers[Numbers::kAtLabel + i] = read<T>(r.data, r.dtype, at);
        }
      });
      each<Numbers::kPerClasses>([&](auto i) {
        const Rows& r = c.inputs[place_of<Loss>(Kind::kPerClass, i)];
        numbers[Numbers::kAtLabel + Numbers::kElements + i] =
            read<T>(r.data, r.dtype, place(r) + label * r.classes);
      });
    }
  }
  // The loss and every gradient element of a row that is not live.
  __device__ T filler() const { return faulty ? kNan<T> : T(0); }
};

// Where the elements of a row lie, and how they are divided into slots.
template <class Loss, class D>
struct RowLine {
  using V = Vector16<D>;
  static constexpr int kElements = RowNumbers<Loss>::kElements;
  static constexpr unsigned kAllLanes = (1u << V::kSize) - 1;
  int64_t begin[kElements];    // of the row in each input
  unsigned vectors = 0;        // bit i: input i has vectors where the slots are
  const V* vector[kElements];  // the first of them
  int before = 0;              // lanes of the first slot before the row
  int slots = 0;
  int whole_begin = 0, whole_end = 0;  // the slots with no lane outside the row
  unsigned first_lanes = kAllLanes, last_lanes = kAllLanes;  // the row's, in these two slots

  // Past the last row there are no slots.
  __device__ RowLine(const CustomRowsCall& c, const RowPlace& place) {
    each<kElements>([&](auto i) {
      constexpr int kInput = place_of<Loss>(Kind::kElement, i);
      begin[i] = place(c.inputs[kInput]);
      if (i == 0) before = max(misaligned(c.inputs[kInput], begin[0]), 0);
      vectors |= unsigned{misaligned(c.inputs[kInput], begin[i]) == before} << i;
      vector[i] = vectors_of(c.inputs[kInput], begin[i]);
    });
    if (!place.exists) return;
    const int lanes = before + static_cast<int>(c.classes), rest = lanes % V::kSize;
    slots = (lanes + V::kSize - 1) / V::kSize;
    whole_begin = before > 0;
    whole_end = lanes / V::kSize;
    first_lanes = kAllLanes << before & kAllLanes;
    if (rest > 0) last_lanes = kAllLanes >> (V::kSize - rest);
    each<kElements>([&](auto i) { hold(vector[i]); });
    hold(vectors);
    hold(slots);
    hold(whole_begin);
    hold(whole_end);
  }
  // The first vector of a row of an input or of a gradient, if there is one.
  __device__ V* vectors_of(const Rows& r, int64_t begin) const {
    const int64_t bytes = (begin - before) * static_cast<int64_t>(sizeof(D));
    return reinterpret_cast<V*>(reinterpret_cast<uintptr_t>(r.data) + bytes);
  }
  __device__ bool is_whole(int slot) const { return slot >= whole_begin && slot < whole_end; }
  // The lanes of a slot that are classes of the row, as bits.
  __device__ unsigned lanes(int slot) const {
    const unsigned bits = slot == 0 ? first_lanes : kAllLanes;
    return slot == slots - 1 ? bits & last_lanes : bits;
  }
  // Elements between the last multiple of 16 bytes and the row; -1 where there are no vectors.
  __device__ static int misaligned(const Rows& r, int64_t begin) {
    if ((sizeof(D) > 2 && r.dtype != kDType<D>) || r.classes != 1) return -1;
    return misalignment(static_cast<const D*>(r.data) + begin);
  }
  __device__ int first_class(int slot) const { return slot * V::kSize - before; }
};

// A row as the loss's formulas see it.
template <class Loss, class D>
struct RowFormula {
  using T = Compute<D>;
  using V = Vector16<D>;
  using Numbers = RowNumbers<Loss>;
  using Head = RowHead<Loss, D>;
  // Float roundings would build up over long rows.
  using Sum = std::conditional_t<sizeof(D) == 4, double, T>;
  template <int kLevel>
  using Terms = LevelTerms<T, Sum, Loss::kMaxima[kLevel], Loss::kSums[kLevel]>;
  using Peaks = FirstClasses<Loss::kPeakCount>;
  static constexpr int kElements = Numbers::kElements, kSize = V::kSize;

  const Loss& loss;
  const CustomRowsCall& c;
  T r[Loss::kNumbers] = {};
  int label = -1;

  struct RowAccess {
    const T* r;
    __device__ T operator()(int i) const { return r[i]; }
    // Two-byte inputs and gradients do not show the error of the quick one.
    __device__ friend T exp_of_class(T x, const RowAccess&) {
      if constexpr (sizeof(D) == 2) {
        return quick_exp(x);
      } else {
        return exp_nonpositive(x);
      }
    }
  };
  // A class's numbers, as the loss takes them.
  struct Class {
    T x[kElements], w[at_least_one(Numbers::kPerClasses)], kept[at_least_one(Loss::kKeptCount)];
  };
  template <int kLevel, int kCount>
  __device__ void terms(Class& one, T (&out)[kCount]) const {
    loss.template terms<kLevel>(one.x, one.w, RowAccess{r}, one.kept, out);
  }
  template <int kLevel>
  static constexpr int kTerms = at_least_one(Loss::kMaxima[kLevel] + Loss::kSums[kLevel]);

  // Element input number i, and its gradient.
  template <int i>
  __device__ const Rows& element_input() const {
    return c.inputs[place_of<Loss>(Kind::kElement, i)];
  }
  template <int i>
  __device__ const Rows& gradient() const {
    return c.gradients[place_of<Loss>(Kind::kElement, i)];
  }

  __device__ void begin(const Head& head) {
    each<Numbers::kFirst>([&](auto i) { r[i] = head.numbers[i]; });
    label = head.label;
  }
  // Computes the row numbers; add(level, terms) walks over this thread's classes, if it has any.
  template <class Group, class Add>
  __device__ void compute(Group& group, Add&& add) {
    loss.template row<-1>(r);
    each<Loss::kLevels>([&](auto level) {
      Terms<level> total;
      add(level, total);
      group.all_reduce(total);
      constexpr int kAt = Numbers::of_level(level), kMaxima = Loss::kMaxima[level];
      each<kMaxima>([&](auto j) { r[kAt + j] = total.max[j]; });
      each<Loss::kSums[level]>([&](auto j) { r[kAt + kMaxima + j] = T(total.sum[j]); });
      loss.template row<level>(r);
    });
  }
  // Writes what the row has one of, and returns its loss.
  __device__ T write_numbers(const Head& head, int64_t row, const RowPlace& place,
                             bool gradients) const {
    const T value = head.live ? r[Loss::kValue] * head.weight : head.filler();
    if (c.value.data) write(c.value.data, c.value.dtype, row, value);
    each<Loss::kAuxiliaryCount>([&](auto i) {
      const Output& to = c.auxiliary[i];
      const T x = head.live ? r[Loss::kAuxiliary[i]] : head.filler();
      if (to.data) write(to.data, to.dtype, row, x);
    });
    each<Numbers::kPerRows>([&](auto i) {
      const Rows& to = c.gradients[place_of<Loss>(Kind::kPerRow, i)];
      const T x = head.live ? r[Loss::kOfRow[i]] : head.filler();
      if (gradients && to.data) write(const_cast<void*>(to.data), to.dtype, place(to), x);
    });
    return value;
  }
};

// A walk of one thread of those that share a row.
template <class Loss, class D, class Group>
struct RowWalk : RowFormula<Loss, D> {
  using Formula = RowFormula<Loss, D>;
  using typename Formula::Class;
  using typename Formula::Numbers;
  using typename Formula::Peaks;
  using typename Formula::RowAccess;
  using typename Formula::T;
  using typename Formula::V;
  template <int kLevel>
  using Terms = typename Formula::template Terms<kLevel>;
  using Formula::c, Formula::kElements, Formula::kSize, Formula::label, Formula::loss, Formula::r;
  using Line = RowLine<Loss, D>;
  // Lanes that are computed together: as many as fit into 16 bytes as T.
  using Part = Vector16<T>;
  static constexpr int kParts = kSize / Part::kSize;

  const RowTiling& tiling;
  Group& group;
  V* const
      smem;  // this thread's: (stages, elements, vectors_per_thread), then those of kept values
  int stage = 0;

  __device__ RowWalk(const Loss& loss, const CustomRowsCall& c, const RowTiling& tiling_,
                     Group& group_, V* smem_)
      : Formula{loss, c}, tiling(tiling_), group(group_), smem(smem_) {}

  // ---- slots ----

  // From one slot of a thread to its next, and from an input to the next one.
  __device__ int step() const { return static_cast<int>(blockDim.x); }
  __device__ int line_step() const { return tiling.vectors_per_thread * step(); }
  // The first slot of a row in shared memory: the first input's.
  __device__ V* row_in_smem(int of_stage) const {
    return smem + of_stage * kElements * line_step();
  }
  // The lanes of a slot whose classes are in the sums.
  __device__ unsigned summed_lanes(const Line& line, int v) const {
    unsigned bits = line.lanes(v);
    if constexpr (Numbers::kHasLabel) {
      const int place = label + line.before;
      if (v == place / kSize) bits &= ~(1u << place % kSize);
    }
    return bits;
  }

  // Begins to copy slot v of input i.
  template <int i>
  __device__ void prefetch(const Line& line, int v, V& to) const {
    const Rows& r = this->template element_input<i>();
    if ((line.vectors >> i & 1) && line.is_whole(v)) {
      cp_async(to, line.vector[i] + v);
      return;
    }
    const int first = line.first_class(v);
    const unsigned valid = line.lanes(v);
    const D* const from = static_cast<const D*>(r.data) + line.begin[i];
    // There are no asynchronous copies of two bytes: a few loads are in flight together. All inputs
    // have this type then.
    constexpr int kTogether = sizeof(D) == 2 ? 4 : 1;
#pragma unroll 1
    for (int lane = 0; lane < kSize; lane += kTogether) {
      const int64_t at = (first + lane) * r.classes;
      D x[kTogether];
      each<kTogether>([&](auto e) {
        if (!(valid >> (lane + e) & 1)) return;
        if constexpr (sizeof(D) == 2) {
          x[e] = from[at + e * r.classes];
        } else if (r.dtype == kDType<D>) {
          cp_async(to.element[lane], from + at);
        } else {
          to.element[lane] = read<T>(r.data, r.dtype, line.begin[i] + at);
        }
      });
      if constexpr (sizeof(D) == 2) {
        each<kTogether>([&](auto e) { to.element[lane + e] = x[e]; });
      }
    }
  }
  __device__ void prefetch(const Line& line, int v, V* slot) const {
    each<kElements>(
        [&](auto i) { this->template prefetch<i>(line, v, slot[i * this->line_step()]); });
  }
  // Begins to copy slot v of a row into shared memory, and the later slots that are this thread's.
  __device__ void prefetch_row(const Line& line, int v, V* slot) const {
#pragma unroll 1
    for (; v < line.slots; v += group.size, slot += step()) prefetch(line, v, slot);
  }
  __device__ void prefetch_row(const Line& line) const {
    prefetch_row(line, group.rank, row_in_smem(stage));
  }

  // ---- the terms of a slot's classes ----

  // A slot of each input.
  struct Slots {
    V x[kElements];
    int v;      // the row's v-th
    int first;  // class
    V* kept;    // the slot of the first kept value
  };
  __device__ bool keeps() const { return (sizeof(D) > 2 || Loss::kKeptNarrow > 0) && tiling.keeps; }
  __device__ Part& kept_slot(const Slots& s, int j, int part) const {
    return reinterpret_cast<Part&>(s.kept[(j * kParts + part) * line_step()]);
  }
  // All but the kept values.
  __device__ void read_class(Class& one, const Slots& s, int e) const {
    each<kElements>([&](auto i) { one.x[i] = T(widen(s.x[i], e)); });
    each<Numbers::kPerClasses>([&](auto i) {
      const Rows& r = c.inputs[place_of<Loss>(Kind::kPerClass, i)];
      const int place = min(max(s.first + e, 0), static_cast<int>(c.classes) - 1);
      one.w[i] = read<T>(r.data, r.dtype, place * r.classes);
    });
  }
  // The kept values that the walk of kLevel reads. The compiler drops what it does not need of the
  // terms.
  template <int kLevel>
  __device__ void recompute_kept(Class& one) const {
    each<kLevel>([&](auto level) {
      if constexpr (leaves_kept<Loss>(level)) {
        T out[Formula::template kTerms<level>];
        this->template terms<level>(one, out);
      }
    });
  }
  // The classes of a part of a slot, with the kept values that the walk of kLevel reads.
  template <int kLevel>
  __device__ void read_part(const Slots& s, int part, Class (&classes)[Part::kSize]) const {
    each<Part::kSize>([&](auto e) { this->read_class(classes[e], s, part * Part::kSize + e); });
    if (keeps()) {
      each<Loss::kKeptCount>([&](auto j) {
        if constexpr (reads_kept<Loss>(kLevel, j)) {
          const Part kept = this->kept_slot(s, j, part);
          each<Part::kSize>([&](auto e) { classes[e].kept[j] = kept.element[e]; });
        }
      });
    } else {
      each<Part::kSize>([&](auto e) { this->template recompute_kept<kLevel>(classes[e]); });
    }
  }

  // ---- walks ----

  // Calls f(slots) for each slot of this thread. Where the row is in shared memory, kPrefetches
  // says whether row `next` takes the place of what has been read. Else `next` is the row itself,
  // and slots of it are copied there a few ahead.
  template <bool kPrefetches, class F>
  __device__ void for_each_slot(const Line& line, const Line& next, F&& f) const {
    const bool in_smem = tiling.fits_in_smem;
    int ahead = in_smem ? 0 : tiling.stages * group.size;
    int kept = (tiling.stages - stage) * kElements * line_step();
    hold(ahead);
    hold(kept);
    V* at = row_in_smem(in_smem ? stage : 0);
    int v = group.rank, copied = 0;
    const auto prefetch_to = [&](int v, V* at) {
      if (v < next.slots) prefetch(next, v, at);
    };
    if (!in_smem) {
      for (int i = 0; i < tiling.stages; ++i) {
        prefetch_to(v + i * group.size, row_in_smem(i));
        cp_async_commit();
      }
    }
#pragma unroll 1
    while (v < line.slots) {
      if (!in_smem) cp_async_wait(tiling.stages - 1);
      const int end = in_smem ? line.slots : v + 1;
#pragma unroll 1
      for (; v < end; v += group.size, at += step()) {
        Slots s{{}, v, line.first_class(v), at + kept};
        each<kElements>([&](auto i) { s.x[i] = at[i * this->line_step()]; });
        f(s);
        if (kPrefetches) prefetch_to(v + ahead, at);
      }
      if (in_smem) break;
      if (!kPrefetches) prefetch_to(v - group.size + ahead, row_in_smem(copied));
      cp_async_commit();
      copied = copied + 1 < tiling.stages ? copied + 1 : 0;
      at = row_in_smem(copied);
    }
    if (kPrefetches && in_smem) prefetch_row(next, v, at);
  }

  template <int kLevel>
  __device__ void add(Terms<kLevel>& total, const Line& line) const {
    constexpr int kMaxima = Loss::kMaxima[kLevel], kSums = Loss::kSums[kLevel];
    for_each_slot<false>(line, line, [&](const Slots& s) {
      const unsigned counted = line.lanes(s.v), summed = summed_lanes(line, s.v);
      T sums[at_least_one(kSums)];
      each<kSums>([&](auto j) { sums[j] = T(-0.0); });  // -0 + x is x
      each<kParts>([&](auto part) {
        Class classes[Part::kSize];
        this->template read_part<kLevel>(s, part, classes);
        each<Part::kSize>([&](auto e) {
          const int lane = part * Part::kSize + e;
          T out[Formula::template kTerms<kLevel>];
          this->template terms<kLevel>(classes[e], out);
          each<kMaxima>([&](auto j) {
            if (counted >> lane & 1) total.max[j] = larger(total.max[j], out[j]);
          });
          each<kSums>([&](auto j) {
            if (summed >> lane & 1) sums[j] += out[kMaxima + j];
          });
        });
        if (!keeps()) return;
        each<Loss::kKeptCount>([&](auto j) {
          if constexpr (leaves_kept<Loss>(kLevel, j)) {
            Part kept;
            each<Part::kSize>([&](auto e) { kept.element[e] = classes[e].kept[j]; });
            this->kept_slot(s, j, part) = kept;
          }
        });
      });
      each<kSums>([&](auto j) { total.sum[j] += sums[j]; });
    });
  }
  // Walks all levels and computes the row numbers.
  __device__ void compute_row(const Line& line, bool live) {
    this->compute(group, [&](auto level, auto& total) {
      if (live) this->template add<level>(total, line);
    });
  }

  __device__ Peaks peaks(const Line& line, bool live) const {
    Peaks found;
    if constexpr (Loss::kPeakCount > 0) {
      const auto look = [&](const Slots& s) {
        const unsigned counted = line.lanes(s.v);
        each<kSize>([&](auto e) {
          each<Loss::kPeakCount>([&](auto p) {
            constexpr Peak kPeak = Loss::kPeaks[p];
            Class one;
            this->read_class(one, s, e);
            this->template recompute_kept<kPeak.level>(one);
            T out[Formula::template kTerms<kPeak.level>];
            this->template terms<kPeak.level>(one, out);
            const bool is_peak = out[kPeak.term] == r[Numbers::of_level(kPeak.level) + kPeak.term];
            if (is_peak && (counted >> e & 1)) found.first[p] = min(found.first[p], s.first + e);
          });
        });
      };
      if (live) for_each_slot<false>(line, line, look);
      group.all_reduce(found);
    }
    return found;
  }
  __device__ void add_at_peaks(const Class& one, int place, const Peaks& peaks, T* out) const {
    each<Loss::kPeakCount>([&](auto p) {
      if (place != peaks.first[p]) return;
      T more[kElements] = {};
      loss.template at_peak<p>(one.x, one.w, RowAccess{r}, more);
      each<kElements>([&](auto i) { out[i] += more[i]; });
    });
  }

  // Where the gradients of a row lie.
  struct Gradients {
    int64_t begin[kElements];
    V* vector[kElements];
    unsigned wanted = 0, vectors = 0;  // bit i: whether that of input i is, and has them
  };
  template <int i>
  __device__ void store_lane(const Gradients& to, int place, D x) const {
    const Rows& r = this->template gradient<i>();
    void* const data = const_cast<void*>(r.data);
    const int64_t at = to.begin[i] + place * r.classes;
    if (sizeof(D) == 2 || r.dtype == kDType<D>) {
      static_cast<D*>(data)[at] = x;
    } else {
      write(data, r.dtype, at, widen(x));
    }
  }
  template <int i>
  __device__ void store(const Line& line, const Gradients& to, const Slots& s, const V& g) const {
    if ((to.vectors >> i & 1) && line.is_whole(s.v)) {
      to.vector[i][s.v] = g;
    } else if (to.wanted >> i & 1) {
      const unsigned valid = line.lanes(s.v);
      each<kSize>([&](auto e) {
        if (valid >> e & 1) this->template store_lane<i>(to, s.first + e, g.element[e]);
      });
    }
  }
  template <bool kAll>
  __device__ void store_slot(const Line& line, const Gradients& to, const Slots& s,
                             const Peaks& peaks) const {
    constexpr int kCount = kAll ? kElements : 1;
    T g[kCount][kSize];
    each<kParts>([&](auto part) {
      Class classes[Part::kSize];
      this->template read_part<Loss::kLevels>(s, part, classes);
      each<Part::kSize>([&](auto e) {
        const Class& one = classes[e];
        T out[kElements] = {};
        loss.template gradients<kAll>(one.x, one.w, RowAccess{r}, one.kept, out);
        this->add_at_peaks(one, s.first + part * Part::kSize + e, peaks, out);
        each<kCount>([&](auto i) { g[i][part * Part::kSize + e] = out[i]; });
      });
    });
    each<kCount>([&](auto i) { this->template store<i>(line, to, s, pack<D>(g[i])); });
  }

  // Writes this thread's part of the gradients; next: see for_each_slot().
  __device__ void write_gradients(const Line& line, const RowPlace& place, bool live, T filler,
                                  const Peaks& peaks, const Line& next) const {
    Gradients to;
    bool later = false;
    each<kElements>([&](auto i) {
      const Rows& r = this->template gradient<i>();
      to.begin[i] = place(r);
      to.vector[i] = line.vectors_of(r, to.begin[i]);
      hold(to.vector[i]);  // before the test: behind it the compiler forgets that this is global
      if (!r.data) return;
      to.wanted |= 1u << i;
      to.vectors |= unsigned{Line::misaligned(r, to.begin[i]) == line.before} << i;
      if (i > 0) later = true;
    });
    for_each_slot<true>(line, next, [&](const Slots& s) {
      if (!live) {
        V g;
        each<kSize>([&](auto e) { g.element[e] = narrow<D>(filler); });
        each<kElements>([&](auto i) { this->template store<i>(line, to, s, g); });
      } else if (kElements > 1 && later) {
        store_slot<true>(line, to, s, peaks);
      } else {
        store_slot<kElements == 1>(line, to, s, peaks);
      }
    });
    if constexpr (Numbers::kHasLabel) {
      // Behind the vector that held it, by the same thread.
      if (!live || group.owner((label + line.before) / kSize) != group.rank) return;
      Class one;
      T out[kElements];
      each<kElements>([&](auto i) {
        one.x[i] = r[Numbers::kAtLabel + i];
        out[i] = r[Loss::kAtLabel[i]];
      });
      each<Numbers::kPerClasses>([&](auto i) { one.w[i] = r[Numbers::kAtLabel + kElements + i]; });
      add_at_peaks(one, label, peaks, out);
      each<kElements>([&](auto i) {
        if (to.wanted >> i & 1) this->template store_lane<i>(to, label, narrow<D>(out[i]));
      });
    }
  }
};

// ---- the kernel ---------------------------------------------------------------------------------

template <class D>
constexpr int kMinCustomRowBlocks = sizeof(D) == 8 ? 1 : 2;

// Shared memory of what threads merge: see all_reduce_block() and the states of a cluster's blocks.
template <class Walk, int kLevels>
constexpr int reduction_bytes() {
  if constexpr (kLevels == 0) {
    return sizeof(typename Walk::Peaks) * 2 * (kRowBlock / kWarp + 1);
  } else {
    return sizeof(typename Walk::template Terms<kLevels - 1>) * 2 * (kRowBlock / kWarp + 1) +
           reduction_bytes<Walk, kLevels - 1>();
  }
}

template <class Loss, class D>
__device__ void compute_rows(const CustomParameters<Loss>& given, const CustomRowsCall& c,
                             const Launch& l, const RowTiling& tiling) {
  using T = Compute<D>;
  using Numbers = RowNumbers<Loss>;
  using Head = RowHead<Loss, D>;
  using Line = RowLine<Loss, D>;
  using Group = ThreadGroup<Scope::kAny>;
  using Walk = RowWalk<Loss, D, Group>;
  static_assert(reduction_bytes<Walk, Loss::kLevels>() + sizeof(Loss) + 2048 <= kCustomStaticSmem,
                "the loss has too many sums");
  extern __shared__ uint4 smem[];
  const Loss& made = prepared(given);
  const GradientScale& s = GradientScale::of_block<Numbers::kHasLabel>(l);
  update_predictor(l, s);
  if (can_skip(l, s)) return;
  const Loss loss = made;  // a copy, which stays in registers
  Group group(tiling.threads_per_row);
  const int64_t rows = c.outer * c.inner, step = group.row_stride();
  Walk walk(loss, c, tiling, group, reinterpret_cast<Vector16<D>*>(smem) + threadIdx.x);
  const auto place_of_row = [&](int64_t row) { return RowPlace(c, rows, row); };
  int64_t row = group.first_row() + group.row_in_block();
  for (; walk.stage < tiling.stages; ++walk.stage) {
    if (tiling.fits_in_smem) walk.prefetch_row(Line(c, place_of_row(row + walk.stage * step)));
    cp_async_commit();
  }
  walk.stage = 0;
  int64_t next_label = Head::label_at(c, place_of_row(row));
  double total = 0;
  for (; row - group.row_in_block() < rows; row += step) {
    const RowPlace place = place_of_row(row);
    const Line line(c, place);
    const Head head(c, l, s.scale, row, place, next_label);
    next_label = Head::label_at(c, place_of_row(row + step));
    walk.begin(head);
    cp_async_wait(tiling.stages - 1);
    walk.compute_row(line, head.live);

    if (group.rank == 0 && place.exists) total += walk.write_numbers(head, row, place, s.write);
    // The blocks of a cluster may have read different predictions.
    typename Walk::Peaks peaks;
    if (l.pass != Pass::kValue) peaks = walk.peaks(line, head.live);
    const Line next(c, place_of_row(tiling.fits_in_smem ? row + tiling.stages * step : row));
    if (s.write) {
      walk.write_gradients(line, place, head.live, head.filler(), peaks, next);
    } else if (tiling.fits_in_smem) {
      walk.prefetch_row(next);
    }
    cp_async_commit();
    walk.stage = walk.stage + 1 < tiling.stages ? walk.stage + 1 : 0;
  }
  group.sync_before_exit();
  write_loss(l, total);
}

}  // namespace fusedloss::cuda
