#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// spread: max(-x) + max(x)
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement};
  static constexpr int kParameters = 0;
  static constexpr int kLevels = 1;
  static constexpr int kMaxima[] = {2};
  static constexpr int kSums[] = {0};
  static constexpr int kKeptCount = 0;
  static constexpr Kept kKept[] = {{}};
  static constexpr int kNumbers = 6;
  static constexpr int kValue = 5;
  static constexpr int kAtLabel[] = {-1};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 2;
  static constexpr Peak kPeaks[] = {{0, 0}, {0, 1}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == -1) {
      r[4] = (-(r[0]));
    }
    if constexpr (kLevel == 0) {
      r[5] = (r[2] + r[3]);
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = (-(x[0]));
      out[1] = x[0];
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = T(0.0);
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
    if constexpr (kPeak == 0) {
      out[0] = r(4);
    }
    if constexpr (kPeak == 1) {
      out[0] = r(0);
    }
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
