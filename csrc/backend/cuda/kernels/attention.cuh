// How attention is cut into thread blocks, and where each of them looks. Next: attention.cu.
#pragma once

#include "kernels/common.cuh"

namespace duplex::cuda {

inline constexpr int kVectors = 8;
inline constexpr int kThreads = 256;
inline constexpr int kBlock = static_cast<int>(kBlockPositions);
inline constexpr int kScoreVectors = kVectors * kBlock / kThreads;  // of a thread
inline constexpr int kWeighThreads = kVectors * kLanes;

// One launch: tiles from `first_tile` on, each cut into parts of `part_blocks` blocks. With more
// than one part they leave (kVectors, d_head) sums, kVectors maxima and kVectors sums of weights.
struct Launch {
  AttentionArgs args;
  std::int64_t first_tile;
  std::int64_t part_blocks;
  std::int64_t n_parts;
  float* partial;  // (tiles, n_kv_heads, n_parts, partial_floats); null: one part, no sums left

  DUPLEX_DEVICE std::int64_t floats() const {
    return std::int64_t{kVectors} * (args.d_head_padded + 2);
  }
  DUPLEX_DEVICE float* part(std::int64_t index) const {
    return partial +
           ((std::int64_t{block_x()} * args.shape.n_kv_heads + block_y()) * n_parts + index) *
               floats();
  }
};

// Shared memory: one block of keys and of values, queries (d_head, kVectors), results
// (kVectors, d_head), scores (64, kVectors), what the bias is read from (kVectors, d_rel), and per
// vector the maximum and the sum at the end, and what rescales the results.
struct Tile {
  std::byte* keys;
  std::byte* values;
  float* q;
  float* out;
  float* scores;
  float* r;
  float* max;
  float* sum;
  float* alpha;
};

// Of one vector so far, in the registers of the sixteen threads that weigh it.
struct Running {
  float max = kMinusInfinity;
  float sum = 0.0f;
};

DUPLEX_DEVICE Tile lay_out(const AttentionArgs& args) {
  const std::int64_t n = args.d_head_padded;
  Tile tile;
  tile.keys = shared_memory();
  tile.values = tile.keys + n * kBlock * static_cast<std::int64_t>(dtype_bytes(args.kv_dtype));
  tile.q = reinterpret_cast<float*>(
      tile.values + n * kBlock * static_cast<std::int64_t>(dtype_bytes(args.kv_dtype)));
  tile.out = tile.q + kVectors * n;
  tile.scores = tile.out + kVectors * n;
  tile.r = tile.scores + kVectors * kBlock;
  tile.max = tile.r + kVectors * args.d_rel;
  tile.sum = tile.max + kVectors;
  tile.alpha = tile.sum + kVectors;
  return tile;
}

// Which vectors this thread block has, and where they look.
struct Walk {
  const AttentionArgs& args;
  const Segment& segment;
  std::int32_t kv_head;
  std::int32_t first;  // vector of the segment
  std::int32_t count;
  std::int32_t group;

  DUPLEX_DEVICE std::int32_t row(std::int32_t v) const { return (first + v) / group; }
  DUPLEX_DEVICE std::int64_t head(std::int32_t v) const {
    return std::int64_t{kv_head} * group + (first + v) % group;
  }
  DUPLEX_DEVICE std::int64_t position(std::int32_t v) const { return segment.position + row(v); }
  DUPLEX_DEVICE std::int64_t first_visible(std::int32_t v) const {
    const std::int64_t at = position(v) - args.shape.window + 1;
    return args.shape.window > 0 && at > 0 ? at : 0;
  }
  DUPLEX_DEVICE const std::byte* keys(std::int64_t block) const {
    const TapeView& tape = args.is_local ? segment.local : segment.global;
    return tape.block(block) + args.layer_offset_bytes +
           static_cast<std::int64_t>(dtype_bytes(args.kv_dtype)) * 2 * kv_head *
               args.d_head_padded * kBlock;
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
};

// The walk of a tile: of its blocks, those of one part.
struct Part {
  std::int64_t begin, end;   // blocks
  std::int64_t first, last;  // parts that the tile has
};

DUPLEX_DEVICE Part part_of(const Walk& walk, std::int64_t part_blocks, std::int64_t index) {
  const std::int64_t begin = walk.first_visible(0) / kBlock;
  const std::int64_t end = walk.position(walk.count - 1) / kBlock + 1;
  const std::int64_t first = begin / part_blocks;
  const std::int64_t from = (first + index) * part_blocks;
  return {from > begin ? from : begin, from + part_blocks < end ? from + part_blocks : end, first,
          (end - 1) / part_blocks};
}

DUPLEX_DEVICE Walk walk_of(const Launch& launch) {
  const AttentionArgs& args = launch.args;
  const std::int32_t group = args.shape.n_heads / args.shape.n_kv_heads;
  const Segment* segment = args.segments.data;
  auto tile = static_cast<std::int32_t>(launch.first_tile + block_x());
  for (std::int32_t n; tile >= (n = (segment->n_rows * group + kVectors - 1) / kVectors); ++segment)
    tile -= n;
  const std::int32_t left = segment->n_rows * group - tile * kVectors;
  return {args, *segment, block_y(), tile * kVectors, left < kVectors ? left : kVectors, group};
}

}  // namespace duplex::cuda
