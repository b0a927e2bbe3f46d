// A sum of doubles that stays exact enough, however many there are.
#pragma once

#include <cmath>

namespace fusedloss {

// Compensated summation (Neumaier): the rounding errors are added up separately.
class Sum {
 public:
  void add(double x) {
    const double t = sum_ + x;
    error_ += std::abs(sum_) >= std::abs(x) ? (sum_ - t) + x : (x - t) + sum_;
    sum_ = t;
  }
  void add(const Sum& other) {
    add(other.sum_);
    error_ += other.error_;
  }
  double value() const { return sum_ + error(); }
  // The sum over n, rounded once.
  double divided_by(double n) const {
    const double near = value() / n;
    const double correction = (std::fma(-near, n, sum_) + error()) / n;
    return std::isfinite(correction) ? near + correction : near;
  }

 private:
  // The rounding errors of a nan or infinite sum mean nothing.
  double error() const { return std::isfinite(error_) ? error_ : 0; }

  double sum_ = 0, error_ = 0;
};

}  // namespace fusedloss
