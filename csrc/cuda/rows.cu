// The row losses on CUDA.
#include <type_traits>

#include "rows_contiguous.cuh"
#include "rows_held.cuh"
#include "rows_launch.h"
#include "rows_strided.cuh"
#include "rows_strided_smem.cuh"

namespace fusedloss::cuda {
namespace {

// Whether the current device is one like that.
bool is_gpu(const TunedHeld& tuned) {
  return tuned.sms == device_attribute(cudaDevAttrMultiProcessorCount) &&
         tuned.memory_bus == device_attribute(cudaDevAttrGlobalMemoryBusWidth) &&
         tuned.capability == capability();
}

// Calls f with the type of the row loss that serves a call.
template <class D, class F>
auto with_loss(const fusedloss::RowsCall& call, const RowsPlan& plan, F&& f) {
  if (has_hard_targets(call)) return f(std::type_identity<CrossEntropyRow<D, true>>());
  if (plan.operands == 2) return f(std::type_identity<ProbabilitiesRow<D>>());
  return f(std::type_identity<CrossEntropyRow<D, false>>());
}

// They read class probabilities where those are.
template <class Loss>
auto* strided_kernel(const RowsPlan& plan) {
  using D = typename Loss::Element;
  using Strided = CrossEntropyRow<D, !Loss::kSoft>;
  constexpr bool kVectors = strided_vectors(sizeof(D), !Loss::kSoft);
  if constexpr (kVectors) {
    if (plan.kernel == RowsPlan::Kernel::kStridedSmem) return rows_strided_smem<Strided>;
  }
  return plan.kernel == RowsPlan::Kernel::kStrided ? rows_strided<Strided, false>
                                                   : rows_strided<Strided, kVectors>;
}

// Null where no plan takes it.
template <class D, Scope kScope, int kHeld, int kThreads>
auto held_kernel() {
  using Kernel = decltype(&rows_held<D, kScope, kHeld, kThreads>);
  if constexpr (has_held_kernel(kHeld, kScope == Scope::kSubWarp ? kThreads : kWarp + 1)) {
    return Kernel(rows_held<D, kScope, kHeld, kThreads>);
  } else {
    return Kernel(nullptr);
  }
}
template <class D, Scope kScope, int kThreads>
auto held_kernel(const RowsPlan& plan) {
  return plan.held == kFewHeld ? held_kernel<D, kScope, kFewHeld, kThreads>()
                               : held_kernel<D, kScope, kManyHeld, kThreads>();
}

// The others, which all take the same arguments.
template <class Loss, Scope kScope>
auto* contiguous_kernel(const RowsPlan& plan) {
  using D = typename Loss::Element;
  if constexpr (!Loss::kSoft && sizeof(D) < 8) {
    if (plan.held) {
      if constexpr (kScope == Scope::kSubWarp) {
        switch (plan.tiling.threads_per_row) {
#define FUSEDLOSS_HELD(THREADS) \
  case THREADS:                 \
    return held_kernel<D, kScope, THREADS>(plan)
          FUSEDLOSS_HELD(1);
          FUSEDLOSS_HELD(2);
          FUSEDLOSS_HELD(4);
          FUSEDLOSS_HELD(8);
          FUSEDLOSS_HELD(16);
#undef FUSEDLOSS_HELD
        }
      }
      return held_kernel<D, kScope, kWarp>(plan);
    }
  }
  return rows_contiguous<Loss, kScope>;
}

// What plan_rows asks of the current device.
template <class D>
struct RowsDevice : CurrentDevice {
  const fusedloss::RowsCall& call;

  bool is_gpu(const TunedHeld& tuned) const { return cuda::is_gpu(tuned); }
  // Both the device and the code that runs there: a driver may have compiled it from the PTX for an
  // older device.
  bool has_clusters() const {
    const auto kernel = rows_contiguous<CrossEntropyRow<float, true>, Scope::kCluster>;
    return asked_once(kernel, {}, [&] {
      cudaFuncAttributes code{};
      return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
             cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
    });
  }
  // For a plan of the strided kernels.
  int64_t resident_blocks(const RowsPlan& plan) const {
    return with_loss<D>(call, plan, [&]<class Loss>(std::type_identity<Loss>) {
      return cuda::resident_blocks(strided_kernel<Loss>(plan), plan.threads, plan.smem);
    });
  }
  int64_t active_clusters(const RowsPlan& plan) const {
    return with_loss<D>(call, plan, [&]<class Loss>(std::type_identity<Loss>) {
      return cuda::active_clusters(contiguous_kernel<Loss, Scope::kCluster>(plan), plan);
    });
  }
};

// Calls f with a value of the logits' type and the call's plan.
template <class F>
auto with_plan(const fusedloss::RowsCall& call, F&& f) {
  return with_type(call.input.dtype, [&](auto tag) {
    return f(tag, plan_rows(call, RowsDevice<decltype(tag)>{{}, call}));
  });
}

template <class Kernel, class Call, class... Rest>
cudaError_t run(Kernel* kernel, const RowsPlan& plan, const Call& call, const Launch& launch,
                Rest... rest) {
  allow_smem(kernel, plan.smem);
  LaunchConfig config(plan, launch.stream);
  return cudaLaunchKernelEx(&config.config, kernel, call, launch, rest...);
}

template <class Loss>
cudaError_t run_rows(const fusedloss::RowsCall& call, const Launch& launch, const RowsPlan& plan) {
  const RowsCall<typename Loss::Number> rows(call);
  switch (plan.kernel) {
    case RowsPlan::Kernel::kSubWarp:
      return run(contiguous_kernel<Loss, Scope::kSubWarp>(plan), plan, rows, launch, plan.tiling);
    case RowsPlan::Kernel::kBlock:
      return run(contiguous_kernel<Loss, Scope::kBlock>(plan), plan, rows, launch, plan.tiling);
    case RowsPlan::Kernel::kCluster:
      return run(contiguous_kernel<Loss, Scope::kCluster>(plan), plan, rows, launch, plan.tiling);
    default:
      return run(strided_kernel<Loss>(plan), plan, rows, launch);
  }
}

}  // namespace

cudaError_t cross_entropy(const Call& call, const Launch& launch) {
  const fusedloss::RowsCall rows(call);
  return with_plan(rows, [&](auto tag, const RowsPlan& plan) {
    using D = decltype(tag);
    return with_loss<D>(rows, plan, [&]<class Loss>(std::type_identity<Loss>) {
      return run_rows<Loss>(rows, launch, plan);
    });
  });
}

}  // namespace fusedloss::cuda
