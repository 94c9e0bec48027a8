// Single operations of the CPU backend, each on inputs of its own, timed from outside.
//
// Weights that are read once a pass come from a ring larger than any cache, as in a pass; the tape
// of attention is as long as the context says. Values are ordinary numbers without meaning.
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"
#include "error.h"
#include "kernel.h"

namespace duplex_bench {
namespace {

constexpr std::size_t kRingBytes = std::size_t{192} << 20;
constexpr std::int32_t kRelFeatures = 16;
constexpr std::int32_t kConvTaps = 4;
constexpr std::int64_t kPastRows = 64;  // in front of the rows of a convolution
constexpr float kEps = 1e-6f;

class LinearKernel final : public Kernel {
 public:
  LinearKernel(const KernelSizes& of, DType type, int n_threads) : Kernel(of, type, n_threads) {
    matrix_bytes_ = packed(sizes.n_out, sizes.n_in);
    n_matrices_ = kRingBytes / matrix_bytes_ + 1;
    ring_ = static_cast<std::byte*>(memory(n_matrices_ * matrix_bytes_));
    x_ = rows(sizes.rows, sizes.n_in);
    y_stride_ = round_up(sizes.n_out, kPanelOutputs);
    y_ = floats(sizes.rows * y_stride_);
    bytes = static_cast<double>(matrix_bytes_);
    operations = 2.0 * sizes.rows * sizes.n_out * sizes.n_in;
  }
  void run() override {
    const std::byte* matrix = ring_ + next_ * matrix_bytes_;
    next_ = (next_ + 1) % n_matrices_;
    backend->linear({.w = {matrix, sizes.n_out, sizes.n_in, dtype},
                     .x = x_,
                     .n_rows = sizes.rows,
                     .y = y_,
                     .y_stride = y_stride_});
  }

 private:
  std::size_t matrix_bytes_ = 0, n_matrices_ = 0, next_ = 0;
  std::byte* ring_ = nullptr;
  Rows x_;
  std::int64_t y_stride_ = 0;
  float* y_ = nullptr;
};

// The tape, segment and projections that attention and kv_append share.
class TapeKernel : public Kernel {
 public:
  TapeKernel(const KernelSizes& of, DType type, int n_threads) : Kernel(of, type, n_threads) {
    const std::int64_t n = sizes.d_head, n_kv = sizes.n_kv_heads;
    const std::int64_t n_blocks = div_up(sizes.context + sizes.rows, kBlockPositions);
    const std::int64_t block_bytes = 2 * n_kv * kv_panel_bytes(dtype, n);
    const std::int64_t conv_bytes = 2 * n_kv * n * 4;
    const TapeView tape{
        static_cast<std::byte*>(memory(static_cast<std::size_t>(n_blocks * block_bytes))), 1,
        block_bytes, block_bytes};
    if (dtype == DType::kInt8) set_scales(tape, n_blocks);
    auto* const conv = static_cast<std::byte*>(
        memory(static_cast<std::size_t>((kPastRows + sizes.rows) * conv_bytes)));
    segment_.n_rows = sizes.rows;
    segment_.position = sizes.context;
    segment_.global = segment_.local = tape;
    // So based that the rows before the first one lie at the buffer's start.
    segment_.conv = {conv - (sizes.context - kPastRows) * conv_bytes, 1, conv_bytes, conv_bytes};
    shape_ = {sizes.n_heads, sizes.n_kv_heads, sizes.d_head, sizes.rel_extent, 0};
    stride_ = (sizes.n_heads + 2 * n_kv) * n + sizes.n_heads * kRelFeatures;
    qkvr_ = floats(sizes.rows * stride_);
    q_ = {floats(sizes.rows * sizes.n_heads * n), sizes.n_heads * n, query_dtype(dtype)};
  }

 protected:
  Segments segments() const { return {&segment_, 1, sizes.rows}; }

  // To what numbers of size one have: 1 / 32 in front of keys, 2^-5 in front of values.
  void set_scales(const TapeView& tape, std::int64_t n_blocks) const {
    for (std::int64_t i = 0; i < 2 * sizes.n_kv_heads * n_blocks; ++i) {
      auto* const scales =
          reinterpret_cast<std::uint16_t*>(tape.base + i * kv_panel_bytes(dtype, sizes.d_head));
      for (std::int64_t p = 0; p < kBlockPositions; ++p)
        scales[p] = float_to_bf16(i % 2 == 0 ? 0.03125f : -5.0f);
    }
  }

  Segment segment_;
  AttentionShape shape_;
  std::int64_t stride_ = 0;
  float* qkvr_ = nullptr;  // (rows, stride)
  Rows q_;
};

class AttentionKernel final : public TapeKernel {
 public:
  AttentionKernel(const KernelSizes& of, DType type, int n_threads)
      : TapeKernel(of, type, n_threads) {
    rel_stride_ = round_up(sizes.rel_extent + 2 * kBlockPositions, kColumnAlign);
    rel_bank_ = floats(kRelFeatures * rel_stride_);
    out_ = rows(sizes.rows, sizes.n_heads * sizes.d_head);
    const double numbers = static_cast<double>(sizes.context) * sizes.d_head;
    bytes = 2.0 * static_cast<double>(sizes.context / kBlockPositions) * sizes.n_kv_heads *
            static_cast<double>(kv_panel_bytes(dtype, sizes.d_head));
    operations = 4.0 * numbers * sizes.n_heads * sizes.rows;
  }
  void run() override {
    backend->attention({.segments = segments(),
                        .shape = shape_,
                        .d_head_padded = sizes.d_head,
                        .d_rel = kRelFeatures,
                        .q = q_,
                        .r = qkvr_ + stride_ - sizes.n_heads * kRelFeatures,
                        .r_stride = stride_,
                        .rel_bank = rel_bank_,
                        .rel_stride = rel_stride_,
                        .is_local = false,
                        .log_scaling_floor = 0,
                        .log_scaling_alpha = 0,
                        .layer_offset_bytes = 0,
                        .kv_dtype = dtype,
                        .out = out_});
  }

 private:
  std::int64_t rel_stride_ = 0;
  float* rel_bank_ = nullptr;
  Rows out_;
};

class KvAppendKernel final : public TapeKernel {
 public:
  KvAppendKernel(const KernelSizes& of, DType type, int n_threads)
      : TapeKernel(of, type, n_threads) {
    weight_ = floats(kConvTaps * sizes.n_kv_heads * sizes.d_head);
    norm_ = floats(sizes.d_head);
    bytes = 4.0 * static_cast<double>(sizes.rows * stride_);
  }
  void run() override {
    const std::int32_t d_kv = sizes.n_kv_heads * sizes.d_head;
    backend->kv_append({.segments = segments(),
                        .shape = shape_,
                        .d_head_padded = sizes.d_head,
                        .qkvr = qkvr_,
                        .stride = stride_,
                        .k_conv = {weight_, 0, d_kv},
                        .v_conv = {weight_, 4 * std::int64_t{d_kv}, d_kv},
                        .kernel = kConvTaps,
                        .q_norm = norm_,
                        .k_norm = norm_,
                        .eps = kEps,
                        .is_local = false,
                        .log_scaling_floor = 0,
                        .log_scaling_alpha = 0,
                        .layer_offset_bytes = 0,
                        .kv_dtype = dtype,
                        .q = q_});
  }

 private:
  float* weight_ = nullptr;
  float* norm_ = nullptr;
};

class ConvAddNormKernel final : public Kernel {
 public:
  ConvAddNormKernel(const KernelSizes& of, DType type, int n_threads)
      : Kernel(of, type, n_threads) {
    const std::int64_t n = sizes.n_in;
    auto* const conv =
        static_cast<std::byte*>(memory(static_cast<std::size_t>((kPastRows + sizes.rows) * n * 4)));
    segment_.n_rows = sizes.rows;
    segment_.position = kPastRows;
    segment_.global = segment_.local = segment_.conv = {conv, 1, n * 4, n * 4};
    x_ = floats(sizes.rows * n);
    hidden_ = floats(sizes.rows * n);
    weight_ = floats((kConvTaps + 1) * n);
    out_ = rows(sizes.rows, n);
    bytes = (4.0 + 8.0) * static_cast<double>(sizes.rows * n);
  }
  void run() override {
    const std::int64_t n = sizes.n_in;
    backend->conv_add_norm({.segments = {&segment_, 1, sizes.rows},
                            .parts = {x_},
                            .n_parts = 1,
                            .x_stride = n,
                            .scale = 1,
                            .conv = {weight_, 0, sizes.n_in},
                            .kernel = kConvTaps,
                            .hidden = hidden_,
                            .hidden_stride = n,
                            .norm = weight_ + kConvTaps * n,
                            .eps = kEps,
                            .width = sizes.n_in,
                            .out = out_});
  }

 private:
  Segment segment_;
  float* x_ = nullptr;
  float* hidden_ = nullptr;
  float* weight_ = nullptr;  // (taps + 1, n_in): the convolution's and the norm's
  Rows out_;
};

class NormKernel final : public Kernel {
 public:
  NormKernel(const KernelSizes& of, DType type, int n_threads) : Kernel(of, type, n_threads) {
    x_ = floats(sizes.rows * std::int64_t{sizes.n_in});
    weight_ = floats(sizes.n_in);
    out_ = rows(sizes.rows, sizes.n_in);
    bytes = 4.0 * sizes.rows * sizes.n_in;
  }
  void run() override {
    backend->norm({.x = x_,
                   .x_stride = sizes.n_in,
                   .weight = weight_,
                   .eps = kEps,
                   .width = sizes.n_in,
                   .n_rows = sizes.rows,
                   .activation = Activation::kNone,
                   .out = out_});
  }

 private:
  float* x_ = nullptr;
  float* weight_ = nullptr;
  Rows out_;
};

class SiluMulKernel final : public Kernel {
 public:
  SiluMulKernel(const KernelSizes& of, DType type, int n_threads) : Kernel(of, type, n_threads) {
    x_ = floats(2 * sizes.rows * std::int64_t{sizes.n_in});
    out_ = rows(sizes.rows, sizes.n_in);
    bytes = 8.0 * sizes.rows * sizes.n_in;
  }
  void run() override {
    backend->silu_mul({.x = x_,
                       .x_stride = 2 * std::int64_t{sizes.n_in},
                       .width = sizes.n_in,
                       .up_offset = sizes.n_in,
                       .n_rows = sizes.rows,
                       .out = out_});
  }

 private:
  float* x_ = nullptr;
  Rows out_;
};

class MoeKernel final : public Kernel {
 public:
  MoeKernel(const KernelSizes& of, DType type, int n_threads) : Kernel(of, type, n_threads) {
    config_ = {sizes.n_experts, sizes.n_shared, sizes.top_k, sizes.d_expert, 1.0f};
    const std::int32_t n_all = sizes.n_experts + sizes.n_shared;
    const std::size_t up_bytes = packed(2 * sizes.d_expert, sizes.n_in);
    const std::size_t down_bytes = packed(sizes.n_in, sizes.d_expert);
    void* const up = memory(static_cast<std::size_t>(n_all) * up_bytes);
    void* const down = memory(static_cast<std::size_t>(n_all) * down_bytes);
    const std::size_t router_bytes = backend->packed_bytes(n_all, sizes.n_in, DType::kF32);
    auto* const router = static_cast<float*>(memory(router_bytes));
    for (std::size_t i = 0; i < router_bytes / 4; ++i) router[i] *= 0.05f;  // no sigmoid is full
    bias_.resize(static_cast<std::size_t>(sizes.n_experts));
    weights_ = {.router = {router, n_all, sizes.n_in, DType::kF32},
                .selection_bias = bias_.data(),
                .gate_up = {up, 2 * sizes.d_expert, sizes.n_in, dtype},
                .down = {down, sizes.n_in, sizes.d_expert, dtype},
                .gate_up_stride_bytes = static_cast<std::int64_t>(up_bytes),
                .down_stride_bytes = static_cast<std::int64_t>(down_bytes)};
    x_ = rows(kInputs * sizes.rows, sizes.n_in);
    y_stride_ = round_up(sizes.n_in, kPanelOutputs);
    y_ = floats(sizes.rows * y_stride_);
    scratch_ = memory(backend->moe_scratch_bytes(config_, sizes.n_in, sizes.rows));
    // As many experts as rows that choose evenly would wake.
    const double idle = std::pow(1 - double(sizes.top_k) / sizes.n_experts, sizes.rows);
    const double awake = sizes.n_experts * (1 - idle) + sizes.n_shared;
    bytes = awake * static_cast<double>(up_bytes + down_bytes);
    operations =
        2.0 * sizes.rows * (sizes.top_k + sizes.n_shared) * 3.0 * sizes.n_in * sizes.d_expert;
  }
  // Other rows every time, so that other experts are woken, which no cache holds.
  void run() override {
    const std::int64_t row_bytes = x_.stride * static_cast<std::int64_t>(dtype_bytes(row_dtype));
    auto* const x = static_cast<std::byte*>(x_.data) + next_ * sizes.rows * row_bytes;
    next_ = (next_ + 1) % kInputs;
    backend->moe(
        {weights_, config_, sizes.rows, {x, x_.stride, row_dtype}, y_, y_stride_, scratch_});
  }

 private:
  static constexpr std::int64_t kInputs = 61;
  MoeConfig config_;
  std::int64_t next_ = 0;
  MoeWeights weights_;
  std::vector<float> bias_;  // zero
  Rows x_;
  std::int64_t y_stride_ = 0;
  float* y_ = nullptr;
  void* scratch_ = nullptr;
};

Kernel* make_kernel(const std::string& name, DType dtype, int n_threads, const KernelSizes& sizes) {
  if (name == "linear") return new LinearKernel(sizes, dtype, n_threads);
  if (name == "attention") return new AttentionKernel(sizes, dtype, n_threads);
  if (name == "kv_append") return new KvAppendKernel(sizes, dtype, n_threads);
  if (name == "conv_add_norm") return new ConvAddNormKernel(sizes, dtype, n_threads);
  if (name == "norm") return new NormKernel(sizes, dtype, n_threads);
  if (name == "silu_mul") return new SiluMulKernel(sizes, dtype, n_threads);
  if (name == "moe") return new MoeKernel(sizes, dtype, n_threads);
  throw std::runtime_error(
      "kernel: expected linear, attention, kv_append, conv_add_norm, norm, silu_mul or moe, "
      "found " +
      name);
}

Kernel* as_kernel(void* kernel) { return static_cast<Kernel*>(kernel); }

}  // namespace
}  // namespace duplex_bench

using namespace duplex_bench;

void* duplex_bench_kernel_create(const char* name, std::int32_t dtype, std::int32_t n_threads,
                                 const KernelSizes* sizes) {
  return guarded([&]() -> void* {
    return make_kernel(name, static_cast<duplex::DType>(dtype), n_threads, *sizes);
  });
}

double duplex_bench_kernel_run(void* kernel) { return as_kernel(kernel)->seconds(); }
void duplex_bench_kernel_beside(void* kernel, void* other, std::int64_t n, double* seconds) {
  as_kernel(kernel)->beside(*as_kernel(other), n, seconds);
}
double duplex_bench_kernel_bytes(void* kernel) { return as_kernel(kernel)->bytes; }
double duplex_bench_kernel_operations(void* kernel) { return as_kernel(kernel)->operations; }
void duplex_bench_kernel_destroy(void* kernel) { delete as_kernel(kernel); }
