#include "backend/cpu/placement.h"

#include <pthread.h>

namespace duplex {

void Placement::adopt(std::vector<std::thread>& threads) {
  if (sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) return;
  if (CPU_COUNT(&allowed_) <= static_cast<int>(threads.size())) return;
  given_ = allowed_;
  for (std::thread& thread : threads) threads_.push_back(thread.native_handle());
}

void Placement::keep_off_this_processor() {
  if (threads_.empty()) return;
  const int processor = sched_getcpu();
  if (processor < 0 || kept_off_.exchange(processor) == processor) return;
  // Others than they were given: the user has moved the process.
  cpu_set_t found;
  if (pthread_getaffinity_np(threads_.front(), sizeof found, &found) == 0 &&
      !CPU_EQUAL(&found, &given_))
    allowed_ = found;
  given_ = allowed_;
  if (processor < CPU_SETSIZE) CPU_CLR(static_cast<unsigned>(processor), &given_);
  // One that cannot be placed (there is no other processor) stays as it is.
  for (const auto thread : threads_) pthread_setaffinity_np(thread, sizeof given_, &given_);
}

}  // namespace duplex
