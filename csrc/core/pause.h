// What a thread does between two looks at a word that another thread will change.
#pragma once

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <thread>
#endif

namespace duplex {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` is taken for a nop
#else
  std::this_thread::yield();
#endif
}

}  // namespace duplex
