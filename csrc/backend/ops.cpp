// The front of every operation: arguments are checked here, once, for all backends.
#include "backend/backend.h"
#include "core/error.h"

namespace duplex {
namespace {

void check_rows(const char* op, const char* name, const Rows& rows, std::int64_t width) {
  check(rows.data != nullptr, op, ": ", name, " has no data");
  check(rows.stride >= width, op, ": ", name, " needs rows of ", width, " elements, stride is ",
        rows.stride);
}

void check_floats(const char* op, const char* name, const float* data, std::int64_t stride,
                  std::int64_t width) {
  check(data != nullptr, op, ": ", name, " has no data");
  check(stride >= width, op, ": ", name, " needs rows of ", width, " floats, stride is ", stride);
}

void check_meets(const char* op, const Rows& rows, const PackedMatrix& w) {
  check(takes_rows(w.dtype, rows.dtype), op, ": rows are ", dtype_name(rows.dtype),
        ", weights are ", dtype_name(w.dtype));
}

void check_parts(const char* op, const PackedMatrix& w, std::int32_t n_parts) {
  const std::int64_t group = is_quantised(w.dtype) ? quantised_group(w.dtype) : kColumnAlign;
  check(n_parts == 1 || (n_parts > 1 && w.n_in % (n_parts * group) == 0), op, ": expected ",
        dtype_name(w.dtype), " columns for ", n_parts, " parts of whole groups of ", group,
        ", found ", w.n_in);
}

void check_tape(const char* op, const Backend& backend, DType kv_dtype, const Rows& q) {
  check(backend.has_kv_dtype(kv_dtype), op, ": device '", backend.name(), "' keeps no ",
        dtype_name(kv_dtype), " keys and values");
  check(q.dtype == query_dtype(kv_dtype), op, ": q must have the dtype of the tape, or float32 ",
        "where that is quantised");
}

void check_segments(const char* op, const Segments& segments, bool is_local) {
  std::int32_t row = 0;
  for (std::int32_t i = 0; i < segments.count; ++i) {
    const Segment& segment = segments.data[i];
    check(segment.row_begin == row && segment.n_rows > 0, op, ": segment ", i,
          " must start at row ", row, " and have rows; found ", segment.row_begin, " and ",
          segment.n_rows);
    check((is_local ? segment.local : segment.global).base != nullptr, op, ": segment ", i,
          " has no tape");
    row += segment.n_rows;
  }
  check(row == segments.n_rows, op, ": segments cover ", row, " of ", segments.n_rows, " rows");
}

std::int64_t padded(std::int64_t width) { return round_up(width, kColumnAlign); }

void check_pairs(const char* op, const Backend& backend, const PackedMatrix& w) {
  check(!w.is_paired || backend.pairs_gate_up(w.dtype), op, ": device '", backend.name(),
        "' multiplies no ", dtype_name(w.dtype), " gates and ups that lie in pairs");
}

void check_activated(const LinearArgs& args) {
  const bool is_wanted = args.activated.data != nullptr;
  check(is_wanted || !args.w.is_paired, "linear: gates and ups that lie in pairs, for no ",
        "activated rows");
  if (!is_wanted) return;
  check(args.w.n_out % (2 * kColumnAlign) == 0, "linear: ", args.w.n_out,
        " outputs must be gates and ups, each a multiple of ", kColumnAlign);
  check(args.divisor == 1.0f && args.n_parts == 1, "linear: activated rows have no divisor and no ",
        "parts");
  check_rows("linear", "activated", args.activated, args.w.n_out / 2);
}

}  // namespace

void Backend::turn(const TurnArgs& args, const TurnSteps& steps) {
  check(has_turns(), "turn: device '", name(), "' has none; ask for each pass");
  const Segments& segments = args.segments;
  check(segments.count > 0, "turn: expected a sequence or more, found none");
  for (std::int32_t i = 0; i < segments.count; ++i)
    check(args.limits[i] >= 0 && args.limits[i] <= args.max_tokens, "turn: expected a limit of 0 ",
          "to ", args.max_tokens, " tokens, found ", args.limits[i]);
  check(args.text.n_rows + args.audio.n_rows <= segments.n_rows, "turn: ", args.text.n_rows,
        " rows of text and ", args.audio.n_rows, " of sound for a pass of ", segments.n_rows);
  check_rows("turn", "passed", args.passed, args.width);
  check(args.n_head > 0, "turn: the head takes no rows");
  check(args.n_vocab >= 1 && args.n_vocab <= kMaxSampledIds, "turn: expected 1 to ", kMaxSampledIds,
        " ids, found ", args.n_vocab);
  if (args.logits != nullptr)
    check_floats("turn", "logits", args.logits, args.logits_stride, args.n_vocab);
  do_turn(args, steps);
}

void Backend::embed_text(const EmbedTextArgs& args) {
  if (args.n_rows == 0) return;
  check(args.table != nullptr && args.norm != nullptr, "embed_text: table and norm are needed");
  check_floats("embed_text", "out", args.out, args.out_stride, padded(args.d_model));
  do_embed_text(args);
}

void Backend::embed_audio(const EmbedAudioArgs& args) {
  if (args.n_rows == 0) return;
  check(args.table != nullptr && args.norm != nullptr, "embed_audio: table and norm are needed");
  check_floats("embed_audio", "out", args.out, args.out_stride, padded(args.d_model));
  do_embed_audio(args);
}

void Backend::norm(const NormArgs& args) {
  if (args.n_rows == 0) return;
  check_floats("norm", "x", args.x, args.x_stride, padded(args.width));
  check_rows("norm", "out", args.out, padded(args.width));
  do_norm(args);
}

void Backend::linear(const LinearArgs& args) {
  if (args.n_rows == 0) return;
  check(args.w.data != nullptr, "linear: no weights");
  check_meets("linear", args.x, args.w);
  check_rows("linear", "x", args.x, args.w.n_in);
  check_floats("linear", "y", args.y, args.y_stride, round_up(args.w.n_out, kPanelOutputs));
  check_parts("linear", args.w, args.n_parts);
  check_pairs("linear", *this, args.w);
  check_activated(args);
  do_linear(args);
}

void Backend::kv_append(const KvAppendArgs& args) {
  if (args.segments.n_rows == 0) return;
  check_segments("kv_append", args.segments, args.is_local);
  const std::int64_t heads = args.shape.n_heads + 2 * args.shape.n_kv_heads;
  check_floats("kv_append", "qkvr", args.qkvr, args.stride, heads * args.d_head_padded);
  check_rows("kv_append", "q", args.q, std::int64_t{args.shape.n_heads} * args.d_head_padded);
  check_tape("kv_append", *this, args.kv_dtype, args.q);
  do_kv_append(args);
}

void Backend::attention(const AttentionArgs& args) {
  if (args.segments.n_rows == 0) return;
  check_segments("attention", args.segments, args.is_local);
  const std::int64_t width = std::int64_t{args.shape.n_heads} * args.d_head_padded;
  check_rows("attention", "q", args.q, width);
  check_rows("attention", "out", args.out, width);
  check_tape("attention", *this, args.kv_dtype, args.q);
  check(args.rel_stride >= args.shape.rel_extent + 2 * kBlockPositions,
        "attention: the bias bank needs rel_extent + 128 columns, stride is ", args.rel_stride);
  do_attention(args);
}

void Backend::conv_add_norm(const ConvAddNormArgs& args) {
  if (args.segments.n_rows == 0) return;
  const std::int64_t width = padded(args.width);
  check(args.n_parts >= 1 && args.n_parts <= kMaxParts, "conv_add_norm: expected 1 to ", kMaxParts,
        " parts, found ", args.n_parts);
  for (std::int32_t p = 0; p < args.n_parts; ++p)
    check_floats("conv_add_norm", "x", args.parts[p], args.x_stride, width);
  check_floats("conv_add_norm", "hidden", args.hidden, args.hidden_stride, width);
  check_rows("conv_add_norm", "out", args.out, width);
  check(args.conv.channels == width, "conv_add_norm: ", args.conv.channels,
        " channels for rows of ", width);
  do_conv_add_norm(args);
}

void Backend::silu_mul(const SiluMulArgs& args) {
  if (args.n_rows == 0) return;
  check(args.width % kColumnAlign == 0 && args.up_offset >= args.width, "silu_mul: width ",
        args.width, " must be a multiple of ", kColumnAlign, " and at most up_offset ",
        args.up_offset);
  check_floats("silu_mul", "x", args.x, args.x_stride, args.up_offset + args.width);
  check_rows("silu_mul", "out", args.out, args.width);
  do_silu_mul(args);
}

void Backend::moe(const MoeArgs& args) {
  if (args.n_rows == 0) return;
  check(args.router.dtype == DType::kF32, "moe: the router is float32");
  check_meets("moe", args.x, args.gate_up);
  check_meets("moe", args.x, args.down);
  for (const ExpertMatrix& shared : {args.shared_gate_up, args.shared_down})
    if (shared.first.data != nullptr) check_meets("moe", args.x, shared.first);
  check_pairs("moe", *this, args.gate_up);
  check(args.shared_gate_up.first.data == nullptr ||
            args.shared_gate_up.first.is_paired == args.gate_up.is_paired,
        "moe: gates and ups must lie in pairs in all experts, or in none");
  check_rows("moe", "x", args.x, args.gate_up.n_in);
  check_floats("moe", "y", args.y, args.y_stride, round_up(args.down.n_out, kPanelOutputs));
  check(args.scratch != nullptr, "moe: no scratch");
  check_parts("moe", args.down, args.n_parts);
  do_moe(args);
}

void Backend::fold(const FoldArgs& args) {
  if (args.n_patches == 0) return;
  check(args.t % args.t_fold == 0 && args.h % args.hw_fold == 0 && args.w % args.hw_fold == 0,
        "fold: ", args.t, "x", args.h, "x", args.w, " cells do not divide into folds of ",
        args.t_fold, "x", args.hw_fold, "x", args.hw_fold);
  check_floats("fold", "x", args.x, args.x_stride, args.c);
  check_rows("fold", "out", args.out,
             std::int64_t{args.t_fold} * args.hw_fold * args.hw_fold * args.c);
  do_fold(args);
}

void Backend::sample(const SampleArgs& args) {
  if (args.n_rows == 0) return;
  check(args.n_vocab >= 1 && args.n_vocab <= kMaxSampledIds, "sample: expected 1 to ",
        kMaxSampledIds, " ids, found ", args.n_vocab);
  check_floats("sample", "logits", args.logits, args.logits_stride, padded(args.n_vocab));
  check(args.rows != nullptr && args.tokens != nullptr, "sample: rows and tokens are needed");
  do_sample(args);
}

}  // namespace duplex
