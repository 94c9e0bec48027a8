// The operations that write the tapes: short convolutions, and the append of keys and values. The
// layout of a block of keys and values is the CPU backend's (csrc/backend/cpu/kernels_append.h).
//
// Cost of a row of conv_add_norm with four taps: 50 bytes a column (to bfloat16), for one thread
// block, and 16 for each part but the first. It waits for the segment's place, then for all columns
// at once, then for the norm.
#include "kernels/conv.cuh"
#include "kernels/kv_int8.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

template <bool kHasMore>
DUPLEX_KERNEL_OF(kMostThreads, 1)
conv_add_norm_kernel(ConvAddNormArgs args) {
  if constexpr (kHasMore)
    conv_add_norm_row(args, block_x(), MoreParts{args, block_x()});
  else
    conv_add_norm_row(args, block_x(), NoMoreParts{});
}

// Where the keys of one head lie in the block of a position; its values are behind them.
DUPLEX_DEVICE std::byte* key_panel(const KvAppendArgs& args, const Segment& segment,
                                   std::int64_t position, std::int32_t head) {
  const TapeView& tape = args.is_local ? segment.local : segment.global;
  return tape.block(position / kBlockPositions) + args.layer_offset_bytes +
         2 * head * kv_panel_bytes(args.kv_dtype, args.d_head_padded);
}

// Key c of position p lies at panel[c][p % 64] (float32) or panel[c / 2][p % 64][c % 2] (bfloat16).
DUPLEX_DEVICE void write_keys(std::byte* panel, DType dtype, std::int64_t slot, std::int64_t column,
                              const Four& x) {
  for (int i = 0; i < kFour; ++i) {
    const std::int64_t c = column + i;
    if (dtype == DType::kF32)
      reinterpret_cast<float*>(panel)[c * kBlockPositions + slot] = x.v[i];
    else
      reinterpret_cast<std::uint16_t*>(panel)[(c / 2 * kBlockPositions + slot) * 2 + c % 2] =
          float_to_bf16(x.v[i]);
  }
}

// Value c of position p: panel[p % 64][c] (float32) or panel[(p % 64) / 2][c][p % 2] (bfloat16).
// note: the newest row also clears its partner when that is yet to come.
DUPLEX_DEVICE void write_values(std::byte* panel, DType dtype, std::int64_t slot, bool is_newest,
                                std::int64_t n, std::int64_t column, const Four& x) {
  if (dtype == DType::kF32) {
    store_four(reinterpret_cast<float*>(panel) + slot * n + column, x);
    return;
  }
  for (int i = 0; i < kFour; ++i) {
    auto* const pair = reinterpret_cast<std::uint16_t*>(panel) + (slot / 2 * n + column + i) * 2;
    pair[slot % 2] = float_to_bf16(x.v[i]);
    if (is_newest && slot % 2 == 0) pair[1] = 0;
  }
}

// The scale of a row of n numbers in shared memory and its codes, by all threads of the block. A
// value's scale is a power of two, of which the panel has the logarithm.
DUPLEX_DEVICE void write_codes(std::byte* panel, std::int64_t slot, const float* x, std::int32_t n,
                               bool is_value) {
  sync_block();
  const float exact = kv_scale(x, n);
  const std::uint16_t scale =
      bf16_from_above(is_value ? static_cast<float>(log2(static_cast<double>(exact))) : exact);
  const float inverse = is_value
                            ? static_cast<float>(exp2(-static_cast<double>(bf16_to_float(scale))))
                            : 1.0f / bf16_to_float(scale);
  if (thread_index() == 0) reinterpret_cast<std::uint16_t*>(panel)[slot] = scale;
  auto* const to = reinterpret_cast<std::uint8_t*>(panel + kKvScalesBytes);
  for (std::int32_t c = thread_index() * kFour; c < n; c += n_threads() * kFour) {
    const Four codes = nearest_codes(load_four(x + c), inverse);
    if (!is_value) {  // codes + 128 of four channels together
      *reinterpret_cast<std::uint32_t*>(to + c * kBlockPositions + slot * kQuad) =
          code_word(codes) ^ 0x80808080u;
      continue;
    }
    for (int i = 0; i < kFour; ++i)  // codes of four positions together
      to[(slot / kQuad * n + c + i) * kQuad + slot % kQuad] =
          static_cast<std::uint8_t>(code_byte(codes.v[i]));
  }
}

// One row of one head: its convolved keys, normed, or its convolved values.
DUPLEX_DEVICE void append_row(const KvAppendArgs& args, std::int32_t head, bool is_value) {
  const std::int32_t n = args.d_head_padded;
  const std::int64_t column =
      (std::int64_t{args.shape.n_heads} + (is_value ? args.shape.n_kv_heads : 0) + head) * n;
  ConvSlot slot = is_value ? args.v_conv : args.k_conv;
  slot.offset_bytes += std::int64_t{head} * n * 4;
  slot.weight += std::int64_t{head} * n;
  const NormRow keys = begin_norm(args.k_norm, args.shape.d_head);
  auto* const places = reinterpret_cast<const float**>(keys.slot + kFour);
  const Segment& segment =
      segment_of(args.segments, block_x(), reinterpret_cast<std::int32_t*>(places));
  const ConvInput input = begin_conv(segment, slot, args.qkvr + column, args.stride, 1.0f, n,
                                     block_x(), args.kernel, places + 1);
  const std::int64_t position = segment.position + input.row;
  const std::int64_t at = position % kBlockPositions;
  std::byte* const panel = key_panel(args, segment, position, head);
  const bool is_newest = input.row + 1 == segment.n_rows;
  const bool is_int8 = args.kv_dtype == DType::kInt8;
  wait_for_previous_grid();
  if (!is_value) {
    for (std::int32_t i = thread_index() * kFour; i < n; i += n_threads() * kFour)
      store_four(keys.x + i, input.run(i));
    finish_norm(keys, args.eps, [&](std::int32_t i, const Four& y) {
      if (is_int8)
        store_four(keys.x + i, y);
      else
        write_keys(panel, args.kv_dtype, at, i, y);
    });
    if (is_int8) write_codes(panel, at, keys.x, n, false);
    return;
  }
  std::byte* const values = panel + kv_panel_bytes(args.kv_dtype, n);
  for (std::int32_t i = thread_index() * kFour; i < n; i += n_threads() * kFour) {
    const Four y = input.run(i);
    if (is_int8)
      store_four(keys.x + i, y);
    else
      write_values(values, args.kv_dtype, at, is_newest, n, i, y);
  }
  if (is_int8) write_codes(values, at, keys.x, n, true);
}

// Block (row, head): the heads of keys, those of values, those of queries.
DUPLEX_KERNEL kv_append_kernel(KvAppendArgs args) {
  let_next_grid_begin();
  const std::int32_t head = block_y() - 2 * args.shape.n_kv_heads;
  if (head < 0) {
    const bool is_value = block_y() >= args.shape.n_kv_heads;
    append_row(args, is_value ? block_y() - args.shape.n_kv_heads : block_y(), is_value);
    return;
  }
  const NormRow row = begin_norm(args.q_norm, args.shape.d_head);
  const std::int64_t column = std::int64_t{head} * row.n;
  const Segment& segment =
      segment_of(args.segments, block_x(), reinterpret_cast<std::int32_t*>(row.slot + kFour));
  const std::int64_t position = segment.position + block_x() - segment.row_begin;
  const float tau = args.is_local
                        ? 1.0f
                        : log_scaling_tau(position, args.log_scaling_floor, args.log_scaling_alpha);
  wait_for_previous_grid();
  for (std::int32_t i = thread_index() * kFour; i < row.n; i += n_threads() * kFour)
    store_four(row.x + i, load_four(args.qkvr + block_x() * args.stride + column + i));
  finish_norm(row, args.eps, [&](std::int32_t i, const Four& y) {
    Four scaled;
    for (int c = 0; c < kFour; ++c) scaled.v[c] = y.v[c] * tau;
    store_four(args.q, block_x(), column + i, scaled);
  });
}

}  // namespace

void launch_kv_append(Runtime& runtime, const KvAppendArgs& args) {
  runtime.launch_early(kv_append_kernel,
                       {args.segments.n_rows, 2 * args.shape.n_kv_heads + args.shape.n_heads},
                       NormRow::threads(args.d_head_padded),
                       NormRow::bytes(args.d_head_padded) + conv_bytes(args.kernel), args);
}

void launch_conv_add_norm(Runtime& runtime, const ConvAddNormArgs& args) {
  runtime.launch_early(args.n_parts == 1 ? conv_add_norm_kernel<false> : conv_add_norm_kernel<true>,
                       {args.segments.n_rows}, NormRow::threads(args.width),
                       conv_add_norm_bytes(args), args);
}

}  // namespace duplex::cuda
