// Losses over rows whose classes lie side by side, row by row.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A row is read
// from memory once, in blocks that stay in the cache for their second use.
#include <array>
#include <cmath>

#include "rows.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kTask = 32768;  // elements per task, at least
constexpr int64_t kBlock = 1024;  // elements of a row at a time
// A row's exponentials are kept for its gradient if they take no more bytes than this, which a
// core's own cache may hold.
constexpr int64_t kMaxSavedBytes = 1 << 20;

// Calls f(i, lanes in use, which of four accumulators to use) for every register of [0, n).
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
double total(RegisterSum<T> sum) {
  Sum total;
  sum.add_to(total);
  return total.value();
}

// If a logit is nan, this may be any number: the row's sum is nan whatever its max is.
template <class T>
T max_element(const T* x, int64_t n) {
  const Vec<T> none(-kInfinity<T>);
  Vec<T> part[4] = {none, none, none, none};
  for_registers<T>(n, [&](int64_t i, int64_t count, int u) {
    part[u] = max(load(x + i, count, -kInfinity<T>), part[u]);
  });
  return max_lane(max(max(part[3], part[2]), max(part[1], part[0])));
}

template <class Loss>
struct RowWalk {
  using T = typename Loss::Number;
  using RowState = typename Loss::template State<double>;
  using Part = typename Loss::template State<Vec<T>>;
  // Short rows end together, a register of them: logarithms and quotients of a row alone cost as
  // much as a few hundred of its classes.
  static constexpr int64_t kGroup = Vec<double>::size();
  using Group = std::array<double, kGroup>;  // a number of each row

  struct Row {
    int64_t index, outer, inner, target;  // target: a class index; -1: class probabilities
    int64_t offset(const Rows& r) const { return outer * r.outer + inner * r.inner; }
  };

  // Four states side by side, so that no addition waits for the one before.
  struct Parts {
    Part part[4];
    FUSEDLOSS_HD explicit Parts(const RowState& row) {
      const Vec<T> max(static_cast<T>(finite_max(row.max))), zero(0);
      unrolled<4>([&](auto u) { part[u] = {max, zero, zero, zero}; });
    }
    FUSEDLOSS_HD double total(Vec<T> Part::* of) const {
      return sum_of_lanes((part[0].*of + part[1].*of) + (part[2].*of + part[3].*of));
    }
  };

  const RowProblem<Loss>& problem;
  const RowsCall& call = problem.call;
  const Loss& loss = problem.loss;
  const int64_t blocks = (call.classes + kBlock - 1) / kBlock;
  const int64_t group = blocks == 1 ? kGroup : 1;  // rows
  // Each block's e^(x - max) is kept from the loss to the gradient, with the max that it was
  // computed with.
  const bool saves = call.gradient.data && call.classes * int64_t{sizeof(T)} <= kMaxSavedBytes;
  const Buffer<T> saved_exp, saved_max;
  alignas(CacheLine) T logits[kBlock], target_shares[kBlock], gradient[kBlock];
  typename Loss::template State<Group> states{};
  typename Loss::template Slope<Group> slopes{};
  Group target_gaps{}, target_weights{}, losses{}, scales{};

  explicit RowWalk(const RowProblem<Loss>& p)
      : problem(p), saved_exp(saves ? group * blocks * kBlock : 0), saved_max(group * blocks) {}

  Row row_at(int64_t index) const {
    return {index, index / call.inner, index % call.inner, call.indices ? call.indices[index] : -1};
  }
  bool ignored(const Row& row) const { return call.indices && row.target == call.ignore_index; }

  // The classes [begin, begin + n) of a row.
  const T* read(const Rows& rows, const Row& row, int64_t begin, int64_t n, T* scratch) const {
    const int64_t offset = row.offset(rows) + begin * rows.classes;
    if (rows.classes == 1 && is_dtype<T>(rows.dtype)) return elements<T>(rows, offset);
    widen(rows.dtype, rows.data, offset, rows.classes, n, scratch);
    return scratch;
  }

  // q of these classes; null: 1.
  const T* read_target_shares(const Row& row, int64_t begin, int64_t n) {
    const T* const w = problem.weight ? problem.weight + begin : nullptr;
    if (call.indices) return w;
    const T* const y = read(call.probabilities, row, begin, n, target_shares);
    if (!w && !loss.smooth) return y;
    for_registers<T>(n, [&](int64_t i, int64_t count, int) {
      const Vec<T> weights = w ? load(w + i, count, T(0)) : Vec<T>(1);
      store(loss.target_share(load(y + i, count, T(0)), weights), target_shares + i, count);
    });
    return target_shares;
  }

  // Adds the logits x of one block to state, whose max counts them already, but not x[target],
  // which may lie outside of [0, n). kExact: each is added in double. kSave: e^(x - max) is stored
  // in save as well.
  template <bool kSave, bool kExact>
  void add_logits(const T* x, int64_t n, int64_t target, RowState& state, T* save, const char* next,
                  const char* out) const {
    const int64_t next_size = bytes_of(call.input.dtype), out_size = bytes_of(call.gradient.dtype);
    // A copy of the target's register, with -inf in place of the target.
    constexpr int64_t kLanes = Vec<T>::size();
    T others[kLanes];
    int64_t others_begin = -1;
    if (0 <= target && target < n) {
      others_begin = target / kLanes * kLanes;
      std::copy_n(x + others_begin, std::min(kLanes, n - others_begin), others);
      others[target - others_begin] = -kInfinity<T>;
    }
    Parts parts(state);
    RegisterSum<T> exact;
    for_registers<T>(n, [&](int64_t i, int64_t count, int u) FUSEDLOSS_INLINE {
      __builtin_prefetch(next + i * next_size, 0, 2);
      const T* const from = i == others_begin ? others : x + i;
      Part alone = parts.part[u];
      const Vec<T> e = Loss::add(kExact ? alone : parts.part[u], load(from, count, -kInfinity<T>));
      if constexpr (kExact) exact.add(e);
      if constexpr (kSave) {
        __builtin_prefetch(out + i * out_size, 1, 2);
        store(e, save + i, count);
      }
    });
    Loss::merge(state, {state.max, kExact ? total(exact) : parts.total(&Part::sum), 0, 0});
  }

  // Adds the targets of a block whose logits are in state already. kShares: the targets are q;
  // otherwise all are 1.
  template <bool kShares>
  void add_targets(const T* x, const T* q, int64_t n, RowState& state) const {
    Parts parts(state);
    const T max = static_cast<T>(finite_max(state.max));
    for_registers<T>(n, [&](int64_t i, int64_t count, int u) FUSEDLOSS_INLINE {
      const Vec<T> share = kShares ? load(q + i, count, T(0)) : Vec<T>(1);
      Loss::add_target(parts.part[u], load(x + i, count, max), share);
    });
    const double target_mass = kShares ? parts.total(&Part::target_mass) : static_cast<double>(n);
    Loss::merge(state, {state.max, 0, parts.total(&Part::weighted_logits), target_mass});
  }

  void reduce(int64_t k, const Row& row) {
    const T target_logit = *read(call.input, row, std::max<int64_t>(row.target, 0), 1, logits);
    RowState state{row.target >= 0 ? target_logit : -kInfinity<T>, 0, 0, 0};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * kBlock, n = std::min(kBlock, call.classes - begin);
      const T* const x = read(call.input, row, begin, n, logits);
      // Prefetches the next block, or the next row's first, and this block's gradient: an engine
      // that loads and computes in turns leaves memory idle half of the time.
      const char* const next = address(call.input, row.offset(call.input) + begin + n);
      const char* const out = address(call.gradient, row.offset(call.gradient) + begin);
      Loss::rescale(state, static_cast<double>(max_element(x, n)));
      saved_max[k * blocks + b] = static_cast<T>(state.max);
      T* const save = saves ? &saved_exp[(k * blocks + b) * kBlock] : nullptr;
      const auto add = [&](auto saves, auto exact) {
        add_logits<saves(), exact()>(x, n, row.target - begin, state, save, next, out);
      };
      with_constants(add, saves, problem.exact_sums);
      if (!loss.sums_targets()) continue;
      const T* const q = read_target_shares(row, begin, n);
      with_constants([&](auto shares) { add_targets<shares()>(x, q, n, state); }, q);
    }
    states.max[k] = state.max;
    states.sum[k] = state.sum;
    states.weighted_logits[k] = state.weighted_logits;
    states.target_mass[k] = state.target_mass;
    target_gaps[k] = double(target_logit) - state.max;
    target_weights[k] = problem.class_weight(std::max<int64_t>(row.target, 0));
    scales[k] = call.scale;
    if (call.upstream) problem.read_scales(row.index, 1, &scales[k]);
  }

  // The losses and slopes of the rows that reduce() has gone over.
  void finish() {
    using V = Vec<double>;
    const auto lanes = [](const Group& numbers) { return V::loadu(numbers.data()); };
    const V gap = lanes(target_gaps), weight = lanes(target_weights),
            target_exp = call.indices ? exp_nonpositive(gap) : V(0);
    const typename Loss::template State<V> row{lanes(states.max), lanes(states.sum),
                                               lanes(states.weighted_logits),
                                               lanes(states.target_mass)};
    loss.loss(row, Loss::excess(row.sum, target_exp), gap, weight).store(losses.data());
    if (!call.gradient.data) return;
    const auto slope = loss.slope(row, target_exp, weight, lanes(scales));
    slope.factor.store(slopes.factor.data());
    slope.scale.store(slopes.scale.data());
    slope.target_gradient.store(slopes.target_gradient.data());
  }

  void write_gradient(int64_t k, const Row& row) {
    const Vec<T> max(states.max[k]);
    const int64_t stride = call.gradient.classes;
    const bool direct = is_dtype<T>(call.gradient.dtype) && stride == 1;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * kBlock, n = std::min(kBlock, call.classes - begin),
                    block = k * blocks + b;
      T* const out =
          direct ? elements<T>(call.gradient, row.offset(call.gradient) + begin) : gradient;
      const T* x = saves ? &saved_exp[block * kBlock] : read(call.input, row, begin, n, logits);
      const double gap = saves ? double(saved_max[block]) - states.max[k] : 0;
      const double factor = gap == 0 ? slopes.factor[k] : slopes.factor[k] * std::exp(gap);
      const typename Loss::template Slope<Vec<T>> slope{Vec<T>(factor), Vec<T>(slopes.scale[k]),
                                                        Vec<T>(0), Vec<T>(0)};
      const T* const q = loss.sums_targets() ? read_target_shares(row, begin, n) : nullptr;
      const auto write = [&](auto saves, auto soft, auto shares) {
        for_registers<T>(n, [=](int64_t i, int64_t count, int) {
          const Vec<T> v = load(x + i, count, T(0)), e = saves() ? v : Loss::exponential(v, max),
                       share = shares() ? load(q + i, count, T(0)) : Vec<T>(1);
          store(soft() ? Loss::gradient(slope, e, share) : Loss::gradient(slope, e), out + i,
                count);
        });
      };
      with_constants(write, saves, loss.sums_targets(), q);
      if (begin <= row.target && row.target < begin + n) {
        out[row.target - begin] = static_cast<T>(slopes.target_gradient[k]);
      }
      if (!direct) {
        narrow(out, n, call.gradient.dtype, const_cast<void*>(call.gradient.data),
               row.offset(call.gradient) + begin * stride, stride);
      }
    }
  }

  void clear_gradient(const Row& row) {
    with_type(call.gradient.dtype, [&](auto tag) {
      using D = decltype(tag);
      D* const out = elements<D>(call.gradient, row.offset(call.gradient));
      for (int64_t c = 0; c < call.classes; ++c) out[c * call.gradient.classes] = D(0);
    });
  }

  // The rows [begin, begin + n), n <= group; their losses go to sum, in order.
  void process_rows(int64_t begin, int64_t n, Sum& sum) {
    for (int64_t k = 0; k < n; ++k) {
      const Row row = row_at(begin + k);
      if (!ignored(row)) reduce(k, row);
    }
    finish();
    for (int64_t k = 0; k < n; ++k) {
      const Row row = row_at(begin + k);
      const T value = ignored(row) ? T(0) : static_cast<T>(losses[k]);
      sum.add(value);
      if (call.value) narrow(&value, 1, call.value_dtype, call.value, row.index, 1);
      if (!call.gradient.data) continue;
      if (ignored(row)) {
        clear_gradient(row);
      } else {
        write_gradient(k, row);
      }
    }
  }
};

}  // namespace

template <class Loss>
double rows_contiguous(const RowsCall& call) {
  using Walk = RowWalk<Loss>;
  const RowProblem<Loss> problem(call);
  const int64_t rows = call.outer * call.inner;
  const int64_t step = std::max<int64_t>(1, kTask / std::max<int64_t>(call.classes, 1));
  return sum_tasks<Walk>(
      call.threads, (rows + step - 1) / step, [&] { return std::make_unique<Walk>(problem); },
      [&](Walk& walk, int64_t task) {
        const int64_t end = std::min(rows, (task + 1) * step);
        Sum sum;
        for (int64_t row = task * step; row < end; row += walk.group)
          walk.process_rows(row, std::min(walk.group, end - row), sum);
        return sum.value();
      });
}

template double rows_contiguous<CrossEntropyRow<float>>(const RowsCall& call);
template double rows_contiguous<CrossEntropyRow<double>>(const RowsCall& call);

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
