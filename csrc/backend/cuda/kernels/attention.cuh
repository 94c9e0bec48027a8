// How attention is cut into thread blocks: what one launch is given, and what parts leave.
// Next: attention_walk.cuh.
#pragma once

#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {

inline constexpr int kVectors = 8;  // of a tile
inline constexpr int kThreads = 256;
inline constexpr int kBlock = static_cast<int>(kBlockPositions);
inline constexpr std::int64_t kPartPositions = 2 * kBlock;  // of a walk that is cut

// What a block of int8 keys and values leaves for a vector: d_head sums, the lanes of its sum of
// weights, its largest score.
constexpr std::int64_t block_floats(std::int64_t d_head_padded) {
  return d_head_padded + kLanes + kFour;
}
// What a part leaves for a tile. bfloat16: (kVectors, d_head) sums, kVectors maxima and kVectors
// sums of weights. int8: (kVectors, 2) blocks.
constexpr std::int64_t part_floats(DType kv_dtype, std::int64_t d_head_padded) {
  return kVectors *
         (kv_dtype == DType::kInt8 ? 2 * block_floats(d_head_padded) : d_head_padded + 2);
}

// Calls visit(begin, end) for the runs of parts from `first` to `last` that are not wholly
// forgotten, in ascending order; the parts left are what a walk looks at, numbered as they come.
template <class Visit>
constexpr void for_runs(const PositionRange* forgotten, std::int32_t n, std::int64_t first,
                        std::int64_t last, const Visit& visit) {
  for (std::int32_t i = 0; i < n && first <= last; ++i) {
    const std::int64_t begin = div_up(forgotten[i].begin, kPartPositions);
    const std::int64_t end = forgotten[i].end / kPartPositions;
    if (end <= begin || end <= first) continue;
    if (first < begin) visit(first, begin <= last ? begin : last + 1);
    first = end;
  }
  if (first <= last) visit(first, last + 1);
}

constexpr std::int64_t count_parts(const PositionRange* forgotten, std::int32_t n,
                                   std::int64_t first, std::int64_t last) {
  std::int64_t count = 0;
  for_runs(forgotten, n, first, last,
           [&](std::int64_t begin, std::int64_t end) { count += end - begin; });
  return count;
}

// One launch: groups of tiles from `first_group` on.
struct Launch {
  AttentionArgs args;
  std::int64_t first_group;
  std::int32_t group_tiles;
  std::int32_t n_parts;
  std::int32_t bank_width;  // attention_bias.cuh
  // (groups, group_tiles, n_kv_heads, n_parts, part_floats()); null: one part in bfloat16
  float* partial;

  // What a part of a tile of this thread block's group leaves, or has left.
  template <DType kDType>
  DUPLEX_DEVICE float* sums(std::int32_t tile, std::int64_t part) const {
    const std::int64_t of_group =
        (std::int64_t{block_x()} * group_tiles + tile) * args.shape.n_kv_heads + block_y();
    return partial + (of_group * n_parts + part) * part_floats(kDType, args.d_head_padded);
  }
};

// attention_bf16.cu, attention_int8.cu: one launch, and the sum of its parts.
void launch_attention_bf16(Runtime& runtime, const Launch& launch, std::int64_t n_groups);
void launch_attention_int8(Runtime& runtime, const Launch& launch, std::int64_t n_groups);

}  // namespace duplex::cuda
