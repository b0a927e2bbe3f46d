#include "carried.h"

#include <ATen/ops/full.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace fusedloss {

using at::Tensor;

namespace {

// The predictions of calls without one of their own, by what tells call sites apart.
struct Shared {
  using Key = std::tuple<std::string, at::ScalarType, int64_t, int64_t>;
  // A CUDA graph holds predictions by their addresses, so none is ever freed: of too many sites the
  // oldest leaves its own to the latest.
  class Sites {
   public:
    Tensor find(Key key, const at::Device& device) {
      const auto found = table_.find(key);
      if (found != table_.end()) return found->second;
      if (keys_.size() < kLimit) {
        keys_.push_back(key);
        return table_.emplace(std::move(key), new_prediction(device)).first->second;
      }
      auto site = table_.extract(std::exchange(keys_[oldest_], key));
      oldest_ = (oldest_ + 1) % kLimit;
      site.key() = std::move(key);
      return table_.insert(std::move(site)).position->second;
    }

   private:
    static constexpr size_t kLimit = 512;
    std::map<Key, Tensor> table_;
    std::vector<Key> keys_;
    size_t oldest_ = 0;
  };
  std::mutex mutex;
  std::map<std::pair<at::DeviceType, int>, Sites> sites;  // of each device

  static Shared& one() {
    static auto& shared = *new Shared;  // outlives whatever runs at exit
    return shared;
  }

 private:
  Shared() {
#if !defined(_WIN32)
    // A child of fork() must not inherit the lock from a thread that it has not.
    pthread_atfork([] { one().mutex.lock(); }, [] { one().mutex.unlock(); },
                   [] { one().mutex.unlock(); });
#endif
  }
};

}  // namespace

Tensor new_prediction(const at::Device& device) {
  const auto make = [&] {
    Tensor prediction = at::full({2}, 1.0, at::dtype(at::kDouble).device(device));
    prediction.select(0, 1).fill_(3.0);
    return prediction;
  };
#if defined(FUSEDLOSS_CUDA)
  return outside_of_capture(device, make);
#else
  return make();
#endif
}

Tensor prediction_of(const OptionalTensor& own, std::string_view loss, const Tensor& input,
                     int64_t reduction) {
  if (own.has_value()) {
    check_pair("prediction", *own, input);
    return *own;
  }
  Shared& shared = Shared::one();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  const at::Device device = input.device();
  return shared.sites[{device.type(), device.index()}].find(
      {std::string(loss), input.scalar_type(), input.numel(), reduction}, device);
}

static void destroy(void* carried) { delete static_cast<Carried*>(carried); }

void carry(const Tensor& scales, const Tensor& input, const Tensor& target, Tensor gradient,
           Tensor prediction, Tensor target_gradient) {
  auto* carried = new Carried{std::move(gradient),
                              std::move(target_gradient),
                              std::move(prediction),
                              at::DimVector(input.sizes()),
                              input.scalar_type(),
                              input.storage().getWeakStorageImpl(),
                              target.storage().getWeakStorageImpl(),
                              {}};
  c10::StorageImpl* storage = scales.storage().unsafeGetStorageImpl();
  carried->memory = storage->set_data_ptr(
      c10::DataPtr(storage->mutable_data(), carried, &destroy, storage->device()));
}

Carried* carried(const Tensor& scales) {
  return scales.has_storage() ? scales.storage().data_ptr().cast_context<Carried>(&destroy)
                              : nullptr;
}

void drop_gradients(const Tensor& scales) {
  if (Carried* left = carried(scales)) {
    left->gradient.reset();
    left->target_gradient.reset();
  }
}

void drop_gradients_of_other_memory(const Tensor& scales, const Tensor& input,
                                    const Tensor& target) {
  const Carried* left = carried(scales);
  if (!left) return;
  const auto is_in = [](const Tensor& t, const auto& storage) {
    return t.storage().unsafeGetStorageImpl() == storage._unsafe_get_target();
  };
  if (!is_in(input, left->input_storage) || !is_in(target, left->target_storage)) {
    drop_gradients(scales);
  }
}

BackwardGradients::BackwardGradients(Carried* left, const Tensor& input, const Tensor& target,
                                     Wants wants) {
  if (left) {
    TORCH_CHECK(input.sizes() == left->input_sizes && input.scalar_type() == left->input_dtype,
                "fusedloss: backward's input is a ", input.scalar_type(), " tensor of shape ",
                input.sizes(), ", and forward's was a ", left->input_dtype, " tensor of shape ",
                at::IntArrayRef(left->input_sizes), ": between the two, leave input.data as it is");
    gradient = std::move(left->gradient);
    target_gradient = std::move(left->target_gradient);
  }
  if (!wants.input) {
    gradient.reset();
  } else if (!lies_like_gradient(gradient, input, input.scalar_type())) {
    gradient = empty_gradient(input);
    fresh = true;
  }
  if (!wants.target) {
    target_gradient.reset();
  } else if (!lies_like_gradient(target_gradient, input, target.scalar_type())) {
    target_gradient = empty_target_gradient(input, target);
    fresh = true;
  }
}

}  // namespace fusedloss
