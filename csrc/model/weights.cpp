#include "model/weights.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "model/weight_builder.h"

namespace duplex {
namespace {

// Of an arena on its way from or to a file: it stays in the processor's cache.
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

// Rows [first, first + n) of a matrix with `width` columns, every `step`-th.
OutputRows output_rows(const SourceTensor& tensor, std::int64_t first, std::int64_t n,
                       std::int64_t width, std::int64_t step = 1) {
  return {&tensor, n, first * width, width * step};
}
OutputRows padding(std::int64_t n) { return {nullptr, n, 0, 0}; }

class Loader {
 public:
  Loader(const ModelConfig& config, TensorSource& source, WeightBuilder& builder,
         const WeightDTypes& dtypes)
      : config_(config),
        source_(source),
        builder_(builder),
        dtypes_(dtypes),
        d_(config.d_model),
        d_padded_(round_up(config.d_model, kColumnAlign)) {}

  Weights load() {
    Weights weights;
    weights.dtype = dtypes_.rows;
    weights.embed =
        builder_.table(source_.find("model.llm.embed.weight", {config_.vocab_size, d_}));
    weights.embed_norm = norm("model.llm.embed_norm.weight", d_);
    for (std::size_t i = 0; i < config_.layers.size(); ++i)
      weights.layers.push_back(
          layer("model.llm.layers." + std::to_string(i) + ".", config_.layers[i]));
    weights.final_norm = norm("model.llm.norm.weight", d_);
    weights.head = head();
    weights.mtp = mtp();
    if (config_.audio) {
      const std::int64_t rows = std::int64_t{config_.audio->n_mels} * config_.audio->n_levels;
      weights.audio_table = builder_.table(source_.find("model.audio.encoder.weight", {rows, d_}));
      weights.audio_norm = norm("model.audio.final_norm.weight", d_);
    }
    if (config_.vision) weights.vision = vision();
    return weights;
  }

 private:
  const float* norm(const std::string& name, std::int64_t width) {
    return builder_.vector(source_.find(name, {width}), width, round_up(width, kColumnAlign));
  }

  // The file may hold the padded vocabulary or only the rows that exist.
  PackedMatrix head() {
    const std::string name = "model.llm.unembed.weight";
    const SourceTensor& tensor = source_.find(name);
    const bool is_unpadded =
        !tensor.shape.empty() && tensor.shape[0] == config_.unpadded_vocab_size;
    source_.find(name, {is_unpadded ? config_.unpadded_vocab_size : config_.vocab_size, d_});
    return builder_.matrix({output_rows(tensor, 0, config_.unpadded_vocab_size, d_)}, d_);
  }

  MtpWeights mtp() {
    MtpWeights weights;
    for (std::size_t i = 0; i < config_.mtp.layers.size(); ++i) {
      const std::string prefix = "model.mtp.layers." + std::to_string(i) + ".";
      MtpLayerWeights depth;
      depth.hidden_norm = norm(prefix + "hidden_norm.weight", d_);
      depth.embed_norm = norm(prefix + "embed_norm.weight", d_);
      depth.input_proj = builder_.matrix(
          {output_rows(source_.find(prefix + "input_proj.weight", {d_, 2 * d_}), 0, d_, 2 * d_)},
          2 * d_, d_, d_padded_, dtypes_.matrices);
      depth.block = layer(prefix + "transformer_block.", config_.mtp.layers[i]);
      weights.layers.push_back(depth);
    }
    if (config_.mtp.has_chain_norm) weights.chain_norm = norm("model.mtp.chain_norm.weight", d_);
    return weights;
  }

  LayerWeights layer(const std::string& prefix, const LayerConfig& config) {
    const AttentionShape& shape = config_.attention(config);
    const std::int64_t n_kv = std::int64_t{shape.n_kv_heads} * shape.d_head;
    const std::int64_t kernel = config_.conv_kernel;
    LayerWeights layer;
    layer.attn_norm = norm(prefix + "attn_norm.weight", d_);
    layer.mlp_norm = norm(prefix + "mlp_norm.weight", d_);
    layer.q_norm = norm(prefix + "attn.q_norm.weight", shape.d_head);
    layer.k_norm = norm(prefix + "attn.k_norm.weight", shape.d_head);
    const auto convolution = [&](const char* name, std::int64_t channels, std::int64_t group) {
      return builder_.convolution(source_.find(prefix + name, {channels, 1, kernel}), group,
                                  round_up(group, kColumnAlign));
    };
    layer.k_conv = convolution("attn.k_sconv.weight", n_kv, shape.d_head);
    layer.v_conv = convolution("attn.v_sconv.weight", n_kv, shape.d_head);
    layer.attn_conv = convolution("attn_sconv.weight", d_, d_);
    layer.mlp_conv = convolution("mlp_sconv.weight", d_, d_);
    layer.rel_bank = builder_.rel_bank(
        source_.find(prefix + "attn.rel_logits_proj.proj", {config_.d_rel, shape.rel_extent}),
        layer.rel_stride);
    layer.qkvr = projections(prefix, shape);
    const std::int64_t n_q = std::int64_t{shape.n_heads} * shape.d_head;
    layer.out = builder_.matrix(
        {output_rows(source_.find(prefix + "attn.wo_ud.weight", {d_, n_q}), 0, d_, n_q)}, n_q,
        shape.d_head, padded_head(shape), dtypes_.matrices);
    if (config.is_moe)
      layer.moe = moe(prefix + "mlp.");
    else
      layer.dense = dense(prefix + "mlp.");
    return layer;
  }

  // One matrix for q, k, v and r. Heads narrower than their padding are packed head by head.
  PackedMatrix projections(const std::string& prefix, const AttentionShape& shape) {
    const auto tensor = [&](const char* name, std::int64_t rows) -> const SourceTensor& {
      return source_.find(prefix + "attn." + name + ".weight", {rows, d_});
    };
    const std::int64_t d_head = shape.d_head;
    const SourceTensor& q = tensor("wq_du", shape.n_heads * d_head);
    const SourceTensor& k = tensor("wk_dv", shape.n_kv_heads * d_head);
    const SourceTensor& v = tensor("wv_dv", shape.n_kv_heads * d_head);
    const SourceTensor& r = tensor("wr_du", std::int64_t{shape.n_heads} * config_.d_rel);
    std::vector<OutputRows> outputs;
    const auto add_heads = [&](const SourceTensor& heads, std::int64_t n_heads) {
      for (std::int64_t head = 0; head < n_heads; ++head) {
        outputs.push_back(output_rows(heads, head * d_head, d_head, d_));
        if (padded_head(shape) > d_head) outputs.push_back(padding(padded_head(shape) - d_head));
      }
    };
    add_heads(q, shape.n_heads);
    add_heads(k, shape.n_kv_heads);
    add_heads(v, shape.n_kv_heads);
    outputs.push_back(output_rows(r, 0, std::int64_t{shape.n_heads} * config_.d_rel, d_));
    return builder_.matrix(outputs, d_);
  }

  DenseMlpWeights dense(const std::string& prefix) {
    const std::int64_t width = config_.d_ff;
    DenseMlpWeights mlp;
    mlp.global_scale = builder_.scalar(source_.find(prefix + "global_scale", {1}));
    const std::int64_t gap = round_up(width, kColumnAlign) - width;
    if (const SourceTensor* both = source_.try_find(prefix + "w13_dn.weight")) {
      source_.find(both->name, {2 * width, d_});
      mlp.gate_up = builder_.matrix({output_rows(*both, 0, width, d_, 2), padding(gap),
                                     output_rows(*both, 1, width, d_, 2), padding(gap)},
                                    d_);
    } else {
      const auto [gate, up] = module_gate_up(prefix, "w13_dn.weight", ".weight", {width, d_});
      mlp.gate_up = builder_.matrix({output_rows(*gate, 0, width, d_), padding(gap),
                                     output_rows(*up, 0, width, d_), padding(gap)},
                                    d_);
    }
    mlp.down = builder_.matrix(
        {output_rows(source_.find(prefix + "w2_md.weight", {d_, width}), 0, d_, width)}, width);
    return mlp;
  }

  // The gate and up tensors of the transformers spelling, where the `published` one is absent.
  std::pair<const SourceTensor*, const SourceTensor*> module_gate_up(
      const std::string& prefix, const std::string& published, const std::string& suffix,
      const std::vector<std::int64_t>& shape) {
    std::string base = prefix;
    if (base.starts_with("model.llm"))
      base.replace(0, std::string("model.llm").size(), "model.language_model");
    const std::string gate_name = base + "gate_proj" + suffix;
    const std::string up_name = base + "up_proj" + suffix;
    const SourceTensor* gate = source_.try_find(gate_name);
    const SourceTensor* up = source_.try_find(up_name);
    check<CheckpointError>(gate != nullptr && up != nullptr, "checkpoint: tensor '", prefix,
                           published, "' is missing (also looked for '", gate_name, "' and '",
                           up_name, "')");
    source_.find(gate->name, shape);
    source_.find(up->name, shape);
    return {gate, up};
  }

  MoeWeights moe(const std::string& prefix) {
    const MoeConfig& m = config_.moe;
    const std::int64_t n_all = m.n_experts + m.n_shared;
    MoeWeights weights;
    weights.router = builder_.matrix(
        {output_rows(source_.find(prefix + "gate.weight", {n_all, d_}), 0, n_all, d_)}, d_, d_,
        d_padded_, DType::kF32);
    weights.selection_bias = builder_.vector(source_.find(prefix + "gate.bias", {m.n_experts}),
                                             m.n_experts, round_up(m.n_experts, kColumnAlign));
    weights.global_scale = builder_.scalar(source_.find(prefix + "gate.global_scale", {1}));
    load_gate_up(prefix, weights);
    const std::int64_t width = m.d_expert;
    const SourceTensor& routed =
        source_.find(prefix + "experts.w2_weight", {m.n_experts, d_, width});
    const SourceTensor& shared =
        source_.find(prefix + "shared_experts.shared_w2_weight", {m.n_shared, d_, width});
    for (std::int64_t e = 0; e < n_all; ++e) {
      const bool is_shared = e >= m.n_experts;
      const SourceTensor& tensor = is_shared ? shared : routed;
      const std::int64_t row = (is_shared ? e - m.n_experts : e) * d_;
      note_expert(e, builder_.matrix({output_rows(tensor, row, d_, width)}, width), weights.down,
                  weights.down_stride_bytes);
    }
    return weights;
  }

  // Experts are packed one behind the other, so expert 1 tells the stride.
  static void note_expert(std::int64_t e, const PackedMatrix& packed, PackedMatrix& first,
                          std::int64_t& stride) {
    if (e == 0) first = packed;
    if (e == 1)
      stride =
          static_cast<const std::byte*>(packed.data) - static_cast<const std::byte*>(first.data);
  }

  void load_gate_up(const std::string& prefix, MoeWeights& weights) {
    const MoeConfig& m = config_.moe;
    const std::int64_t width = m.d_expert;
    const std::int64_t gap = round_up(width, kColumnAlign) - width;
    // Interleaved (step 2, ups at 1) as published, or halves (step 1, ups at `width`).
    const SourceTensor* routed = source_.try_find(prefix + "experts.w13_weight");
    const bool is_interleaved = routed != nullptr;
    std::string module = prefix;
    module.replace(0, std::string("model.llm").size(), "model.language_model");
    if (!is_interleaved) routed = source_.try_find(module + "experts.gate_up_proj");
    check<CheckpointError>(routed != nullptr, "checkpoint: tensor '", prefix,
                           "experts.w13_weight' is missing (also looked for '", module,
                           "experts.gate_up_proj')");
    source_.find(routed->name, {m.n_experts, 2 * width, d_});
    const std::int64_t step = is_interleaved ? 2 : 1;
    const std::int64_t up_row = is_interleaved ? 1 : width;
    for (std::int64_t e = 0; e < m.n_experts; ++e) {
      const std::int64_t row = e * 2 * width;
      note_expert(
          e,
          builder_.matrix({output_rows(*routed, row, width, d_, step), padding(gap),
                           output_rows(*routed, row + up_row, width, d_, step), padding(gap)},
                          d_),
          weights.gate_up, weights.gate_up_stride_bytes);
    }
    const SourceTensor* shared = source_.try_find(prefix + "shared_experts.shared_w13_weight");
    if (shared != nullptr) source_.find(shared->name, {m.n_shared, 2 * width, d_});
    const auto [gate, up] = shared != nullptr
                                ? std::pair{shared, shared}
                                : module_gate_up(prefix + "shared_experts.", "shared_w13_weight",
                                                 "", {m.n_shared, width, d_});
    const std::int64_t per_expert = shared != nullptr ? 2 * width : width;
    const std::int64_t shared_step = shared != nullptr ? 2 : 1;
    for (std::int64_t s = 0; s < m.n_shared; ++s) {
      const std::int64_t row = s * per_expert;
      note_expert(m.n_experts + s,
                  builder_.matrix(
                      {output_rows(*gate, row, width, d_, shared_step), padding(gap),
                       output_rows(*up, row + (shared != nullptr ? 1 : 0), width, d_, shared_step),
                       padding(gap)},
                      d_),
                  weights.gate_up, weights.gate_up_stride_bytes);
    }
  }

  VisionWeights vision() {
    VisionWeights weights;
    const auto& stages = config_.vision->stages;
    for (std::size_t i = 0; i < stages.size(); ++i) {
      const std::string number = std::to_string(i) + ".weight";
      const HmlpStage& stage = stages[i];
      weights.linear.push_back(builder_.matrix(
          {output_rows(
              source_.find("model.visual.layers.linear_" + number, {stage.d_out, stage.d_in}), 0,
              stage.d_out, stage.d_in)},
          stage.d_in, stage.d_in, round_up(stage.d_in, kColumnAlign), dtypes_.rows));
      if (i + 1 < stages.size())
        weights.norm.push_back(norm("model.visual.layers.norm_" + number, stage.d_out));
    }
    weights.final_norm = norm("model.visual.final_norm.weight", d_);
    return weights;
  }

  const ModelConfig& config_;
  TensorSource& source_;
  WeightBuilder& builder_;
  WeightDTypes dtypes_;
  std::int64_t d_;
  std::int64_t d_padded_;
};

}  // namespace

Weights load_weights(const ModelConfig& config, TensorSource& source, const WeightDTypes& dtypes,
                     Backend& backend, const LoadProgress& progress) {
  WeightBuilder builder(backend, dtypes, progress);
  Loader(config, source, builder, dtypes).load();  // measures, and checks names and shapes
  source.check_all_used();
  auto arena = backend.allocate(builder.bytes());
  builder.start_filling(static_cast<std::byte*>(arena->data()), builder.bytes());
  Weights weights = Loader(config, source, builder, dtypes).load();
  weights.arena = std::move(arena);
  if (progress) progress(builder.bytes(), builder.bytes());
  return weights;
}

Weights load_packed_weights(const ModelConfig& config, const PackedArena& packed,
                            const WeightDTypes& dtypes, Backend& backend,
                            const LoadProgress& progress) {
  TensorSource shapes = TensorSource::of_shapes();
  WeightBuilder builder(backend, dtypes, progress);
  Loader(config, shapes, builder, dtypes).load();
  const std::size_t bytes = builder.bytes();
  check<CheckpointError>(packed.bytes == bytes, "packed weights: expected ", bytes,
                         " bytes for this config.json, ", dtype_name(dtypes.rows), " and ",
                         dtype_name(dtypes.matrices), " weights, found ", packed.bytes);
  auto arena = backend.allocate(bytes);
  auto* const base = static_cast<std::byte*>(arena->data());
  std::vector<std::byte> piece(std::min(kPieceBytes, bytes));
  for (std::size_t at = 0; at < bytes; at += piece.size()) {
    const std::size_t n = std::min(piece.size(), bytes - at);
    packed.read(piece.data(), n);
    backend.write(base + at, piece.data(), n);
    if (progress) progress(at + n, bytes);
  }
  builder.start_placing(base);
  Weights weights = Loader(config, shapes, builder, dtypes).load();
  weights.arena = std::move(arena);
  return weights;
}

void write_arena(const Weights& weights, Backend& backend, const ArenaWriter& write) {
  const std::size_t bytes = weights.arena->bytes();
  const auto* const base = static_cast<const std::byte*>(weights.arena->data());
  std::vector<std::byte> piece(std::min(kPieceBytes, bytes));
  for (std::size_t at = 0; at < bytes; at += piece.size()) {
    const std::size_t n = std::min(piece.size(), bytes - at);
    backend.read(piece.data(), base + at, n);
    write(piece.data(), n);
  }
}

}  // namespace duplex
