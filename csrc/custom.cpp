#include "custom.h"

#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <shared_mutex>

namespace fusedloss {
namespace {

struct Loaded {
  std::shared_mutex mutex;
  std::map<std::string, const cpu::CustomKernel*, std::less<>> table;

  static Loaded& one() {
    static auto& loaded = *new Loaded;  // outlives whatever runs at exit
    return loaded;
  }
};

#define FUSEDLOSS_TEXT(X) #X
#define FUSEDLOSS_NAME(X) FUSEDLOSS_TEXT(X)

}  // namespace

void load_custom(const std::string& loss, const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle, "fusedloss: ", library, " does not load: ", dlerror());
  const auto entry =
      reinterpret_cast<cpu::CustomEntry>(dlsym(handle, FUSEDLOSS_NAME(FUSEDLOSS_CUSTOM_ENTRY)));
  TORCH_CHECK(entry, "fusedloss: ", library, " is no compiled loss: ", dlerror());
  const cpu::CustomKernel* kernel = entry();
  TORCH_CHECK(kernel->version == cpu::kCustomVersion, "fusedloss: ", library,
              " is of interface version ", kernel->version, ", and this fusedloss of ",
              cpu::kCustomVersion);
  Loaded& loaded = Loaded::one();
  const std::unique_lock lock(loaded.mutex);
  loaded.table.emplace(loss, kernel);
}

const cpu::CustomKernel& custom_kernel(std::string_view loss) {
  Loaded& loaded = Loaded::one();
  const std::shared_lock lock(loaded.mutex);
  const auto found = loaded.table.find(loss);
  TORCH_CHECK(found != loaded.table.end(), "fusedloss: no kernel of a loss '", loss,
              "' is loaded: import the module that defines it, and call it once");
  return *found->second;
}

}  // namespace fusedloss
