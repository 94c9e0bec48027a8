// Cuts each operation into pieces for the threads. Pieces write disjoint outputs, so it never
// matters which thread runs which.
#include <algorithm>
#include <array>
#include <cmath>
#include <thread>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/isa.h"
#include "core/error.h"
#include "core/processors.h"

namespace duplex {
namespace {

constexpr std::int64_t kMaxLinearRows = 256;  // row pointers of one linear piece, on the stack

int thread_count(int wanted) {
  check(wanted >= 0 && wanted <= 1024, "n_threads: expected 0 (one per core) to 1024, found ",
        wanted);
  if (wanted > 0) return wanted;
  if (const int n = available_processors(); n > 0) return n;
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

CpuBackend::CpuBackend(const BackendOptions& options)
    : CpuBackend(choose_kernels(options.isa),
                 std::make_shared<ThreadPool>(thread_count(options.n_threads)),
                 LaneKind::kInteraction) {}

CpuBackend::CpuBackend(const CpuKernels& kernels, std::shared_ptr<ThreadPool> pool, LaneKind lane)
    : kernels_(kernels),
      pool_(std::move(pool)),
      lane_(lane),
      attention_scratch_(static_cast<std::size_t>(pool_->n_threads())) {
  if (lane == LaneKind::kBackground) background_ = std::make_unique<BackgroundThread>();
}

std::unique_ptr<Backend> CpuBackend::background_lane() {
  return std::unique_ptr<Backend>(new CpuBackend(kernels_, pool_, LaneKind::kBackground));
}

std::string CpuBackend::description() const {
  return std::string("cpu ") + kernels_.name + ", " + std::to_string(pool_->n_threads()) +
         (pool_->n_threads() == 1 ? " thread" : " threads");
}

void CpuBackend::run_awake(const std::function<void()>& work) {
  const auto pass = [&] {
    const ThreadPool::Pass awake(*pool_, lane_);
    work();
  };
  if (background_ != nullptr) return background_->run(std::ref(pass));
  pass();
}

void CpuBackend::do_embed_text(const EmbedTextArgs& args) {
  for_rows(args.n_rows, args.d_model,
           [&](std::int32_t row) { kernels_.embed_text_row(args, row); });
}

void CpuBackend::do_embed_audio(const EmbedAudioArgs& args) {
  for_rows(args.n_rows, std::int64_t{args.d_model} * args.n_mels,
           [&](std::int32_t row) { kernels_.embed_audio_row(args, row); });
}

void CpuBackend::do_norm(const NormArgs& args) {
  for_rows(args.n_rows, args.width, [&](std::int32_t row) { kernels_.norm_row(args, row); });
}

void CpuBackend::do_silu_mul(const SiluMulArgs& args) {
  for_rows(args.n_rows, args.width, [&](std::int32_t row) { kernels_.silu_mul_row(args, row); });
}

float log_scaling_tau(std::int64_t position, std::int32_t floor, float alpha) {
  if (floor <= 0) return 1.0f;
  const float n = static_cast<float>(position + 1) / static_cast<float>(floor);
  // In double, so that other devices can give the same bits.
  return n <= 1.0f ? 1.0f : 1.0f + alpha * static_cast<float>(std::log(static_cast<double>(n)));
}

void CpuBackend::do_kv_append(const KvAppendArgs& args) {
  const std::int64_t heads = args.shape.n_heads + 2 * args.shape.n_kv_heads;
  for_segment_rows(args.segments, heads * args.d_head_padded,
                   [&](const Segment& segment, std::int32_t row) {
                     kernels_.kv_append_row(args, segment, row);
                   });
}

void CpuBackend::do_conv_add_norm(const ConvAddNormArgs& args) {
  for_segment_rows(args.segments, args.width, [&](const Segment& segment, std::int32_t row) {
    kernels_.conv_add_norm_row(args, segment, row);
  });
}

// The rows as the panels of `format` meet them: as they are, or quantised into scratch.
CpuBackend::PanelRows CpuBackend::panel_rows(const Rows& x, std::int32_t n_rows, std::int64_t n_in,
                                             DType format) {
  const auto stride = x.stride * static_cast<std::int64_t>(dtype_bytes(x.dtype));
  const auto* data = static_cast<const std::byte*>(x.data);
  if (!is_quantised(format)) return {data, stride};
  const std::int64_t bytes = quantised_row_bytes(n_in, format);
  const auto needed = static_cast<std::size_t>(n_rows * bytes);
  if (quantised_.size() < needed) quantised_.resize(needed);  // to the widest pass, then never more
  for_rows(n_rows, n_in, [&](std::int32_t row) {
    kernels_.quantise_row(data + row * stride, x.dtype, n_in, format,
                          quantised_.data() + row * bytes);
  });
  return {quantised_.data(), bytes};
}

// A part of a panel lies behind the part before it, and so does a part of a row.
CpuBackend::PanelParts CpuBackend::panel_parts(const PackedMatrix& w, std::int32_t n_parts,
                                               DType row_dtype) const {
  const std::int32_t n_in = w.n_in / n_parts;
  const std::int64_t row_bytes = is_quantised(w.dtype)
                                     ? quantised_row_bytes(n_in, w.dtype)
                                     : n_in * static_cast<std::int64_t>(dtype_bytes(row_dtype));
  return {n_in, static_cast<std::int64_t>(packed_bytes(1, n_in, w.dtype)), row_bytes};
}

void CpuBackend::do_linear(const LinearArgs& args) {
  const PanelRows rows = panel_rows(args.x, args.n_rows, args.w.n_in, args.w.dtype);
  const auto panel_bytes = static_cast<std::int64_t>(packed_bytes(1, args.w.n_in, args.w.dtype));
  const PanelParts parts = panel_parts(args.w, args.n_parts, args.x.dtype);
  const std::int64_t n_panels = div_up(args.w.n_out, kPanelOutputs);
  const bool is_worth_sharing =
      n_panels * panel_bytes >= kWeightBytesWorthSharing ||
      n_panels * kPanelOutputs * args.w.n_in * args.n_rows >= kProductsWorthSharing;
  for_tasks(n_panels, is_worth_sharing, [&](std::int64_t panel, int) {
    std::array<const void*, kMaxLinearRows> x;
    std::array<float*, kMaxLinearRows> y;
    const std::byte* weights = static_cast<const std::byte*>(args.w.data) + panel * panel_bytes;
    for (std::int32_t part = 0; part < args.n_parts; ++part, weights += parts.panel_bytes)
      for (std::int64_t begin = 0; begin < args.n_rows; begin += kMaxLinearRows) {
        const std::int64_t n = std::min<std::int64_t>(kMaxLinearRows, args.n_rows - begin);
        float* const out = args.y + part * args.y_part_stride + panel * kPanelOutputs;
        for (std::int64_t i = 0; i < n; ++i) {
          x[static_cast<std::size_t>(i)] = rows.at(begin + i) + part * parts.row_bytes;
          y[static_cast<std::size_t>(i)] = out + (begin + i) * args.y_stride;
        }
        kernels_.linear_panel({x.data(), static_cast<std::int32_t>(n), weights, parts.n_in,
                               args.w.dtype, y.data(), args.divisor});
      }
  });
  if (args.activated.data != nullptr) do_silu_mul(silu_mul_of(args));
}

// More vectors share a reading of the keys; in the background lane, which gives way between pieces,
// a piece must not take long.
std::int32_t CpuBackend::vectors_at_once(const AttentionArgs& args) const {
  if (lane_ == LaneKind::kInteraction) return kAttentionVectors;
  std::int64_t longest = 1;
  for (std::int32_t s = 0; s < args.segments.count; ++s) {
    const Segment& segment = args.segments.data[s];
    longest = std::max(longest, segment.position + segment.n_rows);
  }
  if (args.shape.window > 0) longest = std::min<std::int64_t>(longest, args.shape.window);
  return static_cast<std::int32_t>(
      std::clamp<std::int64_t>(kVectorPositionsAtOnce / longest, 1, kAttentionVectors));
}

void CpuBackend::do_attention(const AttentionArgs& args) {
  const std::int32_t group = args.shape.n_heads / args.shape.n_kv_heads;
  // Whole rows per piece, so that the count does not depend on the batch.
  const std::int32_t rows_per_piece = std::max(1, vectors_at_once(args) / group);
  const std::int32_t vectors_per_piece = std::min(kAttentionVectors, rows_per_piece * group);
  std::int64_t n_pieces = 0;
  for (std::int32_t s = 0; s < args.segments.count; ++s)
    n_pieces += div_up(std::int64_t{args.segments.data[s].n_rows} * group, vectors_per_piece);
  n_pieces *= args.shape.n_kv_heads;
  const std::int64_t bias_size = kAttentionVectors * args.rel_stride;
  const auto needed = static_cast<std::size_t>(bias_size * pool_->n_threads()) * sizeof(float);
  if (bias_scratch_ == nullptr || bias_scratch_->bytes() < needed)
    bias_scratch_ = allocate(needed);  // to the widest layer, then never more
  pool_->parallel_for(lane_, n_pieces, [&](std::int64_t index, int thread) {
    const auto kv_head = static_cast<std::int32_t>(index % args.shape.n_kv_heads);
    std::int64_t chunk = index / args.shape.n_kv_heads;
    const Segment* segment = args.segments.data;
    for (;; ++segment) {
      const std::int64_t chunks = div_up(std::int64_t{segment->n_rows} * group, vectors_per_piece);
      if (chunk < chunks) break;
      chunk -= chunks;
    }
    AttentionScratch& scratch = attention_scratch_[static_cast<std::size_t>(thread)];
    scratch.bias = static_cast<float*>(bias_scratch_->data()) + thread * bias_size;
    const auto begin = static_cast<std::int32_t>(chunk) * vectors_per_piece;
    const std::int32_t end = std::min(begin + vectors_per_piece, segment->n_rows * group);
    kernels_.attention({&args, segment, kv_head, begin, end}, scratch);
  });
}

void CpuBackend::do_sample(const SampleArgs& args) {
  for_tasks(args.n_rows, false, [&](std::int64_t row, int) {
    args.tokens[row] =
        sampler_.sample(args.logits + row * args.logits_stride, args.n_vocab, args.rows[row]);
  });
}

void CpuBackend::do_fold(const FoldArgs& args) {
  const std::int32_t t = args.t / args.t_fold;
  const std::int32_t h = args.h / args.hw_fold;
  const std::int32_t w = args.w / args.hw_fold;
  for_rows(std::int64_t{args.n_patches} * t * h * w,
           std::int64_t{args.t_fold} * args.hw_fold * args.hw_fold * args.c, [&](std::int32_t row) {
             const std::int32_t x0 = row % w * args.hw_fold;
             const std::int32_t y0 = row / w % h * args.hw_fold;
             const std::int32_t t0 = row / (w * h) % t * args.t_fold;
             const std::int64_t patch = row / (w * h * t);
             std::int64_t column = row * args.out.stride;
             const auto put = [&](float value) {
               if (args.out.dtype == DType::kF32)
                 static_cast<float*>(args.out.data)[column++] = value;
               else
                 static_cast<std::uint16_t*>(args.out.data)[column++] = float_to_bf16(value);
             };
             for (std::int32_t dt = 0; dt < args.t_fold; ++dt)
               for (std::int32_t dy = 0; dy < args.hw_fold; ++dy)
                 for (std::int32_t dx = 0; dx < args.hw_fold; ++dx) {
                   const std::int64_t cell =
                       ((patch * args.t + t0 + dt) * args.h + y0 + dy) * args.w + x0 + dx;
                   for (std::int32_t c = 0; c < args.c; ++c) put(args.x[cell * args.x_stride + c]);
                 }
             const std::int64_t width =
                 std::int64_t{args.t_fold} * args.hw_fold * args.hw_fold * args.c;
             for (std::int64_t pad = width;
                  pad < std::min(round_up(width, kColumnAlign), args.out.stride); ++pad)
               put(0.0f);
           });
}

std::unique_ptr<Backend> create_cpu_backend(const BackendOptions& options);

std::unique_ptr<Backend> create_cpu_backend(const BackendOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace duplex
