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
};

// What a piece needs in a resolved form.
struct AttentionWalk {
  const AttentionPiece& piece;
  const AttentionArgs& args;
  const Segment& segment;
  const AttentionScratch& scratch;
  std::int64_t n;      // padded head width
  std::int32_t group;  // query heads per key/value head
  const TapeView& tape;
  float scale;

  std::int64_t element_bytes() const {
    return static_cast<std::int64_t>(dtype_bytes(args.kv_dtype));
  }
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
          (batch_row(index) * args.q.stride + head(index) * n) * element_bytes();
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
  std::byte* keys(std::int64_t block) const {
    return tape.block(block) + args.layer_offset_bytes +
           element_bytes() * 2 * piece.kv_head * n * kBlockPositions;
  }
  std::byte* values(std::int64_t block) const {
    return keys(block) + element_bytes() * n * kBlockPositions;
  }
  bool is_forgotten(std::int64_t block) const {
    if (args.is_local) return false;
    const std::int64_t begin = block * kBlockPositions;
    for (std::int32_t i = 0; i < segment.n_forgotten; ++i)
      if (begin >= segment.forgotten[i].begin && begin < segment.forgotten[i].end) return true;
    return false;
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

// Folds one block into a vector: its products become scores tau-scaled (q k / d_head + bias), the
// scores weights exp(score - max) for the keys that it sees and zero for the others; what has been
// gathered so far is rescaled where the running maximum grew.
template <class Tile>
inline void fold_block(const AttentionWalk& walk, QueryVector& v, std::int64_t block_begin,
                       const float* products, typename Tile::Element* weights) {
  const int begin = lane_of(v.first_visible, block_begin);
  const int end = lane_of(v.position + 1, block_begin);
  const bool is_whole = begin == 0 && end == kBlockPositions;
  const bool biased = v.position - (block_begin + end - 1) < walk.args.shape.rel_extent;
  // Lane i of the block, at distance position - block_begin - i, lies i to the right of lane 0.
  const std::int64_t column = walk.bias_column(v.position - block_begin);
  F16 s[kBlockPositions / 16];
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) {
    s[i / 16] = mul(load(products + i), set1(walk.scale));
    // Far to the left of the extent the bias is zero; the zeros of the bank reach one block.
    if (biased && column + i >= 0)
      s[i / 16] = fma(load(v.bias + column + i), set1(v.tau), s[i / 16]);
    if (!is_whole) s[i / 16] = keep_lanes(s[i / 16], set1(kMinusInfinity), begin - i, end - i);
  }
  const float block_max = reduce_max(max(max(s[0], s[1]), max(s[2], s[3])));
  if (block_max > v.max) {
    if (v.max != kMinusInfinity) {
      float lanes[16];
      store(lanes, Tile::exp(set1(v.max - block_max)));
      const F16 alpha = set1(lanes[0]);
      v.sum *= lanes[0];
      for (std::int64_t i = 0; i < walk.n; i += 16) store(v.out + i, mul(load(v.out + i), alpha));
    }
    v.max = block_max;
  }
  const F16 shift = set1(v.max == kMinusInfinity ? 0.0f : v.max);
  F16 sum = zero();
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) {
    F16 weight = Tile::exp(sub(s[i / 16], shift));
    if (!is_whole) weight = keep_lanes(weight, zero(), begin - i, end - i);
    sum = add(sum, weight);
    Tile::store_element(weights + i, weight);
  }
  v.sum += reduce_add(sum);
}

// One tile of query vectors against one block.
template <class Tile>
inline void attend_tile(const AttentionWalk& walk, std::int64_t block, QueryVector* vectors,
                        int n_vectors) {
  using Element = typename Tile::Element;
  const std::int64_t block_begin = block * kBlockPositions;
  const Element* q[kTileRows];
  const Element* weights[kTileRows];
  float* products[kTileRows];
  float* out[kTileRows];
  std::int64_t last = 0;  // keys of the block that any vector of the tile sees
  for (int i = 0; i < n_vectors; ++i) {
    q[i] = static_cast<const Element*>(vectors[i].q);
    products[i] = walk.scratch.scores + i * kBlockPositions;
    weights[i] = static_cast<const Element*>(walk.scratch.weights) + i * kBlockPositions;
    out[i] = vectors[i].out;
    last =
        vectors[i].position + 1 - block_begin > last ? vectors[i].position + 1 - block_begin : last;
  }
  last = last < kBlockPositions ? last : kBlockPositions;
  run_row_group<Tile>(n_vectors, q, reinterpret_cast<const Element*>(walk.keys(block)),
                      kBlockPositions * Tile::kPerStep, walk.n / Tile::kPerStep, kBlockPositions,
                      false, products);
  for (int i = 0; i < n_vectors; ++i)
    fold_block<Tile>(walk, vectors[i], block_begin, products[i], const_cast<Element*>(weights[i]));
  run_row_group<Tile>(n_vectors, weights, reinterpret_cast<const Element*>(walk.values(block)),
                      walk.n * Tile::kPerStep, div_up(last, Tile::kPerStep),
                      static_cast<std::int32_t>(walk.n), true, out);
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

template <class Tile>
inline void attention_typed(const AttentionWalk& walk) {
  const std::int32_t n_vectors = walk.piece.vector_end - walk.piece.vector_begin;
  QueryVector vectors[kAttentionVectors];
  for (std::int32_t v = 0; v < n_vectors; ++v)
    vectors[v] = walk.vector(walk.piece.vector_begin + v);
  for_tiles(n_vectors,
            [&](std::int32_t first, std::int32_t n) { fill_bias(walk, vectors + first, n); });
  const std::int64_t last_block = vectors[n_vectors - 1].position / kBlockPositions;
  for (std::int64_t b = vectors[0].first_visible / kBlockPositions; b <= last_block; ++b) {
    if (walk.is_forgotten(b)) continue;
    for_tiles(n_vectors, [&](std::int32_t first, std::int32_t n) {
      if (vectors[first + n - 1].position < b * kBlockPositions ||
          vectors[first].first_visible >= (b + 1) * kBlockPositions)
        return;  // no vector of the tile sees the block
      attend_tile<Tile>(walk, b, vectors + first, n);
    });
  }
  for (std::int32_t v = 0; v < n_vectors; ++v) {
    const std::int32_t index = walk.piece.vector_begin + v;
    const F16 sum = set1(vectors[v].sum);
    for (std::int64_t i = 0; i < walk.n; i += 16)
      write_row(walk.args.out, walk.batch_row(index), walk.head(index) * walk.n + i,
                div(load(vectors[v].out + i), sum));
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
                           args.is_local ? piece.segment->local : piece.segment->global,
                           1.0f / static_cast<float>(args.shape.d_head)};
  if (args.kv_dtype == DType::kF32)
    attention_typed<F32Tile>(walk);
  else
    attention_typed<Bf16Tile>(walk);
}

}  // namespace duplex::DUPLEX_ISA
