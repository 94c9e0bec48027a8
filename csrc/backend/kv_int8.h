// Keys and values in int8, alike for all backends: where codes lie, what scales are, and the
// constants of their attention. The formulas are in docs/CHECKPOINT.md; what a backend does with
// them is its own (cpu/kernels_kv_int8.h, cuda/kernels/kv_int8.cuh).
#pragma once

#include <bit>
#include <cstdint>

#include "core/types.h"

namespace duplex {

inline constexpr std::int64_t kKvScalesBytes = kBlockPositions * 2;  // in front of a panel's codes
inline constexpr std::int64_t kQuad = 4;  // codes that one step of a sum takes
// The scale of numbers too small to matter, zeros above all. The logarithm of a value's scale is
// part of its score, so it must not lie below what a float exponent holds.
inline constexpr float kLeastKvScale = 0x1p-60f;

// What makes a row's largest magnitude 127.
[[gnu::always_inline]] constexpr float kv_scale_of(float largest) {
  const float scale = largest / 127.0f;
  return scale > kLeastKvScale ? scale : kLeastKvScale;
}

// The least bfloat16 that is no less than a finite x.
[[gnu::always_inline]] constexpr std::uint16_t bf16_from_above(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>(x < 0 ? bits >> 16 : (bits + 0xffffu) >> 16);
}

// Of a block's largest weight, whose code is 255.
inline constexpr float kLog2Of255 = 7.99435343685886f;
// A vector's maximum follows the scores only when they have outgrown it by this, which floats have
// room for: rescaling what has been gathered is then rare.
inline constexpr float kScoreRoom = 32.0f;

}  // namespace duplex
