// The table of losses: what the operators must know of one, by its name. Built-in losses stand in
// it, compiled custom losses are loaded into it.
#pragma once

#include <array>
#include <atomic>
#include <string>
#include <string_view>
#include <vector>

#include "math/custom_rows.h"
#include "math/losses.h"

namespace fusedloss {

namespace cpu {
struct PointwiseKernel;
struct CustomRowsKernel;
}  // namespace cpu
namespace cuda {
struct CustomKernels;
}

enum class Family {
  kPointwise,  // every element has a loss, from its own input and target
  kRows,       // every row has one, from all of its elements
};

struct LossInfo {
  std::string name;
  size_t number = 0;  // of a built-in loss: its place in the tables of kernels
  Family family = Family::kPointwise;
  Mean mean = Mean::kElements;
  int parameters = 0;
  int inputs = 2;          // how many it takes
  int gradients = 1;       // for how many of them, from the first on, there may be a gradient
  bool symmetric = false;  // in input and target: a gradient for target is input's, negated
  Domain domain = Domain::kReal;
  // The loss whose target is class indices; null: it takes none.
  const LossInfo* of_classes = nullptr;
  bool custom = false;
  std::vector<Kind> kinds;  // of a custom row loss's inputs
  int auxiliary = 0;        // how many further results a row of it has

  // Null for a built-in loss, and where no kernels are loaded; there are those of its family.
  std::atomic<const cpu::PointwiseKernel*> cpu = nullptr;
  std::atomic<const cpu::CustomRowsKernel*> cpu_rows = nullptr;
  std::atomic<const cuda::CustomKernels*> cuda = nullptr;

  bool custom_rows() const { return custom && family == Family::kRows; }
  // The kind of input i, which is also there where a loss has one input and is given it twice.
  Kind kind(size_t i) const { return i < kinds.size() ? kinds[i] : Kind::kElement; }
};

// Null: there is no loss of this name. What it points to lives for ever.
const LossInfo* find_loss(std::string_view name);
// Those that are built in.
std::vector<const LossInfo*> built_in_losses();

// Loads the library of a custom loss for the CPU. It stays loaded. Throws std::runtime_error where
// it is none, or of another version.
void load_custom(const std::string& name, const std::string& library);
// The same for GPUs: see cuda/kernels.h.
void load_custom_kernels(const std::string& name, int inputs, int parameters, int capability,
                         const std::string& file);
// The same of a row loss. kinds: numbers of Kind; sizes: of CustomRowsInfo in cuda/sizes.h, from
// kept.
void load_custom_rows_kernels(const std::string& name, const std::vector<int>& kinds,
                              int parameters, const std::array<int, 4>& sizes, int auxiliary,
                              int capability, const std::string& file);

}  // namespace fusedloss
