// Attention of a group of query vectors over the tape, block by block.
//
// A block of 64 positions is a weight panel twice: its keys give scores (64 outputs), its values
// reduce them. Every query vector walks its blocks in ascending position with a running maximum, so
// its result depends on nothing but its own keys. Included by kernels_<isa>.cpp; see
// kernels_gemm.h.
#pragma once

#include <limits>

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_rows.h"

namespace duplex::DUPLEX_ISA {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What a piece needs in a resolved form.
struct AttentionWalk {
  const AttentionPiece& piece;
  const AttentionArgs& args;
  const Segment& segment;
  const AttentionScratch& scratch;
  std::int64_t n;      // padded head width
  std::int32_t group;  // query heads per key/value head
  const TapeView& tape;

  std::int64_t row(std::int32_t vector) const { return vector / group; }
  std::int64_t head(std::int32_t vector) const {
    return std::int64_t{piece.kv_head} * group + vector % group;
  }
  std::int64_t position(std::int32_t vector) const { return segment.position + row(vector); }
  std::int64_t first_visible(std::int32_t vector) const {
    const std::int64_t first = position(vector) - args.shape.window + 1;
    return args.shape.window > 0 && first > 0 ? first : 0;
  }
  const float* r(std::int32_t vector) const {
    return args.r + (segment.row_begin + row(vector)) * args.r_stride + head(vector) * args.d_rel;
  }
  const void* q(std::int32_t vector) const {
    const std::int64_t at = (segment.row_begin + row(vector)) * args.q.stride + head(vector) * n;
    return static_cast<const std::byte*>(args.q.data) +
           at * static_cast<std::int64_t>(dtype_bytes(args.kv_dtype));
  }
  std::byte* keys(std::int64_t block) const {
    return tape.block(block) + args.layer_offset_bytes +
           static_cast<std::int64_t>(dtype_bytes(args.kv_dtype)) * 2 * piece.kv_head * n *
               kBlockPositions;
  }
  std::byte* values(std::int64_t block) const {
    return keys(block) +
           static_cast<std::int64_t>(dtype_bytes(args.kv_dtype)) * n * kBlockPositions;
  }
  bool is_forgotten(std::int64_t block) const {
    if (args.is_local) return false;
    const std::int64_t begin = block * kBlockPositions;
    for (std::int32_t i = 0; i < segment.n_forgotten; ++i)
      if (begin >= segment.forgotten[i].begin && begin < segment.forgotten[i].end) return true;
    return false;
  }
};

// scores = tau-scaled (q k / d_head + bias); the lanes outside [begin, end) become -infinity.
// Returns the maximum.
inline float finish_scores(const AttentionWalk& walk, std::int32_t vector, std::int64_t block_begin,
                           int begin, int end, float* scores) {
  if (begin >= end) return kMinusInfinity;  // nothing visible: the scores are not read
  const AttentionArgs& args = walk.args;
  const std::int64_t position = walk.position(vector);
  const F16 scale = set1(1.0f / static_cast<float>(args.shape.d_head));
  const bool biased = position - (block_begin + end - 1) < args.shape.rel_extent;
  const float tau = args.is_local || !biased
                        ? 1.0f
                        : log_scaling_tau(position, args.log_scaling_floor, args.log_scaling_alpha);
  const float* r = walk.r(vector);
  // Column of distance d is kBlockPositions + rel_extent - 1 - d, so lane i of the block, at
  // distance position - block_begin - i, lies i to the right of lane 0.
  const std::int64_t column =
      kBlockPositions + args.shape.rel_extent - 1 - (position - block_begin);
  F16 best = set1(kMinusInfinity);
  for (int i = 0; i < kBlockPositions; i += 16) {
    F16 score = mul(load(scores + i), scale);
    if (biased) {
      // Far to the left of the extent the bias is zero; the zeros of the bank reach one block.
      const std::int64_t at = column + i;
      if (at >= 0) {
        F16 bias = zero();
        for (std::int32_t k = 0; k < args.d_rel; ++k)
          bias = fma(set1(r[k]), load(args.rel_bank + k * args.rel_stride + at), bias);
        score = fma(bias, set1(tau), score);
      }
    }
    const int lane_begin = begin > i ? (begin - i < 16 ? begin - i : 16) : 0;
    const int lane_end = end - i < 0 ? 0 : (end - i < 16 ? end - i : 16);
    score = lane_begin < lane_end ? select_range(score, set1(kMinusInfinity), lane_begin, lane_end)
                                  : set1(kMinusInfinity);
    best = max(best, score);
    store(scores + i, score);
  }
  return reduce_max(best);
}

// Turns scores into weights exp(score - max), updates the running maximum and sum, and rescales
// what has been gathered so far. A vector that sees nothing of this block gets zero weights.
inline void fold_block(const AttentionWalk& walk, std::int32_t vector, float block_max, int begin,
                       int end, const float* scores, void* weights) {
  const std::int32_t slot = vector - walk.piece.vector_begin;
  float& running_max = walk.scratch.max[slot];
  float& running_sum = walk.scratch.sum[slot];
  float* out = walk.scratch.out + slot * walk.n;
  if (block_max > running_max) {
    if (running_max != kMinusInfinity) {
      float lanes[16];
      store(lanes, exp_nonpositive(set1(running_max - block_max)));
      const F16 alpha = set1(lanes[0]);
      running_sum *= lanes[0];
      for (std::int64_t i = 0; i < walk.n; i += 16) store(out + i, mul(load(out + i), alpha));
    }
    running_max = block_max;
  }
  const F16 shift = set1(running_max == kMinusInfinity ? 0.0f : running_max);
  F16 sum = zero();
  for (int i = 0; i < kBlockPositions; i += 16) {
    const int lane_begin = begin > i ? (begin - i < 16 ? begin - i : 16) : 0;
    const int lane_end = end - i < 0 ? 0 : (end - i < 16 ? end - i : 16);
    F16 weight = zero();
    if (lane_begin < lane_end)
      weight =
          select_range(exp_nonpositive(sub(load(scores + i), shift)), zero(), lane_begin, lane_end);
    sum = add(sum, weight);
    if (walk.args.kv_dtype == DType::kF32)
      store(static_cast<float*>(weights) + i, weight);
    else
      store_bf16(static_cast<std::uint16_t*>(weights) + i, weight);
  }
  running_sum += reduce_add(sum);
}

// One tile of query vectors against one block.
template <class Tile>
inline void attend_tile(const AttentionWalk& walk, std::int64_t block, std::int32_t first,
                        int n_vectors) {
  using Element = typename Tile::Element;
  const std::int64_t block_begin = block * kBlockPositions;
  const Element* q[kTileRows];
  const Element* weights[kTileRows];
  float* scores[kTileRows];
  float* out[kTileRows];
  for (int i = 0; i < n_vectors; ++i) {
    q[i] = static_cast<const Element*>(walk.q(first + i));
    scores[i] = walk.scratch.scores + i * kBlockPositions;
    weights[i] = static_cast<const Element*>(walk.scratch.weights) + i * kBlockPositions;
    out[i] = walk.scratch.out + (first + i - walk.piece.vector_begin) * walk.n;
  }
  run_row_group<Tile>(n_vectors, q, reinterpret_cast<const Element*>(walk.keys(block)),
                      kBlockPositions * Tile::kPerStep, walk.n / Tile::kPerStep, kBlockPositions,
                      false, scores);
  std::int64_t last = 0;  // keys of the block that any vector of the tile sees
  for (int i = 0; i < n_vectors; ++i) {
    const std::int32_t vector = first + i;
    std::int64_t begin = walk.first_visible(vector) - block_begin;
    std::int64_t end = walk.position(vector) + 1 - block_begin;
    begin = begin < 0 ? 0 : begin > kBlockPositions ? kBlockPositions : begin;
    end = end < 0 ? 0 : end > kBlockPositions ? kBlockPositions : end;
    if (begin > end) begin = end;
    last = end > last ? end : last;
    const float block_max = finish_scores(walk, vector, block_begin, static_cast<int>(begin),
                                          static_cast<int>(end), scores[i]);
    fold_block(walk, vector, block_max, static_cast<int>(begin), static_cast<int>(end), scores[i],
               const_cast<Element*>(weights[i]));
  }
  run_row_group<Tile>(n_vectors, weights, reinterpret_cast<const Element*>(walk.values(block)),
                      walk.n * Tile::kPerStep, div_up(last, Tile::kPerStep),
                      static_cast<std::int32_t>(walk.n), true, out);
}

template <class Tile>
inline void attention_typed(const AttentionWalk& walk) {
  const std::int32_t begin = walk.piece.vector_begin;
  const std::int32_t end = walk.piece.vector_end;
  for (std::int32_t v = 0; v < end - begin; ++v) {
    walk.scratch.max[v] = kMinusInfinity;
    walk.scratch.sum[v] = 0.0f;
    for (std::int64_t i = 0; i < walk.n; i += 16) store(walk.scratch.out + v * walk.n + i, zero());
  }
  // Even tiles: five and five vectors instead of six and four.
  const std::int32_t n_tiles = static_cast<std::int32_t>(div_up(end - begin, kTileRows));
  const std::int64_t last_block = walk.position(end - 1) / kBlockPositions;
  for (std::int64_t b = walk.first_visible(begin) / kBlockPositions; b <= last_block; ++b) {
    if (walk.is_forgotten(b)) continue;
    for (std::int32_t t = 0; t < n_tiles; ++t) {
      const std::int32_t first = begin + (end - begin) * t / n_tiles;
      const std::int32_t next = begin + (end - begin) * (t + 1) / n_tiles;
      if (walk.position(next - 1) < b * kBlockPositions ||
          walk.first_visible(first) >= (b + 1) * kBlockPositions)
        continue;  // no vector of the tile sees the block
      attend_tile<Tile>(walk, b, first, next - first);
    }
  }
  for (std::int32_t v = begin; v < end; ++v) {
    const std::int32_t slot = v - begin;
    const F16 sum = set1(walk.scratch.sum[slot]);
    const std::int64_t row = walk.segment.row_begin + walk.row(v);
    for (std::int64_t i = 0; i < walk.n; i += 16)
      write_row(walk.args.out, row, walk.head(v) * walk.n + i,
                div(load(walk.scratch.out + slot * walk.n + i), sum));
  }
}

inline void attention(const AttentionPiece& piece, const AttentionScratch& scratch) {
  const AttentionArgs& args = *piece.args;
  const AttentionWalk walk{piece,
                           args,
                           *piece.segment,
                           scratch,
                           args.d_head_padded,
                           args.shape.n_heads / args.shape.n_kv_heads,
                           args.is_local ? piece.segment->local : piece.segment->global};
  if (args.kv_dtype == DType::kF32)
    attention_typed<F32Tile>(walk);
  else
    attention_typed<Bf16Tile>(walk);
}

}  // namespace duplex::DUPLEX_ISA
