#include "carried.h"

#include <ATen/ops/full.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace fusedloss {

using at::Tensor;

Tensor new_prediction(const at::Device& device) {
  Tensor prediction = at::full({2}, 1.0, at::dtype(at::kDouble).device(device));
  prediction.select(0, 1).fill_(3.0);
  return prediction;
}

Tensor prediction_of(const OptionalTensor& own, std::string_view loss, const Tensor& input,
                     int64_t reduction) {
  if (own.has_value()) return *own;
  // By what tells call sites apart.
  using Key = std::tuple<std::string, at::DeviceType, int, at::ScalarType, int64_t, int64_t>;
  static std::mutex mutex;
  static auto& table = *new std::map<Key, Tensor>;  // outlives whatever runs at exit
  constexpr size_t kLimit = 512;
  const std::lock_guard<std::mutex> lock(mutex);
  const at::Device device = input.device();
  Key key(loss, device.type(), device.index(), input.scalar_type(), input.numel(), reduction);
  const auto found = table.find(key);
  if (found != table.end()) return found->second;
  if (table.size() >= kLimit) table.clear();
  return table.emplace(std::move(key), new_prediction(device)).first->second;
}

static void destroy(void* carried) { delete static_cast<Carried*>(carried); }

void carry(const Tensor& scales, Tensor gradient, Tensor prediction) {
  auto* carried = new Carried{std::move(gradient), std::move(prediction), {}};
  c10::StorageImpl* storage = scales.storage().unsafeGetStorageImpl();
  carried->memory = storage->set_data_ptr(
      c10::DataPtr(storage->mutable_data(), carried, &destroy, storage->device()));
}

Carried* carried(const Tensor& scales) {
  return scales.has_storage() ? scales.storage().data_ptr().cast_context<Carried>(&destroy)
                              : nullptr;
}

}  // namespace fusedloss
