// Grids that begin before the one in front of them has ended: kernels of Runtime::launch_early().
// The host's twin is csrc/tests/simt/device/chain.cuh.
//
// Such launches, one behind the other, are a chain. What was put into the stream before the first
// of them has ended when it begins. Three rules make the rest safe:
//
// - Every thread calls wait_for_previous_grid(), even one that has nothing to do.
// - Before that it writes no global memory: a grid in front may still read what is there.
// - Before that it reads none that any kernel of the chain writes. Weights and segments may be read
//   (the chain does not write them), and keys and values of positions before the segment's.
//
// The wait returns when the grid in front has ended, and what it wrote can be seen. That one waited
// as well before it ended, so all of the chain in front of it has ended too. A launch that is not
// early, a copy or an event behind a chain comes after its last grid, so after all of it.
//
// A grid begins when all thread blocks of the one in front have called let_next_grid_begin() or
// ended. They all have their places by then, so blocks that wait take none from those that they
// wait for, and no kernel here waits for a later one: the oldest grid can always go on.
#pragma once

#include "device/platform.cuh"

namespace duplex::cuda {

DUPLEX_DEVICE void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DUPLEX_DEVICE void let_next_grid_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// As load_streamed(), of what a grid in front may have written after this one had begun.
DUPLEX_DEVICE Words load_written(const void* address) {
  Words words;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.v[0]), "=r"(words.v[1]), "=r"(words.v[2]), "=r"(words.v[3])
               : "l"(address)
               : "memory");
  return words;
}

}  // namespace duplex::cuda
