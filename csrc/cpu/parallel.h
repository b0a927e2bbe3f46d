// Threads, which whoever calls the engines brings along.
#pragma once

#include <cstdint>

namespace fusedloss::cpu {

// Calls body(context, first, last) for ranges [first, last) that make up [begin, end), each of at
// least `grain` where there are several, at the same time if it likes.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(void* context, int64_t first, int64_t last),
                             void* context);

// f(first, last), likewise.
template <class F>
void parallel_for(ParallelFor run, int64_t begin, int64_t end, int64_t grain, F&& f) {
  const auto body = [](void* context, int64_t first, int64_t last) {
    (*static_cast<decltype(&f)>(context))(first, last);
  };
  run(begin, end, grain, body, &f);
}

// On the calling thread alone.
inline void run_serially(int64_t begin, int64_t end, int64_t,
                         void (*body)(void* context, int64_t first, int64_t last), void* context) {
  if (begin < end) body(context, begin, end);
}

}  // namespace fusedloss::cpu
