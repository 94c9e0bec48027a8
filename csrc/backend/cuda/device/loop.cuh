// Loops of a record (Runtime::record_loop), whose end a kernel decides. The host's twin is
// csrc/tests/simt/device/loop.cuh.
#pragma once

#include "device/platform.cuh"
#include "device/runtime.h"

namespace duplex::cuda {

// Whether the loop goes round once more: by one thread of the last launch in front of it, and of
// the last launch inside.
DUPLEX_DEVICE void set_loop(Loop loop, bool goes_on) {
  cudaGraphSetConditional(loop, goes_on ? 1u : 0u);
}

}  // namespace duplex::cuda
