// The cross-entropy engine on the CPU.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A row (or a tile
// of neighbouring rows, where the class dimension is not innermost, or short) is read from memory
// once and stays in the cache for its second use.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "../math/cross_entropy.h"
#include "../math/sum.h"
#include "lanes.h"
#include "staging.h"
#include "stream.h"
#include "wide.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

// A class index a lane, in registers as large as those of T.
template <class T>
using Index = Integer<T>;

constexpr int64_t kTask = 32768;  // elements a task, at least
constexpr int64_t kBlock = 1024;  // elements of a row at a time
// Bytes of a row's exponentials that are kept for its gradient: what a core's own cache may hold.
constexpr int64_t kKept = 1 << 20;
// Bytes of an output for which a core can count on no cache until it is read.
constexpr size_t kStreamed = 16 << 20;

// ---- what both walks share ----------------------------------------------------------------------

// Runs of registers begin with a line of the cache, so that no register lies across two.
constexpr size_t kAligned = 64;
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kAligned)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(kAligned)); }
  // What is given no value has none, as in an array: to clear it would take as long as a small
  // call.
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
  bool operator==(const Aligned&) const { return true; }
};
template <class T>
using Lines = std::vector<T, Aligned<T>>;

template <class T>
struct Problem {
  const CrossEntropy& call;
  const T* weight;
  // Whether a loss needs the digits of what the smaller e^(x - max) add up to: a class of large
  // weight multiplies them, where more classes count than a target that weighs as much.
  bool keeps_small = call.weight && (!call.indices || call.label_smoothing != 0);
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
struct Prefetch {
  const char *to_read, *to_write;
  int64_t read_size, write_size;

  Prefetch(const Rows& in, int64_t in_offset, const Rows& out, int64_t out_offset)
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
    v.store(p, count);
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

// Accumulators: at least four, and four times 32 bytes, so that registers of 16 and of 32 bytes add
// up the same numbers in the same order.
constexpr int kSplit = kVecBytes < 32 ? 32 / kVecBytes : 1, kWays = 4 * kSplit;

template <class T>
double total(const Vec<T> (&v)[kSplit]) {
  constexpr int kLanes = Vec<T>::size();
  T lanes[kSplit * kLanes];
  unrolled<kSplit>([&](auto p) { v[p].store(lanes + p * kLanes); });
  double sums[4] = {};  // not one chain of additions
  unrolled<kSplit * kLanes>([&](auto i) { sums[i % 4] += lanes[i]; });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// For every register of [0, n): f(i, lanes in use, which of the accumulators to use).
template <class T, class F>
FUSEDLOSS_HD void for_registers(int64_t n, F&& f) {
  constexpr int64_t kLanes = Vec<T>::size();
  int64_t i = 0;
  for (; i + kWays * kLanes <= n; i += kWays * kLanes) {
    unrolled<kWays>([&](auto u) __attribute__((always_inline)) { f(i + u * kLanes, kLanes, u); });
  }
  for (; i < n; i += kLanes) f(i, std::min(kLanes, n - i), i / kLanes % kSplit);
}

template <class T>
struct Accumulators {
  Vec<T> v[kWays];
  explicit Accumulators(T start) {
    unrolled<kWays>([&](auto u) { v[u] = Vec<T>(start); });
  }
  FUSEDLOSS_HD void add(Vec<T> x, int u) { v[u] = v[u] + x; }
  // f over pairs of accumulators, then over pairs of pairs.
  template <class F>
  FUSEDLOSS_HD void reduce(F f, Vec<T> (&to)[kSplit]) const {
    unrolled<kSplit>([&](auto p) {
      to[p] = f(f(v[p], v[kSplit + p]), f(v[2 * kSplit + p], v[3 * kSplit + p]));
    });
  }
  double total() const {
    Vec<T> sums[kSplit];
    reduce([](Vec<T> a, Vec<T> b) { return a + b; }, sums);
    return cpu::CPU_CAPABILITY::total(sums);
  }
};

// The same with the digits of a RegisterSum.
template <class T>
struct ExactAccumulator {
  RegisterSum<T> sum;
  FUSEDLOSS_HD void add(Vec<T> x, int) { sum.add(x); }
  double total() const {
    Sum all;
    sum.add_to(all);
    return all.value();
  }
};

// The larger of two; of nan, either: a nan logit makes its row's sum nan whatever max is.
template <class T>
Vec<T> larger(Vec<T> a, Vec<T> b) {
  return max(b, a);
}

template <class T>
T largest(const T* x, int64_t n) {
  Accumulators<T> top(-std::numeric_limits<T>::infinity());
  for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
    top.v[u] = larger(top.v[u], load(x + i, count, -std::numeric_limits<T>::infinity()));
  });
  Vec<T> tops[kSplit];
  top.reduce(larger<T>, tops);
  return max_lane(larger(tops[0], tops[kSplit - 1]));
}

// Adds the logits x of one block, but not x[target], to max and sum; e^(x - max) goes to keep as
// well, if not null, to be written next. target may lie outside of [0, n). max counts the target's
// logit already. keeps_small: as in Problem.
template <class T>
void add_exponentials(const T* x, int64_t n, int64_t target, bool keeps_small, T& top, double& sum,
                      T* keep, Prefetch ahead) {
  const T block_top = largest(x, n);
  if (block_top > top) {
    if (sum != 0) sum *= std::exp(double(top) - double(block_top));
    top = block_top;
  }
  // All -inf so far, or nan, which is told from it by their sum. What is kept is to be multiplied
  // by e^(top - the row's): 0, or nan where there is nothing but -inf.
  if (top == -std::numeric_limits<T>::infinity()) {
    for (int64_t i = 0; i < n; ++i)
      sum += x[i] == x[i] ? 0 : std::numeric_limits<double>::quiet_NaN();
    if (keep) std::fill(keep, keep + n, T(1));
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
  const auto add = [&](auto keeps, auto parts) {
    for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
      ahead.read(i);
      const Vec<T> logits =
          load(i == own ? others : x + i, count, -std::numeric_limits<T>::infinity());
      const Vec<T> e = exp_nonpositive(logits - Vec<T>(top));
      parts.add(e, u);
      if constexpr (keeps()) {
        ahead.write(i);
        store(e, keep + i, count);
      }
    });
    sum += parts.total();
  };
  const auto add_as = [&](auto parts) {
    if (keep) {
      add(std::true_type(), parts);
    } else {
      add(std::false_type(), parts);
    }
  };
  if (keeps_small) {
    add_as(ExactAccumulator<T>());
  } else {
    add_as(Accumulators<T>(T(0)));
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
      counts.add(qi, u);
      d = d * qi;
    }
    dots.add(d, u);
  });
  dot += dots.total();
  seen += q ? counts.total() : static_cast<double>(n);
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
  const int64_t blocks = (call.classes + kBlock - 1) / kBlock;
  const int64_t group = blocks == 1 ? kGroup : 1;  // rows
  // Each block's e^(x - top) stays between the loss and the gradient, with the top of then.
  const bool keeps = call.gradient.data && call.classes * int64_t{sizeof(T)} <= kKept;
  Lines<T> kept, tops;
  alignas(kAligned) T logits[kBlock], wanted[kBlock], gradient[kBlock];
  RowSums<Line> sums{};
  RowSlope<Line> slopes{};
  Line losses, scales{};

  explicit RowWalk(const Problem<T>& p)
      : problem(p), kept(keeps ? group * blocks * kBlock : 0), tops(group * blocks) {}

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
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * kBlock, n = std::min(kBlock, call.classes - at);
      const T* const x = block(call.input, offset, at, n, logits);
      // The next block, or the next row's first; and this one's gradient, which is written soon.
      const Prefetch ahead(call.input, offset + at + n, call.gradient, out_offset + at);
      const int64_t here = k * blocks + b;
      add_exponentials(x, n, target - at, problem.keeps_small, top, sum,
                       keeps ? &kept[here * kBlock] : nullptr, ahead);
      tops[here] = top;
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
    const V sum = at(sums.sum), gap = at(sums.gap),
            own = call.indices ? exp_nonpositive(gap) : V(0);
    const RowSums<V> row{at(sums.max), sum, at(sums.dot),    at(sums.mass),
                         gap,          own, at(sums.weight), sum + (own - V(1))};
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
    const Vec<T> top(sums.max[k]), scale(s.scale);
    const int64_t out_step = call.gradient.classes;
    const bool direct = is_dtype<T>(call.gradient.dtype) && out_step == 1;
    T* out = gradient;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * kBlock, n = std::min(kBlock, call.classes - at);
      const int64_t here = k * blocks + b;
      const T* x = keeps ? &kept[here * kBlock] : block(call.input, offset, at, n, logits);
      const T* q = nullptr;
      if (!call.indices) {
        q = mass(target_offset, at, n);
      } else if (problem.shares.smooth && problem.weight) {
        q = problem.weight + at;
      }
      if (direct) out = static_cast<T*>(const_cast<void*>(call.gradient.data)) + out_offset + at;
      const double gap = keeps ? double(tops[here]) - sums.max[k] : 0;
      const Vec<T> factor(gap == 0 ? s.factor : s.factor * std::exp(gap));
      const auto exponential = [&](auto subtract) {
        for_registers<T>(n, [&](int64_t i, int64_t count, int) {
          const Vec<T> v = load(x + i, count, T(0));
          store(subtract((keeps ? v : exp_nonpositive(v - top)) * factor, i, count), out + i,
                count);
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
        narrow(out, n, call.gradient.dtype, const_cast<void*>(call.gradient.data),
               out_offset + at * out_step, out_step);
      }
    }
  }

  void clear_gradient(int64_t out_offset) {
    with_type(call.gradient.dtype, [&](auto tag) {
      using D = decltype(tag);
      D* out = static_cast<D*>(const_cast<void*>(call.gradient.data)) + out_offset;
      for (int64_t c = 0; c < call.classes; ++c) out[c * call.gradient.classes] = D(0);
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
double sum_tasks(ParallelFor threads, int64_t tasks, Make&& make, Task&& task) {
  std::vector<double> sums(tasks);
  parallel_for(threads, 0, tasks, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<Walk> walk = make();
    for (int64_t t = first; t < last; ++t) sums[t] = task(*walk, t);
    finish_stream();
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
  return sum_tasks<RowWalk<T>>(
      call.threads, (rows + step - 1) / step, [&] { return std::make_unique<RowWalk<T>>(problem); },
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
  static constexpr int kTogether = 4;  // classes; summed in T before they go to double
  static constexpr Index<T> kNone = -1;
  const Problem<T>& problem;
  const int64_t width;  // rows a full tile: a multiple of kLanes
  const CrossEntropy& call = problem.call;

  // The logits, class by class: a copy, since lines of the input that lie a power of two apart
  // throw each other out of the cache. Then e^(x - max), 0 for the target, in their place; then the
  // gradient, where it does not go to memory as T.
  Lines<T> table, wanted;
  // Of each row: RowSums, whose weight, and what is called own, are the target's; and the loss.
  Lines<T> top, own_logit, weight, losses;
  Lines<double> sum, dot, mass;
  // Its gradient: e^(x - max) * factor - q * part, and the target's element, all times its scale.
  Lines<double> scale;
  Lines<T> factor, part, own_gradient;
  // kNone: the row is ignored, or lies beyond the tile's end. Of class probabilities: 0 otherwise.
  Lines<Index<T>> target;
  Lines<Index<T>> number;  // of each class: its own
  Lines<T> few;            // rows on their way, where classes lie side by side in another dtype
  bool ignores = false;    // whether rows of the tile are

  TileWalk(const Problem<T>& p, int64_t w)
      : problem(p), width(w), table(call.classes * w), wanted(call.indices ? 0 : call.classes * w) {
    for (auto* line : {&top, &own_logit, &weight, &losses, &factor, &part, &own_gradient}) {
      line->resize(w, T(1));
    }
    for (auto* line : {&sum, &dot, &mass}) line->resize(at_sum(w), 0);
    scale.resize(w, call.scale);
    target.resize(w);
    number.resize(call.classes);
    std::iota(number.begin(), number.end(), Index<T>(0));
    few.resize(kLanes * call.classes);
  }

  static Vec<T> at(const T* line, int64_t i) { return Vec<T>::loadu(line + i); }
  static Vec<T> at(const Lines<T>& line, int64_t i) { return at(line.data(), i); }

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
      transpose(data, step, lines + first, width, count, call.classes);
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
      transpose(&table[first], width, direct ? static_cast<T*>(data) + to : &few[0],
                direct ? rows.inner : call.classes, call.classes, count);
      for (int64_t k = 0; !direct && k < count; ++k) {
        narrow(&few[k * call.classes], call.classes, rows.dtype, data, to + k * rows.inner, 1);
      }
    });
  }

  // Which of the rows from i on want class c, and which want none.
  struct Targets {
    const Index<T>*rows, *numbers;
    FUSEDLOSS_HD Mask<T> are(int64_t c, int64_t i) const { return are_index(numbers[c], i); }
    FUSEDLOSS_HD Mask<T> are_none(int64_t i) const { return are_index(kNone, i); }
    FUSEDLOSS_HD Mask<T> are_index(Index<T> index, int64_t i) const {
      return cast<T>(Vec<Index<T>>::loadu(rows + i) == Vec<Index<T>>(index));
    }
  };
  Targets targets() const { return {target.data(), number.data()}; }

  // f(first, count) for every kLanes of the tile's n rows.
  template <class F>
  static void for_lanes(int64_t n, F&& f) {
    for (int64_t first = 0; first < n; first += kLanes) f(first, std::min(kLanes, n - first));
  }

  // f(count, c, i) for every class and every register of the tile's n rows: for the classes
  // [c, c + count), count known to the compiler, in the rows from i on.
  template <class F>
  FUSEDLOSS_HD void for_table(int64_t n, F&& f) const {
    int64_t c = 0;
    const auto line = [&](auto count) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; i += kLanes) f(count, c, i);
      c += count;
    };
    while (c + kTogether <= call.classes) line(std::integral_constant<int, kTogether>());
    while (c < call.classes) line(std::integral_constant<int, 1>());
  }

  // Where the RegisterSum of the rows from i on lies in a line of them.
  static FUSEDLOSS_HD int64_t at_sum(int64_t i) { return i / kLanes * RegisterSum<T>::kSize; }

  // Sums term(c, i) of every class c into sums, with more digits than T has: each of them, or
  // (exact: no) a few that are added up in T before. kept, if not null, is where the terms stay,
  // which may be what term reads.
  template <class F, class Exact = std::false_type>
  FUSEDLOSS_HD void total(int64_t n, Lines<double>& sums, F term, T* kept = nullptr,
                          Exact exact = {}) const {
    std::fill(sums.begin(), sums.end(), 0.0);
    for_table(n, [=, to = sums.data(), stride = width](auto count, int64_t c,
                                                       int64_t i) __attribute__((always_inline)) {
      Vec<T> terms[count], some(0);
      unrolled<count>([&](auto u) __attribute__((always_inline)) { terms[u] = term(c + u, i); });
      unrolled<count>([&](auto u) __attribute__((always_inline)) {
        some = some + terms[u];
        if (kept) terms[u].store(kept + (c + u) * stride + i);
      });
      RegisterSum<T> sum = RegisterSum<T>::load(to + at_sum(i));
      if constexpr (exact()) {
        unrolled<count>([&](auto u) { sum.add(terms[u]); });
      } else {
        sum.add(some);
      }
      sum.store(to + at_sum(i));
    });
  }

  void find_targets(int64_t row0, int64_t n) {
    const int64_t *const indices = call.indices + row0, ignore = call.ignore_index;
    // The next tile's, which hardware would begin to foresee when it is over.
    for (int64_t i = 0; i < width; i += 8) __builtin_prefetch(indices + width + i, 0, 2);
    Index<T>* const to = target.data();
    Index<T> any = 0;  // as wide as an index, so that the loop vectorises
    for (int64_t i = 0; i < n; ++i) {
      const bool ignored = indices[i] == ignore;
      to[i] = ignored ? kNone : static_cast<Index<T>>(indices[i]);
      any |= ignored;
    }
    ignores = any;
    std::fill(to + n, to + width, kNone);
    if (!problem.weight) return;
    for (int64_t i = 0; i < n; ++i) weight[i] = to[i] == kNone ? T(0) : problem.weight[to[i]];
  }

  // The largest logit of each row and its target's. The logits, class by class from `from` on, come
  // into the table, but -inf in place of the target's.
  void find_top(const T* from, int64_t from_stride, int64_t n) {
    std::fill(top.begin(), top.end(), -std::numeric_limits<T>::infinity());
    const auto find = [&](auto indices) {
      for_table(
          n, [=, to = table.data(), to_stride = width, most = top.data(), own = own_logit.data(),
              wants = targets()](auto count, int64_t c, int64_t i) __attribute__((always_inline)) {
            Vec<T> x[count], highest = at(most, i), own_x = at(own, i);
            unrolled<count>([&](auto u) __attribute__((always_inline)) {
              x[u] = load(from + (c + u) * from_stride + i, n - i, T(0));
            });
            unrolled<count>([&](auto u) __attribute__((always_inline)) {
              highest = larger(x[u], highest);
              if (!indices()) return;
              const Mask<T> is_own = wants.are(c + u, i);
              own_x = select(is_own, x[u], own_x);
              x[u] = select(is_own, Vec<T>(-std::numeric_limits<T>::infinity()), x[u]);
            });
            unrolled<count>([&](auto u) { x[u].store(to + (c + u) * to_stride + i); });
            highest.store(most + i);
            if (indices()) own_x.store(own + i);
          });
    };
    if (call.indices) {
      find(std::true_type());
    } else {
      find(std::false_type());
    }
  }

  // The losses of the rows from i on, and what their gradient is made of.
  FUSEDLOSS_HD void finish(int64_t i) {
    const auto sums_of = [&](const Lines<double>& line) __attribute__((always_inline)) {
      return RegisterSum<T>::load(&line[at_sum(i)]).lanes();
    };
    const Wide<T> sums = sums_of(sum), dots = sums_of(dot), masses = sums_of(mass),
                  scales = Wide<T>::load(&scale[i]);
    const Vec<T> max = at(top, i), gap = at(own_logit, i) - max,
                 own = call.indices ? exp_nonpositive(gap) : Vec<T>(0);
    const Wide<T> owns = widen(own), weights = widen(at(weight, i));
    Wide<T> excess = sums;
    unrolled<Wide<T>::kParts>([&](auto p) __attribute__((always_inline)) {
      excess.part[p] = excess.part[p] + (owns.part[p] - Vec<double>(1));
    });
    const Vec<T> loss = problem.shares.loss(RowSums<Vec<T>>{
        max, narrow(sums), narrow(dots), narrow(masses), gap, own, at(weight, i), narrow(excess)});
    select(targets().are_none(i), Vec<T>(0), loss).store(&losses[i]);
    if (!call.gradient.data) return;
    const Vec<double> unread(0);
    Wide<T> factors, parts, own_gradients;
    unrolled<Wide<T>::kParts>([&](auto p) __attribute__((always_inline)) {
      const Vec<double> w = weights.part[p];
      const RowSlope<Vec<double>> s =
          problem.exact.slope(RowSums<Vec<double>>{unread, sums.part[p], unread, masses.part[p],
                                                   unread, owns.part[p], w, unread},
                              scales.part[p]);
      factors.part[p] = s.factor;
      parts.part[p] = s.scale;
      own_gradients.part[p] = s.own * s.factor;
      if (problem.shares.smooth) own_gradients.part[p] = own_gradients.part[p] - w * s.scale;
    });
    narrow(factors).store(&factor[i]);
    narrow(parts).store(&part[i]);
    narrow(own_gradients).store(&own_gradient[i]);
  }

  double one(int64_t o, int64_t begin, int64_t n) {
    const int64_t row0 = o * call.inner + begin;
    if (call.indices) {
      find_targets(row0, n);
    } else {
      std::fill(std::fill_n(target.begin(), n, 0), target.end(), kNone);
      read(call.probabilities, o, begin, n, wanted.data());
      if (problem.weight || problem.shares.smooth) {
        for (int64_t c = 0; c < call.classes; ++c) {
          const Vec<T> w(problem.class_weight(c)), keep(problem.shares.keep),
              spread(problem.shares.spread);
          T* const q = &wanted[c * width];
          for (int64_t i = 0; i < n; i += kLanes) ((at(q, i) * keep + spread) * w).store(q + i);
        }
      }
    }
    if (is_dtype<T>(call.input.dtype) && call.input.inner == 1) {
      find_top(static_cast<const T*>(call.input.data) + offset(call.input, o, 0, begin),
               call.input.classes, n);
    } else {
      read(call.input, o, begin, n, table.data());
      find_top(table.data(), width, n);
    }
    const T *const x = table.data(), *const most = top.data();
    const int64_t stride = width;
    const auto distance = [=](int64_t c, int64_t i) __attribute__((always_inline)) {
      return at(x + c * stride, i) - at(most, i);
    };
    if (!call.indices) {
      const T* const q = wanted.data();
      total(n, mass, [=](int64_t c, int64_t i) { return at(q + c * stride, i); });
      total(n, dot, [=](int64_t c, int64_t i) { return distance(c, i) * at(q + c * stride, i); });
    } else if (problem.shares.smooth) {
      total(n, dot,
            [=, p = problem, own = own_logit.data(), wants = targets()](int64_t c, int64_t i) {
              const Vec<T> logits = select(wants.are(c, i), at(own, i), at(x + c * stride, i));
              return (logits - at(most, i)) * Vec<T>(p.class_weight(c));
            });
    }
    // The next tile's logits are asked for meanwhile: its lines lie in as many pages as there are
    // classes, and begin where no hardware foresees it.
    const int64_t size = bytes_of(call.input.dtype);
    const char* const ahead = address(call.input, offset(call.input, o, 0, begin + width));
    const int64_t line = call.input.classes * size, step = call.input.inner * size;
    const auto exponential = [=](int64_t c, int64_t i) __attribute__((always_inline)) {
      __builtin_prefetch(ahead + c * line + i * step, 0, 2);
      return exp_nonpositive(distance(c, i));
    };
    if (problem.keeps_small) {
      total(n, sum, exponential, table.data(), std::true_type());
    } else {
      total(n, sum, exponential, table.data());
    }
    if (call.upstream) {
      for (int64_t i = 0; i < n; ++i) scale[i] = problem.row_scale(row0 + i);
    }
    RegisterSum<T> sums;
    for (int64_t i = 0; i < n; i += kLanes) {
      finish(i);
      sums.add(at(losses, i));
    }
    Sum sum_of_losses;
    sums.add_to(sum_of_losses);
    if (call.value) narrow(losses.data(), n, call.value_dtype, call.value, row0, 1);
    if (call.gradient.data) write_gradient(o, begin, n);
    return sum_of_losses.value();
  }

  void write_gradient(int64_t o, int64_t begin, int64_t n) {
    const Rows& out = call.gradient;
    T* const data = is_dtype<T>(out.dtype) && out.inner == 1
                        ? static_cast<T*>(const_cast<void*>(out.data)) + offset(out, o, 0, begin)
                        : nullptr;
    T* const first = data ? data : table.data();
    const int64_t stride = data ? out.classes : width;
    // Past the caches, if the whole is too large for them: as many lines at once as there are
    // classes are slow to read in. The first line is aligned, and all are whole registers apart.
    const bool streams = data && call.outer * call.classes * call.inner * sizeof(T) >= kStreamed &&
                         stride % kLanes == 0 && is_streamable(data);
    // gradient(c, i): of the class c, in the rows from i on.
    const auto write_lines = [&](auto streamed, auto gradient) {
      for_table(n, [=](auto count, int64_t c, int64_t i) __attribute__((always_inline)) {
        T* const to = first + c * stride + i;
        Vec<T> g[count];
        unrolled<count>([&](auto u) __attribute__((always_inline)) {
          if (data && !streamed()) __builtin_prefetch(to + (u + count) * stride, 1, 2);
          g[u] = gradient(c + u, i);
        });
        unrolled<count>([&](auto u) __attribute__((always_inline)) {
          store(g[u], to + u * stride, n - i, streamed());
        });
      });
    };
    const auto write_all = [&](auto gradient) {
      if (streams) {
        write_lines(std::true_type(), gradient);
      } else {
        write_lines(std::false_type(), gradient);
      }
    };
    const T *const e = table.data(), *const q = wanted.data(), *const factors = factor.data(),
                   *const parts = part.data(), *const owns = own_gradient.data();
    const int64_t apart = width;
    const auto exponential = [=](int64_t c, int64_t i) __attribute__((always_inline)) {
      return at(e + c * apart, i) * at(factors, i);
    };
    // g, but the target's own; and 0 for an ignored row, whatever it and the weights hold.
    const auto corrected = [=, wants = targets(), none = ignores](Vec<T> g, int64_t c, int64_t i)
                               __attribute__((always_inline)) {
                                 g = select(wants.are(c, i), at(owns, i), g);
                                 return none ? select(wants.are_none(i), Vec<T>(0), g) : g;
                               };
    if (!call.indices) {
      write_all([=](int64_t c, int64_t i) __attribute__((always_inline)) {
        return exponential(c, i) - at(q + c * apart, i) * at(parts, i);
      });
    } else if (problem.shares.smooth) {
      write_all([=, p = problem](int64_t c, int64_t i) __attribute__((always_inline)) {
        return corrected(exponential(c, i) - Vec<T>(p.class_weight(c)) * at(parts, i), c, i);
      });
    } else {
      write_all([=](int64_t c, int64_t i)
                    __attribute__((always_inline)) { return corrected(exponential(c, i), c, i); });
    }
    if (!data) write(out, o, begin, n);
  }
};

template <class T>
double by_tile(const CrossEntropy& call) {
  const Problem<T> problem(call);
  constexpr int64_t kLanes = Vec<T>::size();
  // A table of 32 KiB stays in the L1 cache through its uses. But lines of fewer than 128 rows cost
  // more than a larger table does, as long as the L2 cache holds it; and 32 rows they always have.
  const auto fit = [&](int64_t bytes) {
    return bytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(call.classes, 1);
  };
  const int64_t least = std::clamp<int64_t>(fit(256 << 10), 32, 128);
  // An odd number of registers: the lines of one column then differ in their place in the cache.
  const int64_t full = (std::clamp<int64_t>(fit(32 << 10), least, 4096) / kLanes | 1) * kLanes;
  const int64_t rows = std::max<int64_t>(call.inner, 1);
  const int64_t width = std::min(full, (rows + kLanes - 1) / kLanes * kLanes);
  const int64_t tiles = (call.inner + width - 1) / width;
  return sum_tasks<TileWalk<T>>(
      call.threads, call.outer * tiles,
      [&] { return std::make_unique<TileWalk<T>>(problem, width); },
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
