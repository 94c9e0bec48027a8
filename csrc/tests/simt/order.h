// What ThreadSanitizer is told: every CUDA thread is a thread of its own, and nothing is in order
// but what the device puts in order. Nothing without it. What it sees, and what not: docs/GPU.md.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#define DUPLEX_TSAN(...) __VA_ARGS__
#define DUPLEX_UNSEEN __attribute__((no_sanitize("thread")))  // a function of the twin's own
#else
#define DUPLEX_TSAN(...)
#define DUPLEX_UNSEEN
#endif

namespace duplex::simt {

// What the thread has done before release() comes before what another does behind acquire().
inline void release([[maybe_unused]] const void* place) {
  DUPLEX_TSAN(__tsan_release(const_cast<void*>(place));)
}
inline void acquire([[maybe_unused]] const void* place) {
  DUPLEX_TSAN(__tsan_acquire(const_cast<void*>(place));)
}
// A relaxed store that is only noted yet.
inline void note_store([[maybe_unused]] void* word) {
  DUPLEX_TSAN(__atomic_fetch_or(static_cast<std::uint32_t*>(word), 0, __ATOMIC_RELAXED);)
}

// What the thread does for as long as this lives is the twin's own business.
class Unseen {
 public:
  Unseen() { DUPLEX_TSAN(__tsan_ignore_thread_begin();) }
  ~Unseen() { DUPLEX_TSAN(__tsan_ignore_thread_end();) }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// The order of launches that are behind each other: a grid sees what the host did before, and the
// ends of the grids before; its own blocks do not see each other's.
class LaunchOrder {
 public:
  void begin_launch() {  // by the host
    ++n_begun_;
    release(&begun_);
  }
  void begin_thread(bool is_early) const {
    acquire(&begun_);
    if (!is_early) wait_for_previous_grid();
  }
  void wait_for_previous_grid() const { acquire(&ended_[(n_begun_ - 1) % 2]); }
  void end_thread() { release(&ended_[n_begun_ % 2]); }
  void wait_for_all() const {  // by the host
    for (const char& place : ended_) acquire(&place);
  }

 private:
  unsigned n_begun_ = 0;
  char begun_ = 0, ended_[2] = {};
};
LaunchOrder& launch_order();  // of the stream whose kernel runs, or this system thread's own
// As long as it lives, kernels that this system thread runs are of a stream with this order.
class InLaunchOrder {
 public:
  explicit InLaunchOrder(LaunchOrder& order);
  ~InLaunchOrder();
  InLaunchOrder(const InLaunchOrder&) = delete;
  InLaunchOrder& operator=(const InLaunchOrder&) = delete;
};

}  // namespace duplex::simt
