// The single-thread pieces of the CPU operations, one table of function pointers per instruction
// set. cpu_ops.cpp cuts an operation into these pieces and hands them to the threads.
//
// Every piece gives a row the same bits whatever other rows it is called with: an output is one
// chain of additions over the reduction index in ascending order, whatever the tile shape.
#pragma once

#include <cstdint>

#include "backend/op_args.h"
#include "backend/quantised.h"
#include "core/types.h"

// Before a loop over the rows or columns of a tile: unrolled early, the sums stay in registers.
#define DUPLEX_UNROLL _Pragma("GCC unroll 8")

namespace duplex {

// Quantised panels hold, for every group of reduction indices, 64 bfloat16 scales and then the
// codes; the codes of four indices (a quad) and 16 outputs fill one vector of 64 bytes. int8: code
// + 128. int4: code + 8, the quads of a pair in the low and the high nibbles. The rows they meet
// are quantised by the same groups, so a group's sum is an exact integer.
constexpr std::int64_t kScalesBytes = kPanelOutputs * 2;  // of one group of a panel

// A group of a quantised row is this header and the int8 codes of its group.
struct RowGroup {
  float scale;
  std::int32_t correction;  // -(what was added to the panel's codes) * (sum of the row's codes)
};
constexpr std::int64_t quantised_row_bytes(std::int64_t n_in, DType format) {
  const std::int64_t group = quantised_group(format);
  return div_up(n_in, group) * (std::int64_t{sizeof(RowGroup)} + group);
}

// y[row][0..63] = (sum_k x[row][k] * panel[k][0..63]) / divisor
struct PanelArgs {
  const void* const* rows;  // (n_rows) start of each row: in the dtype of the panel, or quantised
  std::int32_t n_rows;
  const void* panel;  // float32: (n_in, 64); bfloat16: (n_in / 2, 64, 2); or quantised
  std::int32_t n_in;
  DType dtype;
  float* const* y;  // (n_rows)
  float divisor;
};

inline constexpr std::int64_t kMaxHeadWidth = 1024;

// Scratch of one attention piece; one per thread.
inline constexpr std::int32_t kAttentionVectors = 96;
struct AttentionScratch {
  float out[kAttentionVectors * kMaxHeadWidth];            // (vectors, d_head_padded)
  std::int8_t queries[kAttentionVectors * kMaxHeadWidth];  // the same, where the tape is int8
  float* bias;                                             // (kAttentionVectors, rel_stride)
};

// Query vectors [vector_begin, vector_end) of one key/value head of one segment; vector v is row
// v / group, head kv_head * group + v % group.
struct AttentionPiece {
  const AttentionArgs* args;
  const Segment* segment;
  std::int32_t kv_head;
  std::int32_t vector_begin;
  std::int32_t vector_end;
};

struct CpuKernels {
  const char* name;
  void (*linear_panel)(const PanelArgs& args);
  void (*attention)(const AttentionPiece& piece, AttentionScratch& scratch);
  void (*embed_text_row)(const EmbedTextArgs& args, std::int32_t row);
  void (*embed_audio_row)(const EmbedAudioArgs& args, std::int32_t row);
  void (*norm_row)(const NormArgs& args, std::int32_t row);
  void (*kv_append_row)(const KvAppendArgs& args, const Segment& segment, std::int32_t row);
  void (*conv_add_norm_row)(const ConvAddNormArgs& args, const Segment& segment, std::int32_t row);
  void (*silu_mul_row)(const SiluMulArgs& args, std::int32_t row);
  // A row of n_in values (padding zero) to quantised_row_bytes for panels of `format`.
  void (*quantise_row)(const void* x, DType dtype, std::int64_t n_in, DType format, void* out);
  void (*to_float)(const void* x, DType dtype, std::int64_t n_padded, float* out);
  // y += weight * x over n_padded floats
  void (*add_scaled)(float* y, const float* x, float weight, std::int64_t n_padded);
};

// One for each kernels_<isa>.cpp; choose_kernels (isa.h) knows which of them this machine can run.
const CpuKernels& portable_kernels();
const CpuKernels& avx2_kernels();
const CpuKernels& avx2_vnni_kernels();
const CpuKernels& avx512_vnni_kernels();
const CpuKernels& avx512_kernels();

// tau of the log-scaled global layers: 1 + alpha * log(max((position + 1) / floor, 1)).
float log_scaling_tau(std::int64_t position, std::int32_t floor, float alpha);

}  // namespace duplex
