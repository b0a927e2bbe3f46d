#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// sup_con: -sum(positives*log_softmax(similarity))/sum(positives)
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 0;
  static constexpr int kLevels = 2;
  static constexpr int kMaxima[] = {1, 0};
  static constexpr int kSums[] = {1, 2};
  static constexpr int kKeptCount = 1;
  static constexpr Kept kKept[] = {{1, 2}};
  static constexpr int kNumbers = 11;
  static constexpr int kValue = 10;
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
    if constexpr (kLevel == 0) {
      r[6] = origin(r[2]);
      r[8] = (((r[0]) / (r[3])));
    }
    if constexpr (kLevel == 1) {
      r[7] = (((r[0]) / (r[4])));
      r[9] = (((r[5] * r[0]) / ((r[3] * r[3]))));
      r[10] = (-((((r[5] - (r[3] * log(r[4])))) / (r[3]))));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = x[0];
      out[1] = x[1];
    }
    if constexpr (kLevel == 1) {
      const auto t0 = (x[0] - r(6));
      kept[0] = exp_nonpositive(t0);
      out[0] = kept[0];
      out[1] = (t0 * x[1]);
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = ((kept[0] * r(7)) - (r(8) * x[1]));
    if constexpr (kAll) out[1] = (r(9) - ((x[0] - r(6)) * r(8)));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
