// The cross-entropy engine on the CPU.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A row (or a tile
// of neighbouring rows, where the class dimension is not innermost, or short) is read from memory
// once and stays in the cache for its second use.
#include <ATen/Parallel.h>

#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../math/cross_entropy.h"
#include "../math/sum.h"
#include "staging.h"
#include "stream.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTask = 32768;  // elements a task, at least: ATen's own grain
constexpr int64_t kBlock = 1024;  // elements of a row at a time
// Bytes of an output for which a core can count on no cache until it is read.
constexpr size_t kStreamed = 16 << 20;

// ---- what both walks share ----------------------------------------------------------------------

template <class T>
struct Problem {
  const CrossEntropy& call;
  const T* weight;
  Shares<T> shares;
  Shares<double> exact;

  explicit Problem(const CrossEntropy& c)
      : call(c),
        weight(static_cast<const T*>(c.weight)),
        shares(c.indices, c.label_smoothing, static_cast<double>(c.classes), c.weight_sum),
        exact(c.indices, c.label_smoothing, static_cast<double>(c.classes), c.weight_sum) {}

  bool ignored(int64_t row) const { return call.indices && call.indices[row] == call.ignore_index; }
  T class_weight(int64_t c) const { return weight ? weight[c] : T(1); }
  double row_scale(int64_t row) const {
    return call.upstream ? call.scale * double(static_cast<const T*>(call.upstream)[row])
                         : call.scale;
  }
};

const char* address(const Rows& rows, int64_t offset) {
  return static_cast<const char*>(rows.data) + offset * bytes_of(rows.dtype);
}

// Asks for what is used next, a register at a time: an engine that loads and computes by turns
// leaves memory idle half of the time. What lies beyond the end of data does nothing.
struct Ahead {
  const char *to_read, *to_write;
  int64_t read_size, write_size;

  Ahead(const Rows& in, int64_t in_offset, const Rows& out, int64_t out_offset)
      : to_read(address(in, in_offset)),
        to_write(address(out, out_offset)),
        read_size(bytes_of(in.dtype)),
        write_size(bytes_of(out.dtype)) {}

  // Inlined: a function that only prefetches the compiler takes for one without effect.
  FUSEDLOSS_HD void read(int64_t i) const { __builtin_prefetch(to_read + i * read_size, 0, 2); }
  FUSEDLOSS_HD void write(int64_t i) const { __builtin_prefetch(to_write + i * write_size, 1, 2); }
};

template <class T>
Vec<T> load(const T* p, int64_t count, T rest) {
  if (count >= Vec<T>::size()) return Vec<T>::loadu(p);
  return Vec<T>::set(Vec<T>(rest), Vec<T>::loadu(p, count), count);
}

template <class T>
void store(Vec<T> v, T* p, int64_t count) {
  if (count >= Vec<T>::size()) {
    v.store(p);
  } else {
    v.store(p, static_cast<int>(count));
  }
}

template <class T>
FUSEDLOSS_HD void store(Vec<T> v, T* p, int64_t count, bool streams) {
  if (streams && count >= Vec<T>::size()) {
    stream(v, p);
  } else {
    store(v, p, count);
  }
}

template <class T>
double total(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  double sums[4] = {};  // not one chain of additions
  unrolled<Vec<T>::size()>([&](auto i) { sums[i % 4] += lanes[i]; });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// For every register of [0, n): f(i, lanes in use, which of the accumulators to use).
template <class T, class F>
FUSEDLOSS_HD void for_registers(int64_t n, F&& f) {
  constexpr int64_t kLanes = Vec<T>::size();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    f(i, kLanes, 0);
    f(i + kLanes, kLanes, 1);
    f(i + 2 * kLanes, kLanes, 2);
    f(i + 3 * kLanes, kLanes, 3);
  }
  for (; i < n; i += kLanes) f(i, std::min(kLanes, n - i), 0);
}

template <class T>
struct Accumulators {
  Vec<T> v[4];
  explicit Accumulators(T start) : v{Vec<T>(start), Vec<T>(start), Vec<T>(start), Vec<T>(start)} {}
  Vec<T> sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
};

// The larger of two; of nan, either: a nan logit makes its row's sum nan whatever max is.
template <class T>
Vec<T> larger(Vec<T> a, Vec<T> b) {
  return at::vec::clamp_min(a, b);
}

template <class T>
T largest(const T* x, int64_t n) {
  Accumulators<T> top(-std::numeric_limits<T>::infinity());
  for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
    top.v[u] = larger(top.v[u], load(x + i, count, -std::numeric_limits<T>::infinity()));
  });
  return at::vec::vec_reduce_all<T>([](Vec<T>& a, Vec<T>& b) { return larger(a, b); },
                                    larger(larger(top.v[0], top.v[1]), larger(top.v[2], top.v[3])));
}

// Adds the logits x of one block, but not x[target], to max and sum; e^(x - max) goes to keep as
// well, if not null, to be written next. target may lie outside of [0, n). max counts the target's
// logit already.
template <class T>
void add_exponentials(const T* x, int64_t n, int64_t target, T& top, double& sum, T* keep,
                      Ahead ahead) {
  const T block_top = largest(x, n);
  if (block_top > top) {
    if (sum != 0) sum *= std::exp(double(top) - double(block_top));
    top = block_top;
  }
  // All -inf so far, or nan, which is told from it by their sum.
  if (top == -std::numeric_limits<T>::infinity()) {
    for (int64_t i = 0; i < n; ++i)
      sum += x[i] == x[i] ? 0 : std::numeric_limits<double>::quiet_NaN();
    if (keep) std::fill(keep, keep + n, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  // The target's register, without it.
  constexpr int64_t kLanes = Vec<T>::size();
  T others[kLanes];
  int64_t own = -1;
  if (0 <= target && target < n) {
    own = target / kLanes * kLanes;
    std::copy_n(x + own, std::min(kLanes, n - own), others);
    others[target - own] = -std::numeric_limits<T>::infinity();
  }
  const auto add = [&](auto keeps) {
    Accumulators<T> parts(T(0));
    for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
      ahead.read(i);
      const Vec<T> logits =
          load(i == own ? others : x + i, count, -std::numeric_limits<T>::infinity());
      const Vec<T> e = exp_nonpositive(logits - Vec<T>(top));
      parts.v[u] = parts.v[u] + e;
      if constexpr (keeps()) {
        ahead.write(i);
        store(e, keep + i, count);
      }
    });
    sum += total(parts.sum());
  };
  if (keep) {
    add(std::true_type());
  } else {
    add(std::false_type());
  }
}

// Adds q (x - origin) to dot and q to seen; q null: 1.
template <class T>
void add_distances(const T* x, const T* q, int64_t n, T origin, double& dot, double& seen) {
  Accumulators<T> dots(T(0)), counts(T(0));
  for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
    Vec<T> d = load(x + i, count, origin) - Vec<T>(origin);
    if (q) {
      const Vec<T> qi = load(q + i, count, T(0));
      counts.v[u] = counts.v[u] + qi;
      d = d * qi;
    }
    dots.v[u] = dots.v[u] + d;
  });
  dot += total(dots.sum());
  seen += q ? total(counts.sum()) : static_cast<double>(n);
}

// ---- class dimension innermost: row by row ------------------------------------------------------

// Rows of one block end together, a register of them: logarithms and quotients of a row alone cost
// as much as a few hundred of its classes.
template <class T>
struct RowWalk {
  static constexpr int64_t kGroup = Vec<double>::size();
  using Line = std::array<double, kGroup>;
  const Problem<T>& problem;
  const CrossEntropy& call = problem.call;
  // A row of one block keeps its e^(x - max) between the loss and the gradient.
  const bool one_block = call.classes <= kBlock, keeps = one_block && call.gradient.data;
  const int64_t group = one_block ? kGroup : 1;  // rows
  T logits[kBlock], wanted[kBlock], kept[kGroup][kBlock], gradient[kBlock];
  RowSums<Line> sums{};
  RowSlope<Line> slopes{};
  Line losses, scales{};

  explicit RowWalk(const Problem<T>& p) : problem(p) {}

  const T* block(const Rows& rows, int64_t offset, int64_t at, int64_t n, T* scratch) {
    if (rows.classes == 1 && is_dtype<T>(rows.dtype)) {
      return static_cast<const T*>(rows.data) + offset + at;
    }
    widen(rows.dtype, rows.data, offset + at * rows.classes, rows.classes, n, scratch);
    return scratch;
  }

  // q of the classes [at, at + n), for class probabilities.
  const T* mass(int64_t offset, int64_t at, int64_t n) {
    const T* y = block(call.probabilities, offset, at, n, wanted);
    if (!problem.weight && !problem.shares.smooth) return y;
    for_registers<T>(n, [&](int64_t i, int64_t count, int) {
      Vec<T> q =
          load(y + i, count, T(0)) * Vec<T>(problem.shares.keep) + Vec<T>(problem.shares.spread);
      if (problem.weight) q = q * load(problem.weight + at + i, count, T(0));
      store(q, wanted + i, count);
    });
    return wanted;
  }

  void reduce(int64_t k, int64_t offset, int64_t target_offset, int64_t out_offset,
              int64_t target) {
    const T logit = *block(call.input, offset, std::max<int64_t>(target, 0), 1, logits);
    T top = target >= 0 ? logit : -std::numeric_limits<T>::infinity();
    // Distances are measured from the largest logit so far, so that all have one sign and none
    // cancel: `dot` over classes that count `seen` in all moves with it.
    double sum = 0, dot = 0, seen = 0, origin = 0;
    for (int64_t at = 0; at < call.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, call.classes - at);
      const T* const x = block(call.input, offset, at, n, logits);
      // The next block, or the next row's first; and this one's gradient.
      const Ahead ahead(call.input, offset + at + n, call.gradient, out_offset);
      add_exponentials(x, n, target - at, top, sum, keeps ? kept[k] : nullptr, ahead);
      if (call.indices && !problem.shares.smooth) continue;
      const double next = std::isfinite(top) ? top : origin;
      dot += seen * (origin - next);
      origin = next;
      const T* const q = call.indices ? (problem.weight ? problem.weight + at : nullptr)
                                      : mass(target_offset, at, n);
      add_distances(x, q, n, static_cast<T>(origin), dot, seen);
    }
    sums.max[k] = top;
    sums.sum[k] = sum;
    sums.dot[k] = dot;
    sums.mass[k] = seen;
    sums.gap[k] = double(logit) - double(top);
    sums.weight[k] = problem.class_weight(std::max<int64_t>(target, 0));
  }

  // The losses and slopes of the rows that were reduced.
  void finish() {
    using V = Vec<double>;
    const auto at = [](const Line& line) { return V::loadu(line.data()); };
    const RowSums<V> row{at(sums.max),   at(sums.sum), at(sums.dot),
                         at(sums.mass),  at(sums.gap), exp_nonpositive(at(sums.gap)),
                         at(sums.weight)};
    problem.shares.loss(row).store(losses.data());
    if (!call.gradient.data) return;
    const RowSlope<V> slope = problem.shares.slope(row, at(scales));
    slope.factor.store(slopes.factor.data());
    slope.scale.store(slopes.scale.data());
    slope.own.store(slopes.own.data());
  }

  void write_gradient(int64_t k, int64_t offset, int64_t target_offset, int64_t out_offset,
                      int64_t target) {
    const RowSlope<double> s{slopes.factor[k], slopes.scale[k], slopes.own[k]};
    const Vec<T> top(sums.max[k]), factor(s.factor), scale(s.scale);
    const bool direct = is_dtype<T>(call.gradient.dtype);
    T* out = gradient;
    for (int64_t at = 0; at < call.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, call.classes - at);
      const T* x = one_block ? kept[k] : block(call.input, offset, at, n, logits);
      const T* q = nullptr;
      if (!call.indices) {
        q = mass(target_offset, at, n);
      } else if (problem.shares.smooth && problem.weight) {
        q = problem.weight + at;
      }
      if (direct) out = static_cast<T*>(const_cast<void*>(call.gradient.data)) + out_offset + at;
      const auto exponential = [&](auto subtract) {
        for_registers<T>(n, [&](int64_t i, int64_t count, int) {
          const Vec<T> e = one_block ? load(x + i, count, T(0))
                                     : exp_nonpositive(load(x + i, count, T(0)) - top);
          store(subtract(e * factor, i, count), out + i, count);
        });
      };
      if (q) {
        exponential([&](Vec<T> g, int64_t i, int64_t count) {
          return g - load(q + i, count, T(0)) * scale;
        });
      } else if (problem.shares.smooth) {
        exponential([&](Vec<T> g, int64_t, int64_t) { return g - scale; });
      } else {
        exponential([](Vec<T> g, int64_t, int64_t) { return g; });
      }
      if (at <= target && target < at + n) {
        const double smooth = problem.shares.smooth ? sums.weight[k] * s.scale : 0;
        out[target - at] = static_cast<T>(s.own * s.factor - smooth);
      }
      if (!direct) {
        narrow(out, n, call.gradient.dtype, const_cast<void*>(call.gradient.data), out_offset + at,
               1);
      }
    }
  }

  void clear_gradient(int64_t out_offset) {
    with_type(call.gradient.dtype, [&](auto tag) {
      using D = decltype(tag);
      D* out = static_cast<D*>(const_cast<void*>(call.gradient.data)) + out_offset;
      std::fill(out, out + call.classes, D(0));
    });
  }

  // The rows [begin, begin + n), n <= group; their losses go to sum, in order.
  void some(int64_t begin, int64_t n, Sum& sum) {
    const auto offset = [&](const Rows& rows, int64_t k) {
      const int64_t o = (begin + k) / call.inner, i = (begin + k) % call.inner;
      return o * rows.outer + i * rows.inner;
    };
    const auto target = [&](int64_t k) { return call.indices ? call.indices[begin + k] : -1; };
    for (int64_t k = 0; k < n; ++k) {
      if (problem.ignored(begin + k)) continue;
      reduce(k, offset(call.input, k), offset(call.probabilities, k), offset(call.gradient, k),
             target(k));
      scales[k] = problem.row_scale(begin + k);
    }
    finish();
    for (int64_t k = 0; k < n; ++k) {
      const bool ignored = problem.ignored(begin + k);
      const T value = ignored ? T(0) : static_cast<T>(losses[k]);
      sum.add(value);
      if (call.value) narrow(&value, 1, call.value_dtype, call.value, begin + k, 1);
      if (!call.gradient.data) continue;
      if (ignored) {
        clear_gradient(offset(call.gradient, k));
      } else {
        write_gradient(k, offset(call.input, k), offset(call.probabilities, k),
                       offset(call.gradient, k), target(k));
      }
    }
  }
};

// Sums task(walk, t) over every t, in parallel, a walk a thread; the sums are added in order.
template <class Walk, class Make, class Task>
double sum_tasks(int64_t tasks, Make&& make, Task&& task) {
  std::vector<double> sums(tasks);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<Walk> walk = make();
    for (int64_t t = first; t < last; ++t) sums[t] = task(*walk, t);
  });
  Sum sum;
  for (double s : sums) sum.add(s);
  return sum.value();
}

template <class T>
double by_row(const CrossEntropy& call) {
  const Problem<T> problem(call);
  const int64_t rows = call.outer * call.inner;
  const int64_t step = std::max<int64_t>(1, kTask / std::max<int64_t>(call.classes, 1));
  return sum_tasks<RowWalk<T>>((rows + step - 1) / step,
                               [&] { return std::make_unique<RowWalk<T>>(problem); },
                               [&](RowWalk<T>& walk, int64_t task) {
                                 const int64_t end = std::min(rows, (task + 1) * step);
                                 Sum sum;
                                 for (int64_t row = task * step; row < end; row += walk.group)
                                   walk.some(row, std::min(walk.group, end - row), sum);
                                 return sum.value();
                               });
}

// ---- class dimension not innermost, or short: tiles of neighbouring rows ------------------------

// One tile: `width` rows side by side, every class. Arrays are (classes, width) or (width).
template <class T>
struct TileWalk {
  static constexpr int64_t kLanes = Vec<T>::size();
  static constexpr int kFlush = 4;  // classes summed in T before they go to double
  const Problem<T>& problem;
  const int64_t width;  // rows a full tile: a multiple of kLanes
  const CrossEntropy& call = problem.call;

  // The logits, class by class: a copy, since lines of the input that lie a power of two apart
  // throw each other out of the cache. Then e^(x - max), 0 for the target, in their place; then the
  // gradient, where it does not go to memory as T.
  std::vector<T> table, wanted;
  std::vector<T> top, sum, dot, mass, logit, weight, scale, losses;
  std::vector<T> few;  // rows on their way, where classes lie side by side in another dtype
  std::vector<double> wide_sum, wide_mass, wide_scale;
  // For class indices: where in the table each row's target stands (an ignored row's: class 0).
  std::vector<int64_t> own;
  int64_t ignored = 0;  // rows of the tile

  TileWalk(const Problem<T>& p, int64_t w)
      : problem(p), width(w), table(call.classes * w), wanted(call.indices ? 0 : call.classes * w) {
    for (auto* line : {&top, &sum, &dot, &mass, &logit, &weight, &scale, &losses}) {
      line->resize(w, T(1));
    }
    for (auto* line : {&wide_sum, &wide_mass, &wide_scale}) line->resize(w, 1.0);
    own.resize(call.indices ? w : 0);
    few.resize(kLanes * call.classes);
  }

  static Vec<T> at(const T* line, int64_t i) { return Vec<T>::loadu(line + i); }

  static int64_t offset(const Rows& rows, int64_t o, int64_t c, int64_t begin) {
    return o * rows.outer + c * rows.classes + begin * rows.inner;
  }

  // Whether rows are read and written as they lie and transposed on the way: where their classes
  // lie side by side, and are enough to fill registers.
  bool transposes(const Rows& rows) const { return rows.classes == 1 && call.classes >= kLanes; }

  // The tile's n rows of every class, as lines of width.
  void read(const Rows& rows, int64_t o, int64_t begin, int64_t n, T* lines) {
    if (n < width) std::fill_n(lines, call.classes * width, T(0));
    if (!transposes(rows)) {
      for (int64_t c = 0; c < call.classes; ++c) {
        widen(rows.dtype, rows.data, offset(rows, o, c, begin), rows.inner, n, lines + c * width);
      }
      return;
    }
    for_lanes(n, [&](int64_t first, int64_t count) {
      const int64_t from = offset(rows, o, 0, begin + first);
      const T* data = static_cast<const T*>(rows.data) + from;
      int64_t step = rows.inner;
      if (!is_dtype<T>(rows.dtype)) {
        for (int64_t k = 0; k < count; ++k) {
          widen(rows.dtype, rows.data, from + k * rows.inner, 1, call.classes,
                &few[k * call.classes]);
        }
        data = few.data();
        step = call.classes;
      }
      at::vec::transpose_mxn<T>(data, step, lines + first, width, static_cast<int>(count),
                                static_cast<int>(call.classes));
    });
  }

  // The gradient, back from the table.
  void write(const Rows& rows, int64_t o, int64_t begin, int64_t n) {
    void* const data = const_cast<void*>(rows.data);
    if (!transposes(rows)) {
      for (int64_t c = 0; c < call.classes; ++c) {
        narrow(&table[c * width], n, rows.dtype, data, offset(rows, o, c, begin), rows.inner);
      }
      return;
    }
    for_lanes(n, [&](int64_t first, int64_t count) {
      const int64_t to = offset(rows, o, 0, begin + first);
      const bool direct = is_dtype<T>(rows.dtype);
      at::vec::transpose_mxn<T>(&table[first], width, direct ? static_cast<T*>(data) + to : &few[0],
                                direct ? rows.inner : call.classes, static_cast<int>(call.classes),
                                static_cast<int>(count));
      for (int64_t k = 0; !direct && k < count; ++k) {
        narrow(&few[k * call.classes], call.classes, rows.dtype, data, to + k * rows.inner, 1);
      }
    });
  }

  // f(first, count) for every kLanes of the tile's n rows.
  template <class F>
  static void for_lanes(int64_t n, F&& f) {
    for (int64_t first = 0; first < n; first += kLanes) f(first, std::min(kLanes, n - first));
  }

  // For each class c, f = make(c), and f(i) for each register of the tile's n rows. What f needs is
  // found by make: in f's own loop every store of a register would have it loaded again.
  template <class Make>
  void for_classes(int64_t n, Make&& make) {
    for (int64_t c = 0; c < call.classes; ++c) {
      const auto f = make(c);
      for (int64_t i = 0; i < n; i += kLanes) f(i);
    }
  }

  // Sums f(c, i) of every class c into to, and with more digits into wide: kFlush classes at a time
  // in T, and these sums in double. kept, if not null, is where (classes, width) f(c, i) stay,
  // which may be what f reads. f goes by value, as what make returns does above.
  template <class F>
  void accumulate(int64_t n, T* to, std::vector<double>& wide, F f, T* kept = nullptr) {
    std::fill(wide.begin(), wide.end(), 0.0);
    int64_t c = 0;
    const auto some = [&](auto count) {
      for (int64_t i = 0; i < n; i += kLanes) {
        Vec<T> values[count], part(0);
        unrolled<count>([&](auto u) __attribute__((always_inline)) { values[u] = f(c + u, i); });
        unrolled<count>([&](auto u) __attribute__((always_inline)) {
          part = part + values[u];
          if (kept) values[u].store(kept + (c + u) * width + i);
        });
        part.store(to + i);
      }
      for (int64_t i = 0; i < n; ++i) wide[i] += to[i];
      c += count;
    };
    while (c + kFlush <= call.classes) some(std::integral_constant<int, kFlush>());
    while (c < call.classes) some(std::integral_constant<int, 1>());
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(wide[i]);
  }

  void find_targets(int64_t row0, int64_t n) {
    const int64_t *const indices = call.indices + row0, stride = width, ignore = call.ignore_index;
    // The next tile's, which hardware would begin to foresee when it is over.
    for (int64_t i = 0; i < width; i += 8) __builtin_prefetch(indices + width + i, 0, 2);
    int64_t* const place = own.data();
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool skip = indices[i] == ignore;
      count += skip;
      place[i] = (skip ? 0 : indices[i]) * stride + i;
    }
    ignored = count;
  }

  // What every element of a row is multiplied by, rounded once, in the place of sum and scale; and
  // for the target's element what the gradient, multiplied by that, is right with.
  void find_slopes(int64_t row0, int64_t n) {
    // Not left to one loop: vectorised, it would load through a null pointer under an empty mask,
    // which is slow.
    if (call.upstream) {
      for (int64_t i = 0; i < n; ++i) wide_scale[i] = problem.row_scale(row0 + i);
    } else {
      std::fill_n(wide_scale.begin(), n, call.scale);
    }
    // For one kind of call, so that its loop vectorises; which asks also that what is written is
    // none of what is read.
    const auto find = [&](auto indices, auto smooth) {
      Shares<double> shares = problem.exact;
      shares.indices = indices();
      shares.smooth = smooth();
      const double *const scales = wide_scale.data(), *const sums = wide_sum.data(),
                          *const masses = wide_mass.data();
      const T *const at_target = top.data(), *const weights = weight.data();
      T *__restrict const factor = sum.data(), *__restrict const part = scale.data(),
                         *__restrict const slope = logit.data();
      for (int64_t i = 0; i < n; ++i) {
        const double w = weights[i];
        const RowSlope<double> s =
            shares.slope(RowSums<double>{0, sums[i], 0, masses[i], 0, at_target[i], w}, scales[i]);
        factor[i] = static_cast<T>(s.factor);
        part[i] = static_cast<T>(s.scale);
        // That g = own * factor - w * part is off by no more than its own roundings.
        const double f = factor[i];
        const double error = shares.smooth ? w * (double(part[i]) - s.scale) : 0;
        const double better = (s.own * s.factor + error) / f;
        slope[i] = static_cast<T>(std::isfinite(better) ? better : s.own);
      }
    };
    if (!call.indices) {
      find(std::false_type(), std::false_type());
    } else if (problem.shares.smooth) {
      find(std::true_type(), std::true_type());
    } else {
      find(std::true_type(), std::false_type());
    }
  }

  double one(int64_t o, int64_t begin, int64_t n) {
    const int64_t row0 = o * call.inner + begin;
    T* const x = table.data();
    const int64_t stride = width;
    if (!call.indices) {
      read(call.probabilities, o, begin, n, wanted.data());
      if (problem.weight || problem.shares.smooth) {
        for_classes(n, [&](int64_t c) {
          T* const q = &wanted[c * stride];
          const Vec<T> w(problem.class_weight(c)), keep(problem.shares.keep),
              spread(problem.shares.spread);
          return [=](int64_t i) { ((at(q, i) * keep + spread) * w).store(q + i); };
        });
      }
    }
    T* const most = top.data();
    read(call.input, o, begin, n, x);
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec<T> highest(-std::numeric_limits<T>::infinity());
      for (int64_t c = 0; c < call.classes; ++c) highest = larger(at(x + c * stride, i), highest);
      highest.store(most + i);
    }
    if (!call.indices) {
      const T* const q = wanted.data();
      accumulate(n, mass.data(), wide_mass,
                 [=](int64_t c, int64_t i) { return at(q + c * stride, i); });
      accumulate(n, dot.data(), wide_scale, [=](int64_t c, int64_t i) {
        return (at(x + c * stride, i) - at(most, i)) * at(q + c * stride, i);
      });
    } else if (problem.shares.smooth) {
      accumulate(n, dot.data(), wide_scale, [=, p = problem](int64_t c, int64_t i) {
        return (at(x + c * stride, i) - at(most, i)) * Vec<T>(p.class_weight(c));
      });
    }
    if (call.indices) {
      find_targets(row0, n);
      const int64_t* const place = own.data();
      T* const logits = logit.data();
      for (int64_t i = 0; i < n; ++i) {
        logits[i] = std::exchange(x[place[i]], -std::numeric_limits<T>::infinity());
      }
      if (problem.weight) {
        for (int64_t i = 0; i < n; ++i) weight[i] = problem.weight[place[i] / stride];
      }
    }
    // The next tile's logits are asked for meanwhile: its lines lie in as many pages as there are
    // classes, and begin where no hardware foresees it.
    const int64_t size = bytes_of(call.input.dtype);
    const char* const ahead = address(call.input, offset(call.input, o, 0, begin + width));
    const int64_t line = call.input.classes * size, step = call.input.inner * size;
    accumulate(
        n, sum.data(), wide_sum,
        [=](int64_t c, int64_t i) {
          __builtin_prefetch(ahead + c * line + i * step, 0, 2);
          return exp_nonpositive(at(x + c * stride, i) - at(most, i));
        },
        x);
    T* const at_target = most;  // takes its place
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec<T> gap = at(&logit[0], i) - at(most, i);
      const RowSums<Vec<T>> row{
          at(most, i), at(&sum[0], i),       at(&dot[0], i),   at(&mass[0], i),
          gap,         exp_nonpositive(gap), at(&weight[0], i)};
      problem.shares.loss(row).store(&losses[i]);
      row.at.store(at_target + i);
    }
    if (call.gradient.data) find_slopes(row0, n);
    std::fill(losses.begin() + n, losses.end(), T(0));
    for (int64_t i = 0; ignored && i < n; ++i) {
      if (problem.ignored(row0 + i)) losses[i] = 0;
    }
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += losses[i + k];
    }
    Sum sum_of_losses;
    for (double lane : lanes) sum_of_losses.add(lane);
    if (call.value) narrow(losses.data(), n, call.value_dtype, call.value, row0, 1);
    if (call.gradient.data) write_gradient(o, begin, n);
    return sum_of_losses.value();
  }

  void write_gradient(int64_t o, int64_t begin, int64_t n) {
    const int64_t row0 = o * call.inner + begin;
    if (call.indices) {
      const int64_t* const place = own.data();
      const T* const slope = logit.data();
      T* const e = table.data();
      for (int64_t i = 0; i < n; ++i) e[place[i]] = slope[i];
    }
    const Rows& out = call.gradient;
    T* const data = is_dtype<T>(out.dtype) && out.inner == 1
                        ? static_cast<T*>(const_cast<void*>(out.data))
                        : nullptr;
    const auto line = [&](int64_t c) {
      return data ? data + offset(out, o, c, begin) : &table[c * width];
    };
    // Past the caches, if the whole is too large for them: as many lines at once as there are
    // classes are slow to read in. The first line is aligned, and all are whole registers apart.
    const bool streams = data && call.outer * call.classes * call.inner * sizeof(T) >= kStreamed &&
                         out.classes % kLanes == 0 && is_streamable(line(0));
    for_classes(n, [&](int64_t c) {
      const T* const q = call.indices ? nullptr : &wanted[c * width];
      const bool smooth = problem.shares.smooth;
      const Vec<T> w(problem.class_weight(c));
      return [=, e = &table[c * width], factor = sum.data(), part = scale.data(), to = line(c),
              next = line(c + 1 < call.classes ? c + 1 : 0)](int64_t i) {
        if (!streams) __builtin_prefetch(next + i, 1, 2);
        Vec<T> g = at(e, i) * at(factor, i);
        if (q) {
          g = g - at(q, i) * at(part, i);
        } else if (smooth) {
          g = g - w * at(part, i);
        }
        store(g, to + i, n - i, streams);
      };
    });
    for (int64_t i = 0; ignored && i < n; ++i) {
      if (!problem.ignored(row0 + i)) continue;
      // Whatever its logits hold, nan included: 0.
      for (int64_t c = 0; c < call.classes; ++c) line(c)[i] = T(0);
    }
    if (!data) write(out, o, begin, n);
    if (streams) finish_stream();
  }
};

template <class T>
double by_tile(const CrossEntropy& call) {
  const Problem<T> problem(call);
  constexpr int64_t kLanes = Vec<T>::size();
  // A tile of about 32 KiB stays in the L1 cache through its three uses; lines of two cache lines
  // at least.
  const int64_t fit = 32768 / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(call.classes, 1);
  // An odd number of registers: the lines of one column then differ in their place in the cache.
  const int64_t full = (std::clamp<int64_t>(fit, 32, 4096) / kLanes | 1) * kLanes;
  const int64_t rows = std::max<int64_t>(call.inner, 1);
  const int64_t width = std::min(full, (rows + kLanes - 1) / kLanes * kLanes);
  const int64_t tiles = (call.inner + width - 1) / width;
  return sum_tasks<TileWalk<T>>(
      call.outer * tiles, [&] { return std::make_unique<TileWalk<T>>(problem, width); },
      [&](TileWalk<T>& walk, int64_t task) {
        const int64_t begin = task % tiles * width;
        return walk.one(task / tiles, begin, std::min(width, call.inner - begin));
      });
}

}  // namespace

ClassCount count_classes(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  ClassCount count;
  for (int64_t i = 0; i < n; ++i) {
    const bool ignore = index[i] == ignore_index;
    count.ignored += ignore;
    count.outside += !ignore & (static_cast<uint64_t>(index[i]) >= static_cast<uint64_t>(classes));
  }
  return count;
}

double cross_entropy(const CrossEntropy& call) {
  if (call.compute_in_double) return call.by_row ? by_row<double>(call) : by_tile<double>(call);
  return call.by_row ? by_row<float>(call) : by_tile<float>(call);
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
