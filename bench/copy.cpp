// The least work of a loss step: read one or two tensors, write one. Compiled by bench/limit.py.
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLine = 64;  // bytes of a cache line

struct Line {
  uint64_t words[kLine / sizeof(uint64_t)];
};

Line load(const char* at) {
  Line line;
  std::memcpy(&line, at, kLine);
  return line;
}

// Any operation that needs both numbers will do; this one is as fast whatever the bits mean.
Line both(Line a, const Line& b) {
  for (size_t i = 0; i < sizeof a.words / sizeof *a.words; ++i) a.words[i] ^= b.words[i];
  return a;
}

// Writes past the caches, which saves reading the line first; `at` is a multiple of kLine.
void stream(char* at, const Line& line) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(at), _mm512_loadu_si512(&line));
#elif defined(__AVX__)
  for (size_t i = 0; i < kLine; i += sizeof(__m256i)) {
    const auto part = reinterpret_cast<const char*>(&line) + i;
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
  }
#elif defined(__SSE2__)
  for (size_t i = 0; i < kLine; i += sizeof(__m128i)) {
    const auto part = reinterpret_cast<const char*>(&line) + i;
    _mm_stream_si128(reinterpret_cast<__m128i*>(at + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(part)));
  }
#else
  std::memcpy(at, &line, kLine);
#endif
}

template <bool kTwoInputs, bool kStream>
void copy_lines(const char* a, const char* b, char* out, size_t lines, int threads) {
#pragma omp parallel num_threads(threads) if (lines >= 2048)
  {
#pragma omp for schedule(static) nowait
    for (size_t i = 0; i < lines; ++i) {
      Line line = load(a + i * kLine);
      if constexpr (kTwoInputs) line = both(line, load(b + i * kLine));
      if constexpr (kStream) {
        stream(out + i * kLine, line);
      } else {
        std::memcpy(out + i * kLine, &line, kLine);
      }
    }
#if defined(__SSE2__)
    if constexpr (kStream) _mm_sfence();
#endif
  }
}

}  // namespace

// out = a, or a ^ b where b is not null; tensors of `bytes` bytes.
extern "C" void fusedloss_copy(const char* a, const char* b, char* out, size_t bytes, int streaming,
                               int threads) {
  const size_t lines = bytes / kLine;
  const bool streams = streaming != 0 && reinterpret_cast<uintptr_t>(out) % kLine == 0;
  const auto copy = b == nullptr ? (streams ? copy_lines<false, true> : copy_lines<false, false>)
                                 : (streams ? copy_lines<true, true> : copy_lines<true, false>);
  copy(a, b, out, lines, threads);
  for (size_t i = lines * kLine; i < bytes; ++i) {
    out[i] = static_cast<char>(a[i] ^ (b == nullptr ? 0 : b[i]));
  }
}
