// Stores that go past the caches: lines that are written whole are not read into them first, and
// throw nothing out of them.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../math/vocabulary.h"

namespace fusedloss::cpu {
namespace CPU_CAPABILITY {

// Whether stream() takes p.
template <class T>
bool is_streamable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vec<T>) == 0;
}

// finish_stream() comes before other threads read.
template <class T>
FUSEDLOSS_HD void stream(Vec<T> v, T* p) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(p, v);
  } else {
    _mm512_stream_pd(p, v);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(p, v);
  } else {
    _mm256_stream_pd(p, v);
  }
#else
  v.store(p);
#endif
}

inline void finish_stream() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss::cpu
