#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// structured_hinge: Relu(max(x - 100*y) - sum(x*y) + 1)
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 0;
  static constexpr int kLevels = 1;
  static constexpr int kMaxima[] = {1};
  static constexpr int kSums[] = {1};
  static constexpr int kKeptCount = 0;
  static constexpr Kept kKept[] = {{}};
  static constexpr int kNumbers = 8;
  static constexpr int kValue = 7;
  static constexpr int kAtLabel[] = {-1};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 1;
  static constexpr Peak kPeaks[] = {{0, 0}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      const auto t0 = (r[2] + T(1.0) - r[3]);
      const auto t1 = (t0 > T(0.0));
      const auto t2 = (r[0] * select(t1, T(1.0), T(0.0)));
      r[4] = (r[0] * select(t1, T(-1.0), T(0.0)));
      r[5] = t2;
      r[6] = (T(-100.0) * t2);
      r[7] = clamp_min(t0, T(0.0));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = (x[0] - (T(100.0) * x[1]));
      out[1] = (x[0] * x[1]);
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = (r(4) * x[1]);
    if constexpr (kAll) out[1] = (r(4) * x[0]);
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
    if constexpr (kPeak == 0) {
      out[0] = r(5);
      out[1] = r(6);
    }
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
