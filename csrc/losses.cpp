#include "losses.h"

#include <dlfcn.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#include "cpu/custom_rows.h"
#include "cpu/pointwise.h"
#if defined(FUSEDLOSS_CUDA)
#include "cuda/kernels.h"
#endif

namespace fusedloss {
namespace {

// Those that are built in, which nothing changes.
struct BuiltIn {
  std::deque<LossInfo> losses;

  BuiltIn() {
#define FUSEDLOSS_ADD(NAME, LOSS) add<LOSS>(NAME);
    FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_ADD)
#undef FUSEDLOSS_ADD
    LossInfo& rows = add("cross_entropy");
    rows.family = Family::kRows;
    rows.mean = Mean::kRows;
    rows.parameters = 1;  // label_smoothing
    rows.of_classes = &rows;
    LossInfo* const of_classes = find("log_loss_of_classes");
    find("log_loss")->of_classes = of_classes->of_classes = of_classes;
  }

  LossInfo* find(std::string_view name) {
    const auto found = std::find_if(losses.begin(), losses.end(),
                                    [&](const LossInfo& info) { return info.name == name; });
    return found == losses.end() ? nullptr : &*found;
  }
  static BuiltIn& instance() {
    static auto& built_in = *new BuiltIn;  // outlives whatever runs at exit
    return built_in;
  }

 private:
  LossInfo& add(const char* name) {
    LossInfo& info = losses.emplace_back();
    info.name = name;
    info.number = losses.size() - 1;
    return info;
  }
  template <class Loss>
  void add(const char* name) {
    LossInfo& info = add(name);
    info.mean = Loss::kMean;
    info.parameters = Loss::kParameters;
    info.inputs = Loss::kInputs;
    info.gradients = Loss::kGradients;
    info.symmetric = Loss::kSymmetric;
    info.domain = Loss::kDomain;
  }
};

// Those that were loaded.
struct Loaded {
  std::shared_mutex mutex;
  std::map<std::string, LossInfo, std::less<>> losses;  // whose elements stay where they are

  static Loaded& instance() {
    static auto& loaded = *new Loaded;
    return loaded;
  }
};

// The custom loss of this name, which is changed under the lock. kinds: of a row loss.
LossInfo& custom_loss(const std::string& name, int inputs, int parameters,
                      std::vector<Kind> kinds = {}, int auxiliary = 0) {
  const auto [found, is_new] = Loaded::instance().losses.try_emplace(name);
  LossInfo& info = found->second;
  if (is_new) {
    info.name = name;
    info.family = kinds.empty() ? Family::kPointwise : Family::kRows;
    info.mean = kinds.empty() ? Mean::kWeights : Mean::kRows;
    info.parameters = parameters;
    info.inputs = info.gradients = inputs;
    info.custom = true;
    info.kinds = std::move(kinds);
    info.auxiliary = auxiliary;
  }
  return info;
}

#define FUSEDLOSS_TEXT(X) #X
#define FUSEDLOSS_NAME(X) FUSEDLOSS_TEXT(X)

// What the library's function of this name returns; null: it has none. Throws where that is of
// another version.
template <class Kernel>
const Kernel* kernel_of(void* handle, const char* symbol, int32_t version,
                        const std::string& library) {
  const auto entry = reinterpret_cast<const Kernel* (*)()>(dlsym(handle, symbol));
  const Kernel* const kernel = entry ? entry() : nullptr;
  if (kernel && kernel->version != version) {
    throw std::runtime_error("fusedloss: " + library + " is of interface version " +
                             std::to_string(kernel->version) + ", and this fusedloss of " +
                             std::to_string(version));
  }
  return kernel;
}

}  // namespace

const LossInfo* find_loss(std::string_view name) {
  if (const LossInfo* built_in = BuiltIn::instance().find(name)) return built_in;
  Loaded& loaded = Loaded::instance();
  const std::shared_lock lock(loaded.mutex);
  const auto found = loaded.losses.find(name);
  return found == loaded.losses.end() ? nullptr : &found->second;
}

std::vector<const LossInfo*> built_in_losses() {
  std::vector<const LossInfo*> all;
  for (const LossInfo& info : BuiltIn::instance().losses) all.push_back(&info);
  return all;
}

void load_custom(const std::string& name, const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error("fusedloss: " + library + " does not load: " + dlerror());
  const auto* const rows = kernel_of<cpu::CustomRowsKernel>(
      handle, FUSEDLOSS_NAME(FUSEDLOSS_CUSTOM_ROWS_ENTRY), cpu::kCustomRowsVersion, library);
  if (rows) {
    const std::unique_lock lock(Loaded::instance().mutex);
    custom_loss(name, rows->inputs, rows->parameters, {rows->kinds, rows->kinds + rows->inputs},
                rows->auxiliary)
        .cpu_rows = rows;
    return;
  }
  const auto* const kernel = kernel_of<cpu::PointwiseKernel>(
      handle, FUSEDLOSS_NAME(FUSEDLOSS_CUSTOM_ENTRY), cpu::kPointwiseVersion, library);
  if (!kernel) {
    throw std::runtime_error("fusedloss: " + library + " is no compiled loss: " + dlerror());
  }
  const std::unique_lock lock(Loaded::instance().mutex);
  custom_loss(name, kernel->inputs, kernel->parameters).cpu = kernel;
}

#if defined(FUSEDLOSS_CUDA)
namespace {

// load: a function of the kernels that are there already, for other devices.
template <class Load>
void load_kernels(const std::string& name, int inputs, int parameters, std::vector<Kind> kinds,
                  int auxiliary, Load&& load) {
  const std::unique_lock lock(Loaded::instance().mutex);
  const auto& losses = Loaded::instance().losses;
  const auto known = losses.find(name);
  const cuda::CustomKernels* others = nullptr;
  if (known != losses.end()) others = known->second.cuda;
  const cuda::CustomKernels* const kernels = load(others);
  custom_loss(name, inputs, parameters, std::move(kinds), auxiliary).cuda = kernels;
}

}  // namespace

void load_custom_kernels(const std::string& name, int inputs, int parameters, int capability,
                         const std::string& file) {
  load_kernels(name, inputs, parameters, {}, 0, [&](const cuda::CustomKernels* others) {
    return cuda::load_custom(file.c_str(), capability, others);
  });
}

void load_custom_rows_kernels(const std::string& name, const std::vector<int>& kinds,
                              int parameters, const std::array<int, 4>& sizes, int auxiliary,
                              int capability, const std::string& file) {
  std::vector<Kind> of_inputs;
  unsigned elements = 0;
  for (size_t i = 0; i < kinds.size(); ++i) {
    of_inputs.push_back(static_cast<Kind>(kinds[i]));
    elements |= unsigned{of_inputs[i] == Kind::kElement} << i;
  }
  const int inputs = static_cast<int>(kinds.size());
  const auto load = [&](const cuda::CustomKernels* others) {
    const cuda::CustomRowsInfo rows{elements, sizes[0], sizes[1], sizes[2], sizes[3]};
    return cuda::load_custom_rows(file.c_str(), capability, rows, others);
  };
  load_kernels(name, inputs, parameters, of_inputs, auxiliary, load);
}
#endif

}  // namespace fusedloss
