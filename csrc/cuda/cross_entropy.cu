// The cross-entropy engine on CUDA.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A row is read
// from memory once and stays in shared memory, with part of a warp, a block or a cluster of blocks,
// until its gradient leaves; the packets of a row to come take the places that it leaves. What no
// cluster can hold is read once more. One kernel serves every pass, so that a gradient has the same
// bits from each.
//
// Where the class dimension is not innermost, a thread walks the classes of a packet of
// neighbouring rows; it meets them the second time in the cache.
#include <cooperative_groups.h>

#include <algorithm>
#include <climits>

#include "../math/cross_entropy.h"
#include "common.cuh"

namespace fusedloss::cuda {
namespace {

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
inline constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

constexpr int kBatch = 2;  // packets of a thread that are added up together
constexpr int kLanesBlock = 512, kRowBlock = 256, kColumnsBlock = 128;  // threads

// ---- sums over part of a row --------------------------------------------------------------------

// To measure distances from: a row of nothing but -inf has none.
template <class T>
__device__ T origin(T max) {
  return max == -kInfinity<T> ? T(0) : max;
}

// e^x for x <= 0, as exact as operands of type D deserve.
template <class D>
__device__ Compute<D> exp_for(Compute<D> x) {
  if constexpr (sizeof(D) == 2) {
    return quick_exp(x);
  } else {
    return exp_nonpositive(x);
  }
}

// What some of a row's classes add up to, measured from the largest of them; members as in RowSums.
// D is the type of the results. kHard: the target alone counts; dot and mass stay 0 then. Where
// more counts, the loss of a row that is sure of another class needs the digits of what the others,
// small beside it, add up to.
template <class D, bool kHard>
struct Partial {
  using T = Compute<D>;
  using Result = D;
  static constexpr bool kSoft = !kHard;
  T max = -kInfinity<T>;
  std::conditional_t<kSoft && std::is_same_v<D, float>, double, T> sum = 0;
  T dot = 0, mass = 0;

  // As measured from another origin.
  __device__ void move_to(T top) {
    const T from = origin(max), to = origin(top);
    sum *= exp_for<D>(max - to);  // 0 where max is -inf
    dot += mass * (from - to);
    max = top;
  }
  __device__ void merge(Partial other) {
    const T top = fmax(max, other.max);
    move_to(top);
    other.move_to(top);
    add(other);
  }
  // One that is measured from the same origin.
  __device__ void add(const Partial& other) {
    sum += other.sum;
    dot += other.dot;
    mass += other.mass;
  }
};

// A sum of two has the same bits in either order, and so all lanes come to the same end.
template <class P>
__device__ void merge_lanes(P& p, int lanes) {
  auto top = p.max;
  for (int step = lanes / 2; step > 0; step /= 2) {
    top = fmax(top, __shfl_xor_sync(kAllLanes, top, step));
  }
  p.move_to(top);
  for (int step = lanes / 2; step > 0; step /= 2) {
    p.sum += __shfl_xor_sync(kAllLanes, p.sum, step);
    if constexpr (P::kSoft) {
      p.dot += __shfl_xor_sync(kAllLanes, p.dot, step);
      p.mass += __shfl_xor_sync(kAllLanes, p.mass, step);
    }
  }
}

// ---- the threads that share a row ---------------------------------------------------------------

enum class Scope { kLanes, kBlock, kCluster };

// Of a power of two of lanes: a warp works on several rows.
template <Scope kScope, class P>
struct Group {
  const int size, rank;

  __device__ explicit Group(int lanes) : size(lanes), rank(threadIdx.x % lanes) {}
  // Whose packet it is; a remainder by what is no constant takes twenty instructions.
  __device__ int owner(int packet) const { return packet & (size - 1); }
  // Groups of one warp stay together: the row that the first of them is at, and this one's own.
  __device__ int64_t first_row() const {
    return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp * (kWarp / size);
  }
  __device__ int64_t row_step() const { return int64_t{gridDim.x} * blockDim.x / size; }
  __device__ int64_t row_behind() const { return threadIdx.x % kWarp / size; }
  __device__ void merge(P& p) const { merge_lanes(p, size); }
  __device__ void leave() const {}
};

// A block's warps leave their partials in shared memory. Two sets of them, used by turns, make one
// barrier a row enough: who writes a set anew has passed the barrier that follows its reading.
template <class P>
struct BlockPartials {
  P of_warp[2][kWarp];
};

template <class P>
__device__ void merge_block(P& p, P (&of_warp)[kWarp]) {
  merge_lanes(p, kWarp);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = p;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  p = lane < blockDim.x / kWarp ? of_warp[lane] : P();
  merge_lanes(p, kWarp);
}

template <class P>
struct Group<Scope::kBlock, P> {
  const int size = blockDim.x, rank = threadIdx.x;
  BlockPartials<P>& shared;
  int turn = 0;

  __device__ explicit Group(int) : shared(storage()) {}
  __device__ int owner(int packet) const { return packet % size; }
  __device__ static BlockPartials<P>& storage() {
    __shared__ alignas(16) unsigned char bytes[sizeof(BlockPartials<P>)];
    return *reinterpret_cast<BlockPartials<P>*>(bytes);
  }
  __device__ int64_t first_row() const { return blockIdx.x; }
  __device__ int64_t row_step() const { return gridDim.x; }
  __device__ int64_t row_behind() const { return 0; }
  __device__ void merge(P& p) {
    merge_block(p, shared.of_warp[turn]);
    turn ^= 1;
  }
  __device__ void leave() const {}
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// The hardware has no clusters, and none is launched: see has_clusters.
template <class P>
struct Group<Scope::kCluster, P> : Group<Scope::kBlock, P> {
  using Group<Scope::kBlock, P>::Group;
};
#else
template <class P>
struct Group<Scope::kCluster, P> {
  const int size, rank;
  BlockPartials<P>& shared;
  int turn = 0;

  __device__ explicit Group(int)
      : size(cluster().num_blocks() * blockDim.x),
        rank(cluster().block_rank() * blockDim.x + threadIdx.x),
        shared(Group<Scope::kBlock, P>::storage()) {}
  __device__ int owner(int packet) const { return packet % size; }
  __device__ static cooperative_groups::cluster_group cluster() {
    return cooperative_groups::this_cluster();
  }
  __device__ int64_t first_row() const { return blockIdx.x / cluster().num_blocks(); }
  __device__ int64_t row_step() const { return gridDim.x / cluster().num_blocks(); }
  __device__ int64_t row_behind() const { return 0; }
  __device__ void merge(P& p) {
    __shared__ alignas(16) unsigned char bytes[2 * sizeof(P)];
    P* const of_block = reinterpret_cast<P*>(bytes) + turn;
    merge_block(p, shared.of_warp[turn]);
    if (threadIdx.x == 0) *of_block = p;
    cluster().sync();
    p = P();
    for (unsigned b = 0; b < cluster().num_blocks(); ++b) {
      p.merge(*cluster().map_shared_rank(of_block, b));
    }
    turn ^= 1;
  }
  // A block's shared memory goes with it: none may leave while another reads there.
  __device__ void leave() const { cluster().sync(); }
};
#endif

// ---- what every kernel of this file knows of a call ---------------------------------------------

template <class T>
struct Problem {
  CrossEntropyCall call;
  int64_t rows;

  template <class N, bool kHard>
  __device__ Shares<N> shares() const {
    if constexpr (kHard) return {true, 0, 1, 1};
    const double classes = static_cast<double>(call.classes);
    return {call.indices != nullptr, call.label_smoothing, classes,
            call.weight_sum ? *call.weight_sum : classes};
  }
  __device__ T class_weight(int64_t c) const {
    return call.weight ? static_cast<const T*>(call.weight)[c] : T(1);
  }
  __device__ int64_t offset(const Rows& r, int64_t row) const {
    if (call.inner == 1) return row * r.outer;  // a 64-bit division takes as long as a packet
    return row / call.inner * r.outer + row % call.inner * r.inner;
  }
  __device__ int64_t index(int64_t row) const {
    return call.indices && row < rows ? call.indices[row] : -1;
  }
  template <class D>
  __device__ D* gradient(int64_t row) const {
    void* const data = const_cast<void*>(call.gradient.data);
    return data ? static_cast<D*>(data) + offset(call.gradient, row) : nullptr;
  }
  // q of class c, for the dot and for a gradient element; y_at: where its row of probabilities is.
  __device__ T share(const Shares<T>& shares, int64_t y_at, int64_t c) const {
    const T w = class_weight(c);
    if (call.indices) return w;
    const Rows& r = call.probabilities;
    return (read<T>(r.data, r.dtype, y_at + c * r.classes) * shares.keep + shares.spread) * w;
  }
};

// The target of a row.
struct Target {
  int64_t index = -1;   // -1: class probabilities, or not live
  bool live = false;    // there are a loss and a gradient to compute
  bool faulty = false;  // else they are nan, or 0: ignored, or no row at all

  Target() = default;
  template <class T>
  __device__ Target(const Problem<T>& problem, int64_t row, const Launch& l)
      : Target(problem, row, problem.index(row), l) {}
  template <class T>
  __device__ Target(const Problem<T>& problem, int64_t row, int64_t index_, const Launch& l) {
    if (row >= problem.rows) return;
    const CrossEntropyCall& call = problem.call;
    live = true;
    if (!call.indices) return;
    index = index_;
    if (index >= 0 && index < call.classes && index != call.ignore_index) return;
    live = false;
    faulty = index != call.ignore_index;
    if (faulty) {
      tell(l, Fault::kTargetClass, row, index, call.classes);
    }
    index = -1;
  }
  template <class T>
  __device__ T rest() const {
    return faulty ? kNan<T> : T(0);
  }
};

// What a row's factor is computed in. All its elements share the error of that, and those that keep
// a float's digits would show it.
template <class D>
using Wide = std::conditional_t<std::is_same_v<D, float>, double, Compute<D>>;

// A gradient from e^(x - max) and q: their products nearly cancel.
template <class D>
__device__ Compute<D> soft_gradient(const RowSlope<Compute<D>>& slope,
                                    const RowSlope<Compute<D>>& low, Compute<D> e, Compute<D> q) {
  Compute<D> rest = -q * slope.scale;
  if constexpr (!std::is_same_v<Wide<D>, Compute<D>>) {
    rest = std::fma(-q, slope.scale, e * low.factor - q * low.scale);
  }
  return std::fma(e, slope.factor, rest);
}

// What comes of a row's sums, once they are complete.
template <class T>
struct RowEnd {
  RowSums<T> sums{};
  T at_target = 0;             // the gradient there
  RowSlope<T> slope{}, low{};  // to be added up; low is 0 where T is as wide as it gets

  template <class P>
  __device__ RowEnd(const Problem<T>& problem, const Shares<Wide<typename P::Result>>& shares,
                    const Target& target, P p, T logit, double scale, int64_t row) {
    using W = Wide<typename P::Result>;
    if (!target.live) return;
    if (target.index >= 0) p.move_to(fmax(p.max, logit));
    const T weight = target.index >= 0 ? problem.class_weight(target.index) : T(1);
    const T gap = logit - p.max;
    const CrossEntropyCall& call = problem.call;
    const T at = call.indices ? exp_nonpositive(gap) : T(0);
    sums = {p.max,  static_cast<T>(p.sum),
            p.dot,  p.mass,
            gap,    at,
            weight, static_cast<T>(p.sum + (decltype(p.sum)(at) - 1))};
    if (call.upstream) scale = read<W>(call.upstream, call.upstream_dtype, row);
    const RowSums<W> wide{p.max, static_cast<W>(p.sum), p.dot, p.mass, gap, at, weight, W(0)};
    const RowSlope<W> exact = shares.slope(wide, static_cast<W>(scale));
    W own = exact.own * exact.factor;
    if (shares.smooth) own = own - wide.weight * exact.scale;
    at_target = static_cast<T>(own);
    slope = {static_cast<T>(exact.factor), static_cast<T>(exact.scale), static_cast<T>(exact.own)};
    if constexpr (!std::is_same_v<W, T>) {
      low = {rest_of(exact.factor, slope.factor), rest_of(exact.scale, slope.scale), 0};
    }
  }
  template <class W>
  __device__ static T rest_of(W exact, T high) {
    return isfinite(high) ? static_cast<T>(exact - high) : T(0);
  }
  __device__ T loss(const Shares<T>& shares, const Target& target) const {
    return target.live ? shares.loss(sums) : target.template rest<T>();
  }
};

// ---- classes side by side -----------------------------------------------------------------------

// One row: packets, which begin at multiples of 16 bytes wherever the row itself begins, and its
// edges, the classes before and behind them.
template <class D>
struct PackedRow {
  using P = Packet<D>;
  const D* input;
  D* gradient;
  int head;  // classes before the first packet
  int packets;
  int edges;    // classes in no packet
  bool packed;  // gradient lies at the same phase

  __device__ PackedRow(const D* in, D* out, int classes)
      : input(in), gradient(out), packed(phase(in) == phase(out)) {
    head = min((P::kSize - phase(in)) % P::kSize, classes);
    packets = static_cast<int>(static_cast<unsigned>(classes - head) / P::kSize);
    edges = classes - packets * P::kSize;
  }
  // The class of an edge, and of a packet's first element.
  __device__ int edge(int e) const { return e < head ? e : e + packets * P::kSize; }
  __device__ int first(int p) const { return head + p * P::kSize; }

  // How many packets a thread of the group has.
  template <class G>
  __device__ int count(const G& group) const {
    return (packets - group.rank + group.size - 1) / group.size;
  }
  __device__ const P* at(int p) const { return reinterpret_cast<const P*>(input + first(p)); }
  __device__ void store(int p, const P& packet) const {
    D* const out = gradient + first(p);
    if (packed) {
      *reinterpret_cast<P*>(out) = packet;
      return;
    }
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) out[i] = packet.element[i];
  }
};

// How a row's packets are laid over its threads.
struct Layout {
  int lanes = kWarp;  // a row, where a warp has several
  int each = 0;       // packets of a thread
  int stages = 1;     // rows there at a time: one is computed with, the others are on their way
  bool keeps = true;  // else no row is there, and it is read twice
};

template <Scope kScope>
constexpr int kBlock = kScope == Scope::kLanes ? kLanesBlock : kRowBlock;
// Threads of an SM: more of them where each is not short of registers.
template <class D, bool kHard>
constexpr int kThreadsAtOnce = sizeof(D) == 8 ? 256 : (kHard ? 1024 : 768);

// kHard: class indices without label smoothing.
template <class D, Scope kScope, bool kHard>
__global__ void __launch_bounds__(kBlock<kScope>,
                                  std::max(1, kThreadsAtOnce<D, kHard> / kBlock<kScope>))
    rows(const Problem<Compute<D>> problem, const Launch l, const Layout layout) {
  using T = Compute<D>;
  using P = Packet<D>;
  using Sums = Partial<D, kHard>;
  extern __shared__ uint4 shared[];
  const Scaling& s = Scaling::of_block(l);  // in shared memory: it takes no registers meanwhile
  if (settled(l, s)) return;
  const CrossEntropyCall& call = problem.call;
  const auto shares = problem.template shares<T, kHard>();
  const auto wide_shares = problem.template shares<Wide<D>, kHard>();
  Group<kScope, Sums> group(layout.lanes);
  const int64_t step = group.row_step();
  const auto line_of = [&](int64_t row) {
    const bool there = row < problem.rows;
    const int64_t any = there ? row : 0;
    return PackedRow<D>(static_cast<const D*>(call.input.data) + problem.offset(call.input, any),
                        problem.template gradient<D>(any),
                        there ? static_cast<int>(call.classes) : 0);
  };
  const auto logit_of = [&](int64_t row, const Target& target) {
    if (target.index < 0) return T(0);
    const D* const input = static_cast<const D*>(call.input.data);
    return T(widen(input[problem.offset(call.input, row) + target.index]));
  };

  // A thread's own packets alone: no other looks there, and no barrier is needed.
  P* const places = reinterpret_cast<P*>(shared) + threadIdx.x;
  int stage = 0;
  const auto place = [&](int k) -> P& {
    return places[(stage * layout.each + k) * static_cast<int>(blockDim.x)];
  };
  // The packets of a row, from this thread's k-th on, are sent for.
  const auto send_for = [&](const PackedRow<D>& line, int k) {
    for (int p = k * group.size + group.rank; p < line.packets; p += group.size) {
      copy_ahead(place(k++), line.at(p));
    }
  };

  int64_t row = group.first_row() + group.row_behind();
  for (; stage < layout.stages; ++stage) {
    if (layout.keeps) send_for(line_of(row + stage * step), 0);
    end_of_copies();
  }
  stage = 0;
  Target target(problem, row, problem.index(row), l);
  T logit = logit_of(row, target);
  double total = 0;
  for (; row - group.row_behind() < problem.rows; row += step) {
    const PackedRow<D> line = line_of(row);
    const int64_t next_index = problem.index(row + step);
    const int64_t y_at = problem.offset(call.probabilities, row);
    // Where the target is, if it is in a packet; far behind them where there is none.
    const int class_of_target = static_cast<int>(target.index);
    const auto behind_head = static_cast<unsigned>(class_of_target - line.head);
    const int its_packet = static_cast<int>(behind_head / P::kSize);
    const int its_element = static_cast<int>(behind_head % P::kSize);
    const bool mine = its_packet < line.packets && group.owner(its_packet) == group.rank;
    const D nothing = narrow<D>(-kInfinity<T>);

    // The target's own share is left out of the sum.
    wait_for_copies(layout.stages - 1);
    if (layout.keeps && mine) place(its_packet / group.size).element[its_element] = nothing;
    Sums sums;
    // Class c, by itself.
    const auto part_of = [&](T distance, T top, int c) {
      Sums part{top, exp_for<D>(distance)};
      if constexpr (!kHard) {
        part.mass = problem.share(shares, y_at, c);
        part.dot = part.mass * (c == class_of_target ? logit - origin(top) : distance);
      }
      return part;
    };
    // From this thread's k-th packet on as many as `many` says, whose values are in flight
    // together.
    const auto add = [&](auto many, int k) {
      P x[many];
#pragma unroll
      for (int u = 0; u < many; ++u) {
        const int p = (k + u) * group.size + group.rank;
        x[u] = layout.keeps ? place(k + u) : *line.at(p);
        if (!layout.keeps && p == its_packet) put(x[u], its_element, nothing);
      }
      Sums part;
#pragma unroll
      for (int u = 0; u < many; ++u) part.max = fmax(part.max, largest(x[u]));
      const T top = origin(part.max);
#pragma unroll
      for (int u = 0; u < many; ++u) {
        const int c = line.first((k + u) * group.size + group.rank);
        // As a tree: where one class outweighs all others, each addition to it is a rounding.
        Sums of[P::kSize];
#pragma unroll
        for (int i = 0; i < P::kSize; ++i) {
          of[i] = part_of(T(widen(x[u], i)) - top, part.max, c + i);
        }
#pragma unroll
        for (int half = P::kSize / 2; half > 0; half /= 2) {
#pragma unroll
          for (int i = 0; i < half; ++i) of[i].add(of[i + half]);
        }
        part.add(of[0]);
      }
      sums.merge(part);
    };
    if (target.live) {
      const int count = line.count(group);
      int k = 0;
      for (; k + kBatch <= count; k += kBatch) add(std::integral_constant<int, kBatch>(), k);
      for (; k < count; ++k) add(std::integral_constant<int, 1>(), k);
      for (int e = group.rank; e < line.edges; e += group.size) {
        const int c = line.edge(e);
        const T x = c == class_of_target ? -kInfinity<T> : T(widen(line.input[c]));
        sums.merge(part_of(x - origin(x), x, c));
      }
    }
    const PackedRow<D> ahead = line_of(layout.keeps ? row + layout.stages * step : problem.rows);
    if (!s.write) send_for(ahead, 0);
    group.merge(sums);

    const RowEnd<T> end(problem, wide_shares, target, sums, logit, s.scale, row);
    if (group.rank == 0 && row < problem.rows) {
      const T loss = end.loss(shares, target);
      if (call.value) write(call.value, call.value_dtype, row, loss);
      total += loss;
    }
    const Target next(problem, row + step, next_index, l);
    logit = logit_of(row + step, next);
    if (s.write) {
      const auto gradient = [&](T x, int c) {
        const T e = exp_for<D>(x - end.sums.max);
        if constexpr (kHard) return e * end.slope.factor;
        return soft_gradient<D>(end.slope, end.low, e, problem.share(shares, y_at, c));
      };
      int k = 0;
#pragma unroll 2
      for (int p = group.rank; p < line.packets; p += group.size, ++k) {
        const P x = layout.keeps ? place(k) : *line.at(p);
        if (p < ahead.packets) copy_ahead(place(k), ahead.at(p));
        T g[P::kSize];
        if (target.live) {
#pragma unroll
          for (int i = 0; i < P::kSize; ++i) g[i] = gradient(T(widen(x, i)), line.first(p) + i);
        } else {
          std::fill_n(g, P::kSize, target.template rest<T>());
        }
        line.store(p, pack<D>(g));
      }
      for (int e = group.rank; e < line.edges; e += group.size) {
        const int c = line.edge(e);
        T g = target.template rest<T>();
        if (target.live) g = gradient(T(widen(line.input[c])), c);
        line.gradient[c] = narrow<D>(c == class_of_target ? end.at_target : g);
      }
      if (mine) line.gradient[class_of_target] = narrow<D>(end.at_target);
      send_for(ahead, k);
    }
    end_of_copies();
    stage = stage + 1 < layout.stages ? stage + 1 : 0;
    target = next;
  }
  group.leave();
  finish(l, total);
}

// ---- classes apart ------------------------------------------------------------------------------

// Blocks for an SM at least: left to itself the compiler would spill registers to fit in more.
template <class D, bool kWide, bool kHard>
constexpr int kColumnsBlocks = kWide ? 4 : (kHard && sizeof(D) < 8 ? 8 : 1);

// kWide: a thread has a packet of rows, which lie side by side; else one row, wherever it lies.
template <class D, bool kWide, bool kHard>
__global__ void __launch_bounds__(kColumnsBlock, kColumnsBlocks<D, kWide, kHard>)
    columns(const Problem<Compute<D>> problem, const Launch l) {
  using T = Compute<D>;
  constexpr int kRows = kWide ? Packet<D>::kSize : 1;
  constexpr int kStep = kRows > 4 ? 2 : 4;  // classes in flight
  struct alignas(kWide ? kPacketBytes : sizeof(D)) Line {
    D element[kRows];
  };
  const Scaling s = Scaling::of_block(l);
  if (settled(l, s)) return;
  const CrossEntropyCall& call = problem.call;
  const auto shares = problem.template shares<T, kHard>();
  const auto wide_shares = problem.template shares<Wide<D>, kHard>();
  const int64_t step = int64_t{gridDim.x} * blockDim.x * kRows;
  double total = 0;
  for (int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kRows; row < problem.rows;
       row += step) {
    const D* const input = static_cast<const D*>(call.input.data) + problem.offset(call.input, row);
    D* const gradient = problem.template gradient<D>(row);
    const auto line = [&](int64_t c) {
      return *reinterpret_cast<const Line*>(input + c * call.input.classes);
    };
    Target targets[kRows];
    int64_t y_at[kRows];
    T logits[kRows];
    Partial<D, kHard> sums[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      targets[j] = Target(problem, row + j, l);
      const int64_t t = targets[j].index;
      y_at[j] = problem.offset(call.probabilities, row + j);
      logits[j] = t >= 0 ? T(widen(input[t * call.input.classes + j])) : T(0);
    }
    for (int64_t c = 0; c < call.classes; c += kStep) {
      Line x[kStep];
#pragma unroll
      for (int k = 0; k < kStep; ++k) {
        if (c + k < call.classes) x[k] = line(c + k);
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        Partial<D, kHard> part;
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
          if (c + k < call.classes && c + k != targets[j].index) {
            part.max = fmax(part.max, T(widen(x[k].element[j])));
          }
        }
        const T top = origin(part.max);
#pragma unroll
        for (int k = 0; k < kStep; ++k) {
          if (c + k >= call.classes) break;
          const T distance = T(widen(x[k].element[j])) - top;
          if (c + k != targets[j].index) part.sum += exp_for<D>(distance);
          if constexpr (!kHard) {
            const T q = problem.share(shares, y_at[j], c + k);
            part.dot += q * distance;
            part.mass += q;
          }
        }
        sums[j].merge(part);
      }
    }
    T max[kRows], at_target[kRows];
    RowSlope<T> slope[kRows], low[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const RowEnd<T> end(problem, wide_shares, targets[j], sums[j], logits[j], s.scale, row + j);
      const T loss = end.loss(shares, targets[j]);
      if (call.value) write(call.value, call.value_dtype, row + j, loss);
      total += loss;
      max[j] = end.sums.max;
      at_target[j] = end.at_target;
      slope[j] = end.slope;
      low[j] = end.low;
    }
    if (!s.write) continue;
    for (int64_t c = call.classes - 1; c >= 0; --c) {
      const Line x = line(c);
      Line out;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const T e = exp_for<D>(T(widen(x.element[j])) - max[j]);
        T g = e * slope[j].factor;
        if (!kHard && targets[j].live) {
          g = soft_gradient<D>(slope[j], low[j], e, problem.share(shares, y_at[j], c));
        }
        if (c == targets[j].index) g = at_target[j];
        out.element[j] = narrow<D>(targets[j].live ? g : targets[j].template rest<T>());
      }
      *reinterpret_cast<Line*>(gradient + c * call.gradient.classes) = out;
    }
  }
  finish(l, total);
}

// ---- which of them ------------------------------------------------------------------------------

constexpr int kMostBlocks = 8;             // in a cluster, wherever the device has room for it
constexpr int64_t kMostClasses = 1 << 30;  // that a row of packets counts in int
constexpr int64_t kDeclared = 4 << 10;  // of shared memory, what kernels declare and the system has
constexpr int64_t kUnasked = 48 << 10;  // of shared memory, without asking for it

// Packets of a thread: as few in a row for which this makes no more than kFewLanes threads, and as
// many, for its share of what is done once a row; and at most, but where no cluster is large
// enough.
constexpr int64_t kFewPackets = 4, kSomePackets = 8, kManyPackets = 16;
constexpr int kFewLanes = 8;
// Of a block's rows, the one that it is at among them: short ones are too few bytes to keep the
// memory busy.
constexpr int64_t kAheadBytes = 16 << 10, kMostStages = 3;

// How a call is laid over the device.
struct Plan {
  enum class Kernel { kColumns, kWideColumns, kLanes, kBlock, kCluster } kernel;
  Layout layout;
  int threads = 0;     // a block
  int cluster = 1;     // blocks
  int64_t blocks = 1;  // in all
  int64_t shared = 0;  // bytes a block
};

// A packet of two doubles would save nothing, and soft targets take too many registers.
template <class D, bool kHard>
constexpr bool kWideHasUse = kHard && !std::is_same_v<D, double>;

template <class D>
bool lies_wide(const Rows& r) {
  constexpr int kSize = Packet<D>::kSize;
  return phase(static_cast<const D*>(r.data)) == 0 && r.inner == 1 && r.outer % kSize == 0 &&
         r.classes % kSize == 0;
}

// The device has them, and so does the code that runs there: a driver may have compiled it from the
// PTX for an older device.
bool has_clusters() {
  cudaFuncAttributes code{};
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
         cudaFuncGetAttributes(&code, rows<float, Scope::kCluster, true>) == cudaSuccess &&
         code.ptxVersion >= 90;
}

int64_t most_shared() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kDeclared;
}

// A launch of a plan's kernel.
struct Launching {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Launching(const Plan& plan, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = plan.kernel == Plan::Kernel::kCluster ? 1 : 0;
  }
  Launching(const Launching&) = delete;
};

// Lets a kernel have what shared memory its plan wants.
template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, const Plan& plan) {
  if (plan.shared <= kUnasked - kDeclared) return cudaSuccess;
  // Whatever this call takes, the most: another thread's is never forbidden what it asked for.
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(most_shared()));
}

// The hardware knows where clusters fit; 0: nowhere, as on a slice of a device.
template <class D, bool kHard>
int64_t clusters_at_once(const Plan& plan) {
  constexpr auto kernel = rows<D, Scope::kCluster, kHard>;
  int count = 0;
  Launching launching(plan, nullptr);
  if (allow_shared(kernel, plan) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count, kernel, &launching.config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

template <class D>
Plan plan_for(const CrossEntropy& call, int most_blocks = kMostBlocks) {
  using Kernel = Plan::Kernel;
  constexpr int kSize = Packet<D>::kSize;
  const int64_t sms = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t rows = call.outer * call.inner;
  const bool hard = call.indices && call.label_smoothing == 0;
  Plan plan;
  if (call.classes > kMostClasses || call.input.classes != 1 ||
      (call.gradient.data && call.gradient.classes != 1)) {
    const bool wide = (hard ? kWideHasUse<D, true> : kWideHasUse<D, false>) &&
                      call.inner % kSize == 0 && lies_wide<D>(call.input) &&
                      (!call.gradient.data || lies_wide<D>(call.gradient));
    plan.kernel = wide ? Kernel::kWideColumns : Kernel::kColumns;
    plan.threads = kColumnsBlock;
    const int64_t blocks = ceil_div(rows, kColumnsBlock * (wide ? kSize : 1));
    plan.blocks = std::clamp<int64_t>(blocks, 1, sms * (1024 / kColumnsBlock));
    return plan;
  }
  const int64_t packets = std::max<int64_t>(1, call.classes / kSize);
  Layout& layout = plan.layout;
  int64_t groups = rows;  // of threads, that there is work for
  if (packets <= kWarp * kManyPackets) {
    plan.kernel = Kernel::kLanes;
    plan.threads = kLanesBlock;
    const auto each = [](int lanes) { return lanes < kFewLanes ? kFewPackets : kSomePackets; };
    while (layout.lanes > 1 && layout.lanes / 2 * each(layout.lanes / 2) >= packets) {
      layout.lanes /= 2;
    }
    layout.each = static_cast<int>(ceil_div(packets, layout.lanes));
    // Fewer threads a block where there would be too few blocks, or too little shared memory.
    while (plan.threads > kWarp &&
           (ceil_div(rows, plan.threads / layout.lanes) < sms ||
            int64_t{layout.each} * plan.threads * kPacketBytes > most_shared())) {
      plan.threads /= 2;
    }
    groups = ceil_div(rows, plan.threads / layout.lanes);
  } else {
    constexpr int64_t kHeld = kRowBlock * kManyPackets;  // by a block
    plan.kernel = Kernel::kBlock;
    if (kHeld < packets && most_blocks > 1 && has_clusters()) {
      plan.kernel = Kernel::kCluster;
      while (plan.cluster < most_blocks && plan.cluster * kHeld < packets) plan.cluster *= 2;
    }
    const int64_t share = ceil_div(packets, plan.cluster);  // of a block
    const int64_t threads = ceil_div(ceil_div(share, kManyPackets), kWarp) * kWarp;
    plan.threads = static_cast<int>(std::min<int64_t>(threads, kRowBlock));
    layout.each = static_cast<int>(ceil_div(share, plan.threads));
  }
  const int64_t row_bytes = int64_t{layout.each} * plan.threads * kPacketBytes;
  layout.keeps = row_bytes <= most_shared();
  if (layout.keeps) {
    layout.stages = static_cast<int>(std::clamp<int64_t>(kAheadBytes / row_bytes, 1, kMostStages));
    plan.shared = layout.stages * row_bytes;
  }
  // As many groups as run at once: each has rows after rows, and so one on its way.
  const int64_t threads_per_sm = hard ? kThreadsAtOnce<D, true> : kThreadsAtOnce<D, false>;
  const int64_t shared_per_sm = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t per_sm =
      std::min(threads_per_sm / plan.threads, shared_per_sm / (plan.shared + kDeclared));
  int64_t at_once = sms * std::max<int64_t>(1, per_sm);
  plan.blocks = plan.cluster;
  if (plan.kernel == Kernel::kCluster) {
    at_once = hard ? clusters_at_once<D, true>(plan) : clusters_at_once<D, false>(plan);
    if (at_once == 0) return plan_for<D>(call, plan.cluster / 2);
  }
  plan.blocks = plan.cluster * std::clamp<int64_t>(groups, 1, at_once);
  return plan;
}

template <class F>
auto with_plan(const CrossEntropy& call, F&& f) {
  return with_type(call.input.dtype,
                   [&](auto tag) { return f(tag, plan_for<decltype(tag)>(call)); });
}

template <class D, Scope kScope, bool kHard>
cudaError_t run_rows(const CrossEntropyCall& call, const Launch& launch, const Plan& plan) {
  constexpr auto kernel = rows<D, kScope, kHard>;
  if (const cudaError_t error = allow_shared(kernel, plan); error != cudaSuccess) return error;
  Launching launching(plan, launch.stream);
  const Problem<Compute<D>> problem{call, call.outer * call.inner};
  return cudaLaunchKernelEx(&launching.config, kernel, problem, launch, plan.layout);
}

template <class D, bool kHard>
cudaError_t run(const CrossEntropyCall& call, const Launch& launch, const Plan& plan) {
  const Problem<Compute<D>> problem{call, call.outer * call.inner};
  const auto blocks = static_cast<unsigned>(plan.blocks);
  switch (plan.kernel) {
    case Plan::Kernel::kLanes:
      return run_rows<D, Scope::kLanes, kHard>(call, launch, plan);
    case Plan::Kernel::kBlock:
      return run_rows<D, Scope::kBlock, kHard>(call, launch, plan);
    case Plan::Kernel::kCluster:
      return run_rows<D, Scope::kCluster, kHard>(call, launch, plan);
    case Plan::Kernel::kWideColumns:
      columns<D, kWideHasUse<D, kHard>, kHard>
          <<<blocks, kColumnsBlock, 0, launch.stream>>>(problem, launch);
      break;
    case Plan::Kernel::kColumns:
      columns<D, false, kHard><<<blocks, kColumnsBlock, 0, launch.stream>>>(problem, launch);
      break;
  }
  return cudaGetLastError();
}

// ---- what a mean divides by ---------------------------------------------------------------------

constexpr int kCountBlock = 512;
constexpr int64_t kCountsEach = 32;  // indices a thread, before another block is worth it

template <class W>
__global__ void __launch_bounds__(kCountBlock) count(const ClassWeights c, void* workspace) {
  const W* const weight = static_cast<const W*>(c.weight);
  double total = 0;
  for (int64_t i = int64_t{blockIdx.x} * kCountBlock + threadIdx.x; i < c.n;
       i += int64_t{gridDim.x} * kCountBlock) {
    const int64_t t = c.indices[i];
    if (t < 0 || t >= c.classes || t == c.ignore_index) continue;
    total += weight ? weight[t] : W(1);
  }
  double nothing = 0;  // in common
  // A mean over nothing is nan, whatever label smoothing adds up beside it.
  if (grid_sum(total, nothing, workspace)) *c.sum = total == 0 ? kNan<double> : total;
}

int64_t blocks_for(const ClassWeights& call) {
  return std::clamp<int64_t>(ceil_div(call.n, kCountBlock * kCountsEach), 1,
                             device_attribute(cudaDevAttrMultiProcessorCount));
}

}  // namespace

size_t workspace_bytes(const CrossEntropy& call) {
  return with_plan(call, [](auto, const Plan& plan) { return Workspace::bytes(plan.blocks); });
}

cudaError_t cross_entropy(const CrossEntropyCall& call, const Launch& launch) {
  return with_plan(call, [&](auto tag, const Plan& plan) {
    if (launch.loss) {
      const cudaError_t error = zero_ticket(launch, plan.blocks);
      if (error != cudaSuccess) return error;
    }
    const bool hard = call.indices && call.label_smoothing == 0;
    return hard ? run<decltype(tag), true>(call, launch, plan)
                : run<decltype(tag), false>(call, launch, plan);
  });
}

size_t workspace_bytes(const ClassWeights& call) { return Workspace::bytes(blocks_for(call)); }

cudaError_t sum_class_weights(const ClassWeights& call, const Launch& launch) {
  const int64_t blocks = blocks_for(call);
  if (const cudaError_t error = zero_ticket(launch, blocks); error != cudaSuccess) return error;
  if (call.weight_is_double) {
    count<double>
        <<<static_cast<unsigned>(blocks), kCountBlock, 0, launch.stream>>>(call, launch.workspace);
  } else {
    count<float>
        <<<static_cast<unsigned>(blocks), kCountBlock, 0, launch.stream>>>(call, launch.workspace);
  }
  return cudaGetLastError();
}

}  // namespace fusedloss::cuda
