// The operations as launches: one function per operation, each beside its kernel in a .cu file.
// Pointers of the argument structs are the device's, those of `Segments` included.
#pragma once

#include "backend/moe_layout.h"
#include "backend/op_args.h"
#include "device/runtime.h"

namespace duplex::cuda {

void launch_embed_text(Runtime& runtime, const EmbedTextArgs& args);
void launch_embed_audio(Runtime& runtime, const EmbedAudioArgs& args);
void launch_norm(Runtime& runtime, const NormArgs& args);
void launch_silu_mul(Runtime& runtime, const SiluMulArgs& args);
void launch_fold(Runtime& runtime, const FoldArgs& args);
void launch_sample(Runtime& runtime, const SampleArgs& args);
void launch_kv_append(Runtime& runtime, const KvAppendArgs& args);
void launch_conv_add_norm(Runtime& runtime, const ConvAddNormArgs& args);

// Some rows, one behind the other: row `rows[i]` of `from` becomes row i, where `is_wanted` says
// so.
struct GatherRowsArgs {
  const std::byte* from;
  std::int64_t from_stride_bytes;
  const std::int32_t* rows;
  const std::int32_t* is_wanted;  // null: every one is
  std::byte* to;
  std::int64_t row_bytes;  // a multiple of 16
};
void launch_gather_rows(Runtime& runtime, std::int32_t n_rows, const GatherRowsArgs& args);

// What the passes of a turn (backend/op_args.h) leave to one another, on the device. Arrays have a
// place for each sequence.
struct TurnPlaces {
  std::int32_t count;
  std::int32_t max_tokens;
  std::int32_t n_stops;
  Segment* segments;      // of the passes behind the first
  SampleRow* sampling;    // of the next token
  std::int32_t* chosen;   // the newest token
  std::int32_t* is_open;  // whether it is to say more
  std::int32_t* n_tokens;
  std::int32_t* tokens;  // (count, max_tokens)
  const std::int32_t* limits;
  const std::int32_t* stops;
};
struct TakeTokensArgs {
  TurnPlaces turn;
  bool is_first;  // pass of the turn: the arrays above hold nothing yet
  bool has_loop;
  Loop loop;  // goes on as long as more than half of the sequences are open
};
// Takes the token that was chosen behind each open sequence, and moves the sequence on.
void launch_take_tokens(Runtime& runtime, const TakeTokensArgs& args);

// How the work of an attention is cut, from the host's own segments. Positions enter through
// attention_reach() alone: the parts of the longest walk there may be, without those that are
// wholly forgotten, rounded up to a power of two.
std::int64_t attention_reach(const Segments& segments);
struct AttentionPlan {
  std::int64_t n_groups;       // of tiles of query vectors, all segments together
  std::int32_t group_tiles;    // at most
  std::int64_t n_parts;        // at least those of the longest walk over the tape
  std::int64_t launch_groups;  // of one launch
  std::size_t partial_bytes;   // of `partial`; 0 where nothing is added up afterwards
};
AttentionPlan plan_attention(const AttentionArgs& args);
void launch_attention(Runtime& runtime, const AttentionArgs& args, const AttentionPlan& plan,
                      float* partial);

// Rows as a matrix meets them: quantised rows with a quantised one, so they go through
// launch_quantise_rows() first, which puts them at `out` (quantised_rows_bytes()) or, for any other
// matrix, gives them back as they are.
std::size_t quantised_rows_bytes(std::int64_t n_rows, const PackedMatrix& w);
Rows launch_quantise_rows(Runtime& runtime, const Rows& x, std::int32_t n_rows,
                          const PackedMatrix& w, void* out);
void launch_linear(Runtime& runtime, const LinearArgs& args);

// One matrix for each of some experts, over the rows that chose it. A row and an expert that it
// chose are a pair: number p of all multiplies row p / pairs_of_x of x and writes row p of y.
struct ExpertLinearArgs {
  PackedMatrix w;  // of first_expert
  std::int64_t expert_stride_bytes;
  std::int32_t first_expert;
  std::int32_t n_experts;
  const MoeChoice* choices;  // (rows, per_row), an expert at most once in a row
  std::int32_t first_row;
  std::int32_t n_rows;
  std::int32_t per_row;
  std::int32_t pairs_of_x;  // per_row where x is the rows, 1 where it has a row for each pair
  Rows x;
  float* y;
  std::int64_t y_stride;
  Rows activated;  // as in LinearArgs; no data where w is not paired
};
void launch_expert_linear(Runtime& runtime, const ExpertLinearArgs& args);

// A router's logits for bfloat16 rows are sums of products over so many columns each, which
// thread blocks of their own compute; for float32 rows they are one sum, as on the CPU.
inline constexpr std::int64_t kRouterSlice = 128;
// Chooses the experts of each row: `choices` are (n_rows, top_k + n_shared), `logits` the sums,
// (slices, n_rows, MoeSizes::router_stride()).
void launch_route(Runtime& runtime, const MoeArgs& args, float* logits, MoeChoice* choices);

std::size_t moe_scratch_bytes(const MoeConfig& config, std::int64_t d_model, std::int64_t max_rows);
// `quantised` is room for the rows of either matrix of the experts.
std::size_t moe_quantised_bytes(const MoeArgs& args);
void launch_moe(Runtime& runtime, const MoeArgs& args, void* quantised);

// Bytes of a packed matrix, and the packing of `source` (on the device) into it.
std::size_t packed_matrix_bytes(std::int64_t n_out, std::int64_t n_in_padded, DType dtype);
// Of a matrix whose columns are cut into parts, each packed as a matrix of its own: one of them,
// and rows without the columns in front of it. No matrix has no parts.
PackedMatrix part_of(const PackedMatrix& w, std::int32_t n_parts, std::int32_t part);
Rows columns_from(const Rows& x, std::int64_t column);
struct PackArgs {
  const void* source;
  DType source_dtype;
  std::int64_t n_rows;
  std::int64_t row_stride;  // elements
  PackShape shape;
  std::int64_t n_in_padded;
  std::int64_t first_out;
  void* destination;
  const std::uint8_t* scales = nullptr;  // of NVFP4, as in PackSource
  std::int64_t scale_row_stride = 0;
  MatrixScale matrix_scale = {};
};
void launch_pack(Runtime& runtime, const PackArgs& args);

}  // namespace duplex::cuda
