// Arithmetic that several kernels share. It is the CPU backend's, operation by operation and in its
// order, so float32 results are the same bits on both (csrc/backend/cpu/kernels_rows.h).
#pragma once

#include <bit>
#include <cmath>

#include "backend/op_args.h"
#include "device/chain.cuh"

namespace duplex::cuda {

inline constexpr float kMinusInfinity = -INFINITY;
inline constexpr int kLanes = 16;  // partial sums of a norm: as many as the CPU's vectors have

// exp(x) for x <= 0 to about one unit in the last place; never below exp(-87.3), a normal number.
DUPLEX_DEVICE float exp_nonpositive(float x) {
  const float clamped = x > -87.3f ? x : -87.3f;
  const float n = rintf(clamped * 1.44269504088896341f);
  float r = fmaf(n, -0.693359375f, clamped);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(r * r, p, r) + 1.0f;
  // p * 2^n, never below the normal numbers: added to the exponent.
  return std::bit_cast<float>(std::bit_cast<std::int32_t>(p) +
                              (static_cast<std::int32_t>(n) << 23));
}

DUPLEX_DEVICE float silu(float x) {
  const float e = exp_nonpositive(-fabsf(x));
  const float denominator = 1.0f + e;
  const float positive = (x > 0.0f ? x : 0.0f) / denominator;
  return fmaf(x < 0.0f ? x : 0.0f, e / denominator, positive);
}

DUPLEX_DEVICE float load(const void* base, DType dtype, std::int64_t at) {
  return dtype == DType::kF32 ? static_cast<const float*>(base)[at]
                              : bf16_to_float(static_cast<const std::uint16_t*>(base)[at]);
}

DUPLEX_DEVICE void store(const Rows& rows, std::int64_t row, std::int64_t column, float value) {
  const std::int64_t at = row * rows.stride + column;
  if (rows.dtype == DType::kF32)
    static_cast<float*>(rows.data)[at] = value;
  else
    static_cast<std::uint16_t*>(rows.data)[at] = float_to_bf16(value);
}

// Four columns of a row: what a thread loads at once. Rows, tapes and weights lie at multiples of
// kColumnAlign columns.
struct alignas(16) Four {
  float v[4];
};
inline constexpr int kFour = 4;

DUPLEX_DEVICE Four load_four(const float* at) { return *reinterpret_cast<const Four*>(at); }
DUPLEX_DEVICE void store_four(float* at, const Four& x) { *reinterpret_cast<Four*>(at) = x; }

struct alignas(8) FourHalves {
  std::uint16_t v[4];
};

DUPLEX_DEVICE Four load_four(const void* base, DType dtype, std::int64_t at) {
  if (dtype == DType::kF32) return load_four(static_cast<const float*>(base) + at);
  const auto x = *reinterpret_cast<const FourHalves*>(static_cast<const std::uint16_t*>(base) + at);
  return {
      {bf16_to_float(x.v[0]), bf16_to_float(x.v[1]), bf16_to_float(x.v[2]), bf16_to_float(x.v[3])}};
}

DUPLEX_DEVICE void store_four(const Rows& rows, std::int64_t row, std::int64_t column,
                              const Four& x) {
  const std::int64_t at = row * rows.stride + column;
  if (rows.dtype == DType::kF32)
    store_four(static_cast<float*>(rows.data) + at, x);
  else
    *reinterpret_cast<FourHalves*>(static_cast<std::uint16_t*>(rows.data) +
                                   at) = {{float_to_bf16(x.v[0]), float_to_bf16(x.v[1]),
                                           float_to_bf16(x.v[2]), float_to_bf16(x.v[3])}};
}

// tau of the log-scaled global layers: 1 + alpha * log(max((position + 1) / floor, 1)).
DUPLEX_DEVICE float log_scaling_tau(std::int64_t position, std::int32_t floor, float alpha) {
  if (floor <= 0) return 1.0f;
  const float n = static_cast<float>(position + 1) / static_cast<float>(floor);
  // In double, as on the CPU: the two libraries' logf differ.
  return n <= 1.0f ? 1.0f : 1.0f + alpha * static_cast<float>(log(static_cast<double>(n)));
}

// The segment of a row, looked for by all threads of the block. `slot` is one number of shared
// memory.
DUPLEX_DEVICE const Segment& segment_of(const Segments& segments, std::int32_t row,
                                        std::int32_t* slot) {
  if (segments.count == 1) return segments.data[0];
  for (std::int32_t i = thread_index(); i < segments.count; i += n_threads()) {
    const std::int32_t back = row - segments.data[i].row_begin;
    if (back >= 0 && back < segments.data[i].n_rows) *slot = i;
  }
  sync_block();
  return segments.data[*slot];
}

}  // namespace duplex::cuda
