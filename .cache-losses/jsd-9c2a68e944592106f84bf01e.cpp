#include "cpu/custom_rows_kernel.h"

namespace fusedloss {
namespace {

// jsd: beta*sum((-logaddexp(log(1 - beta) + log_softmax(student), log(beta) + log_softmax(teacher)) + log_softmax(teacher))*softmax(teacher)) + (1 - beta)*sum((-logaddexp(log(1 - beta) + log_softmax(student), log(beta) + log_softmax(teacher)) + log_softmax(student))*softmax(student))
struct Loss : CustomRows<2> {
  static constexpr Kind kKinds[] = {Kind::kElement, Kind::kElement};
  static constexpr int kParameters = 1;
  static constexpr int kLevels = 3;
  static constexpr int kMaxima[] = {2, 0, 0};
  static constexpr int kSums[] = {0, 2, 2};
  static constexpr int kKeptCount = 3;
  static constexpr Kept kKept[] = {{1, 3}, {1, 3}, {2, 3}};
  static constexpr int kNumbers = 19;
  static constexpr int kValue = 18;
  static constexpr int kAtLabel[] = {-1};
  static constexpr int kOfRow[] = {-1};
  static constexpr int kPeakCount = 0;
  static constexpr Peak kPeaks[] = {{}};
  static constexpr int kAuxiliaryCount = 0;
  static constexpr int kAuxiliary[] = {-1};
  FUSEDLOSS_HD static void prepare([[maybe_unused]] const double* parameters, [[maybe_unused]] double* constants) {
    constants[0] = parameters[0];
    constants[1] = (double(1.0) - parameters[0]);
  }
  template <int kLevel, class T>
  FUSEDLOSS_HD void row([[maybe_unused]] T* r) const {
    if constexpr (kLevel == 0) {
      r[8] = origin(r[2]);
      r[9] = origin(r[3]);
    }
    if constexpr (kLevel == 1) {
      [[maybe_unused]] const T c0(constants[0]);
      [[maybe_unused]] const T c1(constants[1]);
      const auto t0 = (((c0) / (r[5])));
      const auto t1 = (((c1) / (r[4])));
      r[10] = t0;
      r[11] = t1;
      r[12] = (-(log(r[5])));
      r[13] = (-(log(r[4])));
      r[14] = (t1 * r[0]);
      r[16] = (t0 * r[0]);
    }
    if constexpr (kLevel == 2) {
      [[maybe_unused]] const T c0(constants[0]);
      [[maybe_unused]] const T c1(constants[1]);
      const auto t0 = (c1 * r[7]);
      const auto t1 = (c0 * r[6]);
      r[15] = (-(((t0 * r[0]) / ((r[4] * r[4])))));
      r[17] = (-(((t1 * r[0]) / ((r[5] * r[5])))));
      r[18] = ((((t0) / (r[4]))) + (((t1) / (r[5]))));
    }
  }
  template <int kLevel, class T, class Row>
  FUSEDLOSS_HD void terms([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* kept, T* out) const {
    if constexpr (kLevel == 0) {
      out[0] = x[0];
      out[1] = x[1];
    }
    if constexpr (kLevel == 1) {
      kept[1] = exp_nonpositive((x[0] - r(8)));
      kept[0] = exp_nonpositive((x[1] - r(9)));
      out[0] = kept[1];
      out[1] = kept[0];
    }
    if constexpr (kLevel == 2) {
      kept[2] = log(((kept[0] * r(10)) + (kept[1] * r(11))));
      const auto t0 = (-(kept[2]));
      out[0] = weighted(kept[0], ((x[1] - r(9)) + r(12) + t0));
      out[1] = weighted(kept[1], ((x[0] - r(8)) + r(13) + t0));
    }
  }
  template <bool kAll, class T, class Row>
  FUSEDLOSS_HD void gradients([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] const T* kept, T* out) const {
    const auto t0 = (-(kept[2]));
    out[0] = weighted(kept[1], (r(15) + (((x[0] - r(8)) + r(13) + t0) * r(14))));
    if constexpr (kAll) out[1] = weighted(kept[0], (r(17) + (((x[1] - r(9)) + r(12) + t0) * r(16))));
  }
  template <int kPeak, class T, class Row>
  FUSEDLOSS_HD void at_peak([[maybe_unused]] const T* x, [[maybe_unused]] const T* w, [[maybe_unused]] const Row& r, [[maybe_unused]] T* out) const {
  }
};

}  // namespace
}  // namespace fusedloss

FUSEDLOSS_CUSTOM_ROWS(fusedloss::Loss)
