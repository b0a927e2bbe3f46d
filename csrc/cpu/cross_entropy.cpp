// Cross-entropy on the CPU: which walk a call takes, and how many of its class indices are no
// class.
#include "rows.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

ClassCount count_classes(const int64_t* index, int64_t n, int64_t classes, int64_t ignore_index) {
  ClassCount count;
  for (int64_t i = 0; i < n; ++i) {
    const bool ignore = index[i] == ignore_index;
    count.ignored += ignore;
    count.outside += !ignore & (static_cast<uint64_t>(index[i]) >= static_cast<uint64_t>(classes));
  }
  return count;
}

namespace {

// Whether to go row by row, for which classes must lie side by side in input and gradient, or by
// tiles of neighbouring rows, which may first make rows neighbours. Fixed by input, so that every
// call on it gives the same bits.
bool goes_by_row(RowsCall& call) {
  // Rows are no neighbours where they are fewer than a register holds, or further apart than their
  // classes. With few classes, what a row costs beside its elements is worth more than to have
  // these side by side.
  constexpr int64_t kFew = 128, kRows = 16;
  const bool contiguous =
      call.classes == 1 || (call.input.classes == 1 && call.gradient.classes == 1);
  if (call.classes > kFew) {
    return contiguous || call.inner < kRows || call.input.classes < call.input.inner;
  }
  if (!contiguous || call.classes == 1 || call.outer * call.inner < kRows) return contiguous;
  if (call.inner == 1) call.lay_rows_inside();
  return false;
}

template <class Row>
double run_rows(RowsCall call) {
  return goes_by_row(call) ? rows_contiguous<Row>(call) : rows_tiled<Row>(call);
}

}  // namespace

Result cross_entropy(const Call& call) {
  Result result;
  result.sum.add(call.compute_in_double ? run_rows<CrossEntropyRow<double>>(RowsCall(call))
                                        : run_rows<CrossEntropyRow<float>>(RowsCall(call)));
  return result;
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
