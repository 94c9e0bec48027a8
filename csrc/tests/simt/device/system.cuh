// The host's twin of csrc/backend/cuda/device/system.cuh, on the stores, the multicast objects and
// the clock of tests/simt/streams.h.
#pragma once

#include "device/platform.cuh"
#include "tests/simt/system_memory.h"

namespace duplex::cuda {

DUPLEX_DEVICE Words load_system(const void* address) {
  Words words;
  simt::load_system(address, words.v, 4);
  return words;
}
DUPLEX_DEVICE void store_system(void* address, const Words& words) {
  simt::store_system(address, words.v, 4);
}
DUPLEX_DEVICE void multicast_store(void* address, const Words& words) {
  simt::multicast_store(address, words.v, 4);
}
DUPLEX_DEVICE Words multicast_sum(const void* address) {
  Words sum;
  simt::multicast_sum(address, sum.v, 4);
  return sum;
}

DUPLEX_DEVICE std::uint32_t load_word_system(const std::uint32_t* address) {
  std::uint32_t word;
  simt::load_system(address, &word, 1);
  return word;
}
DUPLEX_DEVICE void store_word_system(std::uint32_t* address, std::uint32_t word) {
  simt::store_system(address, &word, 1);
}

DUPLEX_DEVICE void multicast_count_release(std::uint32_t* counter) {
  simt::fence_system();
  simt::multicast_count(counter);
}
DUPLEX_DEVICE std::uint32_t load_word_acquire(const std::uint32_t* address) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
DUPLEX_DEVICE void fence_system() { simt::fence_system(); }
DUPLEX_DEVICE void fence_addresses() {}  // one memory has one address here

// note: puts the blocks of a launch in order, which on the device it does not (docs/GPU.md).
DUPLEX_DEVICE std::uint32_t count_up(std::uint32_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL);
}

DUPLEX_DEVICE std::uint64_t clock_ns() { return simt::clock_ns(); }

DUPLEX_DEVICE void stop() { throw simt::Trap(); }

}  // namespace duplex::cuda
