// Four numbers, as they are computed with and as they travel between ranks.
#pragma once

#include <bit>

#include "device/system.cuh"
#include "kernels/all_reduce.h"
#include "kernels/common.cuh"

namespace duplex::cuda {

DUPLEX_DEVICE Four load_word(const float* row, std::int64_t word) {
  return load_four(row + kFour * word);
}
DUPLEX_DEVICE void store_word(float* row, std::int64_t word, const Four& numbers) {
  store_four(row + kFour * word, numbers);
}

DUPLEX_DEVICE Words to_send(const Four& numbers) {
  Words words;
  for (int i = 0; i < 4; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(numbers.v[i]);
    words.v[i] = bits == kEmpty ? 0x7fffffffu : bits;
  }
  return words;
}
DUPLEX_DEVICE bool has_arrived(const Words& words) {
  return words.v[0] != kEmpty && words.v[1] != kEmpty && words.v[2] != kEmpty &&
         words.v[3] != kEmpty;
}
DUPLEX_DEVICE Four received(const Words& words) {
  Four numbers;
  for (int i = 0; i < 4; ++i) numbers.v[i] = std::bit_cast<float>(words.v[i]);
  return numbers;
}

}  // namespace duplex::cuda
