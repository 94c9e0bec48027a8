// Rows of keys, values and queries as int8 codes, as the CPU makes them
// (csrc/backend/cpu/kernels_kv_int8.h).
#pragma once

#include "backend/kv_int8.h"
#include "kernels/common.cuh"

namespace duplex::cuda {

inline constexpr float kLog2e = 1.44269504088896341f;

// 2^t for t < 128 to 2e-5 of it: enough for a weight that is stored in 8 bits.
DUPLEX_DEVICE float exp2_of_bf16(float t) {
  const float clamped = t > -126.0f ? t : -126.0f;
  const float n = rintf(clamped);
  const float f = clamped - n;
  float p = 9.666373953e-3f;
  p = fmaf(p, f, 5.583834276e-2f);
  p = fmaf(p, f, 0.24022348225f);
  p = fmaf(p, f, 0.69313675165f);
  return ldexpf(fmaf(p, f, 1.0f), static_cast<int>(n));
}

// What makes the largest of n numbers 127, n a multiple of four, for a warp that looks at all.
DUPLEX_DEVICE float kv_scale(const float* x, std::int32_t n) {
  float largest = 0.0f;
  for (std::int32_t c = thread_index() % kWarp * kFour; c < n; c += kWarp * kFour)
    for (const float value : load_four(x + c).v) largest = fmaxf(largest, fabsf(value));
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    largest = fmaxf(largest, shuffle_xor(largest, mask, kWarp));
  return kv_scale_of(largest);
}

// Codes of x / scale, not yet integers by type. The bounds are for rows that are not numbers.
DUPLEX_DEVICE Four nearest_codes(const Four& x, float inverse) {
  Four codes;
  for (int i = 0; i < kFour; ++i)
    codes.v[i] = fminf(fmaxf(rintf(x.v[i] * inverse), -127.0f), 127.0f);
  return codes;
}
DUPLEX_DEVICE std::uint32_t code_byte(float code) {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(code)) & 0xffu;
}
DUPLEX_DEVICE std::uint32_t code_word(const Four& codes) {
  std::uint32_t word = 0;
  for (int i = 0; i < kFour; ++i) word |= code_byte(codes.v[i]) << 8 * i;
  return word;
}

}  // namespace duplex::cuda
