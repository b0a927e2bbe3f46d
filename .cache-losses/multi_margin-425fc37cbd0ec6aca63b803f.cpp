#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// multi_margin: (-margin + sum(Relu(x + margin - at(x, label))))/fm.classes
struct Loss : CustomRows<2> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kLabel};
  static constexpr int kParameters = 1;
  static constexpr int kLevels = 1;
  static constexpr int kMaxima[] = {0};
  static constexpr int kSums[] = {2};
  static constexpr int kKeptCount = 0;
  static constexpr Kept kKept[] = {{}};
  static constexpr int kNumbers = 9;
  static constexpr int kValue = 7;
  static constexpr int kAtLabel[] = {8};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
    constants[0] = parameters[0];
    constants[1] = (clamp_min(parameters[0], double(0.0)) - parameters[0]);
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == -1) {
      [[maybe_unused]] const T c0(constants[0]);
      r[5] = (c0 - r[2]);
      r[6] = (((r[0]) / (r[1])));
    }
    if constexpr (kLevel == 0) {
      [[maybe_unused]] const T c1(constants[1]);
      const auto t0 = ((T(1.0)) / (r[1]));
      r[7] = (t0 * (r[3] + c1));
      r[8] = (t0 * r[4] * r[0]);
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      const auto t0 = (r(5) + x[0]);
      out[0] = clamp_min(t0, T(0.0));
      out[1] = select((t0 > T(0.0)), T(-1.0), T(0.0));
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    out[0] = (r(6) * select(((r(5) + x[0]) > T(0.0)), T(1.0), T(0.0)));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
