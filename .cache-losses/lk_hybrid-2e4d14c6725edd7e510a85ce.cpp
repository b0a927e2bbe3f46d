#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// lk_hybrid: (1 - exp(-3*Detach(sum(Minimum(softmax(student), softmax(teacher))))))*(1 - sum(Minimum(softmax(student), softmax(teacher)))) + exp(-3*Detach(sum(Minimum(softmax(student), softmax(teacher)))))*sum((-log_softmax(student) + log_softmax(teacher))*softmax(teacher))
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 0;
  static constexpr int kLevels = 3;
  static constexpr int kMaxima[] = {2, 0, 0};
  static constexpr int kSums[] = {0, 3, 3};
  static constexpr int kKeptCount = 2;
  static constexpr Kept kKept[] = {{1, 3}, {1, 3}};
  static constexpr int kNumbers = 25;
  static constexpr int kValue = 24;
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
      r[10] = origin(r[2]);
      r[11] = origin(r[3]);
    }
    if constexpr (kLevel == 1) {
      const auto t0 = ((T(1.0)) / (r[4]));
      const auto t1 = ((T(1.0)) / (r[5]));
      const auto t2 = ((T(1.0)) / (r[4] * r[4]));
      const auto t3 = ((T(1.0)) / (r[5] * r[5]));
      r[12] = t0;
      r[13] = t1;
      r[14] = t2;
      r[15] = (T(-0.5) * t2);
      r[16] = t3;
      r[17] = (T(-0.5) * t3);
      r[18] = (T(0.5) * t0);
      r[22] = (T(0.5) * t1);
    }
    if constexpr (kLevel == 2) {
      const auto t0 = exp((T(-3.0) * r[7]));
      const auto t1 = (t0 * r[0]);
      const auto t2 = (T(1.0) - t0);
      const auto t3 = (r[9] * r[0]);
      r[19] = (t1 - r[0]);
      r[20] = ((t1 * r[12]) - (t2 * r[8] * r[0]));
      r[21] = (t1 * r[13]);
      r[23] = (-(((t1 * r[16] * r[6]) + t3 - (t0 * t3))));
      r[24] = ((t0 * ((r[13] * r[6]) + log(r[4]) - log(r[5]))) + (t2 * (T(1.0) - r[7])));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = x[0];
      out[1] = x[1];
    }
    if constexpr (kLevel == 1) {
      const auto t0 = (x[0] - r(10));
      const auto t1 = (x[1] - r(11));
      kept[0] = exp_nonpositive(t0);
      kept[1] = exp_nonpositive(t1);
      out[0] = kept[0];
      out[1] = kept[1];
      out[2] = weighted(kept[1], (t1 - t0));
    }
    if constexpr (kLevel == 2) {
      const auto t0 = (kept[0] * r(12));
      const auto t1 = (kept[1] * r(13));
      const auto t2 = (t1 > t0);
      const auto t3 = (t1 < t0);
      out[0] = minimum(t0, t1);
      out[1] = select(t2, (-(kept[0] * r(14))), select(t3, T(0.0), (kept[0] * r(15))));
      out[2] = select(t2, T(0.0), select(t3, (-(kept[1] * r(16))), (kept[1] * r(17))));
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    const auto t1 = (kept[0] * r(12));
    const auto t0 = (kept[1] * r(13));
    const auto t2 = (t0 > t1);
    const auto t3 = (t0 < t1);
    out[0] = ((kept[0] * r(20)) + (r(19) * select(t2, t1, select(t3, T(0.0), (kept[0] * r(18))))) - (kept[1] * r(21)));
    if constexpr (kAll) out[1] = ((r(19) * select(t2, T(0.0), select(t3, t0, (kept[1] * r(22))))) + weighted(kept[1], (r(23) + (((x[1] - r(11)) - (x[0] - r(10))) * r(21)))));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
