// The order of threads and blocks that set_order() or the environment asks for.
#pragma once

#include "tests/simt/grid.h"

namespace duplex::simt {

struct Schedule {
  Order order = Order::kForward;
  std::uint16_t generation = 0;  // counts calls of set_order
  std::uint32_t seed = 0;
  bool operator==(const Schedule&) const = default;
};
Schedule current_schedule();

}  // namespace duplex::simt
