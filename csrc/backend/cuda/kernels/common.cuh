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

// 1 / sqrt(mean(x^2) + eps) of a padded row in shared memory, for all threads of the block. Begins
// and ends with a barrier, so x may be written just before and just after. `slot` is one float of
// shared memory. note: the CPU's sixteen chains, so n_padded / 16 multiply-adds one after another;
// their inputs are read well ahead.
DUPLEX_DEVICE float inverse_rms(const float* x, std::int32_t n_padded, std::int32_t width,
                                float eps, float* slot) {
  sync_block();
  if (thread_index() < kWarp) {
    const float* const own = x + thread_index() % kLanes;
    float sum = 0.0f;
#pragma unroll 8
    for (std::int32_t i = 0; i < n_padded; i += kLanes) sum = fmaf(own[i], own[i], sum);
    for (int delta = kLanes / 2; delta > 0; delta /= 2) sum += shuffle_down(sum, delta, kLanes);
    if (thread_index() == 0) *slot = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
  }
  sync_block();
  return *slot;
}

// A row that is to be normalised by a thread block, in its shared memory. Every thread has the
// columns i = 4 thread_index() and on in steps of 4 n_threads().
inline constexpr int kMostThreads = 1024;
struct NormRow {
  float* x;       // (n)
  float* weight;  // (n)
  float* slot;
  std::int32_t n;  // padded
  std::int32_t width;

  static constexpr std::size_t bytes(std::int64_t width) {
    return static_cast<std::size_t>(2 * round_up(width, kColumnAlign) + kFour) * sizeof(float);
  }
  // As many threads as have something to do.
  static constexpr int threads(std::int64_t width) {
    const std::int64_t all = round_up(div_up(width, kFour), kWarp);
    return static_cast<int>(all < kMostThreads ? all : kMostThreads);
  }
};

// Starts the copy of the weights, so that they are there when the row is.
DUPLEX_DEVICE NormRow begin_norm(const float* weight, std::int32_t width) {
  const auto n = static_cast<std::int32_t>(round_up(width, kColumnAlign));
  auto* const x = reinterpret_cast<float*>(shared_memory());
  for (std::int32_t i = thread_index() * kFour; i < n; i += n_threads() * kFour)
    copy_async(x + n + i, weight + i);
  commit_copies();
  return {x, x + n, x + 2 * n, n, width};
}

// use(i, y) for y = weight * x / rms(x) of every four columns of the thread.
template <class Use>
DUPLEX_DEVICE void finish_norm(const NormRow& row, float eps, const Use& use) {
  const float scale = inverse_rms(row.x, row.n, row.width, eps, row.slot);
  wait_copies<0>();
  for (std::int32_t i = thread_index() * kFour; i < row.n; i += n_threads() * kFour) {
    const Four x = load_four(row.x + i), weight = load_four(row.weight + i);
    Four y;
    for (int c = 0; c < kFour; ++c) y.v[c] = x.v[c] * scale * weight.v[c];
    use(i, y);
  }
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
