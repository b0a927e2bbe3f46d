#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// grpo: entropy*sum(log_softmax(logits)*softmax(logits)) - Minimum(advantage*exp(-old + at(log_softmax(logits), label)), advantage*Clamp(exp(-old + at(log_softmax(logits), label)), 1 - low, high + 1))
struct Loss : CustomRows<3> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kLabel, Kind::kPerRow, Kind::kPerRow};
  static constexpr int kParameters = 3;
  static constexpr int kLevels = 2;
  static constexpr int kMaxima[] = {1, 0};
  static constexpr int kSums[] = {0, 2};
  static constexpr int kKeptCount = 1;
  static constexpr Kept kKept[] = {{1, 2}};
  static constexpr int kNumbers = 15;
  static constexpr int kValue = 11;
  static constexpr int kAtLabel[] = {12};
  static constexpr int kOfRow[] = {13, 14};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
    constants[0] = parameters[2];
    constants[1] = (double(1.0) - parameters[0]);
    constants[2] = (double(1.0) + parameters[1]);
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      r[8] = origin(r[5]);
    }
    if constexpr (kLevel == 1) {
      [[maybe_unused]] const T c0(constants[0]);
      [[maybe_unused]] const T c1(constants[1]);
      [[maybe_unused]] const T c2(constants[2]);
      const auto t0 = (r[4] - r[8]);
      const auto t1 = exp_nonpositive(t0);
      const auto t2 = (r[6] + t1);
      const auto t3 = ((T(1.0)) / (t2));
      const auto t4 = (t3 * c0 * r[0]);
      const auto t5 = ((T(1.0)) / (t2 * t2));
      const auto t6 = (t5 * r[6]);
      const auto t7 = (t5 * r[7]);
      const auto t8 = (t1 * t5);
      const auto t9 = logofsum(r[6], t1);
      const auto t10 = (t3 * t9);
      const auto t11 = (t0 - t9);
      const auto t12 = exp((-((r[2] + t9 - t0))));
      const auto t13 = minimum(maximum(t12, c1), c2);
      const auto t14 = (t13 * r[3]);
      const auto t15 = (t12 * r[3]);
      const auto t16 = (t14 > t15);
      const auto t17 = (t15 * t3);
      const auto t18 = (-(t17));
      const auto t19 = (t14 < t15);
      const auto t20 = (t12 < c1);
      const auto t21 = (t12 > c2);
      const auto t22 = select(t20, T(0.0), select(t21, T(0.0), t18));
      const auto t23 = (T(0.5) * t17);
      const auto t24 = (t1 * t11);
      const auto t25 = (t17 * r[6]);
      const auto t26 = select(t20, T(0.0), select(t21, T(0.0), t25));
      const auto t27 = (-(t15));
      const auto t28 = select(t20, T(0.0), select(t21, T(0.0), t27));
      r[9] = t4;
      r[10] = (t4 - (((c0 * ((t11 * t8) + t10 + t6 + t7 + t8 - (t5 * t9 * r[6]))) + select(t16, t18, select(t19, t22, ((T(0.5) * t22) - t23)))) * r[0]));
      r[11] = ((c0 * ((t3 * r[7]) + (t24 * t3) - (t10 * r[6]))) - minimum(t15, t14));
      r[12] = (((c0 * ((t1 * t6 * t9) + (t24 * t6) - (t1 * t7))) - select(t16, t25, select(t19, t26, ((t23 * r[6]) + (T(0.5) * t26))))) * r[0]);
      r[13] = (-(r[0] * select(t16, t27, select(t19, t28, ((T(0.5) * t28) - (T(0.5) * t15))))));
      r[14] = (-(r[0] * select(t16, t12, select(t19, t13, ((T(0.5) * t12) + (T(0.5) * t13))))));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = x[0];
    }
    if constexpr (kLevel == 1) {
      const auto t0 = (x[0] - r(8));
      kept[0] = exp_nonpositive(t0);
      out[0] = kept[0];
      out[1] = weighted(kept[0], t0);
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = weighted(kept[0], (r(10) + ((x[0] - r(8)) * r(9))));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
