// The base of a custom row loss's generated struct: a loss of all classes of a row, of its label,
// and of numbers of the row.
//
// A row is walked over once a level, and once more for its gradient. A level has maxima and sums
// over the row's classes, whose terms may depend on the row numbers of the levels before it. What
// follows from them for the row as a whole is a row number too: the loss, and the factors of the
// gradient. So such a struct is
//
//   struct Loss : fusedloss::CustomRows<kConstants> {
//     static constexpr Kind kKinds[];         // of the loss's tensors, in their order
//     static constexpr int kParameters;
//     static constexpr int kLevels;           // walks before the gradient's
//     static constexpr int kMaxima[kLevels];  // how many of a level's terms are maxima, the first
//     static constexpr int kSums[kLevels];    // ones, and how many are sums
//     static constexpr int kOriginOf[];       // for the maxima of all levels: the element input
//                                             // whose largest element it is, if it may leave out a
//                                             // nan; else -1
//     static constexpr Kept kKept[];          // see below; kKeptCount of them are used
//     static constexpr int kKeptCount;
//     static constexpr int kKeptNarrow;       // how many of them a GPU keeps for two-byte rows
//     static constexpr int kHeld;             // classes whose numbers fit in a GPU thread's
//     static constexpr int kHeldNarrow;       // registers, of floats and of two-byte rows, or 0
//     static constexpr int kNumbers;          // row numbers: see RowNumbers
//     static constexpr int kValue;            // the place of the loss among them
//     static constexpr int kAtLabel[];        // of the label's gradient, by element input; only
//                                             // with a label, whose gradient it is as a whole
//     static constexpr int kOfRow[];          // of the gradients for the inputs of kind kPerRow
//     static constexpr Peak kPeaks[];         // maxima whose gradient goes to their first
//     static constexpr int kPeakCount;        // position
//     static constexpr int kAuxiliary[];      // the places of further results, kAuxiliaryCount
//     static constexpr int kAuxiliaryCount;
//     FUSEDLOSS_HD static void prepare(const double* parameters, double* constants);
//     // Fills in the row numbers that follow from the walks of levels 0 to kLevel, and with -1
//     // from none. N is float, double or a register of doubles: r[i] is a number of each row.
//     template <int kLevel, class N> void row(N* r) const;
//     // The terms of a class in the walk of kLevel: x are the element inputs, w the class inputs,
//     // r(i) is row number i as a T. Writes the `kept` of this level and reads those of earlier
//     // ones.
//     template <int kLevel, class T, class Row>
//     void terms(const T* x, const T* w, const Row& r, T* kept, T* out) const;
//     // The gradients for the element inputs; for the first one alone unless kAll.
//     template <bool kAll, class T, class Row>
//     void gradients(const T* x, const T* w, const Row& r, const T* kept, T* out) const;
//     // What is added to these gradients where peak number kPeak has its first maximum.
//     template <int kPeak, class T, class Row>
//     void at_peak(const T* x, const T* w, const Row& r, T* out) const;
//   };
//
// With a label, every sum leaves the label's class out: row() adds what belongs to it, from the
// inputs at the label. So 1 - p of a label that is almost sure keeps its digits. Maxima count all
// classes.
#pragma once

#include "vocabulary.h"

namespace fusedloss {

enum class Kind : int8_t {
  kElement,   // a number for each class of each row
  kLabel,     // the index of a class for each row; at most one input is a label
  kPerRow,    // a number for each row
  kPerClass,  // a number for each class
};

// An element value that the walk of one level keeps for later ones. The gradient's walk counts as
// level kLevels.
struct Kept {
  int from, until;
};

// A maximum whose slope counts: number `term` of a level.
struct Peak {
  int level, term;
};

// The place of the n-th input of a kind; -1: there is none.
template <class Loss>
constexpr int place_of(Kind kind, int n) {
  int place = 0;
  for (const Kind of : Loss::kKinds) {
    if (of == kind && n-- == 0) return place;
    ++place;
  }
  return -1;
}

// The order of the row numbers. Those up to kFirst are the engine's to fill in before the first
// walk; then come the maxima and sums of each level, which it fills in after that walk; then what
// row() computes.
template <class Loss>
struct RowNumbers {
  static constexpr int kScale = 0;    // multiplies the gradients: upstream, weight, 1 / divisor
  static constexpr int kClasses = 1;  // how many classes there are
  static constexpr int count(Kind kind) {
    int n = 0;
    for (const Kind k : Loss::kKinds) n += k == kind;
    return n;
  }
  static constexpr int kElements = count(Kind::kElement);
  static constexpr int kPerRows = count(Kind::kPerRow);
  static constexpr int kPerClasses = count(Kind::kPerClass);
  static constexpr bool kHasLabel = count(Kind::kLabel) > 0;

  static constexpr int kOfRow = 2;                    // the inputs of kind kPerRow
  static constexpr int kAtLabel = kOfRow + kPerRows;  // with a label: the element inputs there,
  static constexpr int kFirst =                       // then the class inputs
      kAtLabel + (kHasLabel ? kElements + kPerClasses : 0);
  static constexpr int of_level(int level) {
    int at = kFirst;
    for (int l = 0; l < level; ++l) at += Loss::kMaxima[l] + Loss::kSums[l];
    return at;
  }
  static constexpr int kComputed = of_level(Loss::kLevels);
};

// The max to subtract from a row: 0 where all of it is -inf, and x - max would be nan.
template <class T>
FUSEDLOSS_HD T origin(T max) {
  return select(max == T(-INFINITY), T(0), max);
}
// weight * x, and 0 where the weight is 0: a class of probability 0 does not count, whatever the
// logarithm of that is.
template <class T>
FUSEDLOSS_HD T weighted(T weight, T x) {
  return select(weight == T(0), T(0), weight * x);
}

// e^x for x <= 0, in the terms and gradients of a class. r is their argument: an engine may have a
// version for its own.
template <class T, class Row>
FUSEDLOSS_HD T exp_of_class(T x, const Row& /* r */) {
  return exp_nonpositive(x);
}
// log(others + e), with all digits where others is small and e is 1.
template <class T>
FUSEDLOSS_HD T logofsum(T others, T e) {
  return log1p(others + (e - T(1)));
}

template <int count>
struct CustomRows {
  static constexpr int kConstants = count;
  double constants[count];
};

}  // namespace fusedloss
