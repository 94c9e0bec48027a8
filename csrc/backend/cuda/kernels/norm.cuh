// RMSNorm of a row by a thread block: the CPU's sums, while what else it needs is on its way.
#pragma once

#include "kernels/common.cuh"

namespace duplex::cuda {

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

}  // namespace duplex::cuda
