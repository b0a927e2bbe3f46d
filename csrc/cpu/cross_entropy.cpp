// Cross-entropy on the CPU: which walk a call takes, and the check of its class indices.
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

double cross_entropy(const CrossEntropy& call) {
  using Float = CrossEntropyRow<float>;
  using Double = CrossEntropyRow<double>;
  if (call.compute_in_double) {
    return call.by_row ? rows_contiguous<Double>(call) : rows_tiled<Double>(call);
  }
  return call.by_row ? rows_contiguous<Float>(call) : rows_tiled<Float>(call);
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
