// The operations that write the tapes: short convolutions, and the append of keys and values. The
// layout of a block of keys and values is the CPU backend's (csrc/backend/cpu/kernels_append.h).
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kHeadThreads = 128;
constexpr int kRowThreads = 256;

// Inputs of one convolution around one row: earlier rows of the same batch are read from the batch
// (another block may be writing their tape copy), older ones from the tape.
struct ConvInput {
  const Segment& segment;
  const ConvSlot& slot;
  const float* x;  // the slot's columns of batch row 0
  std::int64_t x_stride;
  float scale;
  std::int32_t row;  // inside the segment
  std::int32_t kernel;

  DUPLEX_DEVICE float* tape(std::int64_t at) const {
    return reinterpret_cast<float*>(segment.conv.block(at) + slot.offset_bytes);
  }
  DUPLEX_DEVICE float tap(std::int32_t back, std::int64_t i) const {
    if (back <= row) return x[(segment.row_begin + row - back) * x_stride + i] * scale;
    const std::int64_t at = segment.position + row - back;
    return at < 0 ? 0.0f : tape(at)[i];
  }
  // The convolved value plus the input itself; also leaves the input on the tape.
  DUPLEX_DEVICE float run(std::int64_t i) const {
    float sum = 0.0f;
    for (std::int32_t j = 0; j < kernel; ++j)
      sum = fmaf(tap(kernel - 1 - j, i), slot.weight[std::int64_t{j} * slot.channels + i], sum);
    const float self = tap(0, i);
    tape(segment.position + row)[i] = self;
    return sum + self;
  }
};

DUPLEX_KERNEL conv_add_norm_kernel(ConvAddNormArgs args) {
  auto* const sums = reinterpret_cast<float*>(shared_memory());
  const Segment& segment = segment_of(args.segments, block_x());
  const ConvInput input{segment,       args.conv,  args.parts[0],
                        args.x_stride, args.scale, block_x() - segment.row_begin,
                        args.kernel};
  float* const hidden = args.hidden + block_x() * args.hidden_stride;
  const std::int64_t n = round_up(args.width, kColumnAlign);
  for (std::int64_t i = thread_index(); i < n; i += n_threads())
    hidden[i] = sums[i] = hidden[i] + input.run(i);
  const float scale = inverse_rms(sums, n, args.width, args.eps, sums + n);
  for (std::int64_t i = thread_index(); i < n; i += n_threads())
    store(args.out, block_x(), i, sums[i] * scale * args.norm[i]);
}

// Key c of position p lies at panel[c][p % 64] (float32) or panel[c / 2][p % 64][c % 2] (bfloat16).
DUPLEX_DEVICE void write_key(std::byte* panel, DType dtype, std::int64_t slot, std::int64_t c,
                             float value) {
  if (dtype == DType::kF32)
    reinterpret_cast<float*>(panel)[c * kBlockPositions + slot] = value;
  else
    reinterpret_cast<std::uint16_t*>(panel)[(c / 2 * kBlockPositions + slot) * 2 + c % 2] =
        float_to_bf16(value);
}

// Value c of position p: panel[p % 64][c] (float32) or panel[(p % 64) / 2][c][p % 2] (bfloat16).
// note: the newest row also clears its partner when that is yet to come.
DUPLEX_DEVICE void write_value(std::byte* panel, DType dtype, std::int64_t slot, bool is_newest,
                               std::int64_t n, std::int64_t c, float value) {
  if (dtype == DType::kF32) {
    reinterpret_cast<float*>(panel)[slot * n + c] = value;
    return;
  }
  auto* const pair = reinterpret_cast<std::uint16_t*>(panel) + (slot / 2 * n + c) * 2;
  pair[slot % 2] = float_to_bf16(value);
  if (is_newest && slot % 2 == 0) pair[1] = 0;
}

DUPLEX_DEVICE void append_key_value(const KvAppendArgs& args, const Segment& segment,
                                    std::int32_t row, std::int32_t head, float* values) {
  const std::int64_t n = args.d_head_padded;
  const std::int64_t k_column = (std::int64_t{args.shape.n_heads} + head) * n;
  const std::int64_t v_column = k_column + args.shape.n_kv_heads * n;
  const std::int64_t position = segment.position + row;
  const std::int64_t slot = position % kBlockPositions;
  const auto element = static_cast<std::int64_t>(dtype_bytes(args.kv_dtype));
  const TapeView& tape = args.is_local ? segment.local : segment.global;
  std::byte* const panel = tape.block(position / kBlockPositions) + args.layer_offset_bytes +
                           element * 2 * head * n * kBlockPositions;
  ConvSlot conv = args.k_conv;
  conv.offset_bytes += head * n * 4;
  conv.weight += head * n;
  const ConvInput keys{segment, conv, args.qkvr + k_column, args.stride, 1.0f, row, args.kernel};
  for (std::int64_t i = thread_index(); i < n; i += n_threads()) values[i] = keys.run(i);
  const float scale = inverse_rms(values, n, args.shape.d_head, args.eps, values + n);
  for (std::int64_t i = thread_index(); i < n; i += n_threads())
    write_key(panel, args.kv_dtype, slot, i, values[i] * scale * args.k_norm[i]);
  conv = args.v_conv;
  conv.offset_bytes += head * n * 4;
  conv.weight += head * n;
  const ConvInput input{segment, conv, args.qkvr + v_column, args.stride, 1.0f, row, args.kernel};
  const bool is_newest = row + 1 == segment.n_rows;
  for (std::int64_t i = thread_index(); i < n; i += n_threads())
    write_value(panel + element * n * kBlockPositions, args.kv_dtype, slot, is_newest, n, i,
                input.run(i));
}

// Block (row, head): the key/value heads first, then the query heads.
DUPLEX_KERNEL kv_append_kernel(KvAppendArgs args) {
  auto* const values = reinterpret_cast<float*>(shared_memory());
  const Segment& segment = segment_of(args.segments, block_x());
  const std::int32_t row = block_x() - segment.row_begin;
  if (block_y() < args.shape.n_kv_heads) {
    append_key_value(args, segment, row, block_y(), values);
    return;
  }
  const std::int64_t n = args.d_head_padded;
  const std::int64_t column = (block_y() - args.shape.n_kv_heads) * n;
  const float* q = args.qkvr + block_x() * args.stride + column;
  for (std::int64_t i = thread_index(); i < n; i += n_threads()) values[i] = q[i];
  const float scale = inverse_rms(values, n, args.shape.d_head, args.eps, values + n);
  const float tau = args.is_local ? 1.0f
                                  : log_scaling_tau(segment.position + row, args.log_scaling_floor,
                                                    args.log_scaling_alpha);
  for (std::int64_t i = thread_index(); i < n; i += n_threads())
    store(args.q, block_x(), column + i, values[i] * scale * args.q_norm[i] * tau);
}

}  // namespace

void launch_kv_append(Runtime& runtime, const KvAppendArgs& args) {
  const std::size_t bytes = static_cast<std::size_t>(args.d_head_padded + 1) * sizeof(float);
  runtime.launch(kv_append_kernel,
                 {args.segments.n_rows, args.shape.n_kv_heads + args.shape.n_heads}, kHeadThreads,
                 bytes, args);
}

void launch_conv_add_norm(Runtime& runtime, const ConvAddNormArgs& args) {
  const auto n = static_cast<std::size_t>(round_up(args.width, kColumnAlign) + 1);
  runtime.launch(conv_add_norm_kernel, {args.segments.n_rows}, kRowThreads, n * sizeof(float),
                 args);
}

}  // namespace duplex::cuda
