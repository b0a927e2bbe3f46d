#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// triplet: Relu(margin - norm(anchor - negative) + norm(anchor - positive))
struct Loss : CustomRows<1> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 1;
  static constexpr int kLevels = 1;
  static constexpr int kMaxima[] = {0};
  static constexpr int kSums[] = {2};
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
    constants[0] = parameters[0];
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      [[maybe_unused]] const T c0(constants[0]);
      const auto t0 = sqrt(r[3]);
      const auto t1 = sqrt(r[2]);
      const auto t2 = (c0 + t0 - t1);
      const auto t3 = (t2 > T(0.0));
      const auto t4 = (T(2.0) * r[0]);
      const auto t5 = (t4 * select(t3, (-(select((r[2] == T(0.0)), T(0.0), (((T(0.5)) / (t1)))))), T(0.0)));
      const auto t6 = (t4 * select(t3, select((r[3] == T(0.0)), T(0.0), (((T(0.5)) / (t0)))), T(0.0)));
      r[4] = t5;
      r[5] = t6;
      r[6] = (-(t6));
      r[7] = (-(t5));
      r[8] = clamp_min(t2, T(0.0));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = ((x[0] - x[2]) * (x[0] - x[2]));
      out[1] = ((x[0] - x[1]) * (x[0] - x[1]));
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    const auto t0 = (x[0] - x[2]);
    const auto t1 = (x[0] - x[1]);
    out[0] = ((t0 * r(4)) + (t1 * r(5)));
    if constexpr (kAll) out[1] = (t1 * r(6));
    if constexpr (kAll) out[2] = (t0 * r(7));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
