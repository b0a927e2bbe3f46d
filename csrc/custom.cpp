#include "custom.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <shared_mutex>

#include "cpu/custom_kernel.h"
#if defined(FUSEDLOSS_CUDA)
#include "cuda/custom_kernel.h"
#endif

namespace fusedloss {
namespace {

template <class Kernel>
struct Loaded {
  std::shared_mutex mutex;
  std::map<std::string, const Kernel*, std::less<>> table;

  static Loaded& one() {
    static auto& loaded = *new Loaded;  // outlives whatever runs at exit
    return loaded;
  }
};

// False for a library that has not this entry.
template <class Kernel>
bool load(const std::string& loss, const std::string& library, void* handle, const char* entry,
          int32_t version) {
  const auto found = reinterpret_cast<const Kernel* (*)()>(dlsym(handle, entry));
  if (!found) return false;
  const Kernel* kernel = found();
  TORCH_CHECK(kernel->version == version, "fusedloss: ", library, " is of interface version ",
              kernel->version, ", and this fusedloss of ", version);
  auto& loaded = Loaded<Kernel>::one();
  const std::unique_lock lock(loaded.mutex);
  loaded.table.emplace(loss, kernel);
  return true;
}

#define FUSEDLOSS_TEXT(X) #X
#define FUSEDLOSS_NAME(X) FUSEDLOSS_TEXT(X)

}  // namespace

void load_custom(const std::string& loss, const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle, "fusedloss: ", library, " does not load: ", dlerror());
#if defined(FUSEDLOSS_CUDA)
  if (load<cuda::CustomKernel>(loss, library, handle, FUSEDLOSS_NAME(FUSEDLOSS_CUSTOM_CUDA_ENTRY),
                               cuda::kCustomVersion)) {
    return;
  }
#endif
  TORCH_CHECK(load<cpu::CustomKernel>(loss, library, handle, FUSEDLOSS_NAME(FUSEDLOSS_CUSTOM_ENTRY),
                                      cpu::kCustomVersion),
              "fusedloss: ", library, " is no compiled loss: ", dlerror());
}

template <class Kernel>
const Kernel& custom_kernel(std::string_view loss, c10::ArrayRef<double> parameters) {
  auto& loaded = Loaded<Kernel>::one();
  const std::shared_lock lock(loaded.mutex);
  const auto found = loaded.table.find(loss);
  TORCH_CHECK(found != loaded.table.end(), "fusedloss: no kernel of a loss '", loss,
              "' is loaded: import the module that defines it, and call it once");
  const Kernel& kernel = *found->second;
  TORCH_CHECK_VALUE(kernel.parameters == static_cast<int64_t>(parameters.size()), "fusedloss: '",
                    loss, "' has ", kernel.parameters, " parameters, and the call ",
                    parameters.size());
  return kernel;
}

template const cpu::CustomKernel& custom_kernel(std::string_view, c10::ArrayRef<double>);
#if defined(FUSEDLOSS_CUDA)
template const cuda::CustomKernel& custom_kernel(std::string_view, c10::ArrayRef<double>);
#endif

}  // namespace fusedloss
