// Four numbers, as they are computed with and as they travel between ranks.
#pragma once

#include <bit>

#include "device/system.cuh"
#include "kernels/all_reduce.h"

namespace duplex::cuda {

struct alignas(16) Floats {
  float v[4];
};

DUPLEX_DEVICE Floats load_floats(const float* row, std::int64_t word) {
  return reinterpret_cast<const Floats*>(row)[word];
}
DUPLEX_DEVICE void store_floats(float* row, std::int64_t word, const Floats& floats) {
  reinterpret_cast<Floats*>(row)[word] = floats;
}

DUPLEX_DEVICE Words to_send(const Floats& floats) {
  Words words;
  for (int i = 0; i < 4; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(floats.v[i]);
    words.v[i] = bits == kEmpty ? 0x7fffffffu : bits;
  }
  return words;
}
DUPLEX_DEVICE bool has_arrived(const Words& words) {
  return words.v[0] != kEmpty && words.v[1] != kEmpty && words.v[2] != kEmpty &&
         words.v[3] != kEmpty;
}
DUPLEX_DEVICE Floats received(const Words& words) {
  Floats floats;
  for (int i = 0; i < 4; ++i) floats.v[i] = std::bit_cast<float>(words.v[i]);
  return floats;
}

}  // namespace duplex::cuda
