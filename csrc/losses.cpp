#include "losses.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#include "cpu/custom_kernel.h"
#if defined(FUSEDLOSS_CUDA)
#include "cuda/custom_kernel.h"
#endif

namespace fusedloss {
namespace {

struct Table {
  std::shared_mutex mutex;
  std::map<std::string, LossInfo, std::less<>> losses;  // whose elements stay where they are

  static Table& instance() {
    static auto& table = *new Table;  // outlives whatever runs at exit
    return table;
  }

 private:
  Table() {
#define FUSEDLOSS_ADD(NAME, LOSS) add<LOSS>(NAME);
    FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_ADD)
#undef FUSEDLOSS_ADD
    losses["log_loss"].of_classes = "log_loss_of_classes";
    LossInfo& rows = losses["cross_entropy"];
    rows.name = rows.of_classes = "cross_entropy";
    rows.family = Family::kRows;
    rows.mean = Mean::kRows;
    rows.parameters = 1;  // label_smoothing
  }

  template <class Loss>
  void add(const char* name) {
    LossInfo& info = losses[name];
    info.name = name;
    info.mean = Loss::kMean;
    info.parameters = Loss::kParameters;
    info.extra_inputs = Loss::kPosWeight;
  }
};

// The kernel that a library offers under this entry; null for one that has no such entry.
template <class Kernel>
const Kernel* kernel_of(const std::string& library, void* handle, const char* entry,
                        int32_t version) {
  const auto found = reinterpret_cast<const Kernel* (*)()>(dlsym(handle, entry));
  if (!found) return nullptr;
  const Kernel* kernel = found();
  if (kernel->version != version) {
    throw std::runtime_error("fusedloss: " + library + " is of interface version " +
                             std::to_string(kernel->version) + ", and this fusedloss of " +
                             std::to_string(version));
  }
  return kernel;
}

#define FUSEDLOSS_TEXT(X) #X
#define FUSEDLOSS_NAME(X) FUSEDLOSS_TEXT(X)

}  // namespace

const LossInfo* find_loss(std::string_view name) {
  Table& table = Table::instance();
  const std::shared_lock lock(table.mutex);
  const auto found = table.losses.find(name);
  return found == table.losses.end() ? nullptr : &found->second;
}

std::vector<const LossInfo*> built_in_losses() {
  Table& table = Table::instance();
  const std::shared_lock lock(table.mutex);
  std::vector<const LossInfo*> built_in;
  for (const auto& [name, info] : table.losses) {
    if (!info.custom()) built_in.push_back(&info);
  }
  return built_in;
}

void load_custom(const std::string& name, const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error("fusedloss: " + library + " does not load: " + dlerror());
  const auto add = [&](const auto* kernel, auto member) {
    if (!kernel) return false;
    Table& table = Table::instance();
    const std::unique_lock lock(table.mutex);
    const auto [found, is_new] = table.losses.try_emplace(name);
    LossInfo& info = found->second;
    if (is_new) {
      info.name = name;
      info.mean = Mean::kWeights;
      info.parameters = kernel->parameters;
      info.target_gradient = true;
    }
    info.*member = kernel;
    return true;
  };
#if defined(FUSEDLOSS_CUDA)
  if (add(kernel_of<cuda::CustomKernel>(
              library, handle, FUSEDLOSS_NAME(FUSEDLOSS_CUSTOM_CUDA_ENTRY), cuda::kCustomVersion),
          &LossInfo::cuda)) {
    return;
  }
#endif
  if (!add(kernel_of<cpu::CustomKernel>(library, handle, FUSEDLOSS_NAME(FUSEDLOSS_CUSTOM_ENTRY),
                                        cpu::kCustomVersion),
           &LossInfo::cpu)) {
    throw std::runtime_error("fusedloss: " + library + " is no compiled loss: " + dlerror());
  }
}

}  // namespace fusedloss
