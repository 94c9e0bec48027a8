// How many processors there are for this process.
#pragma once

#include <sched.h>

namespace duplex {

// That the calling thread may use, which are fewer than there are under taskset or in a container;
// 0 where the system does not say.
inline int available_processors() {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 0;
}

}  // namespace duplex
