// How attention is cut into thread blocks, and where each of them looks.
// Next: attention.cu (float32), attention_parts.cuh, attention_bias.cuh (bfloat16 and int8).
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

// Which vectors a thread block has, or one tile of them, and where they look. Vector v is row
// v / group of the segment and head kv_head * group + v % group.
struct Walk {
  const AttentionArgs& args;
  const Segment& segment;
  std::int64_t start;      // position of the segment, and its row of the batch: copies, so that
  std::int32_t row_begin;  // barriers do not make threads load them again
  std::int32_t kv_head;
  std::int32_t first;  // vector of the segment
  std::int32_t count;
  std::int32_t group;

  DUPLEX_DEVICE Walk tile(std::int32_t index) const {
    const std::int32_t left = count - index * kVectors;
    return {args,
            segment,
            start,
            row_begin,
            kv_head,
            first + index * kVectors,
            left < kVectors ? left : kVectors,
            group};
  }
  DUPLEX_DEVICE std::int32_t row(std::int32_t v) const { return (first + v) / group; }
  DUPLEX_DEVICE std::int64_t batch_row(std::int32_t v) const { return row_begin + row(v); }
  DUPLEX_DEVICE std::int64_t head(std::int32_t v) const {
    return std::int64_t{kv_head} * group + (first + v) % group;
  }
  DUPLEX_DEVICE std::int64_t position(std::int32_t v) const { return start + row(v); }
  DUPLEX_DEVICE std::int64_t first_visible(std::int32_t v) const {
    const std::int64_t at = position(v) - args.shape.window + 1;
    return args.shape.window > 0 && at > 0 ? at : 0;
  }
  // Of the type that the tape has.
  DUPLEX_DEVICE const std::byte* keys(std::int64_t block, DType kv_dtype) const {
    const TapeView& tape = args.is_local ? segment.local : segment.global;
    return tape.block(block) + args.layer_offset_bytes +
           2 * kv_head * kv_panel_bytes(kv_dtype, args.d_head_padded);
  }
  DUPLEX_DEVICE bool is_forgotten(std::int64_t block) const {
    if (args.is_local) return false;
    for (std::int32_t i = 0; i < segment.n_forgotten; ++i)
      if (block * kBlock >= segment.forgotten[i].begin && block * kBlock < segment.forgotten[i].end)
        return true;
    return false;
  }
  // The first block from `block` on that is not forgotten.
  DUPLEX_DEVICE std::int64_t next(std::int64_t block, std::int64_t end) const {
    while (block < end && is_forgotten(block)) ++block;
    return block;
  }
  template <class Visit>
  DUPLEX_DEVICE void for_runs(std::int64_t from, std::int64_t last, const Visit& visit) const {
    cuda::for_runs(segment.forgotten, args.is_local ? 0 : segment.n_forgotten, from, last, visit);
  }
  // The part that is the ordinal-th these vectors look at; -1: there are not so many.
  DUPLEX_DEVICE std::int64_t part(std::int64_t ordinal) const {
    std::int64_t found = -1;
    for_runs(first_visible(0) / kPartPositions, position(count - 1) / kPartPositions,
             [&](std::int64_t begin, std::int64_t end) {
               if (ordinal >= 0 && ordinal < end - begin) found = begin + ordinal;
               ordinal -= end - begin;
             });
    return found;
  }
  DUPLEX_DEVICE float tau(std::int32_t v) const {
    return args.is_local
               ? 1.0f
               : log_scaling_tau(position(v), args.log_scaling_floor, args.log_scaling_alpha);
  }
};

// The vectors of this thread block. `n_groups` is shared memory, a number for each segment.
DUPLEX_DEVICE Walk walk_of(const Launch& launch, std::int32_t* n_groups) {
  const AttentionArgs& args = launch.args;
  const std::int32_t group = args.shape.n_heads / args.shape.n_kv_heads;
  const std::int32_t most = kVectors * launch.group_tiles;
  auto index = static_cast<std::int32_t>(launch.first_group + block_x());
  const Segment* segment = args.segments.data;
  if (args.segments.count > 1) {
    for (std::int32_t i = thread_index(); i < args.segments.count; i += kThreads)
      n_groups[i] = (segment[i].n_rows * group + most - 1) / most;
    sync_block();
    for (; index >= *n_groups; ++segment) index -= *n_groups++;
  }
  const std::int32_t left = segment->n_rows * group - index * most;
  return {args,      *segment,     segment->position,         segment->row_begin,
          block_y(), index * most, left < most ? left : most, group};
}

// Whether earlier passes wrote all of a part, so that it may be read before the append has ended.
DUPLEX_DEVICE bool is_before_segment(const Walk& walk, std::int64_t index) {
  return (index + 1) * kPartPositions <= walk.start;
}

constexpr std::size_t walk_bytes(const AttentionArgs& args) {
  return static_cast<std::size_t>(args.segments.count) * sizeof(std::int32_t);
}

// attention_bf16.cu, attention_int8.cu: one launch, and the sum of its parts.
void launch_attention_bf16(Runtime& runtime, const Launch& launch, std::int64_t n_groups);
void launch_attention_int8(Runtime& runtime, const Launch& launch, std::int64_t n_groups);

}  // namespace duplex::cuda
