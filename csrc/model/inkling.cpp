#include "model/inkling.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace duplex {
namespace {

std::int64_t heads_width(const AttentionShape& shape) {
  return std::int64_t{shape.n_heads} * shape.d_head_padded();
}

std::int64_t kv_width(const AttentionShape& shape) {
  return std::int64_t{shape.n_kv_heads} * shape.d_head_padded();
}

// Rows that are a multiple of 4 KiB apart would fall into the same cache sets.
std::int64_t padded_stride(std::int64_t width, std::size_t element_bytes) {
  std::int64_t stride = round_up(width, kPanelOutputs);
  if (stride * static_cast<std::int64_t>(element_bytes) % 4096 == 0) stride += kPanelOutputs;
  return stride;
}

std::int64_t float_stride(std::int64_t width) { return padded_stride(width, sizeof(float)); }

// From a part to the next, in floats: a few cache lines more than their rows, for the same reason.
std::int64_t part_stride(const ModelConfig& config, std::int32_t n_rows) {
  return n_rows * float_stride(config.d_model) + kPanelOutputs;
}

// Of the logits that one rank computes; alike for all.
std::int64_t logits_stride(const ModelConfig& config, std::int32_t n_ranks) {
  return float_stride(div_up(config.unpadded_vocab_size, n_ranks));
}

}  // namespace

void check_max_rows(std::int32_t max_rows) {
  check(max_rows >= 1 && max_rows <= 65536, "max_batch_rows: expected 1 to 65536, found ",
        max_rows);
}

Inkling::Inkling(const ModelConfig& config, const Weights& weights, const SequenceLayout& layout,
                 Backend& backend, std::int32_t max_rows, Exchange* exchange)
    : backend_(backend),
      config_(config),
      weights_(weights),
      exchange_(exchange),
      max_rows_(max_rows),
      kv_dtype_(layout.kv_dtype) {
  check_max_rows(max_rows);
  check_exchange();
  for (std::size_t i = 0; i < weights.layers.size(); ++i)
    blocks_.push_back({&weights.layers[i], config.layers[i], layout.layers[i]});
  allocate();
}

ExchangeOptions Inkling::exchange_options(const ModelConfig& config, const Shard& shard,
                                          std::int32_t max_rows) {
  const std::int64_t sums = shard.n_parts * part_stride(config, max_rows);
  const std::int64_t logits = kHeadRows * logits_stride(config, shard.size);
  return {.transport = "auto",
          .max_rows = max_rows,
          .width = config.d_model,
          .n_parts = shard.n_parts,
          .part_stride = part_stride(config, max_rows),
          .gather_stride = logits_stride(config, shard.size),
          .row_stride = float_stride(config.d_model),
          .slab_bytes = static_cast<std::size_t>(std::max(sums, logits)) * sizeof(float)};
}

void Inkling::check_exchange() const {
  const Shard& shard = weights_.shard;
  const int rank = exchange_ == nullptr ? 0 : exchange_->rank();
  const int size = exchange_ == nullptr ? 1 : exchange_->size();
  check(rank == shard.rank && size == shard.size, "tensor_parallel: expected rank ", shard.rank,
        " of ", shard.size, ", whose weights these are, found rank ", rank, " of ", size);
  if (exchange_ == nullptr) return;
  const std::size_t needed = exchange_options(config_, shard, max_rows_).slab_bytes;
  check(exchange_->slab_bytes() >= needed, "tensor_parallel: expected slabs of ", needed,
        " bytes or more for ", max_rows_, " rows, found ", exchange_->slab_bytes());
}

float* Inkling::partial_sums() {
  return exchange_ == nullptr ? block_out_ : static_cast<float*>(exchange_->mine());
}

Rows Inkling::make_rows(const char* name, std::int64_t width, DType dtype, std::int64_t n_rows) {
  Rows rows;
  rows.dtype = dtype;
  rows.stride = padded_stride(width, dtype_bytes(dtype));
  rows.data =
      make_buffer(name, static_cast<std::size_t>(n_rows * rows.stride) * dtype_bytes(dtype));
  return rows;
}

void* Inkling::make_buffer(const char* name, std::size_t bytes) {
  buffers_.push_back(backend_.allocate(bytes));
  plan_.emplace_back(name, bytes);
  return buffers_.back()->data();
}

float* Inkling::make_floats(const char* name, std::int64_t width, std::int64_t& stride) {
  const Rows rows = make_rows(name, width, DType::kF32, max_rows_);
  stride = rows.stride;
  return static_cast<float*>(rows.data);
}

void Inkling::allocate() {
  const DType dtype = weights_.dtype;
  const std::int32_t n_parts = weights_.shard.n_parts;
  std::int64_t widest_projection = 0;
  std::int64_t widest_heads = 0;
  std::int64_t widest_mlp = 0;
  const auto widen = [&](const LayerWeights& layer) {
    widest_projection = std::max<std::int64_t>(widest_projection, layer.qkvr.n_out);
    widest_heads = std::max<std::int64_t>(widest_heads, layer.out.n_in);
    widest_projection = std::max<std::int64_t>(widest_projection, layer.dense.gate_up.n_out);
    widest_mlp = std::max<std::int64_t>(widest_mlp, layer.dense.down.n_in);
  };
  for (const LayerWeights& layer : weights_.layers) widen(layer);
  for (const MtpLayerWeights& depth : weights_.mtp.layers) widen(depth.block);
  hidden_ = make_floats("hidden", config_.d_model, hidden_stride_);
  normed_ = make_rows("normed", config_.d_model, dtype, max_rows_);
  projected_ = make_floats("projected", widest_projection, projected_stride_);
  queries_ = make_rows("queries", widest_heads, query_dtype(kv_dtype_), max_rows_);
  attended_ = make_rows("attended", widest_heads, dtype, max_rows_);
  activated_ = make_rows("activated", widest_mlp, dtype, max_rows_);
  block_out_stride_ = float_stride(config_.d_model);
  set_rows(max_rows_);
  if (exchange_ == nullptr)
    block_out_ = static_cast<float*>(
        make_buffer("block_out", static_cast<std::size_t>(n_parts * part_stride_) * sizeof(float)));
  if (config_.has_moe())
    moe_scratch_ =
        make_buffer("moe_scratch",
                    backend_.moe_scratch_bytes(config_.moe, config_.d_model, max_rows_, n_parts));
  head_rows_ = make_rows("head_rows", config_.d_model, dtype, kHeadRows);
  slab_logits_stride_ = logits_stride(config_, weights_.shard.size);
  for (std::int32_t rank = 0; rank < weights_.shard.size; ++rank)
    logits_slices_.push_back(vocabulary_slice(config_, rank, weights_.shard.size));
  if (weights_.shard.rank == 0) {
    const Rows out = make_rows("logits", config_.unpadded_vocab_size, DType::kF32, kHeadRows);
    head_out_ = static_cast<float*>(out.data);
    head_out_stride_ = out.stride;
  }
}

// Parts of a pass lie close together: they may have to travel.
void Inkling::set_rows(std::int32_t n_rows) { part_stride_ = part_stride(config_, n_rows); }

void Inkling::forward(const Segments& segments) {
  set_rows(segments.n_rows);
  backend_.run_layers(segments, static_cast<std::int32_t>(blocks_.size()), [&](std::int32_t layer) {
    run_block(segments, blocks_, static_cast<std::size_t>(layer), weights_.final_norm);
  });
}

void Inkling::run_draft_block(const Segments& segments, const Block& block, std::int32_t /*depth*/,
                              const float* norm) {
  set_rows(segments.n_rows);
  run_block(segments, {&block, 1}, 0, norm);
}

void Inkling::run_block(const Segments& segments, std::span<const Block> blocks, std::size_t i,
                        const float* norm) {
  if (i == 0) {
    if (exchange_ != nullptr) exchange_->spread_rows(hidden_, segments.n_rows * hidden_stride_);
    backend_.norm({.x = hidden_,
                   .x_stride = hidden_stride_,
                   .weight = blocks.front().weights->attn_norm,
                   .eps = config_.norm_eps,
                   .width = config_.d_model,
                   .n_rows = segments.n_rows,
                   .activation = Activation::kNone,
                   .out = normed_});
  }
  attention_half(segments, blocks[i]);
  if (i + 1 < blocks.size()) {
    const LayerWeights& next = *blocks[i + 1].weights;
    mlp_half(segments, blocks[i], {next.attn_norm, next.qkvr});
  } else {
    mlp_half(segments, blocks[i], {norm, weights_.head});
  }
}

void Inkling::attention_half(const Segments& segments, const Block& block) {
  const LayerWeights& w = *block.weights;
  const LayerPlacement& place = block.place;
  const AttentionShape& shape = config_.attention(block.config);
  const bool is_local = block.config.is_local;
  const auto kv_channels = static_cast<std::int32_t>(kv_width(shape));
  backend_.linear({w.qkvr, normed_, segments.n_rows, projected_, projected_stride_});
  backend_.kv_append({.segments = segments,
                      .shape = shape,
                      .d_head_padded = shape.d_head_padded(),
                      .qkvr = projected_,
                      .stride = projected_stride_,
                      .k_conv = {w.k_conv, place.k_conv_offset_bytes, kv_channels},
                      .v_conv = {w.v_conv, place.v_conv_offset_bytes, kv_channels},
                      .kernel = config_.conv_kernel,
                      .q_norm = w.q_norm,
                      .k_norm = w.k_norm,
                      .eps = config_.norm_eps,
                      .is_local = is_local,
                      .log_scaling_floor = config_.log_scaling_floor,
                      .log_scaling_alpha = config_.log_scaling_alpha,
                      .layer_offset_bytes = place.kv_offset_bytes,
                      .kv_dtype = kv_dtype_,
                      .q = queries_});
  backend_.attention({.segments = segments,
                      .shape = shape,
                      .d_head_padded = shape.d_head_padded(),
                      .d_rel = config_.d_rel,
                      .q = queries_,
                      .r = projected_ + heads_width(shape) + 2 * kv_width(shape),
                      .r_stride = projected_stride_,
                      .rel_bank = w.rel_bank,
                      .rel_stride = w.rel_stride,
                      .is_local = is_local,
                      .log_scaling_floor = config_.log_scaling_floor,
                      .log_scaling_alpha = config_.log_scaling_alpha,
                      .layer_offset_bytes = place.kv_offset_bytes,
                      .kv_dtype = kv_dtype_,
                      .out = attended_});
  sum_parts(w.out, attended_, segments.n_rows);
  add_and_norm(segments, block, true, 1.0f,
               {w.mlp_norm, block.config.is_moe ? w.moe.router : w.dense.gate_up});
}

void Inkling::sum_parts(const PackedMatrix& w, const Rows& x, std::int32_t n_rows) {
  backend_.linear({.w = w,
                   .x = x,
                   .n_rows = n_rows,
                   .y = partial_sums(),
                   .y_stride = block_out_stride_,
                   .n_parts = weights_.shard.n_parts,
                   .y_part_stride = part_stride_});
}

void Inkling::mlp_half(const Segments& segments, const Block& block, const Next& next) {
  const LayerWeights& w = *block.weights;
  float scale = 1.0f;
  if (block.config.is_moe) {
    backend_.moe({w.moe, config_.moe, segments.n_rows, normed_, partial_sums(), block_out_stride_,
                  moe_scratch_, weights_.shard.n_parts, part_stride_});
  } else {
    backend_.linear({.w = w.dense.gate_up,
                     .x = normed_,
                     .n_rows = segments.n_rows,
                     .y = projected_,
                     .y_stride = projected_stride_,
                     .activated = activated_});
    sum_parts(w.dense.down, activated_, segments.n_rows);
    scale = w.dense.global_scale;
  }
  add_and_norm(segments, block, false, scale, next);
}

void Inkling::add_and_norm(const Segments& segments, const Block& block, bool is_attention,
                           float scale, const Next& next) {
  const LayerWeights& w = *block.weights;
  const LayerPlacement& place = block.place;
  const ConvSlot conv{
      is_attention ? w.attn_conv : w.mlp_conv,
      is_attention ? place.attention_conv_offset_bytes : place.mlp_conv_offset_bytes,
      static_cast<std::int32_t>(round_up(config_.d_model, kColumnAlign))};
  ConvAddNormArgs args{.segments = segments,
                       .parts = {},
                       .n_parts = weights_.shard.n_parts,
                       .x_stride = block_out_stride_,
                       .scale = scale,
                       .conv = conv,
                       .kernel = config_.conv_kernel,
                       .hidden = hidden_,
                       .hidden_stride = hidden_stride_,
                       .norm = next.norm,
                       .eps = config_.norm_eps,
                       .width = config_.d_model,
                       .out = normed_};
  if (exchange_ != nullptr) return exchange_->add(backend_, args, part_stride_, next.matrix);
  for (std::int32_t p = 0; p < args.n_parts; ++p) args.parts[p] = block_out_ + p * part_stride_;
  backend_.conv_add_norm(args);
}

std::size_t Inkling::head_row_bytes() const {
  return static_cast<std::size_t>(weights_.head.n_in) * dtype_bytes(weights_.dtype);
}

void Inkling::read_head_rows(std::span<const std::int32_t> rows, std::byte* out) {
  backend_.read_rows(out, normed_, rows, head_row_bytes());
}

void Inkling::multiply_head(std::span<const void* const> head_rows) {
  const auto stride_bytes =
      static_cast<std::size_t>(head_rows_.stride) * dtype_bytes(weights_.dtype);
  head_input_.resize(head_rows.size() * stride_bytes);
  for (std::size_t i = 0; i < head_rows.size(); ++i)
    std::memcpy(head_input_.data() + i * stride_bytes, head_rows[i], head_row_bytes());
  backend_.write(head_rows_.data, head_input_.data(), head_input_.size());
  multiply_head(head_rows_, static_cast<std::int32_t>(head_rows.size()));
}

void Inkling::multiply_head(const Rows& rows, std::int32_t n_rows) {
  const bool is_alone = exchange_ == nullptr;
  backend_.linear({weights_.head, rows, n_rows,
                   is_alone ? head_out_ : static_cast<float*>(exchange_->mine()),
                   is_alone ? head_out_stride_ : slab_logits_stride_, config_.logit_divisor});
  if (is_alone) return;
  // Each rank has the logits of its slice of the vocabulary; they are wanted on rank 0, which alone
  // has room for all.
  exchange_->gather(backend_, {.n_rows = n_rows,
                               .stride = slab_logits_stride_,
                               .slices = logits_slices_.data(),
                               .out = head_out_,
                               .out_stride = head_out_stride_});
}

void Inkling::logits(std::span<const void* const> head_rows, float* out) {
  const auto n_vocab = static_cast<std::size_t>(config_.unpadded_vocab_size);
  for (std::size_t begin = 0; begin < head_rows.size(); begin += kHeadRows) {
    const std::size_t n = std::min<std::size_t>(kHeadRows, head_rows.size() - begin);
    multiply_head(head_rows.subspan(begin, n));
    if (weights_.shard.rank != 0) continue;
    for (std::size_t i = 0; i < n; ++i)
      backend_.read(out + (begin + i) * n_vocab,
                    head_out_ + i * static_cast<std::size_t>(head_out_stride_),
                    n_vocab * sizeof(float));
  }
}

void Inkling::sample(std::span<const void* const> head_rows, const SampleRow* rows,
                     std::int32_t* tokens) {
  for (std::size_t begin = 0; begin < head_rows.size(); begin += kHeadRows) {
    const std::size_t n = std::min<std::size_t>(kHeadRows, head_rows.size() - begin);
    multiply_head(head_rows.subspan(begin, n));
    backend_.sample({head_out_, head_out_stride_, config_.unpadded_vocab_size,
                     static_cast<std::int32_t>(n), rows + begin, tokens + begin});
  }
}

void Inkling::turn(TurnArgs args) {
  args.passed = normed_;
  args.width = weights_.head.n_in;
  args.n_head = kHeadRows;
  args.logits = head_out_;
  args.logits_stride = head_out_stride_;
  args.n_vocab = config_.unpadded_vocab_size;
  backend_.turn(args, {[&](const Segments& segments) { Inkling::forward(segments); },
                       [&](const Rows& rows, std::int32_t n) { multiply_head(rows, n); }});
}

}  // namespace duplex
