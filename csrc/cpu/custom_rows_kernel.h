// Makes a custom row loss's struct (math/custom_rows.h) into its engine. It is compiled with this
// file on the machine it runs on.
//
// Fewest bytes for value and gradients: read each input, write each gradient. A row, or a tile of
// neighbouring rows, is read from memory once and walked over, a level at a time, in the cache.
#pragma once

#include <array>
#include <cmath>
#include <iterator>
#include <numeric>
#include <vector>

#include "../math/custom_rows.h"
#include "custom_rows.h"
#include "row_walks.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

constexpr int at_least_one(int n) { return n < 1 ? 1 : n; }  // an array has no size 0

// How many registers of a row a walk takes at a time, each with results of its own: these stay in
// registers, and no addition waits for the one before.
constexpr int abreast(int results) {
#if defined(CPU_CAPABILITY_AVX512)
  return results <= 4 ? 4 : 2;
#else
  return results <= 2 ? 4 : 2;
#endif
}

// ---- walks --------------------------------------------------------------------------------------

// One row whose classes lie side by side, some registers of them at a time; or, kTile, two
// registers of neighbouring rows at a time, class by class, from lines of `width` rows each.
template <class Loss, class T, bool kTile>
struct RowsWalk {
  using Numbers = RowNumbers<Loss>;
  using Ids = Vec<Integer<T>>;
  static constexpr int kElements = Numbers::kElements;
  static constexpr bool kHasLabel = Numbers::kHasLabel;
  static constexpr int64_t kLanes = Vec<T>::size();
  static constexpr int kTogether = kTile ? 2 : 1;           // registers of rows
  static constexpr int64_t kRows = kTile ? 2 * kLanes : 1;  // their rows
  static constexpr int64_t kBlock = 8;                      // floats that are added up as floats
  static constexpr Integer<T> kNone = -1;

  const Loss* loss;
  int64_t classes, width, rows;
  const T* x[kElements];
  const T* weights[at_least_one(Numbers::kPerClasses)];  // of the classes
  T* kept[at_least_one(Loss::kKeptCount)];               // in lines like x's
  double* numbers;                                       // of the first row,
  int64_t stride;                                        // from one of its numbers to the next
  const Integer<T>* label;                               // of each row; kNone: it has none
  // What the last level's walk prefetches: inputs of a later walk, and gradients of this one. Bytes
  // from a class to the next, and from a row.
  struct Prefetched {
    const char* from;
    int64_t by_class, by_row;
  };
  Prefetched next[kElements], out[kElements];

  // To the next rows.
  FUSEDLOSS_HD void advance() {
    for (auto& line : x) line += kRows;
    for (auto& line : kept) line += kRows;
    numbers += kRows;
    label += kRows;
    for (auto* places : {next, out}) {
      for (int e = 0; e < kElements; ++e) places[e].from += kRows * places[e].by_row;
    }
  }

  // A nan must not get lost in a maximum that has a slope. Any other may be any number then: it is
  // subtracted from the row, a sum of which is nan.
  static FUSEDLOSS_HD Vec<T> larger(Vec<T> x, Vec<T> max_so_far) {
    return Loss::kPeakCount > 0 ? maximum(x, max_so_far) : max(x, max_so_far);
  }

  // What a register's terms are computed from.
  struct Registers {
    Vec<T> x[kElements], weights[at_least_one(Numbers::kPerClasses)],
        kept[at_least_one(Loss::kKeptCount)];
  };
  // The numbers and labels of one row, or of each register of rows.
  struct Row {
    Vec<T> number[Loss::kNumbers];
    Ids label;
    FUSEDLOSS_HD Vec<T> operator()(int i) const { return number[i]; }
  };
  struct RowsTogether {
    Row rows[kTogether];
    // Those of register u of a step.
    FUSEDLOSS_HD const Row& operator[](int u) const { return rows[kTile ? u : 0]; }
  };

  FUSEDLOSS_HD RowsTogether read_rows() const {
    RowsTogether all;
    unrolled<kTogether>([&](auto u) FUSEDLOSS_INLINE {
      Row& row = all.rows[u];
      unrolled<Loss::kNumbers>([&](auto i) FUSEDLOSS_INLINE {
        const double* const from = numbers + i * stride + u * kLanes;
        if constexpr (kTile) {
          row.number[i] = narrow(Wide<T>::load(from));
        } else {
          row.number[i] = Vec<T>(static_cast<T>(*from));
        }
      });
      if constexpr (kHasLabel) {
        row.label = kTile ? Ids::loadu(label + u * kLanes) : Ids(*label);
      } else {
        row.label = Ids(kNone);
      }
    });
    return all;
  }

  // Register u of the step to class c: where it lies in a line, and the classes in its lanes.
  FUSEDLOSS_HD int64_t at(int64_t c, int u) const { return (kTile ? c * width : c) + u * kLanes; }
  static FUSEDLOSS_HD Ids ids(int64_t c, int u) {
    if constexpr (kTile) return Ids(static_cast<Integer<T>>(c));
    return [&]<int... i>(std::integer_sequence<int, i...>) FUSEDLOSS_INLINE {
      return Ids(static_cast<Integer<T>>(c + u * kLanes)) + Ids(typename Ids::Type{i...});
    }(std::make_integer_sequence<int, kLanes>());
  }
  // For the walk of kLevel. kWhole: all lanes of the register count, else `count`.
  template <int kLevel, bool kWhole>
  FUSEDLOSS_HD Registers read(int64_t c, int u, int64_t count) const {
    Registers from;
    const int64_t there = at(c, u);
    unrolled<kElements>([&](auto e) FUSEDLOSS_INLINE {
      from.x[e] = kWhole ? Vec<T>::loadu(x[e] + there) : Vec<T>::loadu(x[e] + there, count);
    });
    unrolled<Numbers::kPerClasses>([&](auto q) FUSEDLOSS_INLINE {
      from.weights[q] = kTile ? Vec<T>(weights[q][c]) : Vec<T>::loadu(weights[q] + there);
    });
    unrolled<Loss::kKeptCount>([&](auto k) FUSEDLOSS_INLINE {
      if constexpr (Loss::kKept[k].from < kLevel && kLevel <= Loss::kKept[k].until) {
        from.kept[k] = Vec<T>::loadu(kept[k] + there);
      }
    });
    return from;
  }
  FUSEDLOSS_HD void prefetch(int64_t c, int u) const {
    if (u * sizeof(Vec<T>) % sizeof(CacheLine) != 0) return;
    const int64_t row = kTile ? u * kLanes : 0, at = kTile ? c : c + u * kLanes;
    unrolled<kElements>([&](auto e) FUSEDLOSS_INLINE {
      const auto address = [&](const Prefetched& p) FUSEDLOSS_INLINE {
        return p.from + at * p.by_class + row * p.by_row;
      };
      __builtin_prefetch(address(next[e]), 0, 2);
      __builtin_prefetch(address(out[e]), 1, 2);
    });
  }

  // Walks over all classes, for the maxima and sums of kLevel.
  template <int kLevel>
  [[gnu::noinline]] void level() const {
    RowsWalk walk = *this;  // copies: members would be loaded again after each store
    const Loss its = *loss;
    for (int64_t i = 0; i < rows; i += kRows, walk.advance()) walk.template level<kLevel>(its);
  }
  template <int kLevel>
  FUSEDLOSS_HD void level(const Loss& its) const {
    constexpr int kMaxima = Loss::kMaxima[kLevel], kSums = Loss::kSums[kLevel],
                  kTerms = kMaxima + kSums, kAbreast = kTile ? kTogether : abreast(kTerms);
    const RowsTogether r = read_rows();
    Vec<T> maxima[at_least_one(kMaxima)][kAbreast], sums[at_least_one(kSums)][kAbreast];
    RegisterSum<T> totals[at_least_one(kSums)][kTogether];
    const auto fill = []<int n>(Vec<T>(&registers)[n][kAbreast], T number) FUSEDLOSS_INLINE {
      unrolled<n>([&](auto i) FUSEDLOSS_INLINE {
        unrolled<kAbreast>([&](auto u) FUSEDLOSS_INLINE { registers[i][u] = Vec<T>(number); });
      });
    };
    fill(maxima, -kInfinity<T>);

    // The terms of `count` registers from class c on. kWhole: all lanes count, and no sum leaves
    // one out.
    const auto add = [&](auto count, auto whole, int64_t c) FUSEDLOSS_INLINE {
      constexpr bool kWhole = kTile || whole();
      const int64_t lanes = std::min(kLanes, classes - c);
      unrolled<count>([&](auto u) FUSEDLOSS_INLINE {
        Registers from = read<kLevel, kWhole>(c, u, lanes);
        Vec<T> terms[at_least_one(kTerms)];
        its.template terms<kLevel>(from.x, from.weights, r[u], from.kept, terms);
        unrolled<Loss::kKeptCount>([&](auto k) FUSEDLOSS_INLINE {
          if constexpr (Loss::kKept[k].from == kLevel) from.kept[k].store(kept[k] + at(c, u));
        });
        if constexpr (kLevel + 1 == Loss::kLevels) prefetch(c, u);
        const auto counted = [&](Vec<T> term, T none) FUSEDLOSS_INLINE {
          return kWhole ? term : Vec<T>::set(Vec<T>(none), term, lanes);
        };
        unrolled<kMaxima>([&](auto m) FUSEDLOSS_INLINE {
          maxima[m][u] = larger(counted(terms[m], -kInfinity<T>), maxima[m][u]);
        });
        unrolled<kSums>([&](auto s) FUSEDLOSS_INLINE {
          Vec<T> term = counted(terms[kMaxima + s], T(0));
          if constexpr (kHasLabel && (kTile || !kWhole)) {
            term = select(cast<T>(ids(c, u) == r[u].label), Vec<T>(0), term);
          }
          sums[s][u] = sums[s][u] + term;
        });
      });
    };
    const auto add_up = [&]() FUSEDLOSS_INLINE {
      unrolled<kSums>([&](auto s) FUSEDLOSS_INLINE {
        if constexpr (kTile) {
          unrolled<kTogether>([&](auto u) FUSEDLOSS_INLINE { totals[s][u].add(sums[s][u]); });
        } else {
          totals[s][0].add(sums[s]);
        }
      });
    };
    const std::integral_constant<int, kAbreast> all{};
    const std::integral_constant<int, 1> one{};
    if constexpr (kTile) {
      for (int64_t c = 0; c < classes;) {
        fill(sums, 0);
        for (const int64_t end = std::min(c + kBlock, classes); c < end; ++c) {
          add(all, std::true_type(), c);
        }
        add_up();
      }
    } else {
      // The register with the label goes alone.
      constexpr int64_t kStep = kAbreast * kLanes;
      const bool goes_alone = kHasLabel && *label >= 0;
      const int64_t alone = goes_alone ? *label / kLanes * kLanes : classes;
      int64_t c = 0;
      for (const int64_t stop : {alone, classes}) {
        while (c + kStep <= stop) {
          fill(sums, 0);
          const int64_t end = std::min(stop, c + kBlock * kStep);
          for (; c + kStep <= end; c += kStep) add(all, std::true_type(), c);
          add_up();
        }
        fill(sums, 0);
        const int64_t end = std::min(stop + kLanes, classes);
        for (; c < end; c += kLanes) add(one, std::false_type(), c);
        add_up();
      }
    }

    double* to = numbers + Numbers::of_level(kLevel) * stride;
    unrolled<kMaxima>([&](auto m) FUSEDLOSS_INLINE {
      if constexpr (kTile) {
        unrolled<kTogether>([&](auto u) { widen(maxima[m][u]).store(to + u * kLanes); });
      } else {
        Vec<T> max = maxima[m][0];
        unrolled<kAbreast - 1>([&](auto u) { max = larger(maxima[m][u + 1], max); });
        *to = (max == max).all() ? max_lane(max) : std::numeric_limits<T>::quiet_NaN();
      }
      to += stride;
    });
    unrolled<kSums>([&](auto s) FUSEDLOSS_INLINE {
      if constexpr (kTile) {
        unrolled<kTogether>([&](auto u) { totals[s][u].lanes().store(to + u * kLanes); });
      } else {
        const Wide<T> lanes = totals[s][0].lanes();
        Vec<double> sum = lanes.part[0];
        unrolled<Wide<T>::kParts - 1>([&](auto p) { sum = sum + lanes.part[p + 1]; });
        *to = sum_of_lanes(sum);
      }
      to += stride;
    });
  }

  // The first class of each lane at which a peak's term is its maximum, or kNone.
  template <int kPeak>
  FUSEDLOSS_HD Ids first_maximum(const Loss& its, const Row& r, int u) const {
    constexpr Peak peak = Loss::kPeaks[kPeak];
    constexpr int kTerms = Loss::kMaxima[peak.level] + Loss::kSums[peak.level];
    constexpr int64_t kStep = kTile ? 1 : kLanes;
    const Vec<T> max = r(Numbers::of_level(peak.level) + peak.term);
    Ids first(kNone);
    for (int64_t c = (classes - 1) / kStep * kStep; c >= 0; c -= kStep) {
      Registers from = read<peak.level, kTile>(c, u, std::min(kLanes, classes - c));
      Vec<T> terms[kTerms];
      its.template terms<peak.level>(from.x, from.weights, r, from.kept, terms);
      const Ids here = ids(c, u);
      const Mask<T> is_max = (terms[peak.term] == max) & cast<T>(here < Ids(classes));
      first = cast<Integer<T>>(select(is_max, cast<T>(here), cast<T>(first)));
    }
    return first;
  }
  // The gradients of a register of classes, with what belongs to the label and to peaks.
  template <bool kAll, class IsPeak>
  FUSEDLOSS_HD void gradients_of(const Loss& its, const Row& r, Registers& from, Ids here,
                                 const IsPeak& is_peak, Vec<T>* g) const {
    its.template gradients<kAll>(from.x, from.weights, r, from.kept, g);
    if constexpr (kHasLabel) {
      const Mask<T> is_label = cast<T>(here == r.label);
      unrolled<kElements>(
          [&](auto e) FUSEDLOSS_INLINE { g[e] = select(is_label, r(Loss::kAtLabel[e]), g[e]); });
    }
    unrolled<Loss::kPeakCount>([&](auto p) FUSEDLOSS_INLINE {
      Vec<T> more[kElements];
      std::fill_n(more, kElements, Vec<T>(0));
      its.template at_peak<p>(from.x, from.weights, r, more);
      const Mask<T> is_here = is_peak(p);
      unrolled<kElements>([&](auto e)
                              FUSEDLOSS_INLINE { g[e] = select(is_here, g[e] + more[e], g[e]); });
    });
  }

  // Where the gradients go: null for one that is not wanted. kTile: in lines.
  struct Gradients {
    T* to[kElements];
    int64_t line[kElements];
    bool streams;
  };
  // Those of the classes [begin, end). In a single row, those of the label and of peaks are left to
  // gradients_apart().
  template <bool kAll>
  [[gnu::noinline]] void gradients(Gradients out, int64_t begin, int64_t end) const {
    RowsWalk walk = *this;
    const Loss its = *loss;
    for (int64_t i = 0; i < rows; i += kRows, walk.advance()) {
      walk.template gradients<kAll>(its, out, begin, end, rows - i);
      for (T*& to : out.to) to += to ? kRows : 0;
    }
  }
  template <bool kAll>
  FUSEDLOSS_HD void gradients(const Loss& its, const Gradients& out, int64_t begin, int64_t end,
                              int64_t rows_left) const {
    constexpr int kComputed = kAll ? kElements : 1,
                  kAbreast = kTile ? kTogether : abreast(2 * kComputed);
    const RowsTogether r = read_rows();
    const Ids none(kNone);
    bool any_ignored = false;
    Ids peaks[at_least_one(Loss::kPeakCount)][kTogether];
    if constexpr (kTile) {
      unrolled<kTogether>([&](auto u) {
        any_ignored = any_ignored || (kHasLabel && (r[u].label == none).any());
        unrolled<Loss::kPeakCount>([&](auto p) { peaks[p][u] = first_maximum<p>(its, r[u], u); });
      });
    }
    const auto write = [&](auto count, auto whole, int64_t c) FUSEDLOSS_INLINE {
      constexpr bool kWhole = kTile || whole();
      unrolled<count>([&](auto u) FUSEDLOSS_INLINE {
        Registers from = read<Loss::kLevels, kWhole>(c, u, std::min(kLanes, end - c));
        Vec<T> g[kElements];
        if constexpr (!kTile) {
          its.template gradients<kAll>(from.x, from.weights, r[u], from.kept, g);
        } else {
          const Ids here = ids(c, u);
          const auto is_peak = [&](auto p)
                                   FUSEDLOSS_INLINE { return cast<T>(here == peaks[p][u]); };
          gradients_of<kAll>(its, r[u], from, here, is_peak, g);
          if (any_ignored) {  // 0, whatever the row's numbers are
            for (Vec<T>& of : g) of = select(cast<T>(r[u].label == none), Vec<T>(0), of);
          }
        }
        const int64_t lanes = kTile    ? std::max<int64_t>(rows_left - u * kLanes, 0)
                              : kWhole ? kLanes
                                       : std::min(kLanes, end - c);
        unrolled<kComputed>([&](auto e) FUSEDLOSS_INLINE {
          T* const to = out.to[e] + (kTile ? c * out.line[e] : c - begin) + u * kLanes;
          if (kComputed == 1 || out.to[e]) store(g[e], to, lanes, kTile && out.streams);
        });
      });
    };
    int64_t c = begin;
    constexpr int64_t kStep = kTile ? 1 : kAbreast * kLanes;
    for (; c + kStep <= end; c += kStep) {
      write(std::integral_constant<int, kAbreast>(), std::true_type(), c);
    }
    for (; !kTile && c < end; c += kLanes) {
      write(std::integral_constant<int, 1>(), std::false_type(), c);
    }
  }

  // The gradients of a single row at its label and its peaks.
  struct Apart {
    int64_t at;  // the class; `classes`: none
    T gradients[kElements];
  };
  using AllApart = std::array<Apart, kHasLabel + Loss::kPeakCount>;
  // To be called before gradients(), which may write over the row.
  template <bool kAll>
  AllApart gradients_apart() const {
    constexpr int kComputed = kAll ? kElements : 1;
    AllApart apart;
    if constexpr (kHasLabel) {
      apart[0].at = *label;
      for (int e = 0; e < kComputed; ++e) {
        apart[0].gradients[e] = static_cast<T>(numbers[Loss::kAtLabel[e] * stride]);
      }
    }
    if constexpr (Loss::kPeakCount > 0) gradients_at_peaks<kAll>(apart);
    return apart;
  }
  template <bool kAll>
  void gradients_at_peaks(AllApart& apart) const {
    constexpr int kComputed = kAll ? kElements : 1;
    const Row r = read_rows()[0];
    int64_t peaks[at_least_one(Loss::kPeakCount)];
    unrolled<Loss::kPeakCount>([&](auto p) {
      Integer<T> lanes[kLanes];
      first_maximum<p>(*loss, r, 0).store(lanes);
      peaks[p] = classes;
      for (const Integer<T> first : lanes) {
        if (first != kNone) peaks[p] = std::min<int64_t>(peaks[p], first);
      }
    });
    for (int p = 0; p < Loss::kPeakCount; ++p) {
      Apart& at_peak = apart[kHasLabel + p];
      const int64_t c = at_peak.at = peaks[p];
      if (c == classes) continue;
      Registers from = read<Loss::kLevels, false>(c, 0, 1);
      Vec<T> g[kElements];
      const Mask<T> all = Vec<T>(0) == Vec<T>(0);
      const auto is_peak = [&](int other) { return peaks[other] == c ? all : ~all; };
      gradients_of<kAll>(*loss, r, from, ids(c, 0), is_peak, g);
      for (int e = 0; e < kComputed; ++e) {
        T lanes[kLanes];
        g[e].store(lanes);
        at_peak.gradients[e] = lanes[0];
      }
    }
  }
};

// Fills in the numbers that follow from level kLevel, of `rows` rows.
template <class Loss, int kLevel>
[[gnu::noinline]] void compute_numbers(const Loss& loss, double* numbers, int64_t rows,
                                       int64_t stride) {
  const Loss its = loss;
  for (int64_t i = 0; i < rows; i += Vec<double>::size()) {
    Vec<double> r[Loss::kNumbers];
    unrolled<Loss::kNumbers>([&](auto k) { r[k] = Vec<double>::loadu(numbers + k * stride + i); });
    its.template row<kLevel>(r);
    unrolled<Loss::kNumbers>([&](auto k) { r[k].store(numbers + k * stride + i); });
  }
}

// ---- a call -------------------------------------------------------------------------------------

template <class Loss, class T>
struct CustomRowsProblem {
  using Numbers = RowNumbers<Loss>;
  static constexpr int64_t kLanes = Vec<T>::size();
  const CustomRowsCall& call;
  const double scale;
  // A line of all classes is as long as this: registers may be loaded from every class on.
  const int64_t line = (call.classes / kLanes + 2) * kLanes;
  const Buffer<T> weights{Numbers::kPerClasses * line};
  Loss loss;
  bool wants_elements = false, wants_others = false;  // gradients for elements; besides the first's

  CustomRowsProblem(const CustomRowsCall& c, const double* parameters, double s)
      : call(c), scale(s) {
    Loss::prepare(parameters, loss.constants);
    for (int q = 0; q < Numbers::kPerClasses; ++q) {
      const Rows& from = call.inputs[place_of<Loss>(Kind::kPerClass, q)];
      widen(from.dtype, from.data, 0, from.classes, call.classes, &weights[q * line]);
    }
    for (int e = 0; e < Numbers::kElements; ++e) {
      wants_elements = wants_elements || gradient(e).data;
      wants_others = wants_others || (e > 0 && gradient(e).data);
    }
  }
  const Rows& element(int e) const { return call.inputs[place_of<Loss>(Kind::kElement, e)]; }
  const Rows& gradient(int e) const { return call.gradients[place_of<Loss>(Kind::kElement, e)]; }
};

// The rows of one task, whose numbers and lines are kept: `width` of them at most, a multiple of a
// register's.
template <class Loss, class T, bool kTile>
struct CustomRowsTask {
  using Problem = CustomRowsProblem<Loss, T>;
  using Walk = RowsWalk<Loss, T, kTile>;
  using Numbers = RowNumbers<Loss>;
  static constexpr int kElements = Numbers::kElements;
  static constexpr int64_t kLanes = Vec<T>::size();

  const Problem& problem;
  const CustomRowsCall& call = problem.call;
  const int64_t width;
  const Buffer<double> numbers{(Loss::kNumbers + 2) * width};
  double* const weight = numbers.data() + Loss::kNumbers * width;  // of each row
  double* const values = weight + width;                           // its loss
  const Buffer<Integer<T>> labels{width};

  CustomRowsTask(const Problem& p, int64_t w) : problem(p), width(w) {
    std::fill_n(numbers.data(), (Loss::kNumbers + 2) * width, 0.0);
    std::fill_n(number(Numbers::kClasses), width, double(call.classes));
    std::fill_n(labels.data(), width, Integer<T>(0));
  }
  double* number(int i) const { return numbers.data() + i * width; }
  bool ignored(int64_t row) const { return Numbers::kHasLabel && labels[row] == Walk::kNone; }

  // The numbers of each row that are there before the first walk, but for those at its label.
  void read_rows(const Tile& tile) const {
    const auto read = [&](const Rows& rows, double* to) {
      widen(rows.dtype, rows.data, tile.offset(rows), rows.inner, tile.n, to);
    };
    double* const scales = number(Numbers::kScale);
    std::fill_n(weight, tile.n, 1.0);
    std::fill_n(scales, tile.n, 1.0);
    if (call.weight.data) read(call.weight, weight);
    if (call.upstream.data) read(call.upstream, scales);
    for (int64_t i = 0; i < tile.n; ++i) scales[i] *= problem.scale * weight[i];
    for (int p = 0; p < Numbers::kPerRows; ++p) {
      read(call.inputs[place_of<Loss>(Kind::kPerRow, p)], number(Numbers::kOfRow + p));
    }
    if constexpr (Numbers::kHasLabel) {
      const Rows& from = call.inputs[place_of<Loss>(Kind::kLabel, 0)];
      const auto* const label = static_cast<const int64_t*>(from.data) + tile.offset(from);
      for (int64_t i = 0; i < tile.n; ++i) {
        const int64_t c = label[i * from.inner];
        labels[i] = c == call.ignore_index ? Walk::kNone : static_cast<Integer<T>>(c);
      }
    }
  }
  // Those of a row at its label, from its elements, a class `step` behind the one before.
  template <class X>
  void read_at_label(int64_t row, const X& x, int64_t step) const {
    if constexpr (Numbers::kHasLabel) {
      const int64_t c = std::max<int64_t>(labels[row], 0);
      for (int e = 0; e < kElements; ++e) number(Numbers::kAtLabel + e)[row] = x[e][c * step];
      for (int q = 0; q < Numbers::kPerClasses; ++q) {
        number(Numbers::kAtLabel + kElements + q)[row] = problem.weights[q * problem.line + c];
      }
    }
  }

  // Calls walk(level) for each level, and has what follows from it computed.
  template <class Each>
  void walk_levels(int64_t n, const Each& walk) const {
    compute_numbers<Loss, -1>(problem.loss, numbers.data(), n, width);
    unrolled<Loss::kLevels>([&](auto level) {
      walk(level);
      compute_numbers<Loss, level>(problem.loss, numbers.data(), n, width);
    });
  }

  // Writes each row's own results; returns the sum of the losses.
  double write_rows(const Tile& tile) const {
    const int64_t first = tile.outer * call.inner + tile.begin;
    RegisterSum<double> sums;
    for (int64_t i = 0; i < tile.n; ++i) {
      values[i] = ignored(i) ? 0 : weight[i] * number(Loss::kValue)[i];
    }
    constexpr int64_t kStep = Vec<double>::size();
    for (int64_t i = 0; i < tile.n; i += kStep) {
      sums.add(Vec<double>::loadu(values + i, std::min(kStep, tile.n - i)));
    }
    const auto write = [&](double* from, const auto& to, int64_t offset, int64_t step) {
      if (!to.data) return;
      for (int64_t i = 0; i < tile.n; ++i) from[i] = ignored(i) ? 0 : from[i];
      narrow(from, tile.n, to.dtype, const_cast<void*>(static_cast<const void*>(to.data)), offset,
             step);
    };
    write(values, call.value, first, 1);
    for (int k = 0; k < Loss::kAuxiliaryCount; ++k) {
      write(number(Loss::kAuxiliary[k]), call.auxiliary[k], first, 1);
    }
    for (int p = 0; p < Numbers::kPerRows; ++p) {
      const Rows& to = call.gradients[place_of<Loss>(Kind::kPerRow, p)];
      if (to.data) write(number(Loss::kOfRow[p]), to, tile.offset(to), to.inner);
    }
    Sum sum;
    sums.add_to(sum);
    return sum.value();
  }

  // A walk over the rows from `row` on of a tile. Prefetches the row `ahead` of it.
  Walk walk_at(const Tile& tile, int64_t row, int64_t ahead, bool streams) const {
    Walk walk{};
    walk.loss = &problem.loss;
    walk.classes = call.classes;
    walk.width = walk.stride = width;
    walk.rows = kTile ? tile.n : 1;
    walk.numbers = numbers.data() + row;
    walk.label = labels.data() + row;
    for (int q = 0; q < Numbers::kPerClasses; ++q) {
      walk.weights[q] = problem.weights.data() + q * problem.line;
    }
    for (int e = 0; e < kElements; ++e) {
      const auto place = [&](const Rows& rows, int64_t i) -> typename Walk::Prefetched {
        const int64_t bytes = bytes_of(rows.dtype);
        return {address(rows, tile.offset(rows, 0, i)), rows.classes * bytes, rows.inner * bytes};
      };
      const Rows& out = problem.gradient(e);
      walk.next[e] = place(problem.element(e), row + ahead);
      walk.out[e] = out.data && !streams ? place(out, row) : walk.next[e];
    }
    return walk;
  }
};

// Rows one by one. Short ones end together, a register of them: logarithms and quotients of a row
// alone cost as much as a few hundred of its classes.
template <class Loss, class T>
struct CustomRowWalk : CustomRowsTask<Loss, T, false> {
  using Base = CustomRowsTask<Loss, T, false>;
  using Walk = typename Base::Walk;
  using Base::call, Base::problem, Base::kElements, Base::kLanes, Base::ignored;
  static constexpr int64_t kGroup = Vec<double>::size();
  static constexpr int64_t kGroupBytes = 16 << 10;  // of a group's lines
  static constexpr int64_t kLines = kElements + Loss::kKeptCount;
  static constexpr int64_t kPiece = 1024;  // classes whose gradients are converted together

  const int64_t group = std::clamp<int64_t>(
      kGroupBytes / (kLines * problem.line * static_cast<int64_t>(sizeof(T))), 1, kGroup);
  // Each row's elements that are not read in place, and its kept values.
  const Buffer<T> lines{group * kLines * problem.line};
  const Buffer<T> pieces{kElements * kPiece};
  Walk walks[kGroup];

  explicit CustomRowWalk(const CustomRowsProblem<Loss, T>& p) : Base(p, kGroup) {}

  double process(const Tile& tile) {
    Base::read_rows(tile);
    for (int64_t k = 0; k < tile.n; ++k) {
      Walk& walk = walks[k] = Base::walk_at(tile, k, tile.n, false);
      T* line = &lines[k * kLines * problem.line];
      for (int e = 0; e < kElements; ++e, line += problem.line) {
        const Rows& from = problem.element(e);
        const int64_t offset = tile.offset(from, 0, k);
        if (from.classes == 1 && is_dtype<T>(from.dtype)) {
          walk.x[e] = elements<T>(from, offset);
        } else {
          if (!ignored(k)) widen(from.dtype, from.data, offset, from.classes, call.classes, line);
          walk.x[e] = line;
        }
      }
      for (int j = 0; j < Loss::kKeptCount; ++j) walk.kept[j] = line + j * problem.line;
      Base::read_at_label(k, walk.x, 1);
    }
    Base::walk_levels(tile.n, [&](auto level) {
      for (int64_t k = 0; k < tile.n; ++k) {
        if (!ignored(k)) walks[k].template level<level>();
      }
    });
    for (int64_t k = 0; k < tile.n && problem.wants_elements; ++k) {
      if (ignored(k)) {
        clear_gradients(tile, k);
      } else if (kElements > 1 && problem.wants_others) {
        write_gradients<(kElements > 1)>(tile, k);
      } else {
        write_gradients<false>(tile, k);
      }
    }
    return Base::write_rows(tile);
  }

  template <bool kAll>
  void write_gradients(const Tile& tile, int64_t k) const {
    typename Walk::Gradients to{};
    bool direct = true;
    for (int e = 0; e < kElements; ++e) {
      const Rows& out = problem.gradient(e);
      direct = direct && (!out.data || (out.classes == 1 && is_dtype<T>(out.dtype)));
    }
    const auto apart = walks[k].template gradients_apart<kAll>();
    const int64_t step = direct ? call.classes : kPiece;
    for (int64_t begin = 0; begin < call.classes; begin += step) {
      const int64_t n = std::min(step, call.classes - begin);
      for (int e = 0; e < kElements; ++e) {
        const Rows& out = problem.gradient(e);
        if (!out.data) continue;
        to.to[e] = direct ? elements<T>(out, tile.offset(out, 0, k)) : &pieces[e * kPiece];
      }
      walks[k].template gradients<kAll>(to, begin, begin + n);
      for (int e = 0; e < kElements && !direct; ++e) {
        if (to.to[e]) write(e, tile, k, begin, n, to.to[e]);
      }
    }
    for (const auto& [at, gradients] : apart) {
      for (int e = 0; e < kElements && at < call.classes; ++e) {
        if (to.to[e]) write(e, tile, k, at, 1, &gradients[e]);
      }
    }
  }
  void write(int e, const Tile& tile, int64_t k, int64_t begin, int64_t n, const T* from) const {
    const Rows& out = problem.gradient(e);
    narrow(from, n, out.dtype, const_cast<void*>(out.data), tile.offset(out, begin, k),
           out.classes);
  }
  void clear_gradients(const Tile& tile, int64_t k) const {
    std::fill_n(pieces.data(), kPiece, T(0));
    for (int e = 0; e < kElements; ++e) {
      for (int64_t c = 0; c < call.classes && problem.gradient(e).data; c += kPiece) {
        write(e, tile, k, c, std::min(kPiece, call.classes - c), pieces.data());
      }
    }
  }
};

// Tiles of neighbouring rows, a row a lane.
template <class Loss, class T>
struct CustomTileWalk : CustomRowsTask<Loss, T, true> {
  using Base = CustomRowsTask<Loss, T, true>;
  using Walk = typename Base::Walk;
  using Base::call, Base::problem, Base::kElements, Base::kLanes, Base::width, Base::labels;
  static constexpr int64_t kLines = kElements + Loss::kKeptCount;

  const int64_t size = call.classes * width;
  const TileCopier<T> copier{call.classes, width};
  const Buffer<T> lines{kLines * size};  // the elements, then the kept values

  CustomTileWalk(const CustomRowsProblem<Loss, T>& p, int64_t w) : Base(p, w) {}

  double process(const Tile& tile) const {
    Base::read_rows(tile);
    const bool streams = streams_to(tile);
    Walk walk = Base::walk_at(tile, 0, width, streams);
    for (int e = 0; e < kElements; ++e) {
      copier.template copy<false>(problem.element(e), tile, &lines[e * size]);
      walk.x[e] = &lines[e * size];
    }
    for (int j = 0; j < Loss::kKeptCount; ++j) walk.kept[j] = &lines[(kElements + j) * size];
    for (int64_t i = 0; i < tile.n; ++i) {
      std::array<const T*, kElements> x;
      for (int e = 0; e < kElements; ++e) x[e] = walk.x[e] + i;
      Base::read_at_label(i, x, width);
    }
    Base::walk_levels(tile.n, [&](auto level) { walk.template level<level>(); });
    if (problem.wants_elements) {
      if (kElements > 1 && problem.wants_others) {
        write_gradients<(kElements > 1)>(tile, walk, streams);
      } else {
        write_gradients<false>(tile, walk, streams);
      }
    }
    return Base::write_rows(tile);
  }

  bool lies_ready(const Rows& out) const { return out.inner == 1 && is_dtype<T>(out.dtype); }
  // Whether stores go past the caches: if a gradient is too large for them. The first line must be
  // aligned, and all lines whole registers apart.
  bool streams_to(const Tile& tile) const {
    if (call.outer * call.classes * call.inner * sizeof(T) < kStreamed) return false;
    for (int e = 0; e < kElements; ++e) {
      const Rows& out = problem.gradient(e);
      const bool aligned = lies_ready(out) && out.classes % kLanes == 0 &&
                           is_streamable(elements<T>(out, tile.offset(out)));
      if (out.data && !aligned) return false;
    }
    return true;
  }

  template <bool kAll>
  void write_gradients(const Tile& tile, const Walk& walk, bool streams) const {
    typename Walk::Gradients to{};
    to.streams = streams;
    for (int e = 0; e < kElements; ++e) {
      const Rows& out = problem.gradient(e);
      if (!out.data) continue;
      // In place of the elements, which have been read by then.
      to.to[e] = lies_ready(out) ? elements<T>(out, tile.offset(out)) : &lines[e * size];
      to.line[e] = lies_ready(out) ? out.classes : width;
    }
    walk.template gradients<kAll>(to, 0, call.classes);
    for (int e = 0; e < kElements; ++e) {
      const Rows& out = problem.gradient(e);
      if (out.data && !lies_ready(out)) copier.template copy<true>(out, tile, to.to[e]);
    }
  }
};

// Whether to go row by row, and not by tiles of neighbouring rows. Fixed by the first input, so
// that every call on it gives the same bits.
inline bool goes_by_row(const CustomRowsCall& call) {
  constexpr int64_t kFew = 128, kRows = 16;
  const Rows& input = call.inputs[0];
  if (call.inner < kRows) return true;
  return call.classes > kFew && input.classes < input.inner;
}

template <class Loss, class T>
double run_custom_rows(const CustomRowsCall& call, const double* parameters, double scale,
                       ParallelFor threads) {
  const CustomRowsProblem<Loss, T> problem(call, parameters, scale);
  constexpr int64_t kTask = 32768;  // elements a task, at least
  const auto run = [&](auto make, int64_t rows, auto&& width_of) {
    using Walk = typename decltype(make())::element_type;
    const int64_t tiles = (call.inner + rows - 1) / rows;
    return sum_tasks<Walk>(threads, call.outer * tiles, make, [&](auto& walk, int64_t task) {
      const int64_t begin = task % tiles * rows, end = std::min(call.inner, begin + rows);
      const int64_t width = width_of(walk);
      Sum sum;
      for (int64_t row = begin; row < end; row += width) {
        sum.add(walk.process({task / tiles, row, std::min(width, end - row)}));
      }
      return sum.value();
    });
  };
  if (goes_by_row(call)) {
    using Walk = CustomRowWalk<Loss, T>;
    return run([&] { return std::make_unique<Walk>(problem); },
               std::max<int64_t>(Walk::kGroup, kTask / call.classes / Walk::kGroup * Walk::kGroup),
               [](const Walk& walk) { return walk.group; });
  }
  using Walk = CustomTileWalk<Loss, T>;
  // 32 KiB of lines stay in the L1 cache between their uses. Lines of fewer than 128 rows cost more
  // than a tile that only the L2 cache holds; and no line has fewer than 32.
  const auto fit = [&](int64_t bytes) {
    return bytes / (Walk::kLines * call.classes * static_cast<int64_t>(sizeof(T)));
  };
  const int64_t least = std::clamp<int64_t>(fit(256 << 10), 32, 128);
  // An odd number of steps, so that the lines of a column fall on different places in the cache.
  constexpr int64_t kRows = Walk::Walk::kRows;
  const int64_t full = (std::clamp<int64_t>(fit(32 << 10), least, 4096) / kRows | 1) * kRows;
  const int64_t width = std::min(full, (call.inner + kRows - 1) / kRows * kRows);
  return run([&] { return std::make_unique<Walk>(problem, width); }, width,
             [&](const Walk&) { return width; });
}

template <class Loss>
double run_custom_rows_of(const CustomRowsCall& call, const double* parameters, double scale,
                          ParallelFor threads) {
  CustomRowsCall laid = call;
  if (call.inner == 1) laid.lay_rows_inside();
  return call.compute_in_double ? run_custom_rows<Loss, double>(laid, parameters, scale, threads)
                                : run_custom_rows<Loss, float>(laid, parameters, scale, threads);
}

template <class Loss>
constexpr CustomRowsKernel custom_rows_kernel() {
  return {kCustomRowsVersion, static_cast<int32_t>(std::size(Loss::kKinds)),
          Loss::kParameters,  Loss::kAuxiliaryCount,
          Loss::kKinds,       &run_custom_rows_of<Loss>};
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu

#define FUSEDLOSS_CUSTOM_ROWS(LOSS)                                                            \
  extern "C" __attribute__((visibility("default"))) const fusedloss::cpu::CustomRowsKernel*    \
  FUSEDLOSS_CUSTOM_ROWS_ENTRY() {                                                              \
    static constexpr auto kernel = fusedloss::cpu::CPU_CAPABILITY::custom_rows_kernel<LOSS>(); \
    return &kernel;                                                                            \
  }
