#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// renyi: log(sum(Power(softmax(student), 1 - alpha)*Power(softmax(teacher), alpha)))/(alpha - 1)
struct Loss : CustomRows<3> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 1;
  static constexpr int kLevels = 3;
  static constexpr int kMaxima[] = {2, 0, 0};
  static constexpr int kSums[] = {0, 2, 3};
  static constexpr int kKeptCount = 4;
  static constexpr Kept kKept[] = {{1, 3}, {1, 3}, {2, 3}, {2, 3}};
  static constexpr int kNumbers = 18;
  static constexpr int kValue = 17;
  static constexpr int kAtLabel[] = {-1};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
    constants[0] = (double(1.0) - parameters[0]);
    constants[1] = parameters[0];
    constants[2] = ((double(1.0)) / ((parameters[0] - double(1.0))));
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      r[9] = origin(r[2]);
      r[10] = origin(r[3]);
    }
    if constexpr (kLevel == 1) {
      r[11] = ((T(1.0)) / (r[4]));
      r[12] = ((T(1.0)) / (r[5]));
    }
    if constexpr (kLevel == 2) {
      [[maybe_unused]] const T c1(constants[1]);
      [[maybe_unused]] const T c2(constants[2]);
      const auto t0 = (r[4] * r[6]);
      const auto t1 = ((r[4] * r[4]) * r[6]);
      const auto t2 = (r[5] * r[6]);
      const auto t3 = ((r[5] * r[5]) * r[6]);
      r[13] = (((r[0]) / (((t0 * c1) - t0))));
      r[14] = (-(((r[7] * r[0]) / (((t1 * c1) - t1)))));
      r[15] = (((r[0]) / (((t2 * c1) - t2))));
      r[16] = (-(((r[8] * r[0]) / (((t3 * c1) - t3)))));
      r[17] = (c2 * log(r[6]));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = x[0];
      out[1] = x[1];
    }
    if constexpr (kLevel == 1) {
      kept[0] = exp_nonpositive((x[0] - r(9)));
      kept[1] = exp_nonpositive((x[1] - r(10)));
      out[0] = kept[0];
      out[1] = kept[1];
    }
    if constexpr (kLevel == 2) {
      [[maybe_unused]] const T c0(constants[0]);
      [[maybe_unused]] const T c1(constants[1]);
      const auto t0 = (kept[1] * r(12));
      const auto t1 = (kept[0] * r(11));
      kept[2] = power(t0, constants[1]);
      kept[3] = power(t1, constants[0]);
      out[0] = (kept[2] * kept[3]);
      out[1] = weighted(kept[0], (kept[2] * power_slope(t1, kept[3], constants[0])));
      out[2] = weighted(kept[1], (kept[3] * power_slope(t0, kept[2], constants[1])));
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    [[maybe_unused]] const T c0(constants[0]);
    [[maybe_unused]] const T c1(constants[1]);
    out[0] = weighted(kept[0], (r(14) + (kept[2] * r(13) * power_slope((kept[0] * r(11)), kept[3], constants[0]))));
    if constexpr (kAll) out[1] = weighted(kept[1], (r(16) + (kept[3] * r(15) * power_slope((kept[1] * r(12)), kept[2], constants[1]))));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
