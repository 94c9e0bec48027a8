// What the attentions over float and over int8 tapes share: a query vector on its walk over the
// blocks, where its keys and values lie, which of them it sees, and its relative bias. Included by
// kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include <limits>

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_rows.h"
#include "backend/cpu/kernels_tiles.h"

namespace duplex::DUPLEX_ISA {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// A query vector on its walk over the blocks.
struct QueryVector {
  const void* q = nullptr;
  const float* r = nullptr;
  float* bias = nullptr;  // at every distance, computed once: column c as in the bank
  float* out = nullptr;   // weighted values gathered so far, (padded head width)
  std::int64_t position = 0;
  std::int64_t first_visible = 0;
  float tau = 1.0f;
  float max = kMinusInfinity;  // running maximum of the scores
  float sum = 0.0f;            // of the weights
  // In int8 q are codes:
  float scale = 0.0f;
  std::int32_t start = 0;  // of a sum of products: RowGroup::correction
  float sums[16] = {};     // lanes that make up sum
};

// What a piece needs in a resolved form.
struct AttentionWalk {
  const AttentionPiece& piece;
  const AttentionArgs& args;
  const Segment& segment;
  AttentionScratch& scratch;
  std::int64_t n;      // padded head width
  std::int32_t group;  // query heads per key/value head
  const TapeView& tape;
  float scale;

  std::int64_t batch_row(std::int32_t vector) const { return segment.row_begin + vector / group; }
  std::int64_t head(std::int32_t vector) const {
    return std::int64_t{piece.kv_head} * group + vector % group;
  }
  std::int64_t bias_column(std::int64_t distance) const {
    return kBlockPositions + args.shape.rel_extent - 1 - distance;
  }
  QueryVector vector(std::int32_t index) const {
    const std::int64_t slot = index - piece.vector_begin;
    QueryVector v;
    v.q = static_cast<const std::byte*>(args.q.data) +
          (batch_row(index) * args.q.stride + head(index) * n) *
              static_cast<std::int64_t>(dtype_bytes(args.q.dtype));
    v.r = args.r + batch_row(index) * args.r_stride + head(index) * args.d_rel;
    v.bias = scratch.bias + slot * args.rel_stride;
    v.out = scratch.out + slot * n;
    v.position = segment.position + index / group;
    const std::int64_t first = v.position - args.shape.window + 1;
    v.first_visible = args.shape.window > 0 && first > 0 ? first : 0;
    if (!args.is_local)
      v.tau = log_scaling_tau(v.position, args.log_scaling_floor, args.log_scaling_alpha);
    for (std::int64_t i = 0; i < n; i += 16) store(v.out + i, zero());
    return v;
  }
  // The vectors of the piece; returns how many.
  std::int32_t begin(QueryVector* vectors) const {
    for (std::int32_t i = piece.vector_begin; i < piece.vector_end; ++i)
      vectors[i - piece.vector_begin] = vector(i);
    return piece.vector_end - piece.vector_begin;
  }
  // Writes what they gathered, divided by their sums.
  void finish(const QueryVector* vectors) const {
    for (std::int32_t i = piece.vector_begin; i < piece.vector_end; ++i) {
      const QueryVector& v = vectors[i - piece.vector_begin];
      for (std::int64_t c = 0; c < n; c += 16)
        write_row(args.out, batch_row(i), head(i) * n + c, div(load(v.out + c), set1(v.sum)));
    }
  }
  std::byte* keys(std::int64_t block) const {
    return tape.block(block) + args.layer_offset_bytes +
           2 * piece.kv_head * kv_panel_bytes(args.kv_dtype, n);
  }
  std::byte* values(std::int64_t block) const {
    return keys(block) + kv_panel_bytes(args.kv_dtype, n);
  }
  // The first block from this one on that is not forgotten; last + 1 if there is none.
  std::int64_t held_from(std::int64_t block, std::int64_t last) const {
    for (std::int32_t i = 0; !args.is_local && i < segment.n_forgotten; ++i)
      if (block * kBlockPositions >= segment.forgotten[i].begin &&
          block * kBlockPositions < segment.forgotten[i].end)
        block = segment.forgotten[i].end / kBlockPositions;
    return block <= last ? block : last + 1;
  }
};

// Where a position lies among the lanes of a block, at its edges when outside.
inline int lane_of(std::int64_t position, std::int64_t block_begin) {
  const std::int64_t lane = position - block_begin;
  return static_cast<int>(lane < 0 ? 0 : lane < kBlockPositions ? lane : kBlockPositions);
}

// The lanes [begin, end) of a, the others of b; the range may begin or end outside the sixteen.
inline F16 keep_lanes(F16 a, F16 b, int begin, int end) {
  begin = begin > 0 ? begin : 0;
  end = end < 16 ? end : 16;
  return begin < end ? select_range(a, b, begin, end) : b;
}

// r . bank for every distance that a vector of the tile sees.
inline void fill_bias(const AttentionWalk& walk, const QueryVector* vectors, int n_vectors) {
  const float* r[kTileRows];
  float* bias[kTileRows];
  const std::int64_t furthest = walk.bias_column(vectors[n_vectors - 1].position);
  const std::int64_t begin = furthest > 0 ? furthest / 16 * 16 : 0;
  for (int i = 0; i < n_vectors; ++i) {
    r[i] = vectors[i].r;
    bias[i] = vectors[i].bias + begin;
  }
  run_row_group<F32Tile>(n_vectors, r, walk.args.rel_bank + begin, walk.args.rel_stride,
                         walk.args.d_rel, static_cast<std::int32_t>(walk.args.rel_stride - begin),
                         false, bias);
}

// A tile of vectors at a block. The tiles together ask for block `next`, if it is not -1: a head's
// blocks lie far apart, so the processor does not see which comes.
struct TileAtBlock {
  std::int64_t block, next;
  std::int32_t tile, n_tiles;
  std::int32_t first, n;  // vectors
};

// What such a tile asks for, kLines lines a step, beside the panels of its block.
template <int kLines>
struct LinesAhead {
  const std::byte* keys = nullptr;
  const std::byte* values = nullptr;
  LinesAhead(const AttentionWalk& walk, const TileAtBlock& at) {
    if constexpr (kLines > 0) {
      // With four lines in each of its steps one tile would ask for all.
      const std::int64_t begin = at.tile * kLines * kv_panel_bytes(walk.args.kv_dtype, walk.n) / 4;
      keys = walk.keys(at.next) + begin;
      values = walk.values(at.next) + begin;
    }
  }
};

// Fills the biases, then calls attend<kLines>(TileAtBlock) for every block in ascending order and
// every tile of vectors that sees some of it.
template <class Attend>
inline void for_seen_blocks(const AttentionWalk& walk, const QueryVector* vectors,
                            std::int32_t n_vectors, const Attend& attend) {
  for_tiles(n_vectors,
            [&](std::int32_t first, std::int32_t n) { fill_bias(walk, vectors + first, n); });
  const auto n_tiles = static_cast<std::int32_t>(div_up(n_vectors, kTileRows));
  const std::int64_t last = vectors[n_vectors - 1].position / kBlockPositions;
  std::int64_t b = walk.held_from(vectors[0].first_visible / kBlockPositions, last);
  for (std::int64_t behind; b <= last; b = behind) {
    behind = walk.held_from(b + 1, last);
    TileAtBlock at{b, behind <= last ? behind : -1, 0, n_tiles, 0, 0};
    for_tiles(n_vectors, [&](std::int32_t first, std::int32_t n) {
      if (vectors[first + n - 1].position < b * kBlockPositions ||
          vectors[first].first_visible >= (b + 1) * kBlockPositions)
        return;
      at.first = first;
      at.n = n;
      if (at.next >= 0)
        with_lines(at.tile, n_tiles, [&]<int kLines>() { attend.template operator()<kLines>(at); });
      else
        attend.template operator()<0>(at);
      ++at.tile;
    });
  }
}

}  // namespace duplex::DUPLEX_ISA
