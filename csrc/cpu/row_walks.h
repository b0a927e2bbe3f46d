// What the walks over rows share: reading and writing operands, tiles, and tasks with their sums. T
// is the type that a loss is computed in.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

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

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

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

// ---- tiles --------------------------------------------------------------------------------------

// An output of this many bytes does not stay in the caches until it is read.
constexpr size_t kStreamed = 16 << 20;

// The rows [begin, begin + n) of the inner dimension, at one place of the outer one.
struct Tile {
  int64_t outer, begin, n;
  int64_t offset(const Rows& rows, int64_t c = 0, int64_t row = 0) const {
    return outer * rows.outer + c * rows.classes + (begin + row) * rows.inner;
  }
};

// Copies tiles to and from (classes, width) arrays, a line a class.
template <class T>
struct TileCopier {
  static constexpr int64_t kLanes = Vec<T>::size();
  const int64_t classes, width;
  const Buffer<T> row_buffer{kLanes * classes};  // rows with classes side by side, in another dtype

  // Whether rows are transposed on the way: if their classes lie side by side and fill a register.
  bool transposes(const Rows& rows) const { return rows.classes == 1 && classes >= kLanes; }

  template <bool kWrite>
  void copy(const Rows& rows, const Tile& tile, T* lines) const {
    void* const data = const_cast<void*>(rows.data);
    const auto convert = [&](int64_t offset, int64_t stride, int64_t n, T* numbers) {
      if constexpr (kWrite) {
        narrow(numbers, n, rows.dtype, data, offset, stride);
      } else {
        widen(rows.dtype, data, offset, stride, n, numbers);
      }
    };
    if (!kWrite && tile.n < width) std::fill_n(lines, classes * width, T(0));
    for (int64_t c = 0; !transposes(rows) && c < classes; ++c) {
      convert(tile.offset(rows, c), rows.inner, tile.n, lines + c * width);
    }
    const bool direct = is_dtype<T>(rows.dtype);
    for (int64_t i = 0; transposes(rows) && i < tile.n; i += kLanes) {
      const int64_t count = std::min(kLanes, tile.n - i), stride = direct ? rows.inner : classes;
      T* const by_row = direct ? elements<T>(rows, tile.offset(rows, 0, i)) : row_buffer.data();
      const auto convert_rows = [&] {
        for (int64_t k = 0; !direct && k < count; ++k) {
          convert(tile.offset(rows, 0, i + k), 1, classes, by_row + k * classes);
        }
      };
      if constexpr (kWrite) {
        transpose(lines + i, width, by_row, stride, classes, count);
        convert_rows();
      } else {
        convert_rows();
        transpose(by_row, stride, lines + i, width, count, classes);
      }
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
