// The host's twin of csrc/backend/cuda/device/platform.cuh: the same names, for kernels that are
// compiled as ordinary C++. Which of the two a kernel gets is a matter of the include path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "core/types.h"
#include "tests/simt/grid.h"

#define DUPLEX_KERNEL void
#define DUPLEX_KERNEL_OF(n_threads, n_blocks) void
#define DUPLEX_DEVICE inline

namespace duplex::cuda {

inline constexpr int kWarp = simt::kWarpLanes;

DUPLEX_DEVICE int thread_index() { return simt::here().thread; }
DUPLEX_DEVICE int n_threads() { return simt::here().n_threads; }
DUPLEX_DEVICE int block_x() { return simt::here().block[0]; }
DUPLEX_DEVICE int block_y() { return simt::here().block[1]; }
DUPLEX_DEVICE int block_z() { return simt::here().block[2]; }

DUPLEX_DEVICE void sync_block() { simt::sync_block(); }

// NaN until it is written.
DUPLEX_DEVICE std::byte* shared_memory() { return simt::here().shared; }

DUPLEX_DEVICE std::uint32_t add_shared(std::uint32_t* shared, std::uint32_t value) {
  return __atomic_fetch_add(shared, value, __ATOMIC_RELAXED);
}

DUPLEX_DEVICE float shuffle_down(float value, int delta, int width) {
  return simt::shuffle(simt::Wait::kShuffleDown, value, delta, width);
}
DUPLEX_DEVICE float shuffle_xor(float value, int mask, int width) {
  return simt::shuffle(simt::Wait::kShuffleXor, value, mask, width);
}
DUPLEX_DEVICE float shuffle_from(float value, int lane, int width) {
  return simt::shuffle(simt::Wait::kShuffleFrom, value, lane, width);
}

struct alignas(16) Words {
  std::uint32_t v[4];
};

DUPLEX_DEVICE Words load_streamed(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(Words) != 0)
    throw std::logic_error("load_streamed: the address is no multiple of 16");
  Words words;
  std::memcpy(&words, address, sizeof words);
  return words;
}

DUPLEX_DEVICE void load_streamed(const void* address, std::uint32_t (&words)[2]) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof words != 0)
    throw std::logic_error("load_streamed: the address is no multiple of 8");
  std::memcpy(words, address, sizeof words);
}

DUPLEX_DEVICE void prefetch(const void* address, std::uint32_t bytes) {
  simt::prefetch(address, bytes);
}

DUPLEX_DEVICE void copy_async(void* shared, const void* global) {
  simt::copy_async(shared, global);
}
DUPLEX_DEVICE void commit_copies() { simt::commit_copies(); }
template <int kPending>
DUPLEX_DEVICE void wait_copies() {
  simt::wait_copies(kPending);
}

DUPLEX_DEVICE std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  const auto product = [&](int shift) {
    const float x = bf16_to_float(static_cast<std::uint16_t>(a >> shift));
    const float y = bf16_to_float(static_cast<std::uint16_t>(b >> shift));
    return std::uint32_t{float_to_bf16(x * y)} << shift;
  };
  return product(0) | product(16);
}

DUPLEX_DEVICE std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t choice) {
  if ((choice & 0x8888u) != 0) throw std::logic_error("permute_bytes: expected 0 to 7");
  const std::uint64_t both = a | std::uint64_t{b} << 32;
  std::uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i)
    bytes |= static_cast<std::uint32_t>(both >> (choice >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  return bytes;
}

DUPLEX_DEVICE void multiply_add(float (&acc)[4], const Words& a, std::uint32_t b0,
                                std::uint32_t b1) {
  const std::uint32_t b[2] = {b0, b1};
  simt::multiply_fragments(acc, a.v, b);
}
DUPLEX_DEVICE void multiply_add(std::int32_t (&acc)[4], const Words& a, std::uint32_t b0,
                                std::uint32_t b1) {
  const std::uint32_t b[2] = {b0, b1};
  simt::multiply_fragments(acc, a.v, b, simt::Unsigned::kNone);
}
DUPLEX_DEVICE void multiply_add_left_unsigned(std::int32_t (&acc)[4], const Words& a,
                                              std::uint32_t b0, std::uint32_t b1) {
  const std::uint32_t b[2] = {b0, b1};
  simt::multiply_fragments(acc, a.v, b, simt::Unsigned::kLeft);
}
DUPLEX_DEVICE void multiply_add_right_unsigned(std::int32_t (&acc)[4], const Words& a,
                                               std::uint32_t b0, std::uint32_t b1) {
  const std::uint32_t b[2] = {b0, b1};
  simt::multiply_fragments(acc, a.v, b, simt::Unsigned::kRight);
}

}  // namespace duplex::cuda
