// The learned biases of a part of attention, and what of the part a vector sees: bfloat16 and int8.
#pragma once

#include "kernels/attention_parts.cuh"

namespace duplex::cuda {

// The learned biases that the vectors of a thread block meet in its part are in shared memory, a
// bank of (d_rel, launch.bank_width): those of the newest row first, and of each older row a column
// behind.
constexpr std::size_t bank_bytes(const Launch& launch) {
  return static_cast<std::size_t>(launch.args.d_rel) * static_cast<std::size_t>(launch.bank_width) *
         sizeof(float);
}

// Starts the copy to the beginning of shared memory: weights, so the grid in front may still run.
// Returns where the part's first key would be for the segment's first row.
DUPLEX_DEVICE const float* begin_bank(const Launch& launch, const Walk& all,
                                      std::int64_t part_begin) {
  const AttentionArgs& args = launch.args;
  auto* const columns = reinterpret_cast<float*>(shared_memory());
  const std::int32_t width = launch.bank_width, fours = width / kFour;
  const std::int32_t newest = all.row(all.count - 1);
  const std::int64_t first = kBlock + args.shape.rel_extent - 1 - (all.start + newest - part_begin);
  const auto before = static_cast<std::int32_t>((first % kFour + kFour) % kFour);
  const float* const bank = columns + before + newest;
  if (all.position(0) - (part_begin + kParts - 1) >= args.shape.rel_extent) return bank;
  for (std::int32_t i = thread_index(); i < args.d_rel * fours; i += kThreads) {
    const std::int32_t k = i / fours, c = i % fours * kFour;
    const std::int64_t column = first - before + c;
    if (column >= 0 && column < args.rel_stride)
      copy_async(columns + k * width + c, args.rel_bank + k * args.rel_stride + column);
    else
      store_four(columns + k * width + c, Four{});  // far from all keys that are seen
  }
  commit_copies();
  return bank;
}

// What is added to a lane's scores for vector v of its warp: tau times the biases of the positions
// `lane`, lane + kStep, ... from block `half` of the part on; minus infinity of what is not seen.
struct Own {
  float bias[kLanePositions];
  float tau;

  // Of a position that is not seen, what lies on the tape may be no number.
  DUPLEX_DEVICE float score(int i, float product, float factor) const {
    return bias[i] == kMinusInfinity ? kMinusInfinity : fmaf(bias[i], factor, product);
  }
};

// The learned bias, while the keys are on their way. A lane reads one number of r for all.
template <int kStep>
DUPLEX_DEVICE Own look(const Launch& launch, const Walk& walk, const Part& part, const float* bank,
                       int half, int lane) {
  const AttentionArgs& args = launch.args;
  const int v = thread_index() / kWarp, own_lane = thread_index() % kWarp;
  Own own;
  own.tau = 1.0f;
  for (float& bias : own.bias) bias = kMinusInfinity;
  if (v >= walk.count) return own;
  // Counted from the part's first key.
  const auto last = static_cast<std::int32_t>(walk.position(v) - part.begin);
  const auto first_seen = static_cast<std::int32_t>(walk.first_visible(v) - part.begin);
  const std::int32_t start = half * kBlock + lane;
  for (int i = 0; i < kLanePositions; ++i) {
    const std::int32_t key = start + i * kStep;
    if (key >= first_seen && key <= last && part.block(half + i * kStep / kBlock) != nullptr)
      own.bias[i] = 0.0f;
  }
  if (last - (kParts - 1) >= args.shape.rel_extent) return own;
  const float* const r = args.r + walk.batch_row(v) * args.r_stride + walk.head(v) * args.d_rel;
  // Beyond the extent there are zeros.
  const float* column = bank - walk.row(v) + start;
  for (std::int32_t first = 0; first < args.d_rel; first += kWarp) {
    const float of_lane = first + own_lane < args.d_rel ? r[first + own_lane] : 0.0f;
    const std::int32_t n = args.d_rel - first < kWarp ? args.d_rel - first : kWarp;
#pragma unroll 2
    for (std::int32_t k = 0; k < n; ++k, column += launch.bank_width) {
      const float factor = shuffle_from(of_lane, k, kWarp);
      for (int i = 0; i < kLanePositions; ++i)
        own.bias[i] = fmaf(factor, column[i * kStep], own.bias[i]);
    }
  }
  own.tau = walk.tau(v);
  return own;
}

}  // namespace duplex::cuda
