// The operations that need nothing but their own row: embeddings, norms, activations, folds.
#include "kernels/launchers.h"
#include "kernels/norm.cuh"

namespace duplex::cuda {
namespace {

constexpr int kElementThreads = 256;

// The normed row, to float32.
DUPLEX_DEVICE void write_normed(const NormRow& row, float eps, float* out) {
  finish_norm(row, eps, [&](std::int32_t i, const Four& y) { store_four(out + i, y); });
}

DUPLEX_KERNEL_OF(kMostThreads, 1) embed_text_kernel(EmbedTextArgs args) {
  const NormRow row = begin_norm(args.norm, args.d_model);
  const std::int64_t entry = std::int64_t{args.ids[block_x()]} * row.n;
  for (std::int32_t i = thread_index() * kFour; i < row.n; i += n_threads() * kFour)
    store_four(row.x + i, load_four(args.table, args.table_dtype, entry + i));
  write_normed(row, args.eps, args.out_row(block_x()));
}

DUPLEX_KERNEL_OF(kMostThreads, 1) embed_audio_kernel(EmbedAudioArgs args) {
  const NormRow row = begin_norm(args.norm, args.d_model);
  const std::uint8_t* bins = args.bins + std::int64_t{block_x()} * args.n_mels;
  for (std::int32_t i = thread_index() * kFour; i < row.n; i += n_threads() * kFour) {
    Four sum{};
#pragma unroll 8
    for (std::int32_t mel = 0; mel < args.n_mels; ++mel) {
      const std::int64_t entry = std::int64_t{mel * args.n_levels + bins[mel]} * row.n;
      const Four x = load_four(args.table, args.table_dtype, entry + i);
      for (int c = 0; c < kFour; ++c) sum.v[c] += x.v[c];
    }
    store_four(row.x + i, sum);
  }
  write_normed(row, args.eps, args.out_row(block_x()));
}

DUPLEX_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

DUPLEX_KERNEL_OF(kMostThreads, 1) norm_kernel(NormArgs args) {
  let_next_grid_begin();
  const NormRow row = begin_norm(args.weight, args.width);
  wait_for_previous_grid();
  const float* source = args.x + block_x() * args.x_stride;
  for (std::int32_t i = thread_index() * kFour; i < row.n; i += n_threads() * kFour)
    store_four(row.x + i, load_four(source + i));
  finish_norm(row, args.eps, [&](std::int32_t i, Four y) {
    if (args.activation == Activation::kGelu)
      for (float& value : y.v) value = gelu(value);
    store_four(args.out, block_x(), i, y);
  });
}

DUPLEX_KERNEL silu_mul_kernel(SiluMulArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  const std::int64_t i = std::int64_t{block_y()} * n_threads() + thread_index();
  if (i >= args.width) return;
  const float* gate = args.x + block_x() * args.x_stride;
  store(args.out, block_x(), i, silu(gate[i]) * gate[args.up_offset + i]);
}

// One thread for a cell of a row, or for a zero behind the row.
DUPLEX_KERNEL fold_kernel(FoldArgs args) {
  const std::int64_t column = std::int64_t{block_y()} * n_threads() + thread_index();
  const std::int64_t width = std::int64_t{args.t_fold} * args.hw_fold * args.hw_fold * args.c;
  const std::int64_t padded = round_up(width, kColumnAlign);
  if (column >= (padded < args.out.stride ? padded : args.out.stride)) return;
  const std::int64_t row = block_x();
  float value = 0.0f;
  if (column < width) {
    const std::int32_t h = args.h / args.hw_fold, w = args.w / args.hw_fold;
    const std::int32_t t = args.t / args.t_fold;
    const auto channel = static_cast<std::int32_t>(column % args.c);
    const auto cell = static_cast<std::int32_t>(column / args.c);
    const std::int64_t x = row % w * args.hw_fold + cell % args.hw_fold;
    const std::int64_t y = row / w % h * args.hw_fold + cell / args.hw_fold % args.hw_fold;
    const std::int64_t z = row / (w * h) % t * args.t_fold + cell / (args.hw_fold * args.hw_fold);
    const std::int64_t patch = row / (std::int64_t{w} * h * t);
    value = args.x[(((patch * args.t + z) * args.h + y) * args.w + x) * args.x_stride + channel];
  }
  store(args.out, row, column, value);
}

}  // namespace

void launch_embed_text(Runtime& runtime, const EmbedTextArgs& args) {
  runtime.launch(embed_text_kernel, {args.n_rows}, NormRow::threads(args.d_model),
                 NormRow::bytes(args.d_model), args);
}

void launch_embed_audio(Runtime& runtime, const EmbedAudioArgs& args) {
  runtime.launch(embed_audio_kernel, {args.n_rows}, NormRow::threads(args.d_model),
                 NormRow::bytes(args.d_model), args);
}

void launch_norm(Runtime& runtime, const NormArgs& args) {
  runtime.launch_early(norm_kernel, {args.n_rows}, NormRow::threads(args.width),
                       NormRow::bytes(args.width), args);
}

void launch_silu_mul(Runtime& runtime, const SiluMulArgs& args) {
  runtime.launch_early(silu_mul_kernel, {args.n_rows, div_up(args.width, kElementThreads)},
                       kElementThreads, 0, args);
}

void launch_fold(Runtime& runtime, const FoldArgs& args) {
  const std::int64_t width =
      round_up(std::int64_t{args.t_fold} * args.hw_fold * args.hw_fold * args.c, kColumnAlign);
  const std::int64_t n_rows = std::int64_t{args.n_patches} * (args.t / args.t_fold) *
                              (args.h / args.hw_fold) * (args.w / args.hw_fold);
  runtime.launch(fold_kernel, {n_rows, div_up(width, kElementThreads)}, kElementThreads, 0, args);
}

}  // namespace duplex::cuda
