// THE maths: one struct a loss, as eval.h describes them.
#pragma once

#include "eval.h"

namespace fusedloss {

// (x - y)^2. Its slope 2 (x - y) can overflow where the gradient, divided by a mean's count, does
// not.
struct MSE : PointwiseLoss {
  static constexpr Mean kMean = Mean::kWeights;
  static constexpr double kSlopeUnit = 2;
  static constexpr bool kSymmetric = true;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T d = x - y;
    return {d * d, d};
  }
};

// |x - y|; the slope at the kink, and where x - y is nan, is 0.
struct L1 : PointwiseLoss {
  static constexpr Mean kMean = Mean::kWeights;
  static constexpr bool kSymmetric = true;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T d = x - y;
    const T zero(0), one(1);
    return {abs(d), select(zero < d, one, select(d < zero, T(-1), zero))};
  }
};

// d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = x - y: both are s (d - beta s /
// 2), s the slope. beta in [1e-30, 1e30].
struct SmoothL1 : PointwiseLoss {
  static constexpr bool kSymmetric = true;
  static constexpr int kParameters = 1;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T beta(parameters[0]), half_beta(0.5 * parameters[0]), one(1);
    const T d = x - y;
    const T slope = ratio(clamp(d, -beta, beta), beta, one / beta);
    return {slope * multiply_add(-half_beta, slope, d), slope};
  }
};

// d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2), with d = x - y: both are s (d - s / 2),
// s the slope. delta > 0.
struct Huber : PointwiseLoss {
  static constexpr bool kSymmetric = true;
  static constexpr int kParameters = 1;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T delta(parameters[0]), minus_half(-0.5);
    const T d = x - y;
    const T slope = clamp(d, -delta, delta);
    return {slope * multiply_add(minus_half, slope, d), slope};
  }
};

// -(y log x + (1 - y) log(1 - x)), each logarithm at least -100, as in torch.
template <class T>
FUSEDLOSS_HD T binary_entropy(T x, T y) {
  const T one(1), floor(-100);
  const T log_x = clamp_min(log_finite(x), floor);
  const T log_1_x = clamp_min(log1p_finite(-x), floor);
  return multiply_add(y - one, log_1_x, -(y * log_x));
}

// The slope (x - y) / (x (1 - x)) has its denominator bounded below by 1e-12, a float in torch.
struct BCE : PointwiseLoss {
  static constexpr Domain kDomain = Domain::kUnitInterval;
  static constexpr int kUnroll = 2;
  template <class T>
  FUSEDLOSS_HD static auto in_domain(T x, T y) {
    const T zero(0), one(1);
    // x (1 - x) >= 0 exactly where 0 <= x <= 1.
    return logical_and(zero <= x * (one - x), zero <= y * (one - y));
  }
  template <class T>
  FUSEDLOSS_HD EvalQuotient<T> eval(T x, T y) const {
    return {binary_entropy(x, y), x - y, clamp_min((T(1) - x) * x, T(1e-12f))};
  }
};

// log(1 + e^-|x|) + s x, s = -y where x < 0, else 1 - y. The slope sigmoid(x) - y is formed from
// the smaller of sigmoid(x) and 1 - sigmoid(x), so that a confident element keeps its digits.
struct BCEWithLogits : PointwiseLoss {
  static constexpr int kUnroll = 8;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T zero(0), one(1);
    const T e = exp_nonpositive(neg_abs(x));
    const T q = e / (one + e);
    const auto negative = x < zero;
    const T s = select(negative, -y, one - y);
    return {log1p_unit(e) + s * x, s + select(negative, q, -q)};
  }
};

// (1 - y) x + (1 + (p - 1) y) (log(1 + e^-|x|) + max(-x, 0)), p = pos_weight.
struct BCEWithLogitsPosWeight : PointwiseLoss {
  static constexpr int kInputs = 3;
  static constexpr int kUnroll = 8;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y, T p) const {
    const T zero(0), one(1);
    const T e = exp_nonpositive(neg_abs(x));
    const T factor = one + (p - one) * y;
    const T q = factor * (e / (one + e));
    return {(one - y) * x + factor * (log1p_unit(e) + clamp_min(-x, zero)),
            select(x < zero, q - p * y, (one - y) - q)};
  }
};

// -y log(x), x bounded to [eps, 1]; the slope outside these bounds is 0. Where targets are 0, as
// most may be, it computes neither logarithm nor quotient.
struct LogLoss : PointwiseLoss {
  static constexpr Mean kMean = Mean::kRows;
  static constexpr int kParameters = 1;
  static constexpr int kUnroll = 1;  // so that a register of zeros skips the logarithm
  template <class T>
  FUSEDLOSS_HD EvalSparse<T> eval(T x, T y) const {
    const T eps(parameters[0]), zero(0), one(1);
    const T p = clamp(x, eps, one);
    const auto inside = logical_and(eps <= x, x <= one);
    const T nothing = select(x == x, zero, x);  // nan stays
    if (all_zero(y)) return {{p * zero, select(inside, zero, nothing), one}};
    return {{zero - y * log_finite(p), select(inside, zero - y, nothing), p}};
  }
};

// The same for class indices. A nan in another class than the target's leaves the loss as it is,
// and is that element's gradient, as in torch.
struct LogLossOfClasses : PointwiseLoss {
  static constexpr Mean kMean = Mean::kRows;
  static constexpr int kParameters = 1;
  static constexpr bool kIndexed = true;
  static constexpr int kUnroll = 1;  // as above
  template <class T>
  FUSEDLOSS_HD EvalOfClass<T> eval(T x, T y) const {
    const T eps(parameters[0]), zero(0), one(1);
    const T nothing = select(x == x, zero, x);
    if (all_zero(y)) return {{zero, nothing, one}, y};
    const T p = clamp(x, eps, one);
    const auto inside = logical_and(eps <= x, x <= one);
    const T value = select(y == zero, zero, zero - y * log_finite(p));
    return {{value, select(inside, zero - y, nothing), p}, y};
  }
};

// log(1 + e^-z), z = x y.
struct SoftMargin : PointwiseLoss {
  static constexpr int kUnroll = 8;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T zero(0), one(1), z = x * y;
    const T e = exp_nonpositive(neg_abs(z));
    const auto wrong = z < zero;
    const T slope = select(wrong, one, e) / (one + e);  // sigmoid(-z)
    return {log1p_unit(e) + select(wrong, -z, zero), -y * slope};
  }
};

// x where y is 1, max(0, margin - x) where it is -1, and for any other y both, as in torch.
struct HingeEmbedding : PointwiseLoss {
  static constexpr int kParameters = 1;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T margin(parameters[0]), zero(0), one(1);
    const T gap = margin - x;
    const auto similar = y == one, different = y == -one;
    return {select(similar, zero, clamp_min(gap, zero)) + select(different, zero, x),
            select(similar, zero, select(zero <= gap, -one, zero)) + select(different, zero, one)};
  }
};

// max(0, margin - y (a - b)).
struct MarginRanking : PointwiseLoss {
  static constexpr int kInputs = 3;
  static constexpr int kGradients = 2;
  static constexpr int kParameters = 1;
  template <class T>
  FUSEDLOSS_HD EvalEach<T, 2> eval(T a, T b, T y) const {
    const T margin(parameters[0]), zero(0);
    const T gap = margin - y * (a - b);
    const T slope = select(zero <= gap, y, zero);
    return {clamp_min(gap, zero), {-slope, slope}};
  }
};

// y (log y - x), and 0 where y is 0.
struct KLDiv : PointwiseLoss {
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    return {multiply_add(-y, x, xlogy(y, y)), -y};
  }
};

// The same, given the logarithm of y.
struct KLDivLogTarget : PointwiseLoss {
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T log_y) const {
    const T y = exp(log_y);
    return {y * (log_y - x), -y};
  }
};

// With the parameter `full`: Stirling's approximation of log y! where y is above 1.
template <class T>
FUSEDLOSS_HD T stirling(T y, double full) {
  if (full == 0) return T(0);
  const T half(0.5), two_pi(6.283185307179586);
  return select(T(1) < y, y * log(y) - y + half * log(two_pi * y), T(0));
}

// The rate minus y log(rate), x being the logarithm of the rate. Parameters: eps, which is not
// used, and full.
struct PoissonNLLLogInput : PointwiseLoss {
  static constexpr int kParameters = 2;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T rate = exp(x);
    return {rate - y * x + stirling(y, parameters[1]), rate - y};
  }
};

// The same, x being the rate. Parameters: eps, which is added to x in the logarithm, and full.
struct PoissonNLL : PointwiseLoss {
  static constexpr int kParameters = 2;
  template <class T>
  FUSEDLOSS_HD Eval<T> eval(T x, T y) const {
    const T rate = x + T(parameters[0]);
    return {x - y * log(rate) + stirling(y, parameters[1]), T(1) - y / rate};
  }
};

// (log v + (x - y)^2 / v) / 2, v = max(variance, eps), whose slope is that of v, as in torch.
// Parameters: eps, and whether the constant of the distribution is added.
struct GaussianNLL : PointwiseLoss {
  static constexpr int kInputs = 3;
  static constexpr int kGradients = 3;
  static constexpr int kParameters = 2;
  static constexpr Domain kDomain = Domain::kVariance;
  template <class T>
  FUSEDLOSS_HD static auto in_domain(T, T, T variance) {
    return logical_not(variance < T(0));
  }
  template <class T>
  FUSEDLOSS_HD EvalEach<T, 3> eval(T x, T y, T variance) const {
    constexpr double half_log_two_pi = 0.91893853320467274;
    const T half(0.5), one(1), v = clamp_min(variance, T(parameters[0]));
    const T d = x - y, slope = d / v;
    return {half * (log(v) + d * slope) + T(half_log_two_pi * parameters[1]),
            {slope, -slope, half * (one - d * slope) / v}};
  }
};

// Every pointwise loss: the name an operator takes, and its struct.
#define FUSEDLOSS_POINTWISE_LOSSES(X)                                      \
  X("mse_loss", MSE)                                                       \
  X("l1_loss", L1)                                                         \
  X("smooth_l1_loss", SmoothL1)                                            \
  X("huber_loss", Huber)                                                   \
  X("binary_cross_entropy", BCE)                                           \
  X("binary_cross_entropy_with_logits", BCEWithLogits)                     \
  X("binary_cross_entropy_with_logits_pos_weight", BCEWithLogitsPosWeight) \
  X("soft_margin_loss", SoftMargin)                                        \
  X("hinge_embedding_loss", HingeEmbedding)                                \
  X("margin_ranking_loss", MarginRanking)                                  \
  X("kl_div", KLDiv)                                                       \
  X("kl_div_log_target", KLDivLogTarget)                                   \
  X("poisson_nll_loss", PoissonNLL)                                        \
  X("poisson_nll_loss_log_input", PoissonNLLLogInput)                      \
  X("gaussian_nll_loss", GaussianNLL)                                      \
  X("log_loss", LogLoss)                                                   \
  X("log_loss_of_classes", LogLossOfClasses)

}  // namespace fusedloss
