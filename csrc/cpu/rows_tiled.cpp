// Losses over rows whose classes do not lie side by side, or are few, by tiles of neighbouring
// rows.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A tile is read
// from memory once and stays in the cache, class by class, with a row a lane.
#include <numeric>

#include "rows.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

// Bytes of an output for which a core can count on no cache until it is read.
constexpr size_t kStreamed = 16 << 20;
constexpr int kUnroll = 4;  // classes; summed in T before they go to double

template <class T>
FUSEDLOSS_HD Vec<T> at(const T* line, int64_t i) {
  return Vec<T>::loadu(line + i);
}
template <class T>
FUSEDLOSS_HD Vec<T> at(const Buffer<T>& line, int64_t i) {
  return at(line.data(), i);
}

// The rows [begin, begin + n) of the inner dimension, at one place of the outer one.
struct Tile {
  int64_t outer, begin, n;
  int64_t offset(const Rows& rows, int64_t c = 0, int64_t row = 0) const {
    return outer * rows.outer + c * rows.classes + (begin + row) * rows.inner;
  }
};

// Copies tiles to and from (classes, width) arrays, a line a class.
template <class T>
struct TileCopier {
  static constexpr int64_t kLanes = Vec<T>::size();
  const int64_t classes, width;
  const Buffer<T> row_buffer;  // rows whose classes lie side by side, in another dtype

  TileCopier(int64_t classes_, int64_t width_)
      : classes(classes_), width(width_), row_buffer(kLanes * classes_) {}

  // Whether rows are transposed on the way: where their classes lie side by side, and are enough to
  // fill registers.
  bool transposes(const Rows& rows) const { return rows.classes == 1 && classes >= kLanes; }

  void read(const Rows& rows, const Tile& tile, T* lines) const {
    if (tile.n < width) std::fill_n(lines, classes * width, T(0));
    for (int64_t c = 0; !transposes(rows) && c < classes; ++c) {
      widen(rows.dtype, rows.data, tile.offset(rows, c), rows.inner, tile.n, lines + c * width);
    }
    for (int64_t i = 0; transposes(rows) && i < tile.n; i += kLanes) {
      const int64_t count = std::min(kLanes, tile.n - i);
      if (is_dtype<T>(rows.dtype)) {
        const T* const from = static_cast<const T*>(rows.data) + tile.offset(rows, 0, i);
        transpose(from, rows.inner, lines + i, width, count, classes);
        continue;
      }
      for (int64_t k = 0; k < count; ++k) {
        T* const row = &row_buffer[k * classes];
        widen(rows.dtype, rows.data, tile.offset(rows, 0, i + k), 1, classes, row);
      }
      transpose(row_buffer.data(), classes, lines + i, width, count, classes);
    }
  }

  void write(const T* lines, const Rows& rows, const Tile& tile) const {
    void* const data = const_cast<void*>(rows.data);
    for (int64_t c = 0; !transposes(rows) && c < classes; ++c) {
      narrow(lines + c * width, tile.n, rows.dtype, data, tile.offset(rows, c), rows.inner);
    }
    for (int64_t i = 0; transposes(rows) && i < tile.n; i += kLanes) {
      const int64_t count = std::min(kLanes, tile.n - i);
      if (is_dtype<T>(rows.dtype)) {
        T* const to = output<T>(rows, tile.offset(rows, 0, i));
        transpose(lines + i, width, to, rows.inner, classes, count);
        continue;
      }
      transpose(lines + i, width, row_buffer.data(), classes, classes, count);
      for (int64_t k = 0; k < count; ++k) {
        const T* const row = &row_buffer[k * classes];
        narrow(row, classes, rows.dtype, data, tile.offset(rows, 0, i + k), 1);
      }
    }
  }
};

// The class indices of a tile's rows.
template <class T>
struct TileTargets {
  static constexpr Index<T> kNone = -1;
  const Buffer<Index<T>> target;  // kNone: the row is ignored, or lies beyond the tile's end
  const Buffer<Index<T>> class_ids;
  bool any_ignored = false;  // rows of the tile are

  TileTargets(int64_t classes, int64_t width) : target(width), class_ids(classes) {
    std::iota(class_ids.data(), class_ids.data() + classes, Index<T>(0));
  }

  void read(const int64_t* indices, int64_t ignore_index, int64_t n, int64_t width) {
    // The next tile's, which the hardware would not foresee in time.
    for (int64_t i = 0; i < width; i += 8) __builtin_prefetch(indices + width + i, 0, 2);
    Index<T>* const to = target.data();
    Index<T> any = 0;  // as wide as an index, so that the loop vectorises
    for (int64_t i = 0; i < n; ++i) {
      const bool ignored = indices[i] == ignore_index;
      to[i] = ignored ? kNone : static_cast<Index<T>>(indices[i]);
      any |= ignored;
    }
    any_ignored = any;
    std::fill(to + n, to + width, kNone);
  }

  // Which of the rows from i on have class c as their target, and which have none.
  struct Masks {
    const Index<T>*target, *class_ids;
    FUSEDLOSS_HD Mask<T> are(int64_t c, int64_t i) const { return are_index(class_ids[c], i); }
    FUSEDLOSS_HD Mask<T> are_none(int64_t i) const { return are_index(kNone, i); }
    FUSEDLOSS_HD Mask<T> are_index(Index<T> index, int64_t i) const {
      return same(Vec<Index<T>>::loadu(target + i), Vec<Index<T>>(index));
    }
  };
  Masks masks() const { return {target.data(), class_ids.data()}; }
};

// One tile after the other: `width` rows side by side, every class.
template <class Loss>
struct TileWalk {
  using T = typename Loss::Number;
  template <class N, class S = N>
  using State = typename Loss::template State<N, S>;
  static constexpr int64_t kLanes = Vec<T>::size();

  const RowProblem<Loss>& problem;
  const int64_t width;  // rows of a full tile: a multiple of kLanes
  const CrossEntropy& call = problem.call;
  const Loss& loss = problem.loss;
  const TileCopier<T> copier{call.classes, width};
  TileTargets<T> targets{call.classes, width};

  // (classes, width). The logits, in a copy, since lines of the input that lie a power of two apart
  // throw each other out of the cache; then e^(x - max), 0 for the target, in their place; then the
  // gradient, where it does not go to memory as T.
  const Buffer<T> logits{call.classes * width};
  const Buffer<T> target_shares{call.indices ? 0 : call.classes * width};  // q
  // Of each row: its state, whose sums are RegisterSums, and its target; then its loss and slope,
  // and what its gradient is multiplied by.
  const Buffer<T> max{width, 1}, target_logit{width, 1}, target_weight{width, 1};
  const Buffer<double> sum{at_sum(width)}, weighted_logits{at_sum(width), 0},
      target_mass{at_sum(width), 0}, scale{width, call.scale};
  const Buffer<T> losses{width}, slope_factor{width}, slope_scale{width}, target_gradient{width};

  TileWalk(const RowProblem<Loss>& p, int64_t w) : problem(p), width(w) {}

  // Where the RegisterSum of the rows from i on lies.
  static FUSEDLOSS_HD int64_t at_sum(int64_t i) { return i / kLanes * RegisterSum<T>::kSize; }

  // f(count, c, i) for the classes [c, c + count), count known to the compiler, in the rows from i
  // on, for every class and every register of n rows.
  template <class F>
  FUSEDLOSS_HD void for_classes(int64_t n, F&& f) const {
    int64_t c = 0;
    const auto line = [&](auto count) __attribute__((always_inline)) {
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
    std::fill_n(max.data(), width, -kInfinity<T>);
    for_classes(n, [=, to = logits.data(), to_stride = width, maxima = max.data(),
                    own = target_logit.data(), masks = targets.masks()](
                       auto count, int64_t c, int64_t i) __attribute__((always_inline)) {
      Vec<T> x[count], highest = at(maxima, i), target_x = at(own, i);
      unrolled<count>([&](auto u) __attribute__((always_inline)) {
        x[u] = load(from + (c + u) * from_stride + i, n - i, T(0));
      });
      unrolled<count>([&](auto u) __attribute__((always_inline)) {
        highest = larger(x[u], highest);
        if (!kIndices) return;
        const Mask<T> is_target = masks.are(c + u, i);
        target_x = select(is_target, x[u], target_x);
        x[u] = select(is_target, Vec<T>(-kInfinity<T>), x[u]);
      });
      unrolled<count>([&](auto u) { x[u].store(to + (c + u) * to_stride + i); });
      highest.store(maxima + i);
      if (kIndices) target_x.store(own + i);
    });
  }

  // Adds the targets of every class to the states: logit(c, i) and share(c, i) are x and q.
  template <bool kMass, class Logit, class Share>
  FUSEDLOSS_HD void add_targets(int64_t n, Logit logit, Share share) const {
    weighted_logits.fill(0);
    if (kMass) target_mass.fill(0);
    for_classes(n, [=, maxima = max.data(), to_logits = weighted_logits.data(),
                    to_mass = target_mass.data()](auto count, int64_t c, int64_t i)
                       __attribute__((always_inline)) {
                         State<Vec<T>> few{at(maxima, i), Vec<T>(0), Vec<T>(0), Vec<T>(0)};
                         unrolled<count>([&](auto u) __attribute__((always_inline)) {
                           Loss::add_target(few, logit(c + u, i), share(c + u, i));
                         });
                         add_to(to_logits + at_sum(i), few.weighted_logits);
                         if (kMass) add_to(to_mass + at_sum(i), few.target_mass);
                       });
  }
  static FUSEDLOSS_HD void add_to(double* sum, Vec<T> x) {
    (RegisterSum<T>::load(sum) + x).store(sum);
  }

  // Adds the logits of every class to the states, each alone with kExact, and leaves e^(x - max) in
  // their place. Prefetches the next tile meanwhile: its lines lie in as many pages as there are
  // classes, and begin where no hardware foresees it.
  template <bool kExact>
  void add_logits(const Tile& tile) const {
    sum.fill(0);
    const int64_t size = bytes_of(call.input.dtype);
    for_classes(tile.n, [=, stride = width, x = logits.data(), maxima = max.data(), to = sum.data(),
                         ahead = address(call.input, tile.offset(call.input, 0, width)),
                         line = call.input.classes * size, step = call.input.inner * size](
                            auto count, int64_t c, int64_t i) __attribute__((always_inline)) {
      using S = std::conditional_t<kExact, RegisterSum<T>, Vec<T>>;
      S start;
      if constexpr (kExact) {
        start = RegisterSum<T>::load(to + at_sum(i));
      } else {
        start = Vec<T>(0);
      }
      State<Vec<T>, S> few{at(maxima, i), start, Vec<T>(0), Vec<T>(0)};
      Vec<T> e[count];
      unrolled<count>([&](auto u) __attribute__((always_inline)) {
        __builtin_prefetch(ahead + (c + u) * line + i * step, 0, 2);
        e[u] = Loss::add(few, at(x + (c + u) * stride, i));
      });
      unrolled<count>([&](auto u) { e[u].store(x + (c + u) * stride + i); });
      if constexpr (kExact) {
        few.sum.store(to + at_sum(i));
      } else {
        add_to(to + at_sum(i), few.sum);
      }
    });
  }

  // The losses of the rows from i on, and their slopes.
  FUSEDLOSS_HD void finish(int64_t i) const {
    const auto lanes = [&](const Buffer<double>& sums) __attribute__((always_inline)) {
      return RegisterSum<T>::load(&sums[at_sum(i)]).lanes();
    };
    const Wide<T> sums = lanes(sum), logit_sums = lanes(weighted_logits),
                  masses = lanes(target_mass), scales = Wide<T>::load(&scale[i]);
    const Vec<T> gap = at(target_logit, i) - at(max, i),
                 target_exp = call.indices ? exp_nonpositive(gap) : Vec<T>(0);
    const Wide<T> target_exps = widen(target_exp), weights = widen(at(target_weight, i));
    Wide<T> excess;
    unrolled<Wide<T>::kParts>([&](auto p) __attribute__((always_inline)) {
      excess.part[p] = Loss::excess(sums.part[p], target_exps.part[p]);
    });
    const typename Loss::template Row<Vec<T>> row{
        {at(max, i), narrow(sums), narrow(logit_sums), narrow(masses)},
        gap,
        target_exp,
        at(target_weight, i),
        narrow(excess)};
    select(targets.masks().are_none(i), Vec<T>(0), loss.loss(row)).store(&losses[i]);
    if (!call.gradient.data) return;
    const Vec<double> unread(0);
    Wide<T> factors, row_scales, target_gradients;
    unrolled<Wide<T>::kParts>([&](auto p) __attribute__((always_inline)) {
      const typename Loss::Exact::template Row<Vec<double>> exact_row{
          {unread, sums.part[p], unread, masses.part[p]},
          unread,
          target_exps.part[p],
          weights.part[p],
          unread};
      const auto slope = problem.exact.slope(exact_row, scales.part[p]);
      factors.part[p] = slope.factor;
      row_scales.part[p] = slope.scale;
      target_gradients.part[p] = problem.exact.target_gradient(slope, weights.part[p]);
    });
    narrow(factors).store(&slope_factor[i]);
    narrow(row_scales).store(&slope_scale[i]);
    narrow(target_gradients).store(&target_gradient[i]);
  }

  void read_targets(const Tile& tile, int64_t first_row) {
    if (call.indices) {
      targets.read(call.indices + first_row, call.ignore_index, tile.n, width);
      for (int64_t i = 0; problem.weight && i < tile.n; ++i) {
        const Index<T> target = targets.target[i];
        target_weight[i] = target == targets.kNone ? T(0) : problem.weight[target];
      }
      return;
    }
    std::fill(std::fill_n(targets.target.data(), tile.n, 0), targets.target.data() + width,
              targets.kNone);
    copier.read(call.probabilities, tile, target_shares.data());
    if (!problem.weight && !loss.smooth) return;
    for (int64_t c = 0; c < call.classes; ++c) {
      const Vec<T> w(problem.class_weight(c));
      T* const q = &target_shares[c * width];
      for (int64_t i = 0; i < tile.n; i += kLanes) loss.target_share(at(q, i), w).store(q + i);
    }
  }

  void read_logits(const Tile& tile) const {
    const T* from = logits.data();
    int64_t stride = width;
    if (is_dtype<T>(call.input.dtype) && call.input.inner == 1) {
      from = static_cast<const T*>(call.input.data) + tile.offset(call.input);
      stride = call.input.classes;
    } else {
      copier.read(call.input, tile, logits.data());
    }
    if (call.indices) {
      find_max<true>(from, stride, tile.n);
    } else {
      find_max<false>(from, stride, tile.n);
    }
  }

  double process_tile(const Tile& tile) {
    const int64_t first_row = tile.outer * call.inner + tile.begin;
    read_targets(tile, first_row);
    read_logits(tile);
    const auto line = [=, x = logits.data(), stride = width](int64_t c, int64_t i)
                          __attribute__((always_inline)) { return at(x + c * stride, i); };
    if (!call.indices) {
      add_targets<true>(tile.n, line,
                        [q = target_shares.data(), stride = width](int64_t c, int64_t i)
                            __attribute__((always_inline)) { return at(q + c * stride, i); });
    } else if (loss.smooth) {
      add_targets<false>(
          tile.n,
          [=, own = target_logit.data(), masks = targets.masks()](int64_t c, int64_t i)
              __attribute__((always_inline)) {
                return select(masks.are(c, i), at(own, i), line(c, i));
              },
          [p = problem](int64_t c, int64_t) { return Vec<T>(p.class_weight(c)); });
    }
    if (problem.keeps_small) {
      add_logits<true>(tile);
    } else {
      add_logits<false>(tile);
    }
    for (int64_t i = 0; call.upstream && i < tile.n; ++i) {
      scale[i] = problem.row_scale(first_row + i);
    }
    RegisterSum<T> sums;
    for (int64_t i = 0; i < tile.n; i += kLanes) {
      finish(i);
      sums.add(at(losses, i));
    }
    Sum sum_of_losses;
    sums.add_to(sum_of_losses);
    if (call.value) narrow(losses.data(), tile.n, call.value_dtype, call.value, first_row, 1);
    if (call.gradient.data) write_gradient(tile);
    return sum_of_losses.value();
  }

  // gradient(c, i), of the class c in the rows from i on, goes to `first`, a line a class.
  template <bool kStreams, class F>
  FUSEDLOSS_HD void write_lines(T* first, int64_t stride, int64_t n, bool direct,
                                F gradient) const {
    for_classes(n, [=](auto count, int64_t c, int64_t i) __attribute__((always_inline)) {
      T* const to = first + c * stride + i;
      Vec<T> g[count];
      unrolled<count>([&](auto u) __attribute__((always_inline)) {
        if (direct && !kStreams) __builtin_prefetch(to + (u + count) * stride, 1, 2);
        g[u] = gradient(c + u, i);
      });
      unrolled<count>([&](auto u) __attribute__((always_inline)) {
        store(g[u], to + u * stride, n - i, kStreams);
      });
    });
  }
  template <class F>
  FUSEDLOSS_HD void write_classes(const Tile& tile, F gradient) const {
    const Rows& out = call.gradient;
    const bool direct = is_dtype<T>(out.dtype) && out.inner == 1;
    T* const first = direct ? output<T>(out, tile.offset(out)) : logits.data();
    const int64_t stride = direct ? out.classes : width;
    // Past the caches, if the whole is too large for them: as many lines at once as there are
    // classes are slow to read in. The first line is aligned, and all are whole registers apart.
    const size_t bytes = call.outer * call.classes * call.inner * sizeof(T);
    if (direct && bytes >= kStreamed && stride % kLanes == 0 && is_streamable(first)) {
      write_lines<true>(first, stride, tile.n, direct, gradient);
    } else {
      write_lines<false>(first, stride, tile.n, direct, gradient);
    }
    if (!direct) copier.write(first, out, tile);
  }

  void write_gradient(const Tile& tile) const {
    const int64_t stride = width;
    const T *const e = logits.data(), *const q = target_shares.data();
    const auto slope = [factors = slope_factor.data(),
                        scales = slope_scale.data()](int64_t i) __attribute__((always_inline)) {
      return typename Loss::template Slope<Vec<T>>{at(factors, i), at(scales, i), Vec<T>(0)};
    };
    // g, but the target's own gradient; and 0 in an ignored row, whatever it and the weights hold.
    const auto with_target = [own = target_gradient.data(), masks = targets.masks(),
                              any_ignored = targets.any_ignored](Vec<T> g, int64_t c, int64_t i)
                                 __attribute__((always_inline)) {
                                   g = select(masks.are(c, i), at(own, i), g);
                                   if (!any_ignored) return g;
                                   return select(masks.are_none(i), Vec<T>(0), g);
                                 };
    if (!call.indices) {
      write_classes(tile, [=](int64_t c, int64_t i) __attribute__((always_inline)) {
        return Loss::gradient(slope(i), at(e + c * stride, i), at(q + c * stride, i));
      });
    } else if (loss.smooth) {
      write_classes(tile, [=, p = problem](int64_t c, int64_t i) __attribute__((always_inline)) {
        const Vec<T> w(p.class_weight(c));
        return with_target(Loss::gradient(slope(i), at(e + c * stride, i), w), c, i);
      });
    } else {
      write_classes(tile, [=](int64_t c, int64_t i) __attribute__((always_inline)) {
        return with_target(Loss::gradient(slope(i), at(e + c * stride, i)), c, i);
      });
    }
  }
};

}  // namespace

template <class Loss>
double rows_tiled(const CrossEntropy& call) {
  using T = typename Loss::Number;
  using Walk = TileWalk<Loss>;
  const RowProblem<Loss> problem(call);
  constexpr int64_t kLanes = Vec<T>::size();
  // Logits of 32 KiB stay in the L1 cache through their uses. But lines of fewer than 128 rows cost
  // more than more logits do, as long as the L2 cache holds them; and 32 rows they always have.
  const auto fit = [&](int64_t bytes) {
    return bytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(call.classes, 1);
  };
  const int64_t least = std::clamp<int64_t>(fit(256 << 10), 32, 128);
  // An odd number of registers: the lines of one column then differ in their place in the cache.
  const int64_t full = (std::clamp<int64_t>(fit(32 << 10), least, 4096) / kLanes | 1) * kLanes;
  const int64_t rows = std::max<int64_t>(call.inner, 1);
  const int64_t width = std::min(full, (rows + kLanes - 1) / kLanes * kLanes);
  const int64_t tiles = (call.inner + width - 1) / width;
  return sum_tasks<Walk>(
      call.outer * tiles, [&] { return std::make_unique<Walk>(problem, width); },
      [&](Walk& walk, int64_t task) {
        const int64_t begin = task % tiles * width;
        return walk.process_tile({task / tiles, begin, std::min(width, call.inner - begin)});
      });
}

template double rows_tiled<CrossEntropyRow<float>>(const CrossEntropy& call);
template double rows_tiled<CrossEntropyRow<double>>(const CrossEntropy& call);

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
