// Keys and values of a tape as int8 codes: one scale a position and head.
//
// A key is codes times a bfloat16 scale; a value is codes times 2^l, l a bfloat16. Either is taken
// from above, so that no code exceeds 127. Queries become codes in the same way, with a float
// scale. Panels of a block: kv_panel_bytes in views.h. Included by kernels_<isa>.cpp; see
// kernels_gemm.h.
#pragma once

#include <cmath>

#include "backend/cpu/kernels.h"
#include "backend/kv_int8.h"

namespace duplex::DUPLEX_ISA {

// What makes the largest of n numbers 127.
inline float kv_scale(const float* x, std::int64_t n) {
  F16 largest = zero();
  for (std::int64_t i = 0; i < n; i += 16)
    largest = max(largest, max(load(x + i), sub(zero(), load(x + i))));
  return kv_scale_of(reduce_max(largest));
}

// Codes of x / scale; returns their sum.
inline std::int32_t kv_codes(const float* x, std::int64_t n, float inverse, std::int8_t* codes) {
  I16 sum = splat(0);
  for (std::int64_t i = 0; i < n; i += 16) {
    const I16 rounded = to_codes(mul(load(x + i), set1(inverse)));
    store_codes(codes + i, rounded);
    sum = add(sum, rounded);
  }
  return reduce_add(sum);
}

// Codes + 128 of channels c, c + 1, c + 2, c + 3 lie together, then those of the next position.
inline void write_key_int8(std::byte* panel, std::int64_t slot, const float* key, std::int64_t n) {
  const std::uint16_t scale = bf16_from_above(kv_scale(key, n));
  reinterpret_cast<std::uint16_t*>(panel)[slot] = scale;
  std::int8_t codes[kMaxHeadWidth];
  kv_codes(key, n, 1.0f / bf16_to_float(scale), codes);
  auto* to = reinterpret_cast<std::uint8_t*>(panel + kKvScalesBytes);
  for (std::int64_t c = 0; c < n; ++c)
    to[(c / kQuad * kBlockPositions + slot) * kQuad + c % kQuad] =
        static_cast<std::uint8_t>(codes[c] + 128);
}

// Codes of positions p, p + 1, p + 2, p + 3 lie together, then those of the next channel. note:
// logarithm and power are taken in double, where libraries differ too little to matter.
inline void write_value_int8(std::byte* panel, std::int64_t slot, const float* value,
                             std::int64_t n) {
  const double log2 = std::log2(static_cast<double>(kv_scale(value, n)));
  const std::uint16_t log2_scale = bf16_from_above(static_cast<float>(log2));
  reinterpret_cast<std::uint16_t*>(panel)[slot] = log2_scale;
  std::int8_t codes[kMaxHeadWidth];
  const double inverse = std::exp2(-static_cast<double>(bf16_to_float(log2_scale)));
  kv_codes(value, n, static_cast<float>(inverse), codes);
  auto* to = reinterpret_cast<std::int8_t*>(panel + kKvScalesBytes) + slot / kQuad * n * kQuad;
  for (std::int64_t c = 0; c < n; ++c) to[c * kQuad + slot % kQuad] = codes[c];
}

}  // namespace duplex::DUPLEX_ISA
