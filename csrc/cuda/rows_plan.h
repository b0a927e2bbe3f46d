// How a call over rows is laid over the device; no CUDA header.
#pragma once

#include <algorithm>
#include <bit>
#include <initializer_list>
#include <optional>

#include "../call.h"
#include "sizes.h"

namespace fusedloss::cuda {

struct RowsPlan {
  enum class Kernel {
    kStrided,
    kStridedVectorized,
    kStridedSmem,
    kSubWarp,
    kBlock,
    kCluster
  } kernel;
  int held = 0;  // classes per thread in rows_held; 0: it is not used
  RowTiling tiling;
  int operands = 1;    // in shared memory: the logits, and with 2 class probabilities
  int threads = 0;     // per block
  int cluster = 1;     // blocks of a cluster
  int64_t blocks = 1;  // of the grid
  int64_t smem = 0;    // bytes of dynamic shared memory per block

  bool operator==(const RowsPlan&) const = default;
};

// ---- tuning -------------------------------------------------------------------------------------

// Threads of a block.
constexpr int kStridedBlock = 128, kStridedSmemBlock = 64;

// Blocks that an SM should hold at least, so that some move data while others compute.
constexpr int64_t kMinRowBlocksPerSM = 3;

// Those of rows_strided_smem by its registers: 512 threads.
constexpr int kMinStridedSmemBlocks = 512 / kStridedSmemBlock;

// The vectors per thread at which a row moves from a warp to a block, and on to larger clusters.
// Only the largest cluster holds more.
constexpr int kMaxVectorsPerThread = 16;

// Who shares a row of at most `vectors` vectors. Up to 4 threads have 4 each; 8 and 16 threads have
// 8 each, over which a thread spreads its work per row; then come a warp, a block and clusters,
// with kMaxVectorsPerThread each.
struct RowThreads {
  int64_t vectors;
  RowsPlan::Kernel kernel;
  int threads_per_row;
  int cluster;
};
constexpr RowThreads kRowThreads[] = {
    {4, RowsPlan::Kernel::kSubWarp, 1, 1},
    {8, RowsPlan::Kernel::kSubWarp, 2, 1},
    {16, RowsPlan::Kernel::kSubWarp, 4, 1},
    {64, RowsPlan::Kernel::kSubWarp, 8, 1},
    {128, RowsPlan::Kernel::kSubWarp, 16, 1},
    {kWarp * kMaxVectorsPerThread, RowsPlan::Kernel::kSubWarp, kWarp, 1},
    {kRowBlock * kMaxVectorsPerThread, RowsPlan::Kernel::kBlock, kWarp, 1},
    {2 * kRowBlock * kMaxVectorsPerThread, RowsPlan::Kernel::kCluster, kWarp, 2},
    {4 * kRowBlock * kMaxVectorsPerThread, RowsPlan::Kernel::kCluster, kWarp, 4},
    {INT64_MAX, RowsPlan::Kernel::kCluster, kWarp, 8},
};

// Classes per thread in rows_held. Many spread a thread's work per row over more of them; 8 threads
// read whole cache lines.
constexpr int kFewHeld = 32, kManyHeld = 64;
constexpr int64_t kMaxFewHeldClasses = 8 * kFewHeld;
// Rows in shared memory there. A slot is free as soon as it is read, so that with one stage the
// next row is already under way.
constexpr int kMaxHeldStages = 2;

// Bytes of rows in shared memory per block, the current one included, and the rows they may come
// from: one short row would not keep memory busy.
constexpr int64_t kPrefetchBytes = 16 << 10, kMaxStages = 3;

// Resident threads per SM, by their registers.
constexpr int threads_per_sm(int element_bytes, bool hard) {
  return element_bytes == 8 ? 256 : (hard ? 1024 : 768);
}
constexpr int held_threads_per_sm(int held) { return held == kManyHeld ? 512 : 768; }

// Whether rows_strided reads vectors of rows where it can: a vector of two doubles saves nothing,
// and soft targets take too many registers.
constexpr bool strided_vectors(int element_bytes, bool hard) { return hard && element_bytes < 8; }

// Classes that a kernel counts in int.
constexpr int64_t kMaxClasses = 1 << 30;

// ---- rows_held: what may be chosen --------------------------------------------------------------

struct HeldKnobs {
  int classes;         // of a thread
  int threads;         // of a block, at most: a longer row takes several blocks
  int threads_per_sm;  // at most
  int stages;          // at most

  bool operator==(const HeldKnobs&) const = default;
};

constexpr HeldKnobs default_knobs(int64_t classes) {
  const int held = classes <= kMaxFewHeldClasses ? kFewHeld : kManyHeld;
  return {held, kRowBlock, held_threads_per_sm(held), kMaxHeldStages};
}

// What bench/tune.cu found to be faster than the default on one GPU.
struct TunedHeld {
  int capability, sms, memory_bus;  // the GPU: 90 for 9.0; bits of its memory bus
  int element_bytes;
  int64_t classes;  // a power of two: of rows with as many, or fewer by less than half
  HeldKnobs knobs;
};
constexpr std::initializer_list<TunedHeld> kTunedHeld = {
#include "plans.inc"
};

constexpr bool is_valid(const TunedHeld& tuned) {
  const auto& [classes, threads, threads_per_sm, stages] = tuned.knobs;
  return (classes == kFewHeld || classes == kManyHeld) && threads >= kWarp &&
         threads <= kRowBlock && std::has_single_bit(static_cast<unsigned>(threads)) &&
         threads_per_sm >= threads && threads_per_sm <= held_threads_per_sm(classes) &&
         stages >= 1 && stages <= kMaxHeldStages &&
         std::has_single_bit(static_cast<uint64_t>(tuned.classes));
}
static_assert(std::all_of(kTunedHeld.begin(), kTunedHeld.end(), is_valid),
              "plans.inc names a plan that rows_held cannot have");

// Threads of a row of which each holds so many classes: up to a warp, a power of two.
constexpr int64_t held_row_threads(int64_t classes, int held) {
  const int64_t threads = ceil_div(classes, held);
  return threads > kWarp ? threads
                         : static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(threads)));
}

#if defined(FUSEDLOSS_TUNE)  // bench/tune.cu compares all plans
constexpr bool kEveryHeldKernel = true;
#else
constexpr bool kEveryHeldKernel = false;
#endif

// Whether some plan takes the kernel for so many classes of a thread and threads of a row, of which
// all above a warp are alike. No other one is compiled.
constexpr bool has_held_kernel(int held, int64_t threads) {
  const auto takes = [=](const TunedHeld& tuned) {
    const int64_t tuned_threads = held_row_threads(tuned.classes, held);
    return tuned.knobs.classes == held &&
           (tuned_threads == threads || std::min(tuned_threads, threads) > kWarp);
  };
  return kEveryHeldKernel || default_knobs(held * threads).classes == held ||
         std::any_of(kTunedHeld.begin(), kTunedHeld.end(), takes);
}

// ---- the plan -----------------------------------------------------------------------------------

constexpr int bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Class indices without label smoothing.
inline bool has_hard_targets(const fusedloss::RowsCall& call) {
  return call.indices && call.label_smoothing == 0;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// Whether vectors of neighbouring rows are aligned, class after class.
inline bool has_row_vectors(const Rows& r, int64_t size) {
  return is_aligned(r.data) && r.inner == 1 && r.outer % size == 0 && r.classes % size == 0;
}

// Whether class probabilities have no weights and lie as the logits do, and vectors of all operands
// begin alike. The gradient's strides are known before the gradient.
inline bool has_probability_vectors(const fusedloss::RowsCall& call) {
  const Rows &x = call.input, &y = call.probabilities, &g = call.gradient;
  const int size = kVectorBytes / bytes_of(x.dtype);
  return y.data && y.dtype == x.dtype && !call.weight && y.classes == x.classes &&
         y.outer == x.outer && y.inner == x.inner && is_aligned(x.data) && is_aligned(y.data) &&
         is_aligned(g.data) && (g.outer - x.outer) % size == 0 && (g.inner - x.inner) % size == 0;
}

// Slots of rows_strided_smem that hold the class indices of a thread's rows.
constexpr int index_vectors(int rows) {
  return rows * static_cast<int>(sizeof(int64_t)) / kVectorBytes;
}

template <class Device>
RowsPlan plan_strided(const fusedloss::RowsCall& call, const Device& device) {
  const int bytes = bytes_of(call.input.dtype), size = kVectorBytes / bytes;
  const bool vectorized = strided_vectors(bytes, has_hard_targets(call)) &&
                          call.inner % size == 0 && has_row_vectors(call.input, size) &&
                          (!call.gradient.data || has_row_vectors(call.gradient, size));
  RowsPlan plan;
  plan.kernel = vectorized ? RowsPlan::Kernel::kStridedVectorized : RowsPlan::Kernel::kStrided;
  plan.threads = kStridedBlock;
  const int64_t smem = (call.classes + index_vectors(size)) * kStridedSmemBlock * kVectorBytes;
  if (vectorized && kMinRowBlocksPerSM * (smem + kStaticSmem) <= device.smem_per_sm()) {
    plan.kernel = RowsPlan::Kernel::kStridedSmem;
    plan.threads = kStridedSmemBlock;
    plan.smem = smem;
  }
  const int64_t blocks = ceil_div(call.outer * call.inner, plan.threads * (vectorized ? size : 1));
  plan.blocks = std::clamp<int64_t>(blocks, 1, device.resident_blocks(plan));
  return plan;
}

// Sets the grid: as many groups of threads as run at once, if there is work for all. Each goes from
// row to row, and prefetches the next. False: no cluster fits on the device.
template <class Device>
bool set_blocks(RowsPlan& plan, int64_t groups, int64_t threads_per_sm, const Device& device) {
  const int64_t per_sm =
      std::min(threads_per_sm / plan.threads, device.smem_per_sm() / (plan.smem + kStaticSmem));
  int64_t resident = device.sms() * std::max<int64_t>(1, per_sm);
  plan.blocks = plan.cluster;
  if (plan.kernel == RowsPlan::Kernel::kCluster) resident = device.active_clusters(plan);
  if (resident == 0) return false;
  plan.blocks = plan.cluster * std::clamp<int64_t>(groups, 1, resident);
  return true;
}

// Whether all vectors of a matrix's rows are aligned.
inline bool has_class_vectors(const Rows& r, int64_t size) {
  return is_aligned(r.data) && r.classes == 1 && r.outer % size == 0;
}

// Those for a call.
template <class Device>
HeldKnobs held_knobs(const fusedloss::RowsCall& call, const Device& device) {
  for (const TunedHeld& tuned : kTunedHeld) {
    if (tuned.element_bytes == bytes_of(call.input.dtype) && call.classes <= tuned.classes &&
        2 * call.classes > tuned.classes && device.is_gpu(tuned)) {
      return tuned.knobs;
    }
  }
  return default_knobs(call.classes);
}

// What a kernel that holds rows in registers needs of a device.
struct HeldDemand {
  int64_t rows;
  int64_t row_vectors;  // from one row to the next
  int operands;         // which are copied to shared memory
  int vectors_per_thread;
  int64_t row_threads;  // threads that share a row; up to a warp, a power of two
};

template <class Device>
std::optional<RowsPlan> plan_held(const HeldDemand& demand, const Device& device,
                                  const HeldKnobs& knobs) {
  const int64_t threads = demand.row_threads;
  RowsPlan plan;
  plan.held = knobs.classes;
  plan.operands = demand.operands;
  int rows_per_block = 1;
  if (threads <= kWarp) {
    plan.kernel = RowsPlan::Kernel::kSubWarp;
    plan.threads = knobs.threads;
    plan.tiling.threads_per_row = static_cast<int>(threads);
    rows_per_block = plan.threads / plan.tiling.threads_per_row;
    // Smaller blocks where there are too few of them.
    while (plan.threads > kWarp && ceil_div(demand.rows, rows_per_block) < device.sms()) {
      plan.threads /= 2;
      rows_per_block /= 2;
    }
  } else {
    const auto blocks = static_cast<unsigned>(ceil_div(threads, knobs.threads));
    plan.cluster = static_cast<int>(std::bit_ceil(blocks));
    plan.kernel = plan.cluster > 1 ? RowsPlan::Kernel::kCluster : RowsPlan::Kernel::kBlock;
    plan.threads = static_cast<int>(ceil_div(ceil_div(threads, plan.cluster), kWarp) * kWarp);
  }
  if (plan.cluster > (device.has_clusters() ? kMaxClusterSize : 1)) return {};
  plan.tiling.vectors_per_thread = demand.vectors_per_thread;
  const int64_t row_bytes =
      int64_t{demand.operands} * demand.vectors_per_thread * plan.threads * kVectorBytes;
  const int64_t smem_per_block = device.smem_per_sm() / (knobs.threads_per_sm / plan.threads);
  plan.tiling.stages = static_cast<int>(
      std::clamp<int64_t>((smem_per_block - kStaticSmem) / row_bytes, 1, knobs.stages));
  plan.smem = plan.tiling.stages * row_bytes;
  const int64_t groups = ceil_div(demand.rows, rows_per_block);
  if (plan.smem > device.max_smem() || !set_blocks(plan, groups, knobs.threads_per_sm, device)) {
    return {};
  }
  // The kernels count rows, and the vectors from one row of a thread to its next, in 32 bits.
  const int64_t row_stride = plan.blocks / plan.cluster * rows_per_block;
  if (demand.rows + kMaxHeldStages * row_stride > INT32_MAX ||
      row_stride * demand.row_vectors > UINT32_MAX) {
    return {};
  }
  return plan;
}
// The plan of rows_held, if it can take the call.
template <class Device>
std::optional<RowsPlan> plan_held(const fusedloss::RowsCall& call, const Device& device,
                                  const HeldKnobs& knobs) {
  const int bytes = bytes_of(call.input.dtype), size = kVectorBytes / bytes;
  const bool aligned = call.inner == 1 && call.classes % size == 0 &&
                       has_class_vectors(call.input, size) &&
                       (!call.gradient.data || has_class_vectors(call.gradient, size));
  if (!aligned || bytes == 8 || !has_hard_targets(call)) return {};
  const int64_t threads = held_row_threads(call.classes, knobs.classes);
  return plan_held({call.outer, call.input.outer / size, 1, knobs.classes / size, threads}, device,
                   knobs);
}

// What rows_contiguous and the kernels of custom losses need of a device.
struct RowsDemand {
  int64_t rows;
  int64_t vectors;         // of a row of each operand
  int operands;            // which are copied to shared memory
  int kept;                // vectors beside each of those, of what is kept there
  bool one_thread;         // has a row of its own
  int64_t threads_per_sm;  // at most
};

template <class Device>
RowsPlan plan_contiguous(const RowsDemand& demand, const Device& device,
                         int max_cluster = kMaxClusterSize) {
  using Kernel = RowsPlan::Kernel;
  const auto& [rows, vectors, operands, kept, one_thread, threads_per_sm] = demand;
  const int64_t sms = device.sms();
  const int lines = operands + kept;
  const RowThreads* shared_by = kRowThreads;
  while (!one_thread && shared_by->vectors < vectors * lines) ++shared_by;
  RowsPlan plan;
  plan.operands = operands;
  RowTiling& tiling = plan.tiling;
  tiling.keeps = kept > 0;
  plan.kernel = shared_by->kernel;
  tiling.threads_per_row = shared_by->threads_per_row;
  int64_t groups = rows;  // of threads that share a row, as many as there is work for
  if (plan.kernel == Kernel::kSubWarp) {
    tiling.vectors_per_thread = static_cast<int>(ceil_div(vectors, tiling.threads_per_row));
    plan.threads = kRowBlock;
    // Smaller blocks where there are too few of them, or where shared memory is too small for some.
    const int64_t smem = device.smem_per_sm() / kMinRowBlocksPerSM - kStaticSmem;
    while (plan.threads > kWarp &&
           (ceil_div(rows, plan.threads / tiling.threads_per_row) < sms ||
            tiling.vectors_per_thread * lines * plan.threads * kVectorBytes > smem)) {
      plan.threads /= 2;
    }
    groups = ceil_div(rows, plan.threads / tiling.threads_per_row);
  } else {
    if (plan.kernel == Kernel::kCluster) plan.cluster = std::min(shared_by->cluster, max_cluster);
    if (plan.cluster > 1 && !device.has_clusters()) plan.cluster = 1;
    if (plan.cluster == 1) plan.kernel = Kernel::kBlock;
    const int64_t share = ceil_div(vectors, plan.cluster);  // vectors of a block
    const int64_t threads = ceil_div(share * lines, kMaxVectorsPerThread * kWarp) * kWarp;
    plan.threads = static_cast<int>(std::min<int64_t>(threads, kRowBlock));
    tiling.vectors_per_thread = static_cast<int>(ceil_div(share, plan.threads));
  }
  const int64_t line_bytes = int64_t{tiling.vectors_per_thread} * plan.threads * kVectorBytes;
  const int64_t row_bytes = operands * line_bytes;
  // One warp alone, whatever it holds, would not keep memory busy.
  const int64_t smem_for =
      one_thread ? device.smem_per_sm() / kMinRowBlocksPerSM - kStaticSmem : device.max_smem();
  tiling.fits_in_smem = lines * line_bytes <= smem_for;
  if (tiling.fits_in_smem) {
    const int64_t most = (smem_for - kept * line_bytes) / row_bytes;
    tiling.stages = static_cast<int>(
        std::clamp<int64_t>(kPrefetchBytes / row_bytes, 1, std::min(most, kMaxStages)));
    plan.smem = tiling.stages * row_bytes + kept * line_bytes;
  }
  if (!set_blocks(plan, groups, threads_per_sm, device)) {
    return plan_contiguous(demand, device, plan.cluster / 2);
  }
  return plan;
}
template <class Device>
RowsPlan plan_contiguous(const fusedloss::RowsCall& call, const Device& device, int operands) {
  const int bytes = bytes_of(call.input.dtype);
  const int64_t vectors = std::max<int64_t>(1, call.classes * bytes / kVectorBytes);
  return plan_contiguous({call.outer * call.inner, vectors, operands, 0, false,
                          threads_per_sm(bytes, has_hard_targets(call))},
                         device);
}

// Device answers for the GPU: is_gpu(tuned), sms(), max_smem() of a block without kStaticSmem,
// smem_per_sm(), has_clusters(), and how much of a plan runs at once: resident_blocks(plan) and
// active_clusters(plan).
template <class Device>
RowsPlan plan_rows(const fusedloss::RowsCall& call, const Device& device) {
  if (call.classes > kMaxClasses || call.input.classes != 1 ||
      (call.gradient.data && call.gradient.classes != 1)) {
    return plan_strided(call, device);
  }
  if (const auto plan = plan_held(call, device, held_knobs(call, device))) return *plan;
  if (has_probability_vectors(call)) {
    const RowsPlan plan = plan_contiguous(call, device, 2);
    if (plan.tiling.fits_in_smem) return plan;
  }
  return plan_contiguous(call, device, 1);
}

// ---- custom losses ------------------------------------------------------------------------------

// The type that the kernel reads: that of the element inputs. Where they have several it is the one
// that is computed in, which the kernel makes of each.
inline DType read_dtype(const CustomRowsCall& call, unsigned elements) {
  for (int i = 1; i < kMaxInputs; ++i) {
    if ((elements >> i & 1) && call.inputs[i].dtype != call.inputs[0].dtype) {
      return call.compute_in_double ? DType::kFloat64 : DType::kFloat32;
    }
  }
  return call.inputs[0].dtype;
}

constexpr int custom_threads_per_sm(int element_bytes) { return element_bytes == 8 ? 256 : 512; }

// Threads that share a row of which each holds so many classes, at least the eight that read a
// cache line together. Those of rows that would leave most of them idle are in shared memory
// instead.
constexpr int64_t kMinHeldRowThreads = 8;

// The plan of the kernel that holds rows in registers, if it can take the call.
template <class Device>
std::optional<RowsPlan> plan_held(const CustomRowsCall& call, const CustomRowsInfo& loss,
                                  const Device& device) {
  const DType dtype = read_dtype(call, loss.elements);
  const int bytes = bytes_of(dtype), size = kVectorBytes / bytes;
  const int held = bytes == 8 ? 0 : bytes == 4 ? loss.held : loss.held_narrow;
  if (held == 0 || call.inner != 1 || call.classes % size != 0) return {};
  if (2 * call.classes < kMinHeldRowThreads * held || call.classes > kMaxClasses) return {};
  for (int i = 0; i < kMaxInputs; ++i) {
    if (!(loss.elements >> i & 1)) continue;
    const Rows &x = call.inputs[i], &g = call.gradients[i];
    if (x.dtype != dtype || !has_class_vectors(x, size)) return {};
    if (g.data && (g.dtype != dtype || !has_class_vectors(g, size))) return {};
  }
  const int64_t threads = std::max(held_row_threads(call.classes, held), kMinHeldRowThreads);
  const HeldKnobs knobs{held, kRowBlock, custom_threads_per_sm(bytes), kMaxHeldStages};
  // The kernel counts no vectors from row to row.
  return plan_held({call.outer, 0, std::popcount(loss.elements), held / size, threads}, device,
                   knobs);
}

// Kept values are in shared memory if a cluster has room for them.
template <class Device>
RowsPlan plan_custom_rows(const CustomRowsCall& call, const CustomRowsInfo& loss,
                          const Device& device) {
  if (auto held = plan_held(call, loss, device)) {
    if (held->kernel != RowsPlan::Kernel::kSubWarp) held->tiling.threads_per_row = 0;
    return *held;
  }
  const DType dtype = read_dtype(call, loss.elements);
  const int bytes = bytes_of(dtype), size = kVectorBytes / bytes;
  const Rows& x = call.inputs[0];
  const int64_t rows = call.outer * call.inner;
  const bool in_vectors = x.classes == 1 && x.dtype == dtype;
  const bool aligned =
      is_aligned(x.data) && x.outer % size == 0 && (x.inner % size == 0 || call.inner == 1);
  const int64_t before = in_vectors && !aligned ? size - 1 : 0;  // lanes that are not the row's
  // A thread has a row where its neighbours' rows are nearer than its own next class.
  const int64_t neighbour = call.inner > 1 ? x.inner : x.outer;
  RowsDemand demand{rows,
                    ceil_div(before + call.classes, size),
                    std::popcount(loss.elements),
                    bytes == 2 ? 2 * loss.kept_narrow : loss.kept,  // each is four bytes or eight
                    rows > 1 && neighbour < x.classes,
                    custom_threads_per_sm(bytes)};
  RowsPlan plan = plan_contiguous(demand, device);
  if (!plan.tiling.fits_in_smem && demand.kept > 0) {
    demand.kept = 0;
    plan = plan_contiguous(demand, device);
  }
  if (!plan.tiling.fits_in_smem) {  // vectors of a row instead of rows
    plan.tiling.vectors_per_thread = 1;
    plan.tiling.stages = kMaxStages;
    plan.tiling.keeps = false;
    plan.smem = kMaxStages * demand.operands * plan.threads * kVectorBytes;
  }
  if (plan.kernel != RowsPlan::Kernel::kSubWarp) plan.tiling.threads_per_row = 0;
  return plan;
}

}  // namespace fusedloss::cuda
