// A sum of doubles that loses nothing worth naming, however many there are.
#pragma once

#include <cmath>

namespace fusedloss {

// Compensated (Neumaier): what each addition rounds away is added up beside.
class Sum {
 public:
  void add(double x) {
    const double t = sum_ + x;
    lost_ += std::abs(sum_) >= std::abs(x) ? (sum_ - t) + x : (x - t) + sum_;
    sum_ = t;
  }
  // nan and infinite sums have no meaningful rest.
  double value() const { return std::isfinite(lost_) ? sum_ + lost_ : sum_; }

 private:
  double sum_ = 0, lost_ = 0;
};

}  // namespace fusedloss
