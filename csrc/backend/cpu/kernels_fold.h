// One block of float keys and values folded into a query vector: its products become scores, the
// scores weights; how the running maximum and the sums of weights are kept, in int8 too, whose
// scores and weights are in kernels_fold_int8.h. Included by kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_rows.h"
#include "backend/cpu/kernels_walk.h"
#include "backend/kv_int8.h"

namespace duplex::DUPLEX_ISA {

// In float32 every operation is that of a GPU, in its order: weights are e^(score - maximum), the
// maximum follows every score, and the weights of each block are added up.
struct F32Fold {
  using Tile = F32Tile;
  static constexpr float kLog = 1.0f, kRoom = 0.0f;
  static constexpr bool kSumsLanes = false;
  static F16 exp(F16 x) { return exp_nonpositive(x); }
  static void store_element(float* to, F16 value) { store(to, value); }
};
// In bfloat16 and int8 scores are in powers of two, the maximum follows what has outgrown it by
// kScoreRoom, and weights are added up lane by lane.
struct Base2Fold {
  static constexpr float kLog = kLog2e, kRoom = kScoreRoom;
  static constexpr bool kSumsLanes = true;
  static F16 exp(F16 x) { return exp2_of_bf16(x); }
};
struct Bf16Fold : Base2Fold {
  using Tile = Bf16Tile;
  static void store_element(std::uint16_t* to, F16 value) { store_bf16(to, value); }
};

// Which keys of a block a vector sees.
struct Lanes {
  int begin, end;
  Lanes(const QueryVector& v, std::int64_t block_begin)
      : begin(lane_of(v.first_visible, block_begin)), end(lane_of(v.position + 1, block_begin)) {}
  bool is_whole() const { return begin == 0 && end == kBlockPositions; }
};

// Lets v.max follow a score that has outgrown it, and rescales what has been gathered so far.
template <class Fold>
inline void raise_max(const AttentionWalk& walk, QueryVector& v, float block_max) {
  if (block_max <= v.max + Fold::kRoom) return;
  if (v.max != kMinusInfinity) {
    float lanes[16];
    store(lanes, Fold::exp(set1(v.max - block_max)));
    const F16 alpha = set1(lanes[0]);
    if constexpr (Fold::kSumsLanes)
      store(v.sums, mul(load(v.sums), alpha));
    else
      v.sum *= lanes[0];
    for (std::int64_t i = 0; i < walk.n; i += 16) store(v.out + i, mul(load(v.out + i), alpha));
  }
  v.max = block_max;
}

// Behind the last block.
template <class Fold>
inline void add_lanes(QueryVector* vectors, std::int32_t n_vectors) {
  if constexpr (Fold::kSumsLanes)
    for (std::int32_t i = 0; i < n_vectors; ++i) vectors[i].sum = reduce_add(load(vectors[i].sums));
}

// Products become scores, tau-scaled (q k / d_head + bias) in the logarithm of Fold, and minus
// infinity for keys that the vector does not see. Returns the largest.
template <class Fold>
inline float score_products(const AttentionWalk& walk, const QueryVector& v,
                            std::int64_t block_begin, float* products) {
  const Lanes seen(v, block_begin);
  const bool biased = v.position - (block_begin + seen.end - 1) < walk.args.shape.rel_extent;
  // Lane i of the block, at distance position - block_begin - i, lies i to the right of lane 0.
  const std::int64_t column = walk.bias_column(v.position - block_begin);
  const F16 scale = set1(walk.scale * Fold::kLog), tau = set1(v.tau * Fold::kLog);
  F16 s[kBlockPositions / 16];
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) {
    s[i / 16] = mul(load(products + i), scale);
    // Far to the left of the extent the bias is zero; the zeros of the bank reach one block.
    if (biased && column + i >= 0) s[i / 16] = fma(load(v.bias + column + i), tau, s[i / 16]);
    if (!seen.is_whole())
      s[i / 16] = keep_lanes(s[i / 16], set1(kMinusInfinity), seen.begin - i, seen.end - i);
    store(products + i, s[i / 16]);
  }
  return reduce_max(max(max(s[0], s[1]), max(s[2], s[3])));
}

// Scores become weights, zero for keys that the vector does not see, and are added to its sum.
template <class Fold>
inline void weigh_scores(const AttentionWalk& walk, QueryVector& v, std::int64_t block_begin,
                         const float* scores, float block_max,
                         typename Fold::Tile::Element* weights) {
  raise_max<Fold>(walk, v, block_max);
  const Lanes seen(v, block_begin);
  const F16 shift = set1(v.max == kMinusInfinity ? 0.0f : v.max);
  F16 sum = Fold::kSumsLanes ? load(v.sums) : zero();
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) {
    F16 weight = Fold::exp(sub(load(scores + i), shift));
    if (!seen.is_whole()) weight = keep_lanes(weight, zero(), seen.begin - i, seen.end - i);
    sum = add(sum, weight);
    Fold::store_element(weights + i, weight);
  }
  if constexpr (Fold::kSumsLanes)
    store(v.sums, sum);
  else
    v.sum += reduce_add(sum);
}

}  // namespace duplex::DUPLEX_ISA
