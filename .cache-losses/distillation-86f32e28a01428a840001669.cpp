#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// distillation: T**2*sum((-log_softmax(student/T) + log_softmax(teacher/T))*softmax(teacher/T))
struct Loss : CustomRows<3> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 1;
  static constexpr int kLevels = 2;
  static constexpr int kMaxima[] = {2, 0};
  static constexpr int kSums[] = {0, 3};
  static constexpr int kKeptCount = 2;
  static constexpr Kept kKept[] = {{1, 2}, {1, 2}};
  static constexpr int kNumbers = 13;
  static constexpr int kValue = 12;
  static constexpr int kAtLabel[] = {-1};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
    constants[0] = ((double(1.0)) / (parameters[0]));
    constants[1] = parameters[0];
    constants[2] = (parameters[0] * parameters[0]);
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      r[7] = origin(r[2]);
      r[8] = origin(r[3]);
    }
    if constexpr (kLevel == 1) {
      [[maybe_unused]] const T c1(constants[1]);
      [[maybe_unused]] const T c2(constants[2]);
      const auto t0 = (c1 * r[0]);
      const auto t1 = ((T(1.0)) / (r[5]));
      r[9] = (((t0) / (r[4])));
      r[10] = (t0 * t1);
      r[11] = (-(((t0 * r[6]) / ((r[5] * r[5])))));
      r[12] = (c2 * ((t1 * r[6]) + log(r[4]) - log(r[5])));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      [[maybe_unused]] const T c0(constants[0]);
      out[0] = (c0 * x[0]);
      out[1] = (c0 * x[1]);
    }
    if constexpr (kLevel == 1) {
      [[maybe_unused]] const T c0(constants[0]);
      const auto t0 = ((c0 * x[0]) - r(7));
      const auto t1 = ((c0 * x[1]) - r(8));
      kept[0] = exp_nonpositive(t0);
      kept[1] = exp_nonpositive(t1);
      out[0] = kept[0];
      out[1] = kept[1];
      out[2] = weighted(kept[1], (t1 - t0));
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    [[maybe_unused]] const T c0(constants[0]);
    out[0] = ((kept[0] * r(9)) - (kept[1] * r(10)));
    if constexpr (kAll) out[1] = weighted(kept[1], (r(11) + ((((c0 * x[1]) - r(8)) - ((c0 * x[0]) - r(7))) * r(10))));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
