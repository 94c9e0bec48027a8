#include "parallel/waiting.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace duplex {

// The word is shared between processes, so neither call uses a private futex.
void sleep_until_rung(const Bell& bell, std::uint32_t rung, WaitClock::time_point deadline) {
  timespec left{};
  if (deadline != kNoDeadline) {
    const auto wait = deadline - WaitClock::now();
    if (wait <= wait.zero()) return;
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(wait);
    left.tv_sec = seconds.count();
    left.tv_nsec = std::chrono::nanoseconds(wait - seconds).count();
  }
  // Whatever it returns for, a signal too, the caller looks again.
  ::syscall(SYS_futex, &bell.rung, FUTEX_WAIT, rung, deadline == kNoDeadline ? nullptr : &left,
            nullptr, 0);
}

void ring(Bell& bell) {
  bell.rung.fetch_add(1);
  ::syscall(SYS_futex, &bell.rung, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace duplex
