// Copies to shared memory that a thread waits for. Here each is made at once or only when it is
// waited for, as chance has it: until then nothing is known of what is there.
#pragma once

#include <cstring>

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (emulator::begin_copy({to, from, bytes})) std::memcpy(to, from, bytes);
}
inline void __pipeline_commit() { emulator::close_lot(); }
inline void __pipeline_wait_prior(size_t prior) {
  emulator::Copy copy;
  while (emulator::next_copy(prior, copy)) std::memcpy(copy.to, copy.from, copy.bytes);
}
