// Arithmetic that several kernels share. It is the CPU backend's, operation by operation and in its
// order, so float32 results are the same bits on both (csrc/backend/cpu/kernels_rows.h).
#pragma once

#include <cmath>

#include "backend/op_args.h"
#include "device/platform.cuh"

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
  return ldexpf(p, static_cast<int>(n));
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

// 1 / sqrt(mean(x^2) + eps) of a padded row in shared memory, for all threads of the block. Begins
// and ends with a barrier, so x may be written just before and just after. `slot` is one float of
// shared memory.
DUPLEX_DEVICE float inverse_rms(const float* x, std::int64_t n_padded, std::int64_t width,
                                float eps, float* slot) {
  sync_block();
  if (thread_index() < kWarp) {
    float sum = 0.0f;
    for (std::int64_t i = thread_index() % kLanes; i < n_padded; i += kLanes)
      sum = fmaf(x[i], x[i], sum);
    for (int delta = kLanes / 2; delta > 0; delta /= 2) sum += shuffle_down(sum, delta, kLanes);
    if (thread_index() == 0) *slot = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
  }
  sync_block();
  return *slot;
}

// tau of the log-scaled global layers: 1 + alpha * log(max((position + 1) / floor, 1)).
DUPLEX_DEVICE float log_scaling_tau(std::int64_t position, std::int32_t floor, float alpha) {
  if (floor <= 0) return 1.0f;
  const float n = static_cast<float>(position + 1) / static_cast<float>(floor);
  // In double, as on the CPU: the two libraries' logf differ.
  return n <= 1.0f ? 1.0f : 1.0f + alpha * static_cast<float>(log(static_cast<double>(n)));
}

DUPLEX_DEVICE const Segment& segment_of(const Segments& segments, std::int32_t row) {
  const Segment* segment = segments.data;
  while (row >= segment->row_begin + segment->n_rows) ++segment;
  return *segment;
}

}  // namespace duplex::cuda
