#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// variance: sum((x - sum(x)/fm.classes)**2)/fm.classes
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement};
  static constexpr int kParameters = 0;
  static constexpr int kLevels = 2;
  static constexpr int kMaxima[] = {0, 0};
  static constexpr int kSums[] = {1, 2};
  static constexpr int kKeptCount = 0;
  static constexpr Kept kKept[] = {{}};
  static constexpr int kNumbers = 9;
  static constexpr int kValue = 8;
  static constexpr int kAtLabel[] = {-1};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == -1) {
      r[6] = (((T(2.0) * r[0]) / (r[1])));
    }
    if constexpr (kLevel == 0) {
      r[5] = (-(((r[2]) / (r[1]))));
    }
    if constexpr (kLevel == 1) {
      r[7] = (((T(-2.0) * r[4] * r[0]) / ((r[1] * r[1]))));
      r[8] = (((r[3]) / (r[1])));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = x[0];
    }
    if constexpr (kLevel == 1) {
      const auto t0 = (r(5) + x[0]);
      out[0] = (t0 * t0);
      out[1] = t0;
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = (r(7) + ((r(5) + x[0]) * r(6)));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
