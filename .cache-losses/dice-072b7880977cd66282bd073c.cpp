#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// dice: -(smooth + 2*sum(mask*Sigmoid(logit)))/(smooth + sum(mask) + sum(Sigmoid(logit))) + 1
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 1;
  static constexpr int kLevels = 1;
  static constexpr int kMaxima[] = {0};
  static constexpr int kSums[] = {3};
  static constexpr int kKeptCount = 1;
  static constexpr Kept kKept[] = {{0, 1}};
  static constexpr int kNumbers = 8;
  static constexpr int kValue = 7;
  static constexpr int kAtLabel[] = {-1};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
    constants[0] = parameters[0];
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      [[maybe_unused]] const T c0(constants[0]);
      const auto t0 = ((T(2.0) * r[4]) + c0);
      const auto t1 = (r[2] + r[3] + c0);
      const auto t2 = ((T(1.0)) / (t1));
      r[5] = (((t0 * r[0]) / ((t1 * t1))));
      r[6] = (T(-2.0) * t2 * r[0]);
      r[7] = (T(1.0) - (t0 * t2));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      kept[0] = exp_nonpositive(neg_abs(x[0]));
      const auto t0 = ((T(1.0)) / ((kept[0] + T(1.0))));
      const auto t1 = select((x[0] < T(0.0)), (t0 * kept[0]), t0);
      out[0] = x[1];
      out[1] = t1;
      out[2] = (t1 * x[1]);
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    const auto t0 = ((T(1.0)) / ((kept[0] + T(1.0))));
    const auto t1 = ((t0 * t0) * kept[0]);
    out[0] = ((t1 * r(5)) + (t1 * r(6) * x[1]));
    if constexpr (kAll) out[1] = (r(5) + (r(6) * select((x[0] < T(0.0)), (t0 * kept[0]), t0)));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
