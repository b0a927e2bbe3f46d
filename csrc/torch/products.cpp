// Matrix products on the CPU whose bits no number of threads changes: torch's own products of fixed
// parts, each computed by one thread.
//
// A BLAS splits a product by the number of its threads, and a long sum in between two of them has
// other roundings.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "operators.h"

#if defined(__linux__)
// These belong to the libraries that torch is linked with; null where it has others.
extern "C" [[gnu::weak]] int MKL_Set_Num_Threads_Local(int threads);
extern "C" [[gnu::weak]] void omp_set_num_threads(int threads);
#endif

namespace fusedloss {
namespace {

// While it lives, products of this thread are computed by it alone. Inside of a parallel region
// that is so in any case, but a BLAS would still choose its way by the number of threads.
class OneThread {
 public:
  OneThread() {
#if defined(__linux__)
    if (MKL_Set_Num_Threads_Local) before_ = MKL_Set_Num_Threads_Local(1);
    if (omp_set_num_threads && at::in_parallel_region()) omp_set_num_threads(1);
#endif
  }
  OneThread(const OneThread&) = delete;
  ~OneThread() {
#if defined(__linux__)
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
#endif
  }

 private:
  [[maybe_unused]] int before_ = 0;
};

using at::Tensor;

// Calls part(begin, end) for parts of at least `least` numbers of [0, size), which are all alike.
template <class Part>
void for_parts(int64_t size, int64_t least, const Part& part) {
  constexpr int64_t kParts = 64;  // at most: of the size, and not of the threads
  const int64_t step = std::max(least, (size + kParts - 1) / kParts);
  // Two at least, of which one may be empty, so that there is a parallel region.
  const int64_t parts = std::max<int64_t>(2, (size + step - 1) / step);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const OneThread one;
    const at::AutoDispatchBelowADInplaceOrView below;  // a thread's own setting
    for (int64_t begin = first * step; begin < std::min(size, last * step); begin += step) {
      part(begin, std::min(size, begin + step));
    }
  });
}

void multiply(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    out.addmm_(a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

// out = a b, or out += a b.
void product(const Tensor& to, const Tensor& a, const Tensor& b, bool add) {
  const int64_t rows = a.size(0), inner = a.size(1), columns = b.size(1);
  constexpr int64_t kLeast = 256, kSlice = 2048;
  Tensor out = to;
  if (inner >= 2 * kSlice && inner > 4 * std::max(rows, columns) && a.element_size() >= 4) {
    // A sum of products of slices, which read each number once.
    const int64_t slices = (inner + kSlice - 1) / kSlice;
    const Tensor parts = at::empty({slices, rows, columns}, a.options());
    for_parts(slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = i * kSlice, n = std::min(kSlice, inner - from);
        multiply(parts.select(0, i), a.narrow(1, from, n), b.narrow(0, from, n), false);
      }
    });
    for_parts(rows, std::max<int64_t>(1, 4096 / columns), [&](int64_t begin, int64_t end) {
      Tensor sum = out.narrow(0, begin, end - begin);
      for (int64_t i = 0; i < slices; ++i) {
        const Tensor part = parts.select(0, i).narrow(0, begin, end - begin);
        i || add ? sum.add_(part) : sum.copy_(part);
      }
    });
  } else if (rows > columns) {
    for_parts(rows, kLeast, [&](int64_t begin, int64_t end) {
      const int64_t n = end - begin;
      multiply(out.narrow(0, begin, n), a.narrow(0, begin, n), b, add);
    });
  } else {
    for_parts(columns, kLeast, [&](int64_t begin, int64_t end) {
      const int64_t n = end - begin;
      multiply(out.narrow(1, begin, n), a, b.narrow(1, begin, n), add);
    });
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fusedloss, m) {
  m.def("product_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
}
TORCH_LIBRARY_IMPL(fusedloss, CPU, m) { m.impl("product_", &product); }
// It returns nothing, so there is no shape to compute.
TORCH_LIBRARY_IMPL(fusedloss, Meta, m) {
  m.impl("product_", [](const Tensor&, const Tensor&, const Tensor&, bool) {});
}

}  // namespace fusedloss
