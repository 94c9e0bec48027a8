// What the attentions over float and over int8 tapes share: a query vector on its walk over the
// blocks, where its keys and values lie, and which of them it sees. Next: kernels_blocks.h.
// Included by kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include <limits>

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_rows.h"

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

}  // namespace duplex::DUPLEX_ISA
