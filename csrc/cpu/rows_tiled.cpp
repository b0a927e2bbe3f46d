// Losses over rows whose classes do not lie side by side, or are few, by tiles of neighbouring
// rows.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A tile is read
// from memory once and stays in the cache, class by class, with a row a lane.
#include <numeric>
#include <utility>

#include "rows.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

constexpr int kUnroll = 4;  // classes whose sum goes to double together

template <class T>
FUSEDLOSS_HD Vec<T> at(const T* line, int64_t i) {
  return Vec<T>::loadu(line + i);
}

// The arrays of a tile. Loops copy these pointers: members would be loaded again after each store.
template <class T>
struct TileArrays {
  static constexpr Integer<T> kNone = -1;
  int64_t width;
  // (classes, width). The logits, in a copy, since lines of the input that lie a power of two apart
  // throw each other out of the cache; then e^(x - max), 0 for the target, in their place; then the
  // gradient, where it does not go to memory as T.
  T *logits, *target_shares;
  // Per row: its target and max, and the parts of its loss and its gradient.
  T *target_logit, *target_weight, *max, *losses, *factor, *slope_scale, *target_gradient;
  double *scale, *sum, *weighted_logits, *target_mass;  // the last three are RegisterSums
  // kNone: the row is ignored, or lies beyond the tile's end. 0 for class probabilities.
  Integer<T>*target, *class_ids;
  bool any_ignored = false;  // whether a row of the tile is ignored

  // Which of the rows from i on have class c as their target, and which have none.
  FUSEDLOSS_HD Mask<T> is_target(int64_t c, int64_t i) const {
    return cast<T>(at(target, i) == Vec<Integer<T>>(class_ids[c]));
  }
  FUSEDLOSS_HD Mask<T> is_none(int64_t i) const {
    return cast<T>(at(target, i) == Vec<Integer<T>>(kNone));
  }
};

// Walks over tiles of at most `width` rows, a multiple of a register's.
template <class Loss>
struct TileWalk {
  using T = typename Loss::Number;
  template <class N>
  using State = typename Loss::template State<N>;
  using Slope = typename Loss::template Slope<Vec<T>>;
  static constexpr int64_t kLanes = Vec<T>::size();

  const RowProblem<Loss>& problem;
  const RowsCall& call = problem.call;
  const Loss& loss = problem.loss;
  const int64_t width, size = call.classes * width;
  const TileCopier<T> copier{call.classes, width};
  const Buffer<T> memory{(call.indices ? 1 : 2) * size + 7 * width};
  const Buffer<double> double_memory{3 * at_sum(width) + width};
  const Buffer<Integer<T>> index_memory{width + call.classes};
  TileArrays<T> arrays;

  TileWalk(const RowProblem<Loss>& p, int64_t w) : problem(p), width(w) {
    auto& a = arrays;
    a.width = w;
    T* line = a.logits = memory.data();
    a.target_shares = a.logits + size;
    line += (call.indices ? 1 : 2) * size;
    for (T** member : {&a.target_logit, &a.target_weight, &a.max, &a.losses, &a.factor,
                       &a.slope_scale, &a.target_gradient}) {
      *member = std::exchange(line, line + w);
    }
    double* sums = double_memory.data();
    for (double** member : {&a.sum, &a.weighted_logits, &a.target_mass, &a.scale}) {
      *member = std::exchange(sums, sums + at_sum(w));
    }
    a.target = index_memory.data();
    a.class_ids = a.target + w;
    std::fill_n(a.target_logit, 2 * w, T(1));
    std::fill_n(a.sum, 3 * at_sum(w), 0.0);
    std::fill_n(a.scale, w, call.scale);
    std::iota(a.class_ids, a.class_ids + call.classes, Integer<T>(0));
  }

  // Where the RegisterSum of the rows from i on lies.
  static FUSEDLOSS_HD int64_t at_sum(int64_t i) { return i / kLanes * RegisterSum<T>::kSize; }
  static FUSEDLOSS_HD void add_to(double* sum, Vec<T> x) {
    RegisterSum<T> total = RegisterSum<T>::load(sum);
    total.add(x);
    total.store(sum);
  }

  // Calls f(count, c, i) for the classes [c, c + count) in the register of rows from i on, until it
  // has been called for every class and for n rows. count is a compile-time constant.
  template <class F>
  FUSEDLOSS_HD void for_classes(int64_t n, F&& f) const {
    int64_t c = 0;
    const auto line = [&](auto count) FUSEDLOSS_INLINE {
      for (int64_t i = 0; i < n; i += kLanes) f(count, c, i);
      c += count;
    };
    while (c + kUnroll <= call.classes) line(std::integral_constant<int, kUnroll>());
    while (c < call.classes) line(std::integral_constant<int, 1>());
  }

  // The largest logit of each row and its target's. The logits, class by class from `from` on, come
  // into `logits`, but -inf in place of the target's.
  template <bool kIndices>
  void find_max(const T* from, int64_t from_stride, int64_t n) const {
    std::fill_n(arrays.max, width, -kInfinity<T>);
    for_classes(n, [=, a = arrays](auto count, int64_t c, int64_t i) FUSEDLOSS_INLINE {
      Vec<T> x[count], max_x = at(a.max, i), target_x = at(a.target_logit, i);
      unrolled<count>([&](auto u) FUSEDLOSS_INLINE {
        x[u] = load(from + (c + u) * from_stride + i, n - i, T(0));
      });
      unrolled<count>([&](auto u) FUSEDLOSS_INLINE {
        max_x = max(max_x, x[u]);
        if (!kIndices) return;
        const Mask<T> is_target = a.is_target(c + u, i);
        target_x = select(is_target, x[u], target_x);
        x[u] = select(is_target, Vec<T>(-kInfinity<T>), x[u]);
      });
      unrolled<count>([&](auto u) { x[u].store(a.logits + (c + u) * a.width + i); });
      max_x.store(a.max + i);
      if (kIndices) target_x.store(a.target_logit + i);
    });
  }

  // Adds the targets of every class to the states.
  template <bool kIndices>
  void add_targets(int64_t n) const {
    std::fill_n(arrays.weighted_logits, 2 * at_sum(width), 0.0);
    for_classes(n, [=, a = arrays, p = problem](auto count, int64_t c, int64_t i) FUSEDLOSS_INLINE {
      State<Vec<T>> part{at(a.max, i), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
      unrolled<count>([&](auto u) FUSEDLOSS_INLINE {
        const int64_t k = (c + u) * a.width + i;
        const Vec<T> x = at(a.logits, k);
        if constexpr (kIndices) {
          Loss::add_target(part, select(a.is_target(c + u, i), at(a.target_logit, i), x),
                           Vec<T>(p.class_weight(c + u)));
        } else {
          Loss::add_target(part, x, at(a.target_shares, k));
        }
      });
      add_to(a.weighted_logits + at_sum(i), part.weighted_logits);
      if (!kIndices) add_to(a.target_mass + at_sum(i), part.target_mass);
    });
  }

  // Adds the logits of every class to the states, each in double with kExact, and leaves e^(x -
  // max) in their place. Prefetches the next tile: its lines lie in as many pages as there are
  // classes, and the hardware does not foresee where they begin.
  template <bool kExact>
  void add_logits(const Tile& tile) const {
    std::fill_n(arrays.sum, at_sum(width), 0.0);
    const int64_t bytes = bytes_of(call.input.dtype);
    for_classes(tile.n,
                [=, a = arrays, next_tile = address(call.input, tile.offset(call.input, 0, width)),
                 line = call.input.classes * bytes, step = call.input.inner * bytes](
                    auto count, int64_t c, int64_t i) FUSEDLOSS_INLINE {
                  State<Vec<T>> part{at(a.max, i), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
                  Vec<T> e[count];
                  unrolled<count>([&](auto u) FUSEDLOSS_INLINE {
                    __builtin_prefetch(next_tile + (c + u) * line + i * step, 0, 2);
                    e[u] = Loss::add(part, at(a.logits, (c + u) * a.width + i));
                  });
                  unrolled<count>([&](auto u) { e[u].store(a.logits + (c + u) * a.width + i); });
                  RegisterSum<T> sum = RegisterSum<T>::load(a.sum + at_sum(i));
                  if constexpr (kExact) {
                    unrolled<count>([&](auto u) { sum.add(e[u]); });
                  } else {
                    sum.add(part.sum);
                  }
                  sum.store(a.sum + at_sum(i));
                });
  }

  // The losses of the rows from i on, and their slopes.
  FUSEDLOSS_HD void finish(int64_t i) const {
    const auto a = arrays;
    const auto lanes = [=](const double* sums) FUSEDLOSS_INLINE {
      return RegisterSum<T>::load(sums + at_sum(i)).lanes();
    };
    const Wide<T> sums = lanes(a.sum), logit_sums = lanes(a.weighted_logits),
                  masses = lanes(a.target_mass), scales = Wide<T>::load(a.scale + i);
    const Vec<T> max = at(a.max, i), gap = at(a.target_logit, i) - max,
                 weight = at(a.target_weight, i),
                 target_exp = call.indices ? exp_nonpositive(gap) : Vec<T>(0);
    const Wide<T> target_exps = widen(target_exp), weights = widen(weight);
    Wide<T> excess, factors, slope_scales, target_gradients;
    unrolled<Wide<T>::kParts>([&](auto p) FUSEDLOSS_INLINE {
      excess.part[p] = Loss::excess(sums.part[p], target_exps.part[p]);
    });
    const State<Vec<T>> row{max, narrow(sums), narrow(logit_sums), narrow(masses)};
    const Vec<T> losses = loss.loss(row, narrow(excess), gap, weight);
    select(a.is_none(i), Vec<T>(0), losses).store(a.losses + i);
    if (!call.gradient.data) return;
    unrolled<Wide<T>::kParts>([&](auto p) FUSEDLOSS_INLINE {
      const typename Loss::Exact::template State<Vec<double>> exact_row{
          Vec<double>(0), sums.part[p], logit_sums.part[p], masses.part[p]};
      const auto slope =
          problem.exact.slope(exact_row, target_exps.part[p], weights.part[p], scales.part[p]);
      factors.part[p] = slope.factor;
      slope_scales.part[p] = slope.scale;
      target_gradients.part[p] = slope.target_gradient;
    });
    narrow(factors).store(a.factor + i);
    narrow(slope_scales).store(a.slope_scale + i);
    narrow(target_gradients).store(a.target_gradient + i);
  }

  void read_indices(const int64_t* indices, int64_t n) {
    // Prefetches the next tile's, which the hardware would not foresee in time.
    for (int64_t i = 0; i < width; i += 8) __builtin_prefetch(indices + width + i, 0, 2);
    const auto a = arrays;
    Integer<T> any = 0;  // as wide as an index, so that the loop vectorises
    for (int64_t i = 0; i < n; ++i) {
      const bool ignored = indices[i] == call.ignore_index;
      a.target[i] = ignored ? a.kNone : static_cast<Integer<T>>(indices[i]);
      any |= ignored;
    }
    arrays.any_ignored = any;
    std::fill(a.target + n, a.target + width, a.kNone);
    for (int64_t i = 0; problem.weight && i < n; ++i) {
      a.target_weight[i] = a.target[i] == a.kNone ? T(0) : problem.weight[a.target[i]];
    }
  }

  void read_probabilities(const Tile& tile) const {
    const auto a = arrays;
    std::fill(std::fill_n(a.target, tile.n, 0), a.target + width, a.kNone);
    copier.template copy<false>(call.probabilities, tile, a.target_shares);
    for (int64_t c = 0; (problem.weight || loss.smooth) && c < call.classes; ++c) {
      const Vec<T> w(problem.class_weight(c));
      T* const q = a.target_shares + c * width;
      for (int64_t i = 0; i < tile.n; i += kLanes) loss.target_share(at(q, i), w).store(q + i);
    }
  }

  void read_logits(const Tile& tile) const {
    const bool direct = is_dtype<T>(call.input.dtype) && call.input.inner == 1;
    if (!direct) copier.template copy<false>(call.input, tile, arrays.logits);
    const T* const data = static_cast<const T*>(call.input.data);
    const auto find = [&](auto indices) {
      find_max<indices()>(direct ? data + tile.offset(call.input) : arrays.logits,
                          direct ? call.input.classes : width, tile.n);
    };
    with_constants(find, call.indices);
  }

  double process_tile(const Tile& tile) {
    const int64_t first_row = tile.outer * call.inner + tile.begin;
    if (call.indices) {
      read_indices(call.indices + first_row, tile.n);
    } else {
      read_probabilities(tile);
    }
    read_logits(tile);
    if (loss.sums_targets()) {
      with_constants([&](auto indices) { add_targets<indices()>(tile.n); }, call.indices);
    }
    with_constants([&](auto exact) { add_logits<exact()>(tile); }, problem.exact_sums);
    if (call.upstream) problem.read_scales(first_row, tile.n, arrays.scale);
    RegisterSum<T> sums;
    for (int64_t i = 0; i < tile.n; i += kLanes) {
      finish(i);
      sums.add(at(arrays.losses, i));
    }
    Sum sum_of_losses;
    sums.add_to(sum_of_losses);
    if (call.value) narrow(arrays.losses, tile.n, call.value_dtype, call.value, first_row, 1);
    if (call.gradient.data) write_gradient(tile);
    return sum_of_losses.value();
  }

  void write_gradient(const Tile& tile) const {
    const Rows& out = call.gradient;
    const bool direct = is_dtype<T>(out.dtype) && out.inner == 1;
    T* const first = direct ? elements<T>(out, tile.offset(out)) : arrays.logits;
    const int64_t stride = direct ? out.classes : width;
    // Stores go past the caches if the whole gradient is too large for them: reading in as many
    // lines at once as there are classes is slow. The first line must be aligned, and all lines
    // whole registers apart.
    const bool streams = direct &&
                         call.outer * call.classes * call.inner * sizeof(T) >= kStreamed &&
                         stride % kLanes == 0 && is_streamable(first);
    const auto write = [&](auto streamed, auto indices, auto smooth) FUSEDLOSS_INLINE {
      for_classes(tile.n, [=, n = tile.n, a = arrays, p = problem](auto count, int64_t c,
                                                                   int64_t i) FUSEDLOSS_INLINE {
        T* const to = first + c * stride + i;
        const Vec<T> zero(0);
        const Slope slope{at(a.factor, i), at(a.slope_scale, i), zero, zero};
        Vec<T> g[count];
        unrolled<count>([&](auto u) FUSEDLOSS_INLINE {
          if (direct && !streamed()) __builtin_prefetch(to + (u + count) * stride, 1, 2);
          const int64_t k = (c + u) * a.width + i;
          if constexpr (!indices()) {
            g[u] = Loss::gradient(slope, at(a.logits, k), at(a.target_shares, k));
          } else {
            g[u] = smooth() ? Loss::gradient(slope, at(a.logits, k), Vec<T>(p.class_weight(c + u)))
                            : Loss::gradient(slope, at(a.logits, k));
            g[u] = select(a.is_target(c + u, i), at(a.target_gradient, i), g[u]);
            // 0 in an ignored row, whatever it and the weights hold.
            if (a.any_ignored) g[u] = select(a.is_none(i), zero, g[u]);
          }
        });
        unrolled<count>([&](auto u)
                            FUSEDLOSS_INLINE { store(g[u], to + u * stride, n - i, streamed()); });
      });
    };
    with_constants(write, streams, call.indices, call.indices && loss.smooth);
    if (!direct) copier.template copy<true>(out, tile, first);
  }
};

}  // namespace

template <class Loss>
double rows_tiled(const RowsCall& call) {
  using T = typename Loss::Number;
  using Walk = TileWalk<Loss>;
  const RowProblem<Loss> problem(call);
  constexpr int64_t kLanes = Vec<T>::size();
  // 32 KiB of logits stay in the L1 cache between their uses. Lines of fewer than 128 rows cost
  // more than a tile that only the L2 cache holds; and no line has fewer than 32.
  const auto fit = [&](int64_t bytes) {
    return bytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(call.classes, 1);
  };
  const int64_t least = std::clamp<int64_t>(fit(256 << 10), 32, 128);
  // An odd number of registers, so that the lines of a column fall on different places in the
  // cache.
  const int64_t full = (std::clamp<int64_t>(fit(32 << 10), least, 4096) / kLanes | 1) * kLanes;
  const int64_t rows = std::max<int64_t>(call.inner, 1);
  const int64_t width = std::min(full, (rows + kLanes - 1) / kLanes * kLanes);
  const int64_t tiles = (call.inner + width - 1) / width;
  return sum_tasks<Walk>(
      call.threads, call.outer * tiles, [&] { return std::make_unique<Walk>(problem, width); },
      [&](Walk& walk, int64_t task) {
        const int64_t begin = task % tiles * width;
        return walk.process_tile({task / tiles, begin, std::min(width, call.inner - begin)});
      });
}

template double rows_tiled<CrossEntropyRow<float>>(const RowsCall& call);
template double rows_tiled<CrossEntropyRow<double>>(const RowsCall& call);

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
