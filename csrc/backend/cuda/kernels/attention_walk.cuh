// Where a thread block of attention looks: the vectors that it has, and the blocks they see.
// Next: attention.cu (float32), attention_parts.cuh, attention_bias.cuh (bfloat16 and int8).
#pragma once

#include "kernels/attention.cuh"

namespace duplex::cuda {

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
  // The first block from `block` on that is not forgotten; `end` if there is none before.
  DUPLEX_DEVICE std::int64_t next(std::int64_t block, std::int64_t end) const {
    for (std::int32_t i = 0; i < n_holes(); ++i)
      if (block * kBlock >= segment.forgotten[i].begin && block * kBlock < segment.forgotten[i].end)
        block = segment.forgotten[i].end / kBlock;
    return block < end ? block : end;
  }
  DUPLEX_DEVICE bool is_forgotten(std::int64_t block) const {
    return next(block, block + 1) > block;
  }
  DUPLEX_DEVICE std::int32_t n_holes() const { return args.is_local ? 0 : segment.n_forgotten; }
  template <class Visit>
  DUPLEX_DEVICE void for_runs(std::int64_t from, std::int64_t last, const Visit& visit) const {
    cuda::for_runs(segment.forgotten, n_holes(), from, last, visit);
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

}  // namespace duplex::cuda
