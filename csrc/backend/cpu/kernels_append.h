// The append of keys and values to their tape. Included by kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_conv.h"
#include "backend/cpu/kernels_kv_int8.h"
#include "backend/cpu/kernels_rows.h"

namespace duplex::DUPLEX_ISA {

// note: a loop of its own, which gcc makes vectors of; store_bf16 takes denormal numbers for zero
// with the instructions of BF16.
inline void round_to_bf16(const float* x, std::int64_t n, std::uint16_t* out) {
  for (std::int64_t c = 0; c < n; ++c) out[c] = float_to_bf16(x[c]);
}

// Key c of position p lies at panel[c][p % 64] (float32) or panel[c / 2][p % 64][c % 2]
// (bfloat16): the layout of a weight panel with positions as outputs. int8: kernels_kv_int8.h.
inline void write_key(std::byte* panel, DType dtype, std::int64_t slot, const float* key,
                      std::int64_t n) {
  if (dtype == DType::kF32) {
    auto* p = reinterpret_cast<float*>(panel);
    for (std::int64_t c = 0; c < n; ++c) p[c * kBlockPositions + slot] = key[c];
  } else if (dtype == DType::kInt8) {
    write_key_int8(panel, slot, key, n);
  } else {
    std::uint16_t rounded[kMaxHeadWidth];
    round_to_bf16(key, n, rounded);
    std::byte* pair = panel + slot * 4;
    for (std::int64_t c = 0; c < n; c += 2, pair += kBlockPositions * 4)
      __builtin_memcpy(pair, rounded + c, 4);
  }
}

// Value c of position p: panel[p % 64][c] (float32) or panel[(p % 64) / 2][c][p % 2] (bfloat16),
// positions as the reduction index. note: the newest row also clears its partner when that is yet
// to come, so that a pair never holds what an earlier owner of the page left there.
inline void write_value(std::byte* panel, DType dtype, std::int64_t slot, bool is_newest,
                        const float* value, std::int64_t n) {
  if (dtype == DType::kF32) {
    auto* p = reinterpret_cast<float*>(panel) + slot * n;
    for (std::int64_t c = 0; c < n; ++c) p[c] = value[c];
  } else if (dtype == DType::kInt8) {
    write_value_int8(panel, slot, value, n);
  } else {
    std::uint16_t rounded[kMaxHeadWidth];
    round_to_bf16(value, n, rounded);
    auto* p = reinterpret_cast<std::uint16_t*>(panel) + (slot / 2) * n * 2 + slot % 2;
    for (std::int64_t c = 0; c < n; ++c) p[c * 2] = rounded[c];
    if (is_newest && slot % 2 == 0)
      for (std::int64_t c = 0; c < n; ++c) p[c * 2 + 1] = 0;
  }
}

inline void append_kv_head(const KvAppendArgs& args, const Segment& segment, std::int32_t row,
                           std::int32_t head) {
  const std::int64_t n = args.d_head_padded;
  const std::int64_t k_column = (std::int64_t{args.shape.n_heads} + head) * n;
  const std::int64_t v_column = k_column + args.shape.n_kv_heads * n;
  const std::int64_t position = segment.position + row;
  const TapeView& tape = args.is_local ? segment.local : segment.global;
  const std::int64_t panel_bytes = kv_panel_bytes(args.kv_dtype, n);
  std::byte* panel =
      tape.block(position / kBlockPositions) + args.layer_offset_bytes + 2 * head * panel_bytes;
  alignas(64) float values[kMaxHeadWidth];
  ConvSlot slot = args.k_conv;
  slot.offset_bytes += head * n * 4;
  slot.weight += head * n;
  ConvInput<false> input{&segment, &slot, args.qkvr + k_column, args.stride,
                         1.0f,     row,   args.kernel};
  for (std::int64_t i = 0; i < n; i += 16) store(values + i, input.run(i));
  norm_in_place(values, args.k_norm, args.eps, args.shape.d_head);
  write_key(panel, args.kv_dtype, position % kBlockPositions, values, n);
  slot = args.v_conv;
  slot.offset_bytes += head * n * 4;
  slot.weight += head * n;
  input.x = args.qkvr + v_column;
  for (std::int64_t i = 0; i < n; i += 16) store(values + i, input.run(i));
  write_value(panel + panel_bytes, args.kv_dtype, position % kBlockPositions,
              row + 1 == segment.n_rows, values, n);
}

inline void kv_append_row(const KvAppendArgs& args, const Segment& segment, std::int32_t row) {
  for (std::int32_t head = 0; head < args.shape.n_kv_heads; ++head)
    append_kv_head(args, segment, row, head);
  const std::int64_t n = args.d_head_padded;
  const std::int64_t batch_row = segment.row_begin + row;
  const float tau = args.is_local ? 1.0f
                                  : log_scaling_tau(segment.position + row, args.log_scaling_floor,
                                                    args.log_scaling_alpha);
  for (std::int32_t head = 0; head < args.shape.n_heads; ++head) {
    const float* q = args.qkvr + batch_row * args.stride + head * n;
    const F16 scale = set1(inverse_rms(q, n, args.shape.d_head, args.eps));
    for (std::int64_t i = 0; i < n; i += 16)
      write_row(args.q, batch_row, head * n + i,
                mul(mul(mul(load(q + i), scale), load(args.q_norm + i)), set1(tau)));
  }
}

}  // namespace duplex::DUPLEX_ISA
