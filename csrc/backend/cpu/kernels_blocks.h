// How tiles of query vectors go through the blocks that they see, and what is done once before: the
// relative bias. Included by kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_tiles.h"
#include "backend/cpu/kernels_walk.h"

namespace duplex::DUPLEX_ISA {

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
  std::int32_t tile;      // of those that see the block
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
    TileAtBlock at{b, behind <= last ? behind : -1, 0, 0, 0};
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
