#include "one_pass.h"

#include <ATen/ops/full.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <bit>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace fusedloss {

using at::Tensor;

namespace {

// The predictions of calls without one of their own, by what tells call sites apart.
struct SharedPredictions {
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

  static SharedPredictions& instance() {
    static auto& shared = *new SharedPredictions;  // outlives whatever runs at exit
    return shared;
  }

 private:
  SharedPredictions() {
#if !defined(_WIN32)
    // A child of fork() must not inherit the lock from a thread that it has not.
    pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                   [] { instance().mutex.unlock(); });
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

Tensor prediction_of(const OptionalTensor& own, const Arguments& a) {
  if (own.has_value()) {
    check_pair("prediction", *own, a.input);
    return *own;
  }
  SharedPredictions& shared = SharedPredictions::instance();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  const at::Device device = a.input.device();
  return shared.sites[{device.type(), device.index()}].find(
      {std::string(a.loss), a.input.scalar_type(), a.input.numel(), a.reduction}, device);
}

// ---- gradients ----------------------------------------------------------------------------------

void check_mask(int64_t mask, const LossInfo& info) {
  bool known = mask >= 0 && mask < int64_t{1} << info.gradients;
  for (size_t i = 0; i < info.kinds.size(); ++i) {
    const bool differentiable = info.kinds[i] == Kind::kElement || info.kinds[i] == Kind::kPerRow;
    known = known && (differentiable || !wants(mask, i));
  }
  TORCH_CHECK_VALUE(known, "fusedloss: '", info.name, "' has no gradients for the mask ", mask,
                    ": it has ", info.gradients, ", of which bit 0 is input's and bit 1 target's");
}

// What the gradient for an input lies in memory like: input, for an engine writes those of all
// elements alike; for a number of each row the rows, in order.
static Tensor like_gradient(const Arguments& a, const LossInfo& info, size_t i) {
  return info.kind(i) == Kind::kElement ? a.input : a[i].contiguous();
}

Gradients empty_gradients(const Arguments& a, const LossInfo& info, int64_t mask) {
  Gradients gradients(info.gradients);
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!wants(mask, i)) continue;
    gradients[i] = empty_like_input(like_gradient(a, info, i), a[i].scalar_type());
  }
  return gradients;
}

std::vector<Tensor> listed(Gradients&& gradients) {
  std::vector<Tensor> list;
  for (Tensor& gradient : gradients) {
    if (gradient.defined()) list.push_back(std::move(gradient));
  }
  return list;
}

Gradients checked_outputs(const Arguments& a, const LossInfo& info, int64_t mask,
                          at::TensorList out) {
  TORCH_CHECK_VALUE(info.family == Family::kRows && a.each(), "fusedloss: the gradients of '",
                    a.loss, "' are not those of the losses of single rows");
  check_mask(mask, info);
  const auto wanted = static_cast<size_t>(std::popcount(static_cast<uint64_t>(mask)));
  TORCH_CHECK_VALUE(out.size() == wanted, "fusedloss: ", out.size(), " outputs for the mask ",
                    mask);
  Gradients gradients(info.gradients);
  size_t given = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!wants(mask, i)) continue;
    const Tensor& t = gradients[i] = out[given++];
    TORCH_CHECK_VALUE(t.sizes() == a[i].sizes() && t.device() == a[i].device() &&
                          t.scalar_type() == a[i].scalar_type(),
                      "fusedloss: an output of shape ", t.sizes(), " for input ", i, " of shape ",
                      a[i].sizes());
  }
  return gradients;
}

static void destroy(void* saved) { delete static_cast<SavedGradients*>(saved); }

void attach(const Tensor& state, const Arguments& a, Gradients gradients, Tensor prediction) {
  auto* saved = new SavedGradients{std::move(gradients),
                                   std::move(prediction),
                                   at::DimVector(a.input.sizes()),
                                   a.input.scalar_type(),
                                   {},
                                   {}};
  for (size_t i = 0; i < a.inputs(); ++i) {
    saved->storages.push_back(a[i].storage().getWeakStorageImpl());
  }
  c10::StorageImpl* storage = state.storage().unsafeGetStorageImpl();
  saved->memory = storage->set_data_ptr(
      c10::DataPtr(storage->mutable_data(), saved, &destroy, storage->device()));
}

SavedGradients* saved_in(const Tensor& state) {
  return state.has_storage() ? state.storage().data_ptr().cast_context<SavedGradients>(&destroy)
                             : nullptr;
}

void drop_gradients(const Tensor& state) {
  if (SavedGradients* saved = saved_in(state)) saved->gradients = {};
}

void drop_gradients_of_other_memory(const Tensor& state, const Arguments& a) {
  const SavedGradients* saved = saved_in(state);
  if (!saved) return;
  for (size_t i = 0; i < a.inputs(); ++i) {
    const c10::StorageImpl* const there = saved->storages[i]._unsafe_get_target();
    if (a[i].storage().unsafeGetStorageImpl() != there) return drop_gradients(state);
  }
}

BackwardGradients::BackwardGradients(SavedGradients* saved, const Arguments& a,
                                     const LossInfo& info, int64_t mask) {
  const Tensor& input = a.input;
  if (saved) {
    TORCH_CHECK(input.sizes() == saved->input_sizes && input.scalar_type() == saved->input_dtype,
                "fusedloss: backward's input is a ", input.scalar_type(), " tensor of shape ",
                input.sizes(), ", and forward's was a ", saved->input_dtype, " tensor of shape ",
                at::IntArrayRef(saved->input_sizes),
                ": between the two, leave input.data as it is");
    gradients = std::exchange(saved->gradients, {});
  }
  gradients.resize(info.gradients);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const at::ScalarType dtype = a[i].scalar_type();
    if (!wants(mask, i)) {
      gradients[i].reset();
      continue;
    }
    const Tensor like = like_gradient(a, info, i);
    if (!lies_like_input(gradients[i], like, dtype)) {
      gradients[i] = empty_like_input(like, dtype);
      fresh = true;
    }
  }
}

}  // namespace fusedloss
