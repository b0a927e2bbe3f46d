#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// ce: -at(log_softmax(logits), label)
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kLabel};
  static constexpr int kParameters = 0;
  static constexpr int kLevels = 2;
  static constexpr int kMaxima[] = {1, 0};
  static constexpr int kSums[] = {0, 2};
  static constexpr int kKeptCount = 1;
  static constexpr Kept kKept[] = {{1, 2}};
  static constexpr int kNumbers = 12;
  static constexpr int kValue = 8;
  static constexpr int kAtLabel[] = {9};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 2;
  static constexpr int kAuxiliary[] = {10, 11};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      r[6] = origin(r[3]);
    }
    if constexpr (kLevel == 1) {
      const auto t0 = (r[2] - r[6]);
      const auto t1 = exp_nonpositive(t0);
      const auto t2 = ((T(1.0)) / ((r[4] + t1)));
      const auto t3 = (t2 * r[0]);
      const auto t4 = logofsum(r[4], t1);
      const auto t5 = (t0 - t4);
      r[7] = t3;
      r[8] = (-(t5));
      r[9] = (-(t3 * r[4]));
      r[10] = (-(((t2 * r[5]) + (t1 * t2 * t5) - (t2 * t4 * r[4]))));
      r[11] = t5;
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = x[0];
    }
    if constexpr (kLevel == 1) {
      const auto t0 = (x[0] - r(6));
      kept[0] = exp_nonpositive(t0);
      out[0] = kept[0];
      out[1] = weighted(kept[0], t0);
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = (kept[0] * r(7));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
