// What both walks over rows share: a call as a row loss sees it, reading and writing operands, and
// tasks with their sums. Loss is a struct of row_losses.h, T the type that it is computed in.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "../math/row_losses.h"
#include "../math/sum.h"
#include "lanes.h"
#include "parallel.h"
#include "staging.h"
#include "wide.h"

#define FUSEDLOSS_INLINE __attribute__((always_inline))  // for lambdas

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

// Calls f with std::true_type or std::false_type for each condition, so that every combination has
// a loop of its own.
template <class F>
FUSEDLOSS_HD void with_constants(F&& f) {
  f();
}
template <class F, class... Others>
FUSEDLOSS_HD void with_constants(F&& f, bool condition, Others... others) {
  const auto with = [&](auto c) {
    with_constants([&](auto... constants) { f(c, constants...); }, others...);
  };
  if (condition) {
    with(std::true_type());
  } else {
    with(std::false_type());
  }
}

// ---- memory -------------------------------------------------------------------------------------

// An array that begins at a cache line, so that no register crosses two. It is not initialised:
// clearing it would take as long as a small call.
struct alignas(64) CacheLine {
  unsigned char bytes[64];
};
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_(new CacheLine[size * sizeof(T) / sizeof(CacheLine) + 1]) {}
  T* data() const { return reinterpret_cast<T*>(lines_.get()); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  std::unique_ptr<CacheLine[]> lines_;
};

inline const char* address(const Rows& rows, int64_t offset) {
  return static_cast<const char*>(rows.data) + offset * bytes_of(rows.dtype);
}

// The elements of rows, whose dtype is T's. Outputs are written there.
template <class T>
T* elements(const Rows& rows, int64_t offset) {
  return static_cast<T*>(const_cast<void*>(rows.data)) + offset;
}

template <class T>
Vec<T> load(const T* p, int64_t count, T rest) {
  if (count >= Vec<T>::size()) return Vec<T>::loadu(p);
  return Vec<T>::set(Vec<T>(rest), Vec<T>::loadu(p, count), count);
}

// Where a store can go past the caches: lines that are written whole are not read into them first,
// and throw nothing out of them. finish_stream() comes before other threads read.
template <class T>
bool is_streamable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vec<T>) == 0;
}
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <class T>
FUSEDLOSS_HD void stream(Vec<T> v, T* p) {
  FUSEDLOSS_INTRINSIC(stream_ps)(reinterpret_cast<float*>(p), cast<float>(v));
}
inline void finish_stream() { _mm_sfence(); }
#else
template <class T>
FUSEDLOSS_HD void stream(Vec<T> v, T* p) {
  v.store(p);
}
inline void finish_stream() {}
#endif

template <class T>
FUSEDLOSS_HD void store(Vec<T> v, T* p, int64_t count, bool streams = false) {
  if (count < Vec<T>::size()) {
    v.store(p, count);
  } else if (streams) {
    stream(v, p);
  } else {
    v.store(p);
  }
}

// Sums task(walk, t) over every t in parallel, one walk a thread. The sums are added in order.
template <class Walk, class Make, class Task>
double sum_tasks(ParallelFor threads, int64_t tasks, Make&& make, Task&& task) {
  std::vector<double> sums(tasks);
  parallel_for(threads, 0, tasks, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<Walk> walk = make();
    for (int64_t t = first; t < last; ++t) sums[t] = task(*walk, t);
    finish_stream();
  });
  Sum sum;
  for (double s : sums) sum.add(s);
  return sum.value();
}

// ---- a call -------------------------------------------------------------------------------------

struct RowsCall : fusedloss::RowsCall {
  const ParallelFor threads;
  const double scale;  // every gradient element is multiplied by it

  explicit RowsCall(const Call& call)
      : fusedloss::RowsCall(call), threads(call.threads), scale(call.scale) {}
};

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class Loss>
struct RowProblem {
  using T = typename Loss::Number;
  const RowsCall& call;
  const Loss loss;
  const typename Loss::Exact exact;
  const T* const weight;
  // Whether every e^(x - max) is added in double: a class of large weight multiplies the sum of the
  // small ones, unless only the target counts, with the same weight.
  const bool exact_sums;

  explicit RowProblem(const RowsCall& c)
      : call(c),
        loss(c.indices, c.label_smoothing, double(c.classes), weight_sum(c)),
        exact(c.indices, c.label_smoothing, double(c.classes), weight_sum(c)),
        weight(static_cast<const T*>(c.weight)),
        exact_sums(weight && loss.sums_targets()) {}

  static double weight_sum(const RowsCall& c) {
    return c.weight_sum ? *c.weight_sum : double(c.classes);
  }
  T class_weight(int64_t c) const { return weight ? weight[c] : T(1); }
  // What the gradients of the rows [first, first + n) are multiplied by.
  void read_scales(int64_t first, int64_t n, double* scales) const {
    with_type(call.upstream_dtype, [&](auto tag) {
      const auto* const upstream = static_cast<const decltype(tag)*>(call.upstream) + first;
      for (int64_t i = 0; i < n; ++i) scales[i] = call.scale * double(static_cast<T>(upstream[i]));
    });
  }
};

// Both walks write what the call asks for and return the sum of the rows' losses. This one goes row
// by row, for classes that lie side by side.
template <class Loss>
double rows_contiguous(const RowsCall& call);
// Goes by tiles of neighbouring rows, for rows that lie side by side or have few classes.
template <class Loss>
double rows_tiled(const RowsCall& call);

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
