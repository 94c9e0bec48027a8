// What the lanes of a warp do together once all have arrived.
#pragma once

#include <cstdint>

#include "tests/simt/grid.h"

namespace duplex::simt {

// What one lane brings, and takes away.
struct Exchange {
  float value = 0;  // of a shuffle: before, then after
  int argument = 0;
  int width = 0;
  float* acc = nullptr;  // (4) of a matrix product
  std::int32_t* integer_acc = nullptr;
  Unsigned codes = Unsigned::kNone;
  std::uint32_t a[4] = {};
  std::uint32_t b[2] = {};
};

// `lanes` are the 32 of a warp, in order.
void exchange_lanes(Wait kind, Exchange* const* lanes);

}  // namespace duplex::simt
