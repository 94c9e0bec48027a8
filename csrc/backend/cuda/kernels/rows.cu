// The operations that need nothing but their own row: embeddings, norms, activations, folds.
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kElementThreads = 256;

std::size_t row_bytes(std::int64_t width) {  // a padded row and one float behind it
  return static_cast<std::size_t>(round_up(width, kColumnAlign) + 1) * sizeof(float);
}

// out = weight * x / rms(x) for a row in shared memory.
DUPLEX_DEVICE void write_normed(float* x, const float* weight, float eps, std::int64_t width,
                                float* out) {
  const std::int64_t n = round_up(width, kColumnAlign);
  const float scale = inverse_rms(x, n, width, eps, x + n);
  for (std::int64_t i = thread_index(); i < n; i += n_threads()) out[i] = x[i] * scale * weight[i];
}

DUPLEX_KERNEL embed_text_kernel(EmbedTextArgs args) {
  auto* const x = reinterpret_cast<float*>(shared_memory());
  const std::int64_t n = round_up(args.d_model, kColumnAlign);
  const std::int64_t entry = args.ids[block_x()] * n;
  for (std::int64_t i = thread_index(); i < n; i += n_threads())
    x[i] = load(args.table, args.table_dtype, entry + i);
  write_normed(x, args.norm, args.eps, args.d_model, args.out + block_x() * args.out_stride);
}

DUPLEX_KERNEL embed_audio_kernel(EmbedAudioArgs args) {
  auto* const x = reinterpret_cast<float*>(shared_memory());
  const std::int64_t n = round_up(args.d_model, kColumnAlign);
  const std::uint8_t* bins = args.bins + std::int64_t{block_x()} * args.n_mels;
  for (std::int64_t i = thread_index(); i < n; i += n_threads()) {
    float sum = 0.0f;
    for (std::int32_t mel = 0; mel < args.n_mels; ++mel)
      sum += load(args.table, args.table_dtype, (mel * args.n_levels + bins[mel]) * n + i);
    x[i] = sum;
  }
  write_normed(x, args.norm, args.eps, args.d_model, args.out + block_x() * args.out_stride);
}

DUPLEX_KERNEL norm_kernel(NormArgs args) {
  auto* const x = reinterpret_cast<float*>(shared_memory());
  const std::int64_t n = round_up(args.width, kColumnAlign);
  const float* source = args.x + block_x() * args.x_stride;
  for (std::int64_t i = thread_index(); i < n; i += n_threads()) x[i] = source[i];
  const float scale = inverse_rms(x, n, args.width, args.eps, x + n);
  for (std::int64_t i = thread_index(); i < n; i += n_threads()) {
    float value = x[i] * scale * args.weight[i];
    if (args.activation == Activation::kGelu)
      value = 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
    store(args.out, block_x(), i, value);
  }
}

DUPLEX_KERNEL silu_mul_kernel(SiluMulArgs args) {
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
  runtime.launch(embed_text_kernel, {args.n_rows}, kRowThreads, row_bytes(args.d_model), args);
}

void launch_embed_audio(Runtime& runtime, const EmbedAudioArgs& args) {
  runtime.launch(embed_audio_kernel, {args.n_rows}, kRowThreads, row_bytes(args.d_model), args);
}

void launch_norm(Runtime& runtime, const NormArgs& args) {
  runtime.launch(norm_kernel, {args.n_rows}, kRowThreads, row_bytes(args.width), args);
}

void launch_silu_mul(Runtime& runtime, const SiluMulArgs& args) {
  runtime.launch(silu_mul_kernel, {args.n_rows, div_up(args.width, kElementThreads)},
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
