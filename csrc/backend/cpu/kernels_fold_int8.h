// One block of int8 keys and values folded into a query vector: its products become scores, the
// scores codes of weights. The formulas are in kernels_attention_int8.h. Included by
// kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_fold.h"
#include "backend/cpu/kernels_rows.h"
#include "backend/cpu/kernels_walk.h"
#include "backend/kv_int8.h"

namespace duplex::DUPLEX_ISA {

// Of the 64 positions of a block, in the form in which every vector needs them.
struct BlockScales {
  float key[kBlockPositions];  // times log2(e) / d_head
  float value_log2[kBlockPositions];
  float value_inverse[kBlockPositions];
};

inline void read_scales(const AttentionWalk& walk, std::int64_t block, BlockScales& scales) {
  const auto* keys = reinterpret_cast<const std::uint16_t*>(walk.keys(block));
  const auto* values = reinterpret_cast<const std::uint16_t*>(walk.values(block));
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) {
    store(scales.key + i, mul(load_bf16(keys + i), set1(walk.scale * kLog2e)));
    const F16 log2 = load_bf16(values + i);
    store(scales.value_log2 + i, log2);
    // Finite whatever lies where no position was written yet: weights there are zero.
    store(scales.value_inverse + i, exp2_of_bf16(sub(zero(), max(log2, set1(-126.0f)))));
  }
}

// Makes products scores t, minus infinity for keys that the vector does not see; returns the
// largest.
inline float score_block(const AttentionWalk& walk, const QueryVector& v, std::int64_t block_begin,
                         const BlockScales& scales, const std::int32_t* products, float* scores) {
  const Lanes lanes(v, block_begin);
  const F16 scale = set1(v.scale);
  F16 t[kBlockPositions / 16];
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) t[i / 16] =
      fma(to_float(load_lanes(products + i)), mul(load(scales.key + i), scale),
          load(scales.value_log2 + i));
  if (v.position - (block_begin + lanes.end - 1) < walk.args.shape.rel_extent) {
    const float* bias = v.bias + walk.bias_column(v.position - block_begin);
    const F16 factor = set1(v.tau * kLog2e);
    DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) t[i / 16] =
        fma(load(bias + i), factor, t[i / 16]);
  }
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) {
    if (!lanes.is_whole())
      t[i / 16] = keep_lanes(t[i / 16], set1(kMinusInfinity), lanes.begin - i, lanes.end - i);
    store(scores + i, t[i / 16]);
  }
  return reduce_max(max(max(t[0], t[1]), max(t[2], t[3])));
}

// Makes scores codes of weights and adds them to the vector's sums. Returns what the sums of
// weighted values are to be multiplied with before they are added to v.out.
inline float weigh_block(const AttentionWalk& walk, QueryVector& v, std::int64_t block_begin,
                         const BlockScales& scales, const float* scores, float block_max,
                         std::uint8_t* weights) {
  const Lanes lanes(v, block_begin);
  raise_max<Base2Fold>(walk, v, block_max);
  const F16 shift = set1(block_max == kMinusInfinity ? 0.0f : block_max - kLog2Of255);
  F16 sum = zero();
  DUPLEX_UNROLL for (int i = 0; i < kBlockPositions; i += 16) {
    F16 weight = exp2_of_bf16(sub(load(scores + i), shift));
    if (!lanes.is_whole()) weight = keep_lanes(weight, zero(), lanes.begin - i, lanes.end - i);
    store_codes(weights + i, to_codes(weight));
    sum = fma(weight, load(scales.value_inverse + i), sum);
  }
  if (block_max == kMinusInfinity) return 0.0f;  // the vector sees nothing of the block
  float factor[16];
  const F16 factors = exp2_of_bf16(set1(block_max - v.max));
  store(v.sums, fma(sum, factors, load(v.sums)));
  store(factor, factors);
  return factor[0];
}

}  // namespace duplex::DUPLEX_ISA
