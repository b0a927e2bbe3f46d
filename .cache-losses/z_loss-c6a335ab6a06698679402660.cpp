#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// z_loss: z*logsumexp(logits)**2 - (1 - eps)*at(log_softmax(logits), label) - eps*sum(log_softmax(logits))/fm.classes
struct Loss : CustomRows<4> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kLabel};
  static constexpr int kParameters = 2;
  static constexpr int kLevels = 2;
  static constexpr int kMaxima[] = {1, 0};
  static constexpr int kSums[] = {0, 2};
  static constexpr int kKeptCount = 1;
  static constexpr Kept kKept[] = {{1, 2}};
  static constexpr int kNumbers = 11;
  static constexpr int kValue = 9;
  static constexpr int kAtLabel[] = {10};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
    constants[0] = parameters[0];
    constants[1] = (double(2.0) * parameters[1]);
    constants[2] = parameters[1];
    constants[3] = (double(1.0) - parameters[0]);
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == -1) {
      [[maybe_unused]] const T c0(constants[0]);
      r[8] = (-(((c0 * r[0]) / (r[1]))));
    }
    if constexpr (kLevel == 0) {
      r[6] = origin(r[3]);
    }
    if constexpr (kLevel == 1) {
      [[maybe_unused]] const T c0(constants[0]);
      [[maybe_unused]] const T c1(constants[1]);
      [[maybe_unused]] const T c2(constants[2]);
      [[maybe_unused]] const T c3(constants[3]);
      const auto t0 = (r[2] - r[6]);
      const auto t1 = exp_nonpositive(t0);
      const auto t2 = ((T(1.0)) / ((r[4] + t1)));
      const auto t3 = (t2 * r[0]);
      const auto t4 = (t3 * c1);
      const auto t5 = logofsum(r[4], t1);
      const auto t6 = (r[6] + t5);
      const auto t7 = (t0 - t5);
      const auto t8 = (r[1] - T(1.0));
      const auto t9 = (((c0) / (r[1])));
      const auto t10 = (t2 * r[4]);
      const auto t11 = (t1 * t2);
      r[7] = ((t4 * r[6]) + (t4 * t5) + t3);
      r[9] = (-(((t7 * c3) + (t9 * (r[5] + t7 - (t5 * t8))) - (c2 * (t6 * t6)))));
      r[10] = (-(((t10 * c3) + (t9 * (t10 - (t11 * t8))) - (t11 * t6 * c1)) * r[0]));
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
      out[1] = t0;
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = (r(8) + (kept[0] * r(7)));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
