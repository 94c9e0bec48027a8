#include "backend/cpu/placement.h"

#include <pthread.h>

namespace duplex {

void Placement::adopt(std::vector<std::thread>& threads) {
  if (sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) return;
  if (CPU_COUNT(&allowed_) <= static_cast<int>(threads.size())) return;
  for (std::thread& thread : threads) threads_.push_back(thread.native_handle());
}

void Placement::keep_off_this_processor() {
  if (threads_.empty()) return;
  const int processor = sched_getcpu();
  if (processor < 0 || kept_off_.exchange(processor) == processor) return;
  cpu_set_t others = allowed_;
  if (processor < CPU_SETSIZE) CPU_CLR(static_cast<unsigned>(processor), &others);
  // One that cannot be placed (the process was moved to other processors) stays as it is.
  for (const auto thread : threads_) pthread_setaffinity_np(thread, sizeof others, &others);
}

}  // namespace duplex
