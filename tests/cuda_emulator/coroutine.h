// Coroutines, and what the sanitizers are told of them. For emulator.cpp alone, which is compiled
// without any sanitizer: each is asked whether the program has been linked with it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <utility>

#include "emulator.h"

// Null where the program has been linked without the sanitizer.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] int __tsan_atomic32_load(const volatile int* address, int order);
[[gnu::weak]] long long __tsan_atomic64_load(const volatile long long* address, int order);
[[gnu::weak]] long long __tsan_atomic64_fetch_add(volatile long long* address, long long value,
                                                  int order);
[[gnu::weak]] void __asan_poison_memory_region(const volatile void* address, size_t bytes);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* bytes);
}

namespace emulator {

#if !defined(__x86_64__)
#error "the switch between coroutines is written for x86-64 alone"
#endif

// Saves the caller's registers on its stack, the stack pointer in *from, and goes on at `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;

inline char* map_memory(void* at, size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* memory = mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) fail("no memory");
  return static_cast<char*>(memory);
}

struct Coroutine {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* fiber = nullptr;       // ThreadSanitizer's

  void start(void (*body)()) {
    char* memory = map_memory(nullptr, kPage + kStackBytes);
    mprotect(memory, kPage, PROT_NONE);
    stack = memory + kPage;
    stack_bytes = kStackBytes;
    // As emulator_switch leaves a stack: six registers, then where it returns to.
    void** top = reinterpret_cast<void**>(memory + kPage + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(body);
    stack_pointer = top - 6;
    if (__tsan_create_fiber) fiber = __tsan_create_fiber(0);
  }
};

constexpr unsigned kUnordered = 1;  // __tsan_switch_to_fiber_no_sync

inline Coroutine host;

inline void arrive(Coroutine& at, Coroutine* from) {
  if (!__sanitizer_finish_switch_fiber) return;
  if (from == &host) {
    __sanitizer_finish_switch_fiber(at.fake_stack, &host.stack, &host.stack_bytes);
  } else {
    __sanitizer_finish_switch_fiber(at.fake_stack, nullptr, nullptr);
  }
}

inline Coroutine* left = nullptr;  // by the latest change

inline void change(Coroutine& from, Coroutine& to) {
  left = &from;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.fiber, kUnordered);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  }
  emulator_switch(&from.stack_pointer, to.stack_pointer);
  arrive(from, left);
}

// ---- what ThreadSanitizer is told ---------------------------------------------------------------

// In this scope accesses count as another coroutine's.
class As {
 public:
  explicit As(const Coroutine& coroutine) {
    if (!__tsan_switch_to_fiber) return;
    before_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(coroutine.fiber, kUnordered);
  }
  ~As() {
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(before_, kUnordered);
  }
  As(const As&) = delete;

 private:
  void* before_ = nullptr;
};

struct AsHost : As {
  AsHost() : As(host) {}
};

// Addresses that stand for moments: what came before release(moment) is ordered before what comes
// after acquire(moment). No two moments of a launch share one.
using Moment = char*;
constexpr size_t kMomentBytes = size_t{1} << 30;
inline Moment first_moment, next_moment;

inline Moment new_moment() {
  if (next_moment == first_moment + kMomentBytes) fail("too many barriers in one launch");
  return std::exchange(next_moment, next_moment + 8);
}
inline void release(Moment moment) {
  if (__tsan_release) __tsan_release(moment);
}
inline void acquire(Moment moment) {
  if (__tsan_acquire) __tsan_acquire(moment);
}
inline void forget_moments() {
  // Unmapped memory is what ThreadSanitizer forgets.
  const size_t used = (next_moment - first_moment + kPage - 1) / kPage * kPage;
  if (used) {
    munmap(first_moment, used);
    map_memory(first_moment, used);
  }
  next_moment = first_moment;
}

}  // namespace emulator
