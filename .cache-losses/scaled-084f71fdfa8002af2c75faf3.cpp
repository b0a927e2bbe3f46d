#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// scaled: -at(log_softmax(logits*scale), label)
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kLabel, Kind::kPerRow};
  static constexpr int kParameters = 0;
  static constexpr int kLevels = 2;
  static constexpr int kMaxima[] = {1, 0};
  static constexpr int kSums[] = {0, 2};
  static constexpr int kKeptCount = 1;
  static constexpr Kept kKept[] = {{1, 2}};
  static constexpr int kNumbers = 12;
  static constexpr int kValue = 9;
  static constexpr int kAtLabel[] = {10};
  static constexpr int kOfRow[] = {11};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      r[7] = origin(r[4]);
    }
    if constexpr (kLevel == 1) {
      const auto t0 = ((r[3] * r[2]) - r[7]);
      const auto t1 = exp_nonpositive(t0);
      const auto t2 = (((r[0]) / ((r[5] + t1))));
      const auto t3 = (t2 * r[2]);
      r[8] = t3;
      r[9] = (-((t0 - logofsum(r[5], t1))));
      r[10] = (-(t3 * r[5]));
      r[11] = ((t2 * r[6]) - (t2 * r[3] * r[5]));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = (x[0] * r(2));
    }
    if constexpr (kLevel == 1) {
      kept[0] = exp_nonpositive(((x[0] * r(2)) - r(7)));
      out[0] = kept[0];
      out[1] = weighted(kept[0], x[0]);
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = (kept[0] * r(8));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
