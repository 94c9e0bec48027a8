// The argument structs of every backend operation: plain data, no ownership. All sums are float32.
// What Rows, TapeView and Segment are: views.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "backend/sampling.h"
#include "backend/views.h"
#include "core/config.h"
#include "core/shard.h"

namespace duplex {

struct EmbedTextArgs {
  const std::int32_t* ids;  // (n_rows)
  const void* table;        // (vocab_size, d_model)
  DType table_dtype;
  const float* norm;  // (padded d_model)
  float eps;
  std::int32_t d_model;
  std::int32_t n_rows;
  float* out;  // (n_rows, out_stride)
  std::int64_t out_stride;
  const std::int32_t* rows = nullptr;  // (n_rows) of `out` that are written; null: 0, 1, ...

  constexpr float* out_row(std::int32_t i) const {
    return out + (rows == nullptr ? i : rows[i]) * out_stride;
  }
};

// Bag of embeddings: the sum over mels of table[mel * n_levels + bin], then RMSNorm.
struct EmbedAudioArgs {
  const std::uint8_t* bins;  // (n_rows, n_mels)
  std::int32_t n_mels;
  std::int32_t n_levels;
  const void* table;  // (n_mels * n_levels, d_model)
  DType table_dtype;
  const float* norm;
  float eps;
  std::int32_t d_model;
  std::int32_t n_rows;
  float* out;
  std::int64_t out_stride;
  const std::int32_t* rows = nullptr;  // as in EmbedTextArgs

  constexpr float* out_row(std::int32_t i) const {
    return out + (rows == nullptr ? i : rows[i]) * out_stride;
  }
};

enum class Activation : std::uint8_t { kNone, kGelu };

struct NormArgs {
  const float* x;  // (n_rows, x_stride)
  std::int64_t x_stride;
  const float* weight;  // (padded width)
  float eps;
  std::int32_t width;  // true width: the divisor of the mean
  std::int32_t n_rows;
  Activation activation;
  Rows out;
};

struct LinearArgs {
  PackedMatrix w;
  Rows x;  // of a dtype that w takes (takes_rows)
  std::int32_t n_rows;
  float* y;  // (n_rows, y_stride), y_stride >= n_out rounded up to kPanelOutputs
  std::int64_t y_stride;
  float divisor = 1.0f;  // y = (x w^T) / divisor
  // Several sums in place of one: part p of y is what the p-th of n_parts equal runs of columns
  // make. Where the backend packs parts apart, w is n_parts matrices of that width.
  std::int32_t n_parts = 1;
  std::int64_t y_part_stride = 0;  // floats
  // With data: w is as many gates as ups, padded, and silu(gates) * ups of each row go here; y is
  // room to do so. The divisor and the parts are one.
  Rows activated = {};
};

// One convolution of one layer: its weights and where its inputs lie in a block of the conv tape.
struct ConvSlot {
  const float* weight;  // (kernel, padded channels)
  std::int64_t offset_bytes;
  std::int32_t channels;  // padded
};

// From one fused projection: convolve k and v, normalise q and k per head, append k and v.
struct KvAppendArgs {
  Segments segments;
  AttentionShape shape;
  std::int32_t d_head_padded;
  // (n_rows, stride): heads of d_head_padded for q, k, v, then r (n_heads, d_rel)
  const float* qkvr;
  std::int64_t stride;
  ConvSlot k_conv;
  ConvSlot v_conv;
  std::int32_t kernel;
  const float* q_norm;  // (d_head_padded)
  const float* k_norm;
  float eps;
  bool is_local;
  std::int32_t log_scaling_floor;  // 0 = off
  float log_scaling_alpha;
  std::int64_t layer_offset_bytes;  // of this layer inside a block of the tape
  DType kv_dtype;
  Rows q;  // out: (n_rows, n_heads * d_head_padded), query_dtype(kv_dtype)
};

struct AttentionArgs {
  Segments segments;
  AttentionShape shape;
  std::int32_t d_head_padded;
  std::int32_t d_rel;
  Rows q;          // query_dtype(kv_dtype)
  const float* r;  // (n_rows, r_stride), n_heads * d_rel values a row
  std::int64_t r_stride;
  const float* rel_bank;  // (d_rel, rel_stride): distances descending between kBlockPositions zeros
  std::int64_t rel_stride;
  bool is_local;
  std::int32_t log_scaling_floor;
  float log_scaling_alpha;
  std::int64_t layer_offset_bytes;
  DType kv_dtype;
  Rows out;  // (n_rows, n_heads * d_head_padded)
};

// x = parts[0] + parts[1] + ..., in this order; hidden += conv(x * scale) + x * scale;
// out = rms_norm(hidden).
struct ConvAddNormArgs {
  Segments segments;
  const float* parts[kMaxParts];  // each (n_rows, x_stride)
  std::int32_t n_parts;
  std::int64_t x_stride;
  float scale;
  ConvSlot conv;
  std::int32_t kernel;
  float* hidden;  // (n_rows, hidden_stride), in place
  std::int64_t hidden_stride;
  const float* norm;
  float eps;
  std::int32_t width;
  Rows out;
};

// out = silu(x[:, :width]) * x[:, up_offset : up_offset + width]
struct SiluMulArgs {
  const float* x;
  std::int64_t x_stride;
  std::int32_t width;  // padded
  std::int64_t up_offset;
  std::int32_t n_rows;
  Rows out;
};

// From a product to its activated rows.
constexpr SiluMulArgs silu_mul_of(const LinearArgs& args) {
  const std::int32_t width = args.w.n_out / 2;
  return {args.y, args.y_stride, width, width, args.n_rows, args.activated};
}

// Parts are those of the products with `down`, as in LinearArgs.
struct MoeArgs : MoeWeights {
  MoeConfig config;
  std::int32_t n_rows;
  Rows x;    // (n_rows, d_model) normalised
  float* y;  // (n_rows, y_stride)
  std::int64_t y_stride;
  void* scratch;  // moe_scratch_bytes
  std::int32_t n_parts = 1;
  std::int64_t y_part_stride = 0;
};

// Gather of pixels or features into the rows that one hMLP stage multiplies.
// Cells are (n, t, h, w, c) channels last; a row collects t_fold x hw_fold x hw_fold cells.
struct FoldArgs {
  const float* x;  // (n_patches, t, h, w, x_stride)
  std::int64_t x_stride;
  std::int32_t n_patches;
  std::int32_t t, h, w, c;
  std::int32_t t_fold, hw_fold;
  Rows out;  // (n_patches * t/t_fold * h/hw_fold * w/hw_fold, t_fold * hw_fold^2 * c)
};

// How the token behind one row is chosen, and the position that it will take in its sequence.
struct SampleRow {
  SamplingParams params;
  std::int64_t position;
};

// A token for each row of logits, chosen where they lie.
struct SampleArgs {
  const float* logits;  // (n_rows, logits_stride), whatever lies behind n_vocab
  std::int64_t logits_stride;
  std::int32_t n_vocab;
  std::int32_t n_rows;
  const SampleRow* rows;  // (n_rows)
  std::int32_t* tokens;   // out: (n_rows), of the host; there when the call returns
};

// Passes one behind the other without the host: rows of some sequences go through the layers, a
// token is chosen behind each sequence, and is its row of the next pass. A sequence ends with a
// token of `stops` or with its limit; the turn ends when no more than half of them have not, so
// that few do not pay for many, and may end before.
struct TurnArgs {
  Segments segments;     // of the first pass: the next rows of a sequence each
  EmbedTextArgs text;    // its rows that are text, and how a token becomes a row
  EmbedAudioArgs audio;  // its rows that are sound
  // The model's own: what a pass leaves of its rows, of which the head takes the last of each
  // sequence; their padded width; rows that the head takes at once, at most; and (n_head,
  // logits_stride) that it leaves, null on ranks other than 0.
  Rows passed = {};
  std::int32_t width = 0;
  std::int32_t n_head = 0;
  const float* logits = nullptr;
  std::int64_t logits_stride = 0;
  std::int32_t n_vocab = 0;
  const SampleRow* sampling;   // (count) of the token behind the first pass
  const std::int32_t* limits;  // (count) tokens, 0 to max_tokens
  const std::int32_t* stops;   // (n_stops)
  std::int32_t n_stops;
  std::int32_t max_tokens;
  // Out, of the host; null on ranks other than 0. Of a sequence, all tokens but the last have
  // become rows; one row behind these may be written over, so n_rows + limit rows must be backed.
  std::int32_t* n_tokens;  // (count)
  std::int32_t* tokens;    // (count, max_tokens)
  std::byte* head_rows;    // (count, width) in the dtype of `passed`: the newest rows
};

// What a turn asks of the model.
struct TurnSteps {
  std::function<void(const Segments&)> layers;                 // run_layers over these segments
  std::function<void(const Rows&, std::int32_t n_rows)> head;  // their logits
};

}  // namespace duplex
