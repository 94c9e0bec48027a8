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
  // The bias of a vector at every distance, computed once: column c as in the bank.
  float* bias(std::int32_t vector) const {
    return scratch.bias + (vector - piece.vector_begin) * args.rel_stride;
  }
  std::int64_t bias_column(std::int64_t distance) const {
    return kBlockPositions + args.shape.rel_extent - 1 - distance;
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
  // Asks for one tile's share of the keys and values of a block that comes next: tapes lie on small
  // pages, at whose ends the processor's own prefetching stops.
  void prefetch(std::int64_t block, std::int64_t tile, std::int64_t n_tiles) const {
    const std::byte* const data = keys(block);
    const std::int64_t lines =
        2 * n * kBlockPositions * static_cast<std::int64_t>(dtype_bytes(args.kv_dtype)) / 64;
    for (std::int64_t line = lines * tile / n_tiles; line < lines * (tile + 1) / n_tiles; ++line)
      __builtin_prefetch(data + line * 64, 0, 2);
  }
  bool is_forgotten(std::int64_t block) const {
    if (args.is_local) return false;
    const std::int64_t begin = block * kBlockPositions;
    for (std::int32_t i = 0; i < segment.n_forgotten; ++i)
      if (begin >= segment.forgotten[i].begin && begin < segment.forgotten[i].end) return true;
    return false;
  }
};

// The lanes [begin, end) of a, the others of b; the range may begin or end outside the sixteen.
inline F16 keep_lanes(F16 a, F16 b, int begin, int end) {
  begin = begin > 0 ? begin : 0;
  end = end < 16 ? end : 16;
  return begin < end ? select_range(a, b, begin, end) : b;
}

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
  // Lane i of the block, at distance position - block_begin - i, lies i to the right of lane 0.
  const std::int64_t column = walk.bias_column(position - block_begin);
  const float* bias = walk.bias(vector);
  const bool is_whole = begin == 0 && end == kBlockPositions;
  F16 best = set1(kMinusInfinity);
  for (int i = 0; i < kBlockPositions; i += 16) {
    F16 score = mul(load(scores + i), scale);
    // Far to the left of the extent the bias is zero; the zeros of the bank reach one block.
    if (biased && column + i >= 0) score = fma(load(bias + column + i), set1(tau), score);
    if (!is_whole) score = keep_lanes(score, set1(kMinusInfinity), begin - i, end - i);
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
  const bool is_whole = begin == 0 && end == kBlockPositions;
  for (int i = 0; i < kBlockPositions; i += 16) {
    F16 weight = zero();
    if (is_whole || (begin < i + 16 && end > i && begin < end)) {
      weight = exp_nonpositive(sub(load(scores + i), shift));
      if (!is_whole) weight = keep_lanes(weight, zero(), begin - i, end - i);
    }
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

// r . bank for every distance that a vector of the tile sees.
inline void fill_bias(const AttentionWalk& walk, std::int32_t first, int n_vectors) {
  const float* r[kTileRows];
  float* bias[kTileRows];
  const std::int64_t furthest = walk.bias_column(walk.position(first + n_vectors - 1));
  const std::int64_t begin = furthest > 0 ? furthest / 16 * 16 : 0;
  for (int i = 0; i < n_vectors; ++i) {
    r[i] = walk.r(first + i);
    bias[i] = walk.bias(first + i) + begin;
  }
  run_row_group<F32Tile>(n_vectors, r, walk.args.rel_bank + begin, walk.args.rel_stride,
                         walk.args.d_rel, static_cast<std::int32_t>(walk.args.rel_stride - begin),
                         false, bias);
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
  const auto first_of = [&](std::int32_t tile) { return begin + (end - begin) * tile / n_tiles; };
  for (std::int32_t t = 0; t < n_tiles; ++t)
    fill_bias(walk, first_of(t), first_of(t + 1) - first_of(t));
  const std::int64_t last_block = walk.position(end - 1) / kBlockPositions;
  for (std::int64_t b = walk.first_visible(begin) / kBlockPositions; b <= last_block; ++b) {
    if (walk.is_forgotten(b)) continue;
    for (std::int32_t t = 0; t < n_tiles; ++t) {
      const std::int32_t first = first_of(t);
      const std::int32_t next = first_of(t + 1);
      if (walk.position(next - 1) < b * kBlockPositions ||
          walk.first_visible(first) >= (b + 1) * kBlockPositions)
        continue;  // no vector of the tile sees the block
      if (b < last_block) walk.prefetch(b + 1, t, n_tiles);
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
