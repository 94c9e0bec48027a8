// The host's twin of csrc/backend/cuda/device/loop.cuh: a loop is the address of a flag.
#pragma once

#include <bit>

#include "device/platform.cuh"
#include "device/runtime.h"

namespace duplex::cuda {

DUPLEX_DEVICE void set_loop(Loop loop, bool goes_on) { *std::bit_cast<bool*>(loop) = goes_on; }

}  // namespace duplex::cuda
