// How operations see memory: rows, packed matrices, tapes and segments. Plain data, no ownership.
//
// Buffers of rows are row-major with a stride in elements that is at least the padded width
// (core/types.h); columns behind the true width are zero. "GEMM dtype" is the dtype of the packed
// weights that the rows meet: float32 or bfloat16. Next: op_args.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace duplex {

// A read-only or writable set of rows in the GEMM dtype of its consumer.
struct Rows {
  void* data = nullptr;     // (n_rows, stride)
  std::int64_t stride = 0;  // elements
  DType dtype = DType::kF32;
};

// A weight matrix in the backend's own layout.
struct PackedMatrix {
  const void* data = nullptr;
  std::int32_t n_out = 0;
  std::int32_t n_in = 0;  // padded width of the rows it multiplies
  DType dtype = DType::kF32;
  bool is_paired = false;  // gates and ups that were packed with a pair_width
};

// The same matrix of several experts, one behind the other.
struct ExpertMatrix {
  PackedMatrix first;
  std::int64_t stride_bytes = 0;
};

// A mixture of experts: routed experts 0..n_experts-1 and shared experts behind them, all packed
// with one stride; shared experts of another format lie apart.
struct MoeWeights {
  PackedMatrix router;                    // float32, (n_experts + n_shared, d_model)
  const float* selection_bias = nullptr;  // (n_experts)
  float global_scale = 1.0f;
  PackedMatrix gate_up;  // expert 0: gates, padding, ups; or in pairs (PackShape)
  PackedMatrix down;     // expert 0
  std::int64_t gate_up_stride_bytes = 0;
  std::int64_t down_stride_bytes = 0;
  ExpertMatrix shared_gate_up = {};  // no data: behind the routed ones
  ExpertMatrix shared_down = {};
};

// The scale of a whole matrix in NVFP4, by which codes times the scales of their groups are
// multiplied or divided.
struct MatrixScale {
  float value = 0.0f;
  bool is_divisor = false;
};

// Source rows of a matrix to pack: `n_rows` rows of `row_elements` values, `row_stride` apart.
// No alignment is asked of data. NVFP4, for a matrix in NVFP4 alone: two E2M1 codes a byte, and an
// E4M3 scale for each kNvfp4Group columns of a row.
struct PackSource {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  std::int64_t n_rows = 0;
  std::int64_t row_stride = 0;  // elements
  const void* scales = nullptr;
  std::int64_t scale_row_stride = 0;
  MatrixScale matrix_scale = {};
};

// Columns are copied in groups: `in_group` source columns land at multiples of `in_group_padded`.
// With a pair_width, outputs are so many gates, padding included, and as many ups behind them, and
// lie where the backend activates one by the other as it multiplies (Backend::pairs_gate_up).
struct PackShape {
  std::int32_t n_in = 0;  // source columns
  std::int32_t in_group = 0;
  std::int32_t in_group_padded = 0;
  DType dtype = DType::kF32;
  std::int32_t pair_width = 0;  // a multiple of kColumnAlign
};

// Keys, or values, of one head in a block of kBlockPositions: d_head_padded numbers a position.
// int8 has kBlockPositions bfloat16 in front of the codes: scales of keys, base-2 logarithms of
// those of values.
constexpr std::int64_t kv_panel_bytes(DType dtype, std::int64_t d_head_padded) {
  if (dtype == DType::kInt8) return kBlockPositions * (2 + d_head_padded);
  return kBlockPositions * d_head_padded * static_cast<std::int64_t>(dtype_bytes(dtype));
}
// Of the rows of queries that meet such keys.
constexpr DType query_dtype(DType kv_dtype) {
  return is_quantised(kv_dtype) ? DType::kF32 : kv_dtype;
}

// Where a tape lies and how its pages are cut. A page holds `blocks_per_page` blocks of
// `block_bytes`; key/value tapes have blocks of kBlockPositions, the convolution tape of one.
struct TapeView {
  std::byte* base = nullptr;
  std::int64_t blocks_per_page = 1;
  std::int64_t page_bytes = 0;
  std::int64_t block_bytes = 0;

  constexpr std::byte* block(std::int64_t index) const {
    return base + (index / blocks_per_page) * page_bytes + (index % blocks_per_page) * block_bytes;
  }
};

// Consecutive rows of one sequence inside a batch.
struct Segment {
  std::int32_t row_begin = 0;
  std::int32_t n_rows = 0;
  std::int64_t position = 0;                 // of the first row
  TapeView global;                           // keys and values, every position
  TapeView local;                            // keys and values, the recent window
  TapeView conv;                             // short-convolution inputs, the most recent positions
  const PositionRange* forgotten = nullptr;  // (n_forgotten), ascending, whole blocks
  std::int32_t n_forgotten = 0;
};

struct Segments {
  const Segment* data = nullptr;
  std::int32_t count = 0;
  std::int32_t n_rows = 0;  // of all segments together
};

}  // namespace duplex
