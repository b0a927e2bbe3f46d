// Copies to shared memory that a thread waits for. Here each is made only when it is waited for:
// what is read before that is what was there before.
#pragma once

#include <cstring>

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulator::begin_copy({to, from, bytes});
}
inline void __pipeline_commit() { emulator::close_lot(); }
inline void __pipeline_wait_prior(size_t prior) {
  emulator::Copy copy;
  while (emulator::next_copy(prior, copy)) std::memcpy(copy.to, copy.from, copy.bytes);
}
