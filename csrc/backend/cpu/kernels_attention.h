// Attention of a group of query vectors over the tape, block by block.
//
// A block of 64 positions is a weight panel twice: its keys give scores (64 outputs), its values
// reduce them. Every query vector walks its blocks in ascending position with a running maximum, so
// its result depends on nothing but its own keys. Included by kernels_<isa>.cpp; see
// kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_attention_int8.h"
#include "backend/cpu/kernels_blocks.h"
#include "backend/cpu/kernels_fold.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_walk.h"

namespace duplex::DUPLEX_ISA {

// One tile of query vectors against one block.
// note: gcc would call it, which costs a short tape 5 %.
template <class Fold, int kLines>
[[gnu::always_inline]] inline void attend_tile(const AttentionWalk& walk, const TileAtBlock& at,
                                               QueryVector* vectors) {
  using Tile = typename Fold::Tile;
  using Element = typename Tile::Element;
  const int n_vectors = at.n;
  const std::int64_t block_begin = at.block * kBlockPositions;
  float scores_of[kTileRows][kBlockPositions];
  Element weights_of[kTileRows][kBlockPositions];
  const Element* q[kTileRows] = {};
  const Element* weights[kTileRows] = {};
  float* scores[kTileRows] = {};
  float* out[kTileRows];
  std::int64_t last = 0;  // keys of the block that any vector of the tile sees
  for (int i = 0; i < n_vectors; ++i) {
    q[i] = static_cast<const Element*>(vectors[i].q);
    scores[i] = scores_of[i];
    weights[i] = weights_of[i];
    out[i] = vectors[i].out;
    last =
        vectors[i].position + 1 - block_begin > last ? vectors[i].position + 1 - block_begin : last;
  }
  last = last < kBlockPositions ? last : kBlockPositions;
  const LinesAhead<kLines> ahead(walk, at);
  run_row_group<Tile, kLines>(n_vectors, q, reinterpret_cast<const Element*>(walk.keys(at.block)),
                              kBlockPositions * Tile::kPerStep, walk.n / Tile::kPerStep,
                              kBlockPositions, false, scores, ahead.keys);
  // One loop each, so that the reductions of the vectors overlap.
  float maxima[kTileRows];
  for (int i = 0; i < n_vectors; ++i)
    maxima[i] = score_products<Fold>(walk, vectors[i], block_begin, scores[i]);
  for (int i = 0; i < n_vectors; ++i)
    weigh_scores<Fold>(walk, vectors[i], block_begin, scores[i], maxima[i], weights_of[i]);
  run_row_group<Tile, kLines>(n_vectors, weights,
                              reinterpret_cast<const Element*>(walk.values(at.block)),
                              walk.n * Tile::kPerStep, div_up(last, Tile::kPerStep),
                              static_cast<std::int32_t>(walk.n), true, out, ahead.values);
}

template <class Fold>
inline void attention_typed(const AttentionWalk& walk) {
  QueryVector vectors[kAttentionVectors];
  const std::int32_t n_vectors = walk.begin(vectors);
  for_seen_blocks(walk, vectors, n_vectors, [&]<int kLines>(const TileAtBlock& at) {
    attend_tile<Fold, kLines>(walk, at, vectors + at.first);
  });
  add_lanes<Fold>(vectors, n_vectors);
  walk.finish(vectors);
}

inline void attention(const AttentionPiece& piece, AttentionScratch& scratch) {
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
    attention_typed<F32Fold>(walk);
  else if (args.kv_dtype == DType::kBF16)
    attention_typed<Bf16Fold>(walk);
  else
    attention_int8(walk);
}

}  // namespace duplex::DUPLEX_ISA
