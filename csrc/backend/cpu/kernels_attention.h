// Attention of a group of query vectors over the tape, block by block.
//
// A block of 64 positions is a weight panel twice: its keys give scores (64 outputs), its values
// reduce them. Every query vector walks its blocks in ascending position with a running maximum, so
// its result depends on nothing but its own keys. Included by kernels_<isa>.cpp; see
// kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_attention_int8.h"
#include "backend/cpu/kernels_fold.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_walk.h"

namespace duplex::DUPLEX_ISA {

// One tile of query vectors against one block; with kLines, it asks for block `next` meanwhile.
template <class Fold, int kLines>
inline void attend_tile(const AttentionWalk& walk, std::int64_t block, std::int64_t next,
                        QueryVector* vectors, int n_vectors) {
  using Tile = typename Fold::Tile;
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
  // One loop each, so that the reductions of the vectors overlap.
  float maxima[kTileRows];
  for (int i = 0; i < n_vectors; ++i)
    maxima[i] = score_products<Fold>(walk, vectors[i], block_begin, products[i]);
  for (int i = 0; i < n_vectors; ++i)
    weigh_scores<Fold>(walk, vectors[i], block_begin, products[i], maxima[i],
                       const_cast<Element*>(weights[i]));
  run_row_group<Tile, kLines>(n_vectors, weights,
                              reinterpret_cast<const Element*>(walk.values(block)),
                              walk.n * Tile::kPerStep, div_up(last, Tile::kPerStep),
                              static_cast<std::int32_t>(walk.n), true, out, values_ahead);
}

template <class Fold>
inline void attention_typed(const AttentionWalk& walk) {
  QueryVector vectors[kAttentionVectors];
  const std::int32_t n_vectors = walk.begin(vectors);
  for_seen_blocks(walk, vectors, n_vectors,
                  [&](std::int64_t block, std::int64_t next, std::int32_t first, int n) {
                    if (next >= 0)
                      attend_tile<Fold, 4>(walk, block, next, vectors + first, n);
                    else
                      attend_tile<Fold, 0>(walk, block, next, vectors + first, n);
                  });
  add_lanes<Fold>(vectors, n_vectors);
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
    attention_typed<F32Fold>(walk);
  else if (args.kv_dtype == DType::kBF16)
    attention_typed<Bf16Fold>(walk);
  else
    attention_int8(walk);
}

}  // namespace duplex::DUPLEX_ISA
