// Attention over keys and values in int8.
//
// A score is an exact integer sum times the scales of its query and its key. The scale 2^l of a
// value is part of its weight, so it is added to the score as l: in powers of two,
//
//   t = (q . k) s_q s_k log2(e) / d_head + tau bias log2(e) + l,
//
// and the weights of a block, 2^(t - largest t of the block), become codes 0 to 255, so that the
// weighted values are exact integer sums too. The softmax's sum takes the weights before that and
// without l. Blocks are folded in ascending order, as in kernels_attention.h. Included by
// kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_blocks.h"
#include "backend/cpu/kernels_fold_int8.h"
#include "backend/cpu/kernels_kv_int8.h"
#include "backend/cpu/kernels_tiles.h"
#include "backend/cpu/kernels_walk.h"

namespace duplex::DUPLEX_ISA {

// Sums over quads of indices, R vectors by C * 16 outputs. Functions of their own, so that the sums
// have the registers to themselves.
template <int R, int C, int kLines>
[[gnu::noinline]] void key_tile(const std::int8_t* q, std::int64_t n, const std::int32_t* starts,
                                const std::uint8_t* panel, std::int32_t* products,
                                const std::byte* ahead) {
  I16 acc[C][R];
  DUPLEX_UNROLL for (int r = 0; r < R; ++r) {
    const I16 start = start_bytes(starts[r]);
    DUPLEX_UNROLL for (int c = 0; c < C; ++c) acc[c][r] = start;
  }
  for (const std::int8_t* end = q + n; q < end; q += kQuad, panel += kBlockPositions * kQuad) {
    DUPLEX_FETCH(kLines, ahead)
    DUPLEX_UNROLL for (int c = 0; c < C; ++c) {
      const Bytes w = load_bytes(panel + c * 64);
      DUPLEX_UNROLL for (int r = 0; r < R; ++r) acc[c][r] = dot_bytes(acc[c][r], w, q + r * n);
    }
  }
  DUPLEX_UNROLL for (int c = 0; c < C; ++c) DUPLEX_UNROLL for (int r = 0; r < R; ++r)
      store_lanes(products + r * kBlockPositions + c * 16, acc[c][r]);
}

// out += factors * the sums. `out` and `panel` have rows of n channels.
template <int R, int C, int kLines>
[[gnu::noinline]] void value_tile(const std::uint8_t* weights, const float* factors,
                                  const std::uint8_t* panel, std::int64_t n, std::int64_t n_quads,
                                  float* out, const std::byte* ahead) {
  I16 acc[C][R];
  DUPLEX_UNROLL for (int c = 0; c < C; ++c) DUPLEX_UNROLL for (int r = 0; r < R; ++r) acc[c][r] =
      splat(0);
  for (std::int64_t k = 0; k < n_quads; ++k, panel += n * kQuad, weights += kQuad) {
    DUPLEX_FETCH(kLines, ahead)
    DUPLEX_UNROLL for (int c = 0; c < C; ++c) {
      const SignedBytes w = load_signed(panel + c * 64);
      DUPLEX_UNROLL for (int r = 0; r < R; ++r) acc[c][r] =
          dot_signed(acc[c][r], w, weights + r * kBlockPositions);
    }
  }
  DUPLEX_UNROLL for (int r = 0; r < R; ++r) {
    const F16 factor = set1(factors[r]);
    DUPLEX_UNROLL for (int c = 0; c < C; ++c) {
      float* to = out + r * n + c * 16;
      store(to, fma(to_float(acc[c][r]), factor, load(to)));
    }
  }
}

template <int R, int kLines>
inline void attend_tile_int8(const AttentionWalk& walk, const TileAtBlock& at,
                             const BlockScales& scales, QueryVector* vectors) {
  const std::int64_t block = at.block;
  const auto* keys = reinterpret_cast<const std::uint8_t*>(walk.keys(block)) + kKvScalesBytes;
  const auto* values = reinterpret_cast<const std::uint8_t*>(walk.values(block)) + kKvScalesBytes;
  const std::int64_t block_begin = block * kBlockPositions;
  std::int32_t products[R * kBlockPositions];
  float scores[R * kBlockPositions];
  float maxima[R];
  std::uint8_t weights[R * kBlockPositions];
  std::int32_t starts[R];
  float factors[R];
  for (int r = 0; r < R; ++r) starts[r] = vectors[r].start;
  constexpr int kColumns = tile_columns(R);
  const LinesAhead<kLines> ahead(walk, at);
  const auto* q = static_cast<const std::int8_t*>(vectors[0].q);
  for (int c = 0; c < kBlockPositions; c += kColumns * 16)
    with_lines_at<kLines>(c, [&]<int kTileLines>() {
      key_tile<R, kColumns, kTileLines>(q, walk.n, starts, keys + c * kQuad, products + c,
                                        ahead.keys);
    });
  // One loop each, so that the reductions of the vectors overlap.
  for (int r = 0; r < R; ++r)
    maxima[r] = score_block(walk, vectors[r], block_begin, scales, products + r * kBlockPositions,
                            scores + r * kBlockPositions);
  for (int r = 0; r < R; ++r)
    factors[r] = weigh_block(walk, vectors[r], block_begin, scales, scores + r * kBlockPositions,
                             maxima[r], weights + r * kBlockPositions);
  const std::int64_t n_quads = div_up(lane_of(vectors[R - 1].position + 1, block_begin), kQuad);
  std::int64_t c = 0;
  for (; c + kColumns * 16 <= walk.n; c += kColumns * 16)
    with_lines_at<kLines>(c, [&]<int kTileLines>() {
      value_tile<R, kColumns, kTileLines>(weights, factors, values + c * kQuad, walk.n, n_quads,
                                          vectors[0].out + c,
                                          ahead.values + c * n_quads * kTileLines);
    });
  for (; c < walk.n; c += 16)
    value_tile<R, 1, 0>(weights, factors, values + c * kQuad, walk.n, n_quads, vectors[0].out + c,
                        nullptr);
}

// Queries become codes once per piece.
inline void quantise_query(const AttentionWalk& walk, QueryVector& v, std::int8_t* codes) {
  const auto* q = static_cast<const float*>(v.q);
  v.scale = kv_scale(q, walk.n);
  v.start = -128 * kv_codes(q, walk.n, 1.0f / v.scale, codes);
  v.q = codes;
}

inline void attention_int8(const AttentionWalk& walk) {
  QueryVector vectors[kAttentionVectors];
  const std::int32_t n_vectors = walk.begin(vectors);
  for (std::int32_t i = 0; i < n_vectors; ++i)
    quantise_query(walk, vectors[i], walk.scratch.queries + i * walk.n);
  BlockScales scales;
  std::int64_t read = -1;  // the block that the scales are of
  for_seen_blocks(walk, vectors, n_vectors, [&]<int kLines>(const TileAtBlock& at) {
    if (at.block != read) {
      read = at.block;
      read_scales(walk, at.block, scales);
    }
    with_rows(at.n,
              [&]<int R>() { attend_tile_int8<R, kLines>(walk, at, scales, vectors + at.first); });
  });
  add_lanes<Base2Fold>(vectors, n_vectors);
  walk.finish(vectors);
}

}  // namespace duplex::DUPLEX_ISA
