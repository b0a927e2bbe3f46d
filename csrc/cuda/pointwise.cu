// The table of kernels: the losses of losses.h, and the row losses.
#include "pointwise.cuh"

#include "../math/losses.h"

namespace fusedloss::cuda {
namespace {

template <class BuiltIn>
struct BuiltInKernels {
  using Loss = BuiltIn;
  Loss loss;

  template <bool kPlain, class D>
  void vectorized(const VectorizedCall<D>& c, const Launch& l) const {
    launch<pointwise_vectorized<Loss, D, kPlain>>(c, l);
  }
  template <class T>
  void strided(const Call& c, const Launch& l) const {
    launch<pointwise_strided<Loss, T>>(c, l);
  }

 private:
  template <auto kKernel, class C>
  void launch(const C& call, const Launch& l) const {
    kKernel<<<pointwise_blocks(call.numel, kKernel), kThreads, 0, l.stream>>>(loss, call, l);
  }
};

template <class Loss>
cudaError_t run_built_in(const Call& call, const Launch& launch) {
  const Loss loss{PointwiseLoss::with(call.parameters, Loss::kParameters)};
  return run_pointwise(BuiltInKernels<Loss>{loss}, call, launch);
}

#define FUSEDLOSS_KERNEL(NAME, LOSS) &run_built_in<LOSS>,
constexpr Kernel* kLosses[] = {FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_KERNEL) & cross_entropy};
#undef FUSEDLOSS_KERNEL

}  // namespace

Kernel* const* const kernels = kLosses;

size_t workspace_bytes() {
  return GridWorkspace::bytes(int64_t{device_attribute(cudaDevAttrMultiProcessorCount)} *
                              kMaxBlocksPerSM);
}

}  // namespace fusedloss::cuda
