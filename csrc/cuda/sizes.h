// Sizes that kernels and launch plans share; no CUDA header.
#pragma once

#include <cstdint>

namespace fusedloss::cuda {

constexpr int kWarp = 32;         // threads of a warp
constexpr int kVectorBytes = 16;  // the widest memory access of one thread

// Limits of a grid that adds up: blocks per SM, which no GPU exceeds, and slices of class indices.
constexpr int kMaxBlocksPerSM = 32;
constexpr int64_t kMaxSlices = 512;

// Shared memory that kernels declare and the system reserves, and what a kernel gets unasked.
constexpr int64_t kStaticSmem = 4 << 10, kDefaultSmem = 48 << 10;
constexpr int64_t kCustomStaticSmem = 8 << 10;  // the former of a custom row loss's kernel, at most

// ---- rows that threads share --------------------------------------------------------------------

constexpr int kRowBlock = 256;      // threads of a block, at most
constexpr int kMaxClusterSize = 8;  // more than 8 blocks are not portable

// The threads that share a row. kAny: one of the others, which the kernel finds out.
enum class Scope { kSubWarp, kBlock, kCluster, kAny };

// How a row's vectors are laid over its threads and over shared memory.
struct RowTiling {
  int threads_per_row = kWarp;  // kSubWarp alone; the others use the whole block or cluster
  int vectors_per_thread = 0;   // of each operand
  int stages = 1;               // rows in shared memory: one is computed, the others are prefetched
  bool fits_in_smem = true;     // if not, no row is in shared memory, and each walk reads it
  bool keeps = false;           // a custom loss's kept values are there too

  bool operator==(const RowTiling&) const = default;
};

// What a plan must know of a custom loss over rows.
struct CustomRowsInfo {
  unsigned elements = 0;  // bit i: input i has a number for each class
  int kept = 0;           // values of a class that walks keep, where shared memory has room
  int kept_narrow = 0;    // the same of two-byte rows
  int held = 0;           // classes of a thread in registers; 0: there is no kernel for that
  int held_narrow = 0;    // the same of two-byte rows
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fusedloss::cuda
