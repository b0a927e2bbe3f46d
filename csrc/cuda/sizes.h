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

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fusedloss::cuda
