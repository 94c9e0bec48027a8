// Attention of a group of query vectors over the tape, block by block.
//
// A block of 64 positions is a weight panel twice: its keys give scores (64 outputs), its values
// reduce them. Every query vector walks its blocks in ascending position with a running maximum, so
// its result depends on nothing but its own keys. Included by kernels_<isa>.cpp; see
// kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_attention_int8.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_rows.h"
#include "backend/cpu/kernels_walk.h"

namespace duplex::DUPLEX_ISA {

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

// One tile of query vectors against one block; with kLines, it asks for block `next` meanwhile.
template <class Tile, int kLines>
inline void attend_tile(const AttentionWalk& walk, std::int64_t block, std::int64_t next,
                        QueryVector* vectors, int n_vectors) {
  using Element = typename Tile::Element;
  const std::int64_t block_begin = block * kBlockPositions;
  const Element* q[kTileRows] = {};
  const Element* weights[kTileRows];
  float* products[kTileRows] = {};
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
  const std::byte* const keys_ahead = kLines > 0 ? walk.keys(next) : nullptr;
  const std::byte* const values_ahead = kLines > 0 ? walk.values(next) : nullptr;
  run_row_group<Tile, kLines>(n_vectors, q, reinterpret_cast<const Element*>(walk.keys(block)),
                              kBlockPositions * Tile::kPerStep, walk.n / Tile::kPerStep,
                              kBlockPositions, false, products, keys_ahead);
  for (int i = 0; i < n_vectors; ++i)
    fold_block<Tile>(walk, vectors[i], block_begin, products[i], const_cast<Element*>(weights[i]));
  run_row_group<Tile, kLines>(n_vectors, weights,
                              reinterpret_cast<const Element*>(walk.values(block)),
                              walk.n * Tile::kPerStep, div_up(last, Tile::kPerStep),
                              static_cast<std::int32_t>(walk.n), true, out, values_ahead);
}

template <class Tile>
inline void attention_typed(const AttentionWalk& walk) {
  QueryVector vectors[kAttentionVectors];
  const std::int32_t n_vectors = walk.begin(vectors);
  for_seen_blocks(walk, vectors, n_vectors,
                  [&](std::int64_t block, std::int64_t next, std::int32_t first, int n) {
                    if (next >= 0)
                      attend_tile<Tile, 4>(walk, block, next, vectors + first, n);
                    else
                      attend_tile<Tile, 0>(walk, block, next, vectors + first, n);
                  });
  walk.finish(vectors);
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
  else if (args.kv_dtype == DType::kBF16)
    attention_typed<Bf16Tile>(walk);
  else
    attention_int8(walk);
}

}  // namespace duplex::DUPLEX_ISA
