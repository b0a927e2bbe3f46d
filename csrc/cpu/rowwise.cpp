// The cross-entropy engine on the CPU.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A row (or a tile
// of neighbouring rows, where the class dimension is not innermost) is read from memory once and
// stays in the cache for its second use.
//
// A row's loss and gradient are formed from `others`, the sum of e^(x - max) over every class but
// the target: 1 - p_target is others / sum, with all its digits however confident the row is.
#include <ATen/Parallel.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "staging.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTask = 32768;  // elements a task, at least: ATen's own grain
constexpr int64_t kBlock = 1024;  // elements of a row at a time

// ---- what both walks share: a row's numbers -----------------------------------------------------

// A row, once all its logits have been seen.
template <class T>
struct Row {
  T max;       // of the logits
  double sum;  // of e^(x - max): class indices: over all classes but the target
  double dot;  // of q (x - origin), q the weight of each class in the loss
  double mass; // of q; class probabilities only
  T origin;    // class indices: the target's logit
};

template <class T>
struct Problem {
  const CrossEntropy& call;
  const T* weight;
  T keep, spread;  // q = w (keep y + spread): 1 - label_smoothing, label_smoothing / classes
  bool smooth;

  explicit Problem(const CrossEntropy& c)
      : call(c),
        weight(static_cast<const T*>(c.weight)),
        keep(static_cast<T>(1 - c.label_smoothing)),
        spread(static_cast<T>(c.label_smoothing / static_cast<double>(c.classes))),
        smooth(c.label_smoothing != 0) {}

  bool ignored(int64_t row) const {
    return call.indices && call.indices[row] == call.ignore_index;
  }
  double target_weight(int64_t target) const { return weight ? double(weight[target]) : 1.0; }
  // The total of q over the classes, for class indices.
  double mass(int64_t target) const {
    return double(keep) * target_weight(target) + (smooth ? double(spread) * call.weight_sum : 0);
  }
  double row_scale(int64_t row) const {
    return call.upstream ? call.scale * double(static_cast<const T*>(call.upstream)[row])
                         : call.scale;
  }

  double loss(const Row<T>& row, int64_t target) const {
    const double gap = double(row.origin) - double(row.max);
    if (!call.indices) return row.mass * (std::log(row.sum) - gap) - row.dot;
    // log1p keeps the digits of a small loss, where the target is the largest logit.
    const double nll =
        gap == 0 ? std::log1p(row.sum) : std::log(row.sum + std::exp(gap)) - gap;
    const double hard = double(keep) * target_weight(target) * nll;
    return smooth ? hard + double(spread) * (call.weight_sum * nll - row.dot) : hard;
  }

  // What the gradient is made of: e^(x - max) * factor - q * scale, and the target's own.
  struct Slope {
    T factor, scale, at_target;
  };
  Slope slope(int64_t row, int64_t target, const T* stats, T target_logit) const {
    const double scale = row_scale(row);
    const double sum = stats[1];
    if (!call.indices) {
      return {static_cast<T>(double(stats[2]) * scale / sum), static_cast<T>(scale), T(0)};
    }
    const double at = std::exp(double(target_logit) - double(stats[0]));
    const double total = sum + at;
    const double w = target_weight(target);
    double at_target = -double(keep) * w * (sum / total);
    if (smooth) at_target += double(spread) * (call.weight_sum * (at / total) - w);
    return {static_cast<T>(mass(target) * scale / total), static_cast<T>(double(spread) * scale),
            static_cast<T>(at_target * scale)};
  }
};

template <class T>
T* stats_of(const CrossEntropy& call, int64_t row) {
  return static_cast<T*>(call.stats) + row * CrossEntropy::kStats;
}

template <class T>
void keep_stats(const CrossEntropy& call, int64_t row, const Row<T>& r) {
  T* stats = stats_of<T>(call, row);
  stats[0] = r.max;
  stats[1] = static_cast<T>(r.sum);
  stats[2] = static_cast<T>(r.mass);
}

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
double total(Vec<T> v) {
  T lanes[Vec<T>::size()];
  v.store(lanes);
  double sum = 0;
  for (T lane : lanes) sum += lane;
  return sum;
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

template <class T>
T largest(const T* x, int64_t n) {
  Accumulators<T> top(-std::numeric_limits<T>::infinity());
  for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
    top.v[u] = max(top.v[u], load(x + i, count, -std::numeric_limits<T>::infinity()));
  });
  T lanes[Vec<T>::size()];
  max(max(top.v[0], top.v[1]), max(top.v[2], top.v[3])).store(lanes);
  T most = lanes[0];
  for (T lane : lanes) most = lane > most || lane != lane ? lane : most;
  return most;
}

// Adds the logits x of one block to max and sum.
template <class T>
void add_exponentials(const T* x, int64_t n, T& top, double& sum) {
  const T block_top = largest(x, n);
  if (!(block_top <= top)) {
    // Before the first finite logit sum is 0, and e^(-inf - top) = 0 keeps it so.
    sum *= top == block_top ? 1.0 : std::exp(double(top) - double(block_top));
    top = block_top;
  }
  // All -inf so far: nothing to add, and x - top would be nan.
  if (top == -std::numeric_limits<T>::infinity()) return;
  Accumulators<T> parts(T(0));
  for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
    const Vec<T> logits = load(x + i, count, -std::numeric_limits<T>::infinity());
    parts.v[u] = parts.v[u] + exp_nonpositive(logits - Vec<T>(top));
  });
  sum += total(parts.sum());
}

// sum of w (x - origin)
template <class T>
double weighted_distance(const T* x, const T* weight, int64_t n, T origin) {
  Accumulators<T> parts(T(0));
  for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
    Vec<T> d = load(x + i, count, origin) - Vec<T>(origin);
    if (weight) d = d * load(weight + i, count, T(0));
    parts.v[u] = parts.v[u] + d;
  });
  return total(parts.sum());
}

// ---- class dimension innermost: row by row ------------------------------------------------------

template <class T>
struct RowWalk {
  const Problem<T>& problem;
  const CrossEntropy& call = problem.call;
  T logits[kBlock], masked[kBlock], wanted[kBlock], gradient[kBlock];

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
    if (!problem.weight && !problem.smooth) return y;
    for_registers<T>(n, [&](int64_t i, int64_t count, int) {
      Vec<T> q = load(y + i, count, T(0)) * Vec<T>(problem.keep) + Vec<T>(problem.spread);
      if (problem.weight) q = q * load(problem.weight + at + i, count, T(0));
      store(q, wanted + i, count);
    });
    return wanted;
  }

  Row<T> reduce(int64_t offset, int64_t target) {
    Row<T> row{-std::numeric_limits<T>::infinity(), 0, 0, 0, T(0)};
    row.origin = *block(call.input, offset, std::max<int64_t>(target, 0), 1, logits);
    if (target >= 0) row.max = row.origin;
    for (int64_t at = 0; at < call.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, call.classes - at);
      const T* x = block(call.input, offset, at, n, logits);
      if (problem.smooth && target >= 0) {
        row.dot += weighted_distance(x, problem.weight ? problem.weight + at : nullptr, n,
                                     row.origin);
      }
      if (at <= target && target < at + n) {
        if (x != masked) std::memcpy(masked, x, n * sizeof(T));
        masked[target - at] = -std::numeric_limits<T>::infinity();
        add_exponentials(masked, n, row.max, row.sum);
      } else {
        add_exponentials(x, n, row.max, row.sum);
      }
    }
    return row;
  }

  // The part of a row's loss that needs its class probabilities.
  void reduce_probabilities(int64_t offset, int64_t target_offset, Row<T>& row) {
    // Distances are measured from the largest logit: small numbers where q is large.
    row.origin = row.max;
    for (int64_t at = 0; at < call.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, call.classes - at);
      const T* x = block(call.input, offset, at, n, logits);
      const T* q = mass(target_offset, at, n);
      Accumulators<T> dots(T(0)), masses(T(0));
      for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
        const Vec<T> qi = load(q + i, count, T(0));
        masses.v[u] = masses.v[u] + qi;
        dots.v[u] = dots.v[u] + qi * (load(x + i, count, row.max) - Vec<T>(row.max));
      });
      row.mass += total(masses.sum());
      row.dot += total(dots.sum());
    }
  }

  void write_gradient(int64_t row, int64_t offset, int64_t target_offset, int64_t out_offset,
                      int64_t target) {
    const T* stats = stats_of<T>(call, row);
    const T at_target =
        target >= 0 ? *block(call.input, offset, target, 1, logits) : T(0);
    const auto slope = problem.slope(row, target, stats, at_target);
    const Vec<T> top(stats[0]), factor(slope.factor), scale(slope.scale);
    const bool direct = is_dtype<T>(call.gradient.dtype);
    T* out = gradient;
    for (int64_t at = 0; at < call.classes; at += kBlock) {
      const int64_t n = std::min(kBlock, call.classes - at);
      const T* x = block(call.input, offset, at, n, logits);
      const T* q = nullptr;
      if (!call.indices) {
        q = mass(target_offset, at, n);
      } else if (problem.smooth && problem.weight) {
        q = problem.weight + at;
      }
      if (direct) out = static_cast<T*>(const_cast<void*>(call.gradient.data)) + out_offset + at;
      const auto walk = [&](auto subtract) {
        for_registers<T>(n, [&](int64_t i, int64_t count, int) {
          Vec<T> g = exp_nonpositive(load(x + i, count, T(0)) - top) * factor;
          g = subtract(g, i, count);
          store(g, out + i, count);
        });
      };
      if (q) {
        walk([&](Vec<T> g, int64_t i, int64_t count) {
          return g - load(q + i, count, T(0)) * scale;
        });
      } else if (problem.smooth) {
        walk([&](Vec<T> g, int64_t, int64_t) { return g - scale; });
      } else {
        walk([](Vec<T> g, int64_t, int64_t) { return g; });
      }
      if (at <= target && target < at + n) out[target - at] = slope.at_target;
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

  double one(int64_t row) {
    const int64_t o = row / call.inner, i = row % call.inner;
    const auto offset_in = [&](const Rows& rows) { return o * rows.outer + i * rows.inner; };
    const int64_t offset = offset_in(call.input), target_offset = offset_in(call.probabilities);
    const int64_t target = call.indices ? call.indices[row] : -1;
    double loss = 0;
    if (!problem.ignored(row)) {
      if (!call.have_stats) {
        Row<T> r = reduce(offset, target);
        if (!call.indices) reduce_probabilities(offset, target_offset, r);
        loss = problem.loss(r, target);
        keep_stats(call, row, r);
      }
      if (call.gradient.data) {
        write_gradient(row, offset, target_offset, offset_in(call.gradient), target);
      }
    } else if (call.gradient.data) {
      clear_gradient(offset_in(call.gradient));
    }
    if (call.value) {
      const T value = static_cast<T>(loss);
      narrow(&value, 1, call.value_dtype, call.value, row, 1);
    }
    return loss;
  }
};

// Calls task(t) for every t, in parallel, and adds the results in order.
template <class F>
double sum_tasks(int64_t tasks, F&& task) {
  std::vector<double> sums(tasks);
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) sums[t] = task(t);
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

template <class T>
double by_row(const CrossEntropy& call) {
  const Problem<T> problem(call);
  const int64_t rows = call.outer * call.inner;
  const int64_t step = std::max<int64_t>(1, kTask / std::max<int64_t>(call.classes, 1));
  return sum_tasks((rows + step - 1) / step, [&](int64_t task) {
    RowWalk<T> walk(problem);
    double sum = 0;
    for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); ++r) sum += walk.one(r);
    return sum;
  });
}

// ---- class dimension not innermost: tiles of neighbouring rows ----------------------------------

// One tile: `width` rows side by side, every class. Arrays are (classes, kWidth) or (kWidth).
template <class T>
struct TileWalk {
  static constexpr int64_t kLanes = Vec<T>::size();
  const Problem<T>& problem;
  const int64_t width;  // rows a full tile: a multiple of kLanes
  const CrossEntropy& call = problem.call;
  // logits, class by class; the target's is -inf; replaced by e^(x - max) on the way.
  std::unique_ptr<T[]> logits{new T[call.classes * width]};
  std::unique_ptr<T[]> wanted{call.indices ? nullptr : new T[call.classes * width]};
  std::unique_ptr<T[]> top{new T[width]}, part{new T[width]}, at_target{new T[width]},
      factor{new T[width]}, scale{new T[width]}, line{new T[width]};
  std::unique_ptr<double[]> sum{new double[width]}, dot{new double[width]}, mass{new double[width]};

  static constexpr int64_t kFlush = 64;  // classes summed in T before they go to double

  template <class F>
  void registers(F&& f) {
    for (int64_t i = 0; i < width; i += kLanes) f(i);
  }

  void flush(double* to) {
    for (int64_t i = 0; i < width; ++i) {
      to[i] += part[i];
      part[i] = 0;
    }
  }

  void read(const Rows& rows, int64_t o, int64_t first, int64_t n, T* to, T rest) {
    for (int64_t c = 0; c < call.classes; ++c) {
      T* line = to + c * width;
      widen(rows.dtype, rows.data, o * rows.outer + c * rows.classes + first * rows.inner,
            rows.inner, n, line);
      std::fill(line + n, line + width, rest);
    }
  }

  T class_weight(int64_t c) const { return problem.weight ? problem.weight[c] : T(1); }

  // Sums f(c, i) over the classes into to, kFlush of them at a time.
  template <class F>
  void accumulate(double* to, F&& f) {
    std::fill(to, to + width, 0.0);
    std::fill(part.get(), part.get() + width, T(0));
    for (int64_t c = 0; c < call.classes; ++c) {
      registers([&](int64_t i) { (Vec<T>::loadu(&part[i]) + f(c, i)).store(&part[i]); });
      if ((c + 1) % kFlush == 0) flush(to);
    }
    flush(to);
  }

  double one(int64_t o, int64_t first, int64_t n) {
    const T infinity = std::numeric_limits<T>::infinity();
    const int64_t row0 = o * call.inner + first;
    read(call.input, o, first, n, logits.get(), T(0));
    const auto x = [&](int64_t c, int64_t i) { return Vec<T>::loadu(&logits[c * width + i]); };
    const auto target = [&](int64_t i) {
      return problem.ignored(row0 + i) ? int64_t(0) : call.indices[row0 + i];
    };
    if (call.indices) {
      std::fill(at_target.get(), at_target.get() + width, T(0));
      for (int64_t i = 0; i < n; ++i) at_target[i] = logits[target(i) * width + i];
    } else {
      read(call.probabilities, o, first, n, wanted.get(), T(0));
      for (int64_t c = 0; c < call.classes; ++c) {
        registers([&](int64_t i) {
          T* y = &wanted[c * width + i];
          ((Vec<T>::loadu(y) * Vec<T>(problem.keep) + Vec<T>(problem.spread)) *
           Vec<T>(class_weight(c)))
              .store(y);
        });
      }
    }
    if (!call.have_stats) {
      registers([&](int64_t i) {
        Vec<T> most = x(0, i);
        for (int64_t c = 1; c < call.classes; ++c) most = max(most, x(c, i));
        most.store(&top[i]);
      });
      const auto wide = [&](const std::unique_ptr<T[]>& a, int64_t i) {
        return Vec<T>::loadu(&a[i]);
      };
      if (!call.indices) {
        accumulate(mass.get(), [&](int64_t c, int64_t i) {
          return Vec<T>::loadu(&wanted[c * width + i]);
        });
        accumulate(dot.get(), [&](int64_t c, int64_t i) {
          return Vec<T>::loadu(&wanted[c * width + i]) * (x(c, i) - wide(top, i));
        });
      } else if (problem.smooth) {
        accumulate(dot.get(), [&](int64_t c, int64_t i) {
          return (x(c, i) - wide(at_target, i)) * Vec<T>(class_weight(c));
        });
      }
    } else {
      for (int64_t i = 0; i < n; ++i) top[i] = stats_of<T>(call, row0 + i)[0];
      std::fill(top.get() + n, top.get() + width, T(0));
    }
    if (call.indices) {
      for (int64_t i = 0; i < n; ++i) logits[target(i) * width + i] = -infinity;
    }
    const auto exponential = [&](int64_t c, int64_t i) {
      const Vec<T> e = exp_nonpositive(x(c, i) - Vec<T>::loadu(&top[i]));
      e.store(&logits[c * width + i]);
      return e;
    };
    double loss_sum = 0;
    if (!call.have_stats) {
      accumulate(sum.get(), exponential);
      for (int64_t i = 0; i < n; ++i) {
        const bool ignored = problem.ignored(row0 + i);
        double loss = 0;
        if (!ignored) {
          const Row<T> row{top[i], sum[i], dot[i], call.indices ? 0 : mass[i],
                           call.indices ? at_target[i] : top[i]};
          loss = problem.loss(row, call.indices ? target(i) : -1);
          keep_stats(call, row0 + i, row);
        }
        loss_sum += loss;
        part[i] = static_cast<T>(loss);
      }
      if (call.value) narrow(part.get(), n, call.value_dtype, call.value, row0, 1);
    } else {
      for (int64_t c = 0; c < call.classes; ++c) registers([&](int64_t i) { exponential(c, i); });
    }
    if (call.gradient.data) write_gradient(o, first, n);
    return loss_sum;
  }

  void write_gradient(int64_t o, int64_t first, int64_t n) {
    const int64_t row0 = o * call.inner + first;
    const Vec<T> zero(0);
    std::fill(factor.get(), factor.get() + width, T(0));
    std::fill(scale.get(), scale.get() + width, T(0));
    for (int64_t i = 0; i < n; ++i) {
      if (problem.ignored(row0 + i)) continue;
      const int64_t target = call.indices ? call.indices[row0 + i] : -1;
      const auto slope = problem.slope(row0 + i, target, stats_of<T>(call, row0 + i),
                                       call.indices ? at_target[i] : T(0));
      factor[i] = slope.factor;
      scale[i] = slope.scale;
      at_target[i] = slope.at_target;
    }
    for (int64_t c = 0; c < call.classes; ++c) {
      T* g = &logits[c * width];
      registers([&](int64_t i) {
        Vec<T> slope = Vec<T>::loadu(g + i) * Vec<T>::loadu(&factor[i]);
        if (!call.indices) {
          slope = slope - Vec<T>::loadu(&wanted[c * width + i]) * Vec<T>::loadu(&scale[i]);
        } else if (problem.smooth) {
          slope = slope - Vec<T>(class_weight(c)) * Vec<T>::loadu(&scale[i]);
        }
        slope.store(g + i);
      });
    }
    if (call.indices) {
      for (int64_t i = 0; i < n; ++i) {
        if (problem.ignored(row0 + i)) {
          // Whatever its logits hold, nan included: 0.
          for (int64_t c = 0; c < call.classes; ++c) logits[c * width + i] = T(0);
        } else {
          logits[call.indices[row0 + i] * width + i] = at_target[i];
        }
      }
    }
    for (int64_t c = 0; c < call.classes; ++c) {
      narrow(&logits[c * width], n, call.gradient.dtype, const_cast<void*>(call.gradient.data),
             o * call.gradient.outer + c * call.gradient.classes + first * call.gradient.inner,
             call.gradient.inner);
    }
  }
};

template <class T>
double by_tile(const CrossEntropy& call) {
  const Problem<T> problem(call);
  constexpr int64_t kLanes = Vec<T>::size();
  // A tile of about 32 KiB; two cache lines of a class at least, or memory is read in scraps.
  const int64_t fit = 32768 / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(call.classes, 1);
  const int64_t width = std::clamp<int64_t>(fit / kLanes * kLanes, 32, 512);
  const int64_t tiles = (call.inner + width - 1) / width;
  // Tasks of several tiles share scratch; fixed, so that sums are the same for any thread count.
  const int64_t all = call.outer * tiles;
  const int64_t step = std::max<int64_t>(1, kTask / (width * std::max<int64_t>(call.classes, 1)));
  return sum_tasks((all + step - 1) / step, [&](int64_t task) {
    TileWalk<T> walk{problem, width};
    double sum = 0;
    for (int64_t t = task * step; t < std::min(all, (task + 1) * step); ++t) {
      const int64_t first = t % tiles * width;
      sum += walk.one(t / tiles, first, std::min(width, call.inner - first));
    }
    return sum;
  });
}

}  // namespace

double cross_entropy(const CrossEntropy& call) {
  if (call.compute_in_double) return call.by_row ? by_row<double>(call) : by_tile<double>(call);
  return call.by_row ? by_row<float>(call) : by_tile<float>(call);
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
