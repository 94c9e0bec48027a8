// The host's twin of csrc/backend/cuda/device/chain.cuh. A thread that returns without the wait is
// an error; in a record, some blocks go as far as the wait before the launch in front of them
// begins (tests/simt/chain.cpp), so whoever reads rows too early reads old ones.
#pragma once

#include "device/platform.cuh"

namespace duplex::cuda {

DUPLEX_DEVICE void wait_for_previous_grid() { simt::wait_for_previous_grid(); }
DUPLEX_DEVICE void let_next_grid_begin() {}  // it may at any time

DUPLEX_DEVICE Words load_written(const void* address) { return load_streamed(address); }

}  // namespace duplex::cuda
