// The cross-entropy engine on CUDA.
//
// Fewest bytes for value and gradient: read logits, write gradient, 2 N elements. A row is read
// from memory once and stays on chip, with part of a warp, a block or a cluster of blocks, until
// its gradient leaves: the last packets of each thread in its registers, those before in shared
// memory. What no cluster can hold is read once more. One kernel serves every pass, so that a
// gradient has the same bits from each.
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

constexpr int kBatch = 4;  // packets in flight, a thread: then they go to shared memory
constexpr int kLanesBlock = 256, kRowBlock = 384, kColumnsBlock = 128;  // threads

// ---- sums over part of a row --------------------------------------------------------------------

// To measure distances from: a row of nothing but -inf has none.
template <class T>
__device__ T origin(T max) {
  return max == -kInfinity<T> ? T(0) : max;
}

// What some of a row's classes add up to, measured from the largest of them; members as in RowSums.
template <class T>
struct Partial {
  T max = -kInfinity<T>, sum = 0, dot = 0, mass = 0;

  // As measured from another origin.
  __device__ void move_to(T top) {
    const T from = origin(max), to = origin(top);
    sum *= exp_nonpositive(max - to);  // 0 where max is -inf
    dot += mass * (from - to);
    max = top;
  }
  // a.merge(b) and b.merge(a) have the same bits: all threads of a group come to the same end.
  __device__ void merge(Partial other) {
    const T top = fmax(max, other.max);
    move_to(top);
    other.move_to(top);
    sum += other.sum;
    dot += other.dot;
    mass += other.mass;
  }
};

template <class T>
__device__ void merge_lanes(Partial<T>& p, int lanes, bool soft) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    Partial<T> other;
    other.max = __shfl_xor_sync(kAllLanes, p.max, step);
    other.sum = __shfl_xor_sync(kAllLanes, p.sum, step);
    if (soft) {
      other.dot = __shfl_xor_sync(kAllLanes, p.dot, step);
      other.mass = __shfl_xor_sync(kAllLanes, p.mass, step);
    }
    p.merge(other);
  }
}

// ---- the threads that share a row ---------------------------------------------------------------

enum class Scope { kLanes, kBlock, kCluster };

// Of a power of two of lanes: a warp works on several rows.
template <Scope kScope, class T>
struct Group {
  const int size, rank;

  __device__ explicit Group(int lanes) : size(lanes), rank(threadIdx.x % lanes) {}
  // Groups of one warp stay together: the row that the first of them is at, and this one's own.
  __device__ int64_t first_row() const {
    return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp * (kWarp / size);
  }
  __device__ int64_t row_step() const { return int64_t{gridDim.x} * blockDim.x / size; }
  __device__ int64_t row_behind() const { return threadIdx.x % kWarp / size; }
  __device__ void merge(Partial<T>& p, bool soft) { merge_lanes(p, size, soft); }
  __device__ void leave() const {}
};

// A block's warps leave their partials in shared memory. Two sets of them, used by turns, make one
// barrier a row enough: who writes a set anew has passed the barrier that follows its reading.
template <class T>
struct BlockPartials {
  Partial<T> of_warp[2][kWarp];
};

template <class T>
__device__ void merge_block(Partial<T>& p, bool soft, Partial<T> (&of_warp)[kWarp]) {
  merge_lanes(p, kWarp, soft);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = p;
  __syncthreads();
  const unsigned lane = threadIdx.x % kWarp;
  p = lane < blockDim.x / kWarp ? of_warp[lane] : Partial<T>();
  merge_lanes(p, kWarp, soft);
}

template <class T>
struct Group<Scope::kBlock, T> {
  const int size = blockDim.x, rank = threadIdx.x;
  BlockPartials<T>& shared;
  int turn = 0;

  __device__ explicit Group(int) : shared(storage()) {}
  __device__ static BlockPartials<T>& storage() {
    __shared__ alignas(16) unsigned char bytes[sizeof(BlockPartials<T>)];
    return *reinterpret_cast<BlockPartials<T>*>(bytes);
  }
  __device__ int64_t first_row() const { return blockIdx.x; }
  __device__ int64_t row_step() const { return gridDim.x; }
  __device__ int64_t row_behind() const { return 0; }
  __device__ void merge(Partial<T>& p, bool soft) {
    merge_block(p, soft, shared.of_warp[turn]);
    turn ^= 1;
  }
  __device__ void leave() const {}
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// The hardware has no clusters, and none is launched: see has_clusters.
template <class T>
struct Group<Scope::kCluster, T> : Group<Scope::kBlock, T> {
  using Group<Scope::kBlock, T>::Group;
};
#else
template <class T>
struct Group<Scope::kCluster, T> {
  const int size, rank;
  BlockPartials<T>& shared;
  int turn = 0;

  __device__ explicit Group(int)
      : size(cluster().num_blocks() * blockDim.x),
        rank(cluster().block_rank() * blockDim.x + threadIdx.x),
        shared(Group<Scope::kBlock, T>::storage()) {}
  __device__ static cooperative_groups::cluster_group cluster() {
    return cooperative_groups::this_cluster();
  }
  __device__ int64_t first_row() const { return blockIdx.x / cluster().num_blocks(); }
  __device__ int64_t row_step() const { return gridDim.x / cluster().num_blocks(); }
  __device__ int64_t row_behind() const { return 0; }
  __device__ void merge(Partial<T>& p, bool soft) {
    __shared__ alignas(16) unsigned char bytes[2 * sizeof(Partial<T>)];
    Partial<T>* const of_block = reinterpret_cast<Partial<T>*>(bytes) + turn;
    merge_block(p, soft, shared.of_warp[turn]);
    if (threadIdx.x == 0) *of_block = p;
    cluster().sync();
    p = Partial<T>();
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

  template <bool kHard>
  __device__ Shares<T> shares() const {
    if constexpr (kHard) return {true, 0, 1, 1};
    const double classes = static_cast<double>(call.classes);
    return {call.indices != nullptr, call.label_smoothing, classes,
            call.weight_sum ? *call.weight_sum : classes};
  }
  __device__ T class_weight(int64_t c) const {
    return call.weight ? static_cast<const T*>(call.weight)[c] : T(1);
  }
  __device__ int64_t offset(const Rows& r, int64_t row) const {
    return row / call.inner * r.outer + row % call.inner * r.inner;
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
  __device__ Target(const Problem<T>& problem, int64_t row, const Launch& l) {
    if (row >= problem.rows) return;
    const CrossEntropyCall& call = problem.call;
    live = true;
    if (!call.indices) return;
    index = call.indices[row];
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

// What comes of a row's sums, once they are complete.
template <class T>
struct RowEnd {
  T loss = 0, max = 0;
  T at_target = 0;  // the gradient there
  RowSlope<T> slope{};

  __device__ RowEnd(const Problem<T>& problem, const Shares<T>& shares, const Target& target,
                    Partial<T> p, T logit, T scale, int64_t row) {
    if (!target.live) {
      loss = target.template rest<T>();
      return;
    }
    if (target.index >= 0) p.move_to(fmax(p.max, logit));
    const T weight = target.index >= 0 ? problem.class_weight(target.index) : T(1);
    const T gap = logit - p.max;
    const RowSums<T> sums{p.max, p.sum, p.dot, p.mass, gap, exp_nonpositive(gap), weight};
    loss = shares.loss(sums);
    max = p.max;
    const CrossEntropyCall& call = problem.call;
    if (call.upstream) scale = read<T>(call.upstream, call.upstream_dtype, row);
    slope = shares.slope(sums, scale);
    at_target = slope.own * slope.factor;
    if (shares.smooth) at_target = at_target - weight * slope.scale;
  }
};

// ---- classes side by side -----------------------------------------------------------------------

// One row as packets that begin at multiples of 16 bytes, wherever the row itself begins: the
// first and the last may lie half outside.
template <class D>
struct PackedRow {
  using P = Packet<D>;
  const D* input;
  D* gradient;
  int classes;
  int start;    // of the row in its first packet
  bool packed;  // gradient lies at the same phase

  __device__ PackedRow(const D* in, D* out, int n)
      : input(in), gradient(out), classes(n), start(phase(in)), packed(phase(in) == phase(out)) {}
  __device__ int packets() const { return (classes + start + P::kSize - 1) / P::kSize; }
  // The class of a packet's first element.
  __device__ int first(int p) const { return p * P::kSize - start; }
  __device__ bool whole(int c) const { return c >= 0 && c + P::kSize <= classes; }

  __device__ P load(int p) const {
    const int c = first(p);
    if (whole(c)) return *reinterpret_cast<const P*>(input + c);
    P packet;
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) {
      const bool inside = c + i >= 0 && c + i < classes;
      packet.element[i] = inside ? input[c + i] : narrow<D>(-kInfinity<Compute<D>>);
    }
    return packet;
  }
  __device__ void store(int p, const P& packet) const {
    const int c = first(p);
    if (packed && whole(c)) {
      *reinterpret_cast<P*>(gradient + c) = packet;
      return;
    }
#pragma unroll
    for (int i = 0; i < P::kSize; ++i) {
      if (c + i >= 0 && c + i < classes) gradient[c + i] = packet.element[i];
    }
  }
};

// kHard: class indices without label smoothing. keeps: what a thread's registers do not hold is in
// shared memory, else it is read twice.
template <class D, Scope kScope, bool kHard>
__global__ void __launch_bounds__(kScope == Scope::kLanes ? kLanesBlock : kRowBlock,
                                  kHard && sizeof(D) < 8 ? 2 : 1)
    rows(const Problem<Compute<D>> problem, const Launch l, int lanes, bool keeps) {
  using T = Compute<D>;
  using P = Packet<D>;
  extern __shared__ uint4 shared[];
  P* const places = reinterpret_cast<P*>(shared);
  const Scaling& s = Scaling::of_block(l);  // in shared memory: it takes no registers meanwhile
  if (settled(l, s)) return;
  const CrossEntropyCall& call = problem.call;
  const Shares<T> shares = problem.template shares<kHard>();
  Group<kScope, T> group(lanes);
  const int step = group.size * kBatch;
  double total = 0;
  for (int64_t first = group.first_row(); first < problem.rows; first += group.row_step()) {
    const int64_t row = first + group.row_behind();
    const Target target(problem, row, l);
    const PackedRow<D> line(
        static_cast<const D*>(call.input.data) + problem.offset(call.input, row),
        problem.template gradient<D>(row), static_cast<int>(call.classes));
    // Far from any packet where there is none.
    const int target_class = target.index >= 0 ? static_cast<int>(target.index) : INT_MIN / 2;
    const T logit = target.index >= 0 ? T(widen(line.input[target_class])) : T(0);
    const int64_t y_at = problem.offset(call.probabilities, row);
    const int packets = row < problem.rows ? line.packets() : 0;
    const int last = packets > 0 ? (packets - 1) / step : 0;  // batch

    P batch[kBatch];
    // f(packet, p, its place in shared memory) for each packet of a batch.
    const auto for_packets = [&](int number, auto&& f) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int p = number * step + u * group.size + group.rank;
        if (p < packets) {
          f(batch[u], p, places[(number * kBatch + u) * blockDim.x + threadIdx.x]);
        }
      }
    };

    // f(i) where the element i of a packet from class c on is the target's. Unrolled, for an index
    // that is not known to the compiler would take the packet out of its registers.
    const auto at_target = [&](int c, auto&& f) {
      const int at = target_class - c;
      if (at < 0 || at >= P::kSize) return;
#pragma unroll
      for (int i = 0; i < P::kSize; ++i) {
        if (i == at) f(i);
      }
    };

    Partial<T> sums;
    for (int b = 0; target.live && b <= last; ++b) {
      for_packets(b, [&](P& x, int p, P&) { x = line.load(p); });
      Partial<T> part;
      for_packets(b, [&](P& x, int p, P& place) {
        at_target(line.first(p), [&](int i) { x.element[i] = narrow<D>(-kInfinity<T>); });
        part.max = fmax(part.max, largest(x));
        if (keeps && b != last) place = x;
      });
      const T top = origin(part.max);
      for_packets(b, [&](P& x, int p, P&) {
#pragma unroll
        for (int i = 0; i < P::kSize; ++i) {
          part.sum += exp_nonpositive(T(widen(x.element[i])) - top);
          if constexpr (!kHard) {
            const int c = line.first(p) + i;
            if (c < 0 || c >= line.classes) continue;
            const T q = problem.share(shares, y_at, c);
            part.dot += q * ((c == target_class ? logit : T(widen(x.element[i]))) - top);
            part.mass += q;
          }
        }
      });
      sums.merge(part);
    }
    group.merge(sums, !kHard);

    const T scale = static_cast<T>(s.scale);
    const RowEnd<T> end(problem, shares, target, sums, logit, scale, row);
    if (group.rank == 0 && row < problem.rows) {
      if (call.value) write(call.value, call.value_dtype, row, end.loss);
      total += end.loss;
    }
    if (!s.write) continue;
    if (!target.live) {
      T rest[P::kSize];
      std::fill_n(rest, P::kSize, target.template rest<T>());
      for (int b = 0; b <= last; ++b) {
        for_packets(b, [&](P&, int p, P&) { line.store(p, pack<D>(rest)); });
      }
      continue;
    }
    // The last batch first: it is in the registers still.
    for (int b = last; b >= 0; --b) {
      for_packets(b, [&](P& x, int p, P& place) {
        if (b != last) x = keeps ? place : line.load(p);
        const int c = line.first(p);
        T g[P::kSize];
#pragma unroll
        for (int i = 0; i < P::kSize; ++i) {
          g[i] = exp_nonpositive(T(widen(x.element[i])) - end.max) * end.slope.factor;
          if (!kHard && c + i >= 0 && c + i < line.classes) {
            g[i] = g[i] - problem.share(shares, y_at, c + i) * end.slope.scale;
          }
        }
        at_target(c, [&](int i) { g[i] = end.at_target; });
        line.store(p, pack<D>(g));
      });
    }
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
  const Shares<T> shares = problem.template shares<kHard>();
  const T scale = static_cast<T>(s.scale);
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
    Partial<T> sums[kRows];
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
        Partial<T> part;
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
          if (c + k != targets[j].index) part.sum += exp_nonpositive(distance);
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
    RowSlope<T> slope[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const RowEnd<T> end(problem, shares, targets[j], sums[j], logits[j], scale, row + j);
      if (call.value) write(call.value, call.value_dtype, row + j, end.loss);
      total += end.loss;
      max[j] = end.max;
      at_target[j] = end.at_target;
      slope[j] = end.slope;
    }
    if (!s.write) continue;
    for (int64_t c = call.classes - 1; c >= 0; --c) {
      const Line x = line(c);
      Line out;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        T g = exp_nonpositive(T(widen(x.element[j])) - max[j]) * slope[j].factor;
        if (!kHard && targets[j].live) g = g - problem.share(shares, y_at[j], c) * slope[j].scale;
        if (c == targets[j].index) g = at_target[j];
        out.element[j] = narrow<D>(targets[j].live ? g : targets[j].template rest<T>());
      }
      *reinterpret_cast<Line*>(gradient + c * call.gradient.classes) = out;
    }
  }
  finish(l, total);
}

// ---- which of them ------------------------------------------------------------------------------

constexpr int kMostBlocks = 8;             // in a cluster, on every device that has them
constexpr int64_t kMostClasses = 1 << 30;  // that a row of packets counts in int
constexpr int64_t kDeclared = 4 << 10;  // of shared memory, what kernels declare and the system has
constexpr int64_t kUnasked = 48 << 10;  // of shared memory, without asking for it
constexpr int64_t kBatchBytes = kPacketBytes * kBatch;  // of a thread

// How a call is laid over the device.
struct Plan {
  enum class Kernel { kColumns, kWideColumns, kLanes, kBlock, kCluster } kernel;
  int lanes = kWarp;  // a row, kLanes
  int threads = 0;    // a block
  int cluster = 1;    // blocks
  int64_t blocks = 1;
  int64_t shared = 0;  // bytes a block
  bool keeps = true;
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

template <class D>
Plan plan_for(const CrossEntropy& call) {
  using Kernel = Plan::Kernel;
  constexpr int kSize = Packet<D>::kSize;
  const int64_t sms = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t rows = call.outer * call.inner;
  const bool hard = call.indices && call.label_smoothing == 0;
  Plan plan;
  const auto at_once = [&](int64_t groups, int64_t threads_per_sm) {
    const int64_t per_sm = std::max<int64_t>(1, threads_per_sm / (plan.threads * plan.cluster));
    return std::clamp<int64_t>(groups, 1, sms * per_sm);
  };
  if (call.classes > kMostClasses || call.input.classes != 1 ||
      (call.gradient.data && call.gradient.classes != 1)) {
    const bool wide = (hard ? kWideHasUse<D, true> : kWideHasUse<D, false>) &&
                      call.inner % kSize == 0 && lies_wide<D>(call.input) &&
                      (!call.gradient.data || lies_wide<D>(call.gradient));
    plan.kernel = wide ? Kernel::kWideColumns : Kernel::kColumns;
    plan.threads = kColumnsBlock;
    plan.blocks = at_once(ceil_div(rows, kColumnsBlock * (wide ? kSize : 1)), 1024);
    return plan;
  }
  const auto whole = [](int64_t size, int64_t stride) { return size == 1 || stride % kSize == 0; };
  const bool aligned = call.classes % kSize == 0 && whole(call.outer, call.input.outer) &&
                       whole(call.inner, call.input.inner) &&
                       phase(static_cast<const D*>(call.input.data)) == 0;
  // A row that begins amid a packet may end amid one more.
  const int64_t packets = ceil_div(call.classes, kSize) + (aligned ? 0 : 1);
  if (packets <= kWarp * kBatch) {
    plan.kernel = Kernel::kLanes;
    plan.threads = kLanesBlock;
    while (plan.lanes > 1 && plan.lanes / 2 * kBatch >= packets) plan.lanes /= 2;
    plan.blocks = at_once(ceil_div(rows, kLanesBlock / plan.lanes), 2048);
    return plan;
  }
  // Two blocks an SM, so that one loads while the other computes: a batch of each thread in
  // registers and three in shared memory.
  constexpr int64_t kHeld = 4;
  plan.kernel = Kernel::kBlock;
  const int64_t held = kRowBlock * kBatch * kHeld;  // by a block
  if (held < packets && has_clusters()) {
    plan.kernel = Kernel::kCluster;
    while (plan.cluster < kMostBlocks && plan.cluster * held < packets) plan.cluster *= 2;
  }
  const int64_t share = ceil_div(packets, plan.cluster);  // of a block
  const int64_t threads = ceil_div(ceil_div(share, 2 * kBatch), kWarp) * kWarp;
  plan.threads = static_cast<int>(std::min<int64_t>(threads, kRowBlock));
  const int64_t batches = ceil_div(share, plan.threads * kBatch);
  plan.shared = (batches - 1) * plan.threads * kBatchBytes;
  plan.keeps = plan.shared <= most_shared();
  if (!plan.keeps) plan.shared = 0;
  plan.blocks = plan.cluster * at_once(rows, batches <= kHeld ? 1024 : 512);
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
  if (plan.shared > kUnasked - kDeclared) {
    // Whatever this call takes, the most: another thread's is never forbidden what it asked for.
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared()));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = plan.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared);
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = kScope == Scope::kCluster ? 1 : 0;
  const Problem<Compute<D>> problem{call, call.outer * call.inner};
  return cudaLaunchKernelEx(&config, kernel, problem, launch, plan.lanes, plan.keeps);
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
