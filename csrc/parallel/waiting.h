// How a thread of a rank waits for a count of another thread: it looks for a while, then sleeps.
//
// The sleeper says in its bell what it waits for, then looks once more, then sleeps unless the bell
// has rung since before that look. The other side counts up, then looks who waits for it, and
// rings. All four are sequentially consistent: either the sleeper sees the count, or the other side
// sees that it sleeps. csrc/tests/parallel/protocol_steps.cpp has the same steps as a table, of
// which tests try all interleavings.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "core/pause.h"
#include "parallel/group.h"
#include "parallel/layout.h"

namespace duplex {

using WaitClock = std::chrono::steady_clock;
inline constexpr WaitClock::time_point kNoDeadline = WaitClock::time_point::max();

// Sleeps while the bell has rung `rung` times, at most until the deadline.
void sleep_until_rung(const Bell& bell, std::uint32_t rung, WaitClock::time_point deadline);
// Wakes who sleeps there, whatever it waits for.
void ring(Bell& bell);
// Wakes who waits for `what`, which has been counted up.
inline void ring_if_awaited(Bell& bell, std::uint32_t what) {
  if (bell.awaits.load() == what) ring(bell);
}

// Waits until is_ready(), which reads counts with sequential consistency. False: the deadline has
// passed. Throws RankFailed once a rank has failed. `what` is not 0.
template <class IsReady>
bool wait_until(const Group& group, Bell& bell, std::uint32_t what, WaitClock::time_point deadline,
                const IsReady& is_ready) {
  constexpr int kLooks = 64;  // between two looks at the clock
  const auto end_of_spin = std::min(WaitClock::now() + group.spin(), deadline);
  do {
    for (int i = 0; i < kLooks; ++i) {
      if (is_ready()) return true;
      pause();
    }
    group.check_alive();
  } while (WaitClock::now() < end_of_spin);
  for (;;) {
    bell.awaits.store(what);
    const std::uint32_t rung = bell.rung.load();
    const bool ready = is_ready();
    if (ready || group.failed_rank() >= 0 || WaitClock::now() >= deadline) {
      bell.awaits.store(0, std::memory_order_relaxed);
      if (!ready) group.check_alive();
      return ready;
    }
    sleep_until_rung(bell, rung, deadline);
  }
}

}  // namespace duplex
