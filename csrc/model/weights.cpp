#include "model/weights.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/hash.h"
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

// Where the transformers implementation has what is published under `prefix`.
std::string module_prefix(std::string prefix) {
  const std::string published = "model.llm.";
  if (prefix.starts_with(published)) prefix.replace(0, published.size(), "model.language_model.");
  return prefix;
}

class Loader {
 public:
  Loader(const ModelConfig& config, TensorSource& source, WeightBuilder& builder,
         const WeightDTypes& dtypes, const Shard& shard)
      : config_(config),
        shard_(shard),
        source_(source),
        builder_(builder),
        dtypes_(dtypes),
        d_(config.d_model) {}

  Weights load() {
    Weights weights;
    weights.shard = shard_;
    weights.dtype = dtypes_.rows;
    weights.embed = table("model.llm.embed.weight", config_.vocab_size);
    weights.embed_norm = norm("model.llm.embed_norm.weight", d_);
    for (std::size_t i = 0; i < config_.layers.size(); ++i)
      weights.layers.push_back(
          layer("model.llm.layers." + std::to_string(i) + ".", config_.layers[i]));
    weights.final_norm = norm("model.llm.norm.weight", d_);
    weights.head = head();
    weights.mtp = mtp();
    if (config_.audio) {
      const std::int64_t rows = std::int64_t{config_.audio->n_mels} * config_.audio->n_levels;
      weights.audio_table = table("model.audio.encoder.weight", rows);
      weights.audio_norm = norm("model.audio.final_norm.weight", d_);
    }
    if (config_.vision) weights.vision = vision();
    return weights;
  }

 private:
  bool has_towers() const { return shard_.rank == 0; }

  // Of embedded rows.
  const void* table(const std::string& name, std::int64_t n_rows) {
    const SourceTensor& tensor = source_.find(name, {n_rows, d_});
    return has_towers() ? builder_.table(tensor) : nullptr;
  }

  const float* norm(const std::string& name, std::int64_t width) {
    return builder_.vector(source_.find(name, {width}));
  }

  // The file may hold the padded vocabulary or only the rows that exist.
  PackedMatrix head() {
    const std::string name = "model.llm.unembed.weight";
    const SourceTensor& tensor = source_.find(name);
    const bool is_unpadded =
        !tensor.shape.empty() && tensor.shape[0] == config_.unpadded_vocab_size;
    source_.find(name, {is_unpadded ? config_.unpadded_vocab_size : config_.vocab_size, d_});
    const Slice rows = vocabulary_slice(config_, shard_.rank, shard_.size);
    return builder_.matrix({output_rows(tensor, rows.first, rows.n, d_)}, d_);
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
          2 * d_, d_, dtypes_.matrices);
      depth.block = layer(prefix + "transformer_block.", config_.mtp.layers[i]);
      weights.layers.push_back(depth);
    }
    if (config_.mtp.has_chain_norm) weights.chain_norm = norm("model.mtp.chain_norm.weight", d_);
    return weights;
  }

  LayerWeights layer(const std::string& prefix, const LayerConfig& config) {
    const AttentionShape& shape = config_.attention(config);
    const Slice kv_heads = kv_head_slice(shape, shard_);
    const Slice kv_channels{kv_heads.first * shape.d_head, kv_heads.n * shape.d_head};
    const std::int64_t n_kv = std::int64_t{shape.n_kv_heads} * shape.d_head;
    const std::int64_t kernel = config_.conv_kernel;
    LayerWeights layer;
    layer.attn_norm = norm(prefix + "attn_norm.weight", d_);
    layer.mlp_norm = norm(prefix + "mlp_norm.weight", d_);
    layer.q_norm = norm(prefix + "attn.q_norm.weight", shape.d_head);
    layer.k_norm = norm(prefix + "attn.k_norm.weight", shape.d_head);
    const auto convolution = [&](const char* name, std::int64_t n, const Slice& channels,
                                 std::int64_t group) {
      return builder_.convolution(source_.find(prefix + name, {n, 1, kernel}), channels, group);
    };
    layer.k_conv = convolution("attn.k_sconv.weight", n_kv, kv_channels, shape.d_head);
    layer.v_conv = convolution("attn.v_sconv.weight", n_kv, kv_channels, shape.d_head);
    layer.attn_conv = convolution("attn_sconv.weight", d_, {0, d_}, d_);
    layer.mlp_conv = convolution("mlp_sconv.weight", d_, {0, d_}, d_);
    layer.rel_bank = builder_.rel_bank(
        source_.find(prefix + "attn.rel_logits_proj.proj", {config_.d_rel, shape.rel_extent}),
        layer.rel_stride);
    layer.qkvr = projections(prefix, shape);
    const std::int64_t n_q = std::int64_t{shape.n_heads} * shape.d_head;
    layer.out =
        column_slice(source_.find(prefix + "attn.wo_ud.weight", {d_, n_q}), 0, n_q, shape.d_head);
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
    const auto add_heads = [&](const SourceTensor& heads, const Slice& slice) {
      for (std::int64_t head = slice.first; head < slice.first + slice.n; ++head) {
        outputs.push_back(output_rows(heads, head * d_head, d_head, d_));
        if (shape.d_head_padded() > d_head)
          outputs.push_back(padding(shape.d_head_padded() - d_head));
      }
    };
    const Slice q_heads = head_slice(shape, shard_), kv_heads = kv_head_slice(shape, shard_);
    add_heads(q, q_heads);
    add_heads(k, kv_heads);
    add_heads(v, kv_heads);
    outputs.push_back(output_rows(r, q_heads.first * config_.d_rel, q_heads.n * config_.d_rel, d_));
    return builder_.matrix(outputs, d_);
  }

  DenseMlpWeights dense(const std::string& prefix) {
    const std::int64_t width = config_.d_ff;
    DenseMlpWeights mlp;
    mlp.global_scale = builder_.scalar(source_.find(prefix + "global_scale", {1}));
    if (const SourceTensor* both = source_.try_find(prefix + "w13_dn.weight")) {
      source_.find(both->name, {2 * width, d_});
      mlp.gate_up = gate_up({*both, 0}, {*both, 1}, 2, width);
    } else {
      const auto [gate, up] = module_gate_up(prefix, "w13_dn.weight", ".weight", {width, d_});
      mlp.gate_up = gate_up({*gate, 0}, {*up, 0}, 1, width);
    }
    mlp.down = column_slice(source_.find(prefix + "w2_md.weight", {d_, width}), 0, width,
                            width / shard_.total_parts());
    return mlp;
  }

  struct RowsFrom {
    const SourceTensor& tensor;
    std::int64_t row;
  };
  // Gates and ups of one MLP of that width, or of one expert: every `step`-th row of the tensors.
  PackedMatrix gate_up(const RowsFrom& gates, const RowsFrom& ups, std::int64_t step,
                       std::int64_t width) {
    const std::int64_t n = width / shard_.total_parts();
    std::vector<OutputRows> outputs;
    for (const RowsFrom& from : {gates, ups})
      for (std::int64_t part = 0; part < shard_.n_parts; ++part) {
        const std::int64_t first = from.row + step * (shard_.rank * shard_.n_parts + part) * n;
        outputs.push_back(output_rows(from.tensor, first, n, d_, step));
        outputs.push_back(padding(round_up(n, kColumnAlign) - n));
      }
    return builder_.gate_up(outputs, d_);
  }

  // d_model rows from `row` on: this rank's share of `width` input columns, which come in groups.
  PackedMatrix column_slice(const SourceTensor& tensor, std::int64_t row, std::int64_t width,
                            std::int64_t group) {
    const std::int64_t n = width / shard_.size, first = shard_.rank * n;
    const std::int64_t n_at_once = n / builder_.n_matrices(shard_.n_parts);
    check<CheckpointError>(tensor.type != FileType::kE2M1 || n_at_once % 2 == 0,
                           "tensor_parallel: expected slices of an even number of columns of '",
                           tensor.name, "', whose codes come in pairs, found ", n_at_once);
    return builder_.matrix({OutputRows{&tensor, d_, row * width + first, width}}, n, group,
                           dtypes_.matrices, shard_.n_parts);
  }

  // The gate and up tensors of the transformers spelling, where the `published` one is absent.
  std::pair<const SourceTensor*, const SourceTensor*> module_gate_up(
      const std::string& prefix, const std::string& published, const std::string& suffix,
      const std::vector<std::int64_t>& shape) {
    const std::string gate_name = module_prefix(prefix) + "gate_proj" + suffix;
    const std::string up_name = module_prefix(prefix) + "up_proj" + suffix;
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
        DType::kF32);
    weights.selection_bias = builder_.vector(source_.find(prefix + "gate.bias", {m.n_experts}));
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
      note_expert(e, column_slice(tensor, row, width, width / shard_.total_parts()), weights.down,
                  weights.down_stride_bytes, weights.shared_down);
    }
    return weights;
  }

  // Experts are packed one behind the other, so the second of a format tells the stride.
  void note_expert(std::int64_t e, const PackedMatrix& packed, PackedMatrix& first,
                   std::int64_t& stride, ExpertMatrix& shared) const {
    const auto distance = [&](const PackedMatrix& from) {
      return static_cast<const std::byte*>(packed.data) - static_cast<const std::byte*>(from.data);
    };
    if (e == 0) first = packed;
    if (e == 1) stride = distance(first);
    if (packed.dtype == first.dtype) return;
    if (e == config_.moe.n_experts) shared.first = packed;
    if (e == config_.moe.n_experts + 1) shared.stride_bytes = distance(shared.first);
  }

  void load_gate_up(const std::string& prefix, MoeWeights& weights) {
    const MoeConfig& m = config_.moe;
    const std::int64_t width = m.d_expert;
    // Interleaved (step 2, ups at 1) as published, or halves (step 1, ups at `width`).
    const SourceTensor* routed = source_.try_find(prefix + "experts.w13_weight");
    const bool is_interleaved = routed != nullptr;
    const std::string module = module_prefix(prefix) + "experts.gate_up_proj";
    if (!is_interleaved) routed = source_.try_find(module);
    check<CheckpointError>(routed != nullptr, "checkpoint: tensor '", prefix,
                           "experts.w13_weight' is missing (also looked for '", module, "')");
    source_.find(routed->name, {m.n_experts, 2 * width, d_});
    const std::int64_t step = is_interleaved ? 2 : 1;
    const std::int64_t up_row = is_interleaved ? 1 : width;
    for (std::int64_t e = 0; e < m.n_experts; ++e) {
      const std::int64_t row = e * 2 * width;
      note_expert(e, gate_up({*routed, row}, {*routed, row + up_row}, step, width), weights.gate_up,
                  weights.gate_up_stride_bytes, weights.shared_gate_up);
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
      note_expert(
          m.n_experts + s,
          gate_up({*gate, row}, {*up, row + (shared != nullptr ? 1 : 0)}, shared_step, width),
          weights.gate_up, weights.gate_up_stride_bytes, weights.shared_gate_up);
    }
  }

  VisionWeights vision() {
    VisionWeights weights;
    const auto& stages = config_.vision->stages;
    for (std::size_t i = 0; i < stages.size(); ++i) {
      const std::string number = std::to_string(i) + ".weight";
      const HmlpStage& stage = stages[i];
      const SourceTensor& linear =
          source_.find("model.visual.layers.linear_" + number, {stage.d_out, stage.d_in});
      if (has_towers())
        weights.linear.push_back(builder_.matrix({output_rows(linear, 0, stage.d_out, stage.d_in)},
                                                 stage.d_in, stage.d_in, dtypes_.rows));
      if (i + 1 < stages.size())
        weights.norm.push_back(norm("model.visual.layers.norm_" + number, stage.d_out));
    }
    weights.final_norm = norm("model.visual.final_norm.weight", d_);
    return weights;
  }

  const ModelConfig& config_;
  Shard shard_;
  TensorSource& source_;
  WeightBuilder& builder_;
  WeightDTypes dtypes_;
  std::int64_t d_;
};

// Reads packed weights to `base`.
void read_arena(const PackedArena& packed, Backend& backend, std::byte* base,
                const LoadProgress& progress) {
  std::vector<std::byte> piece(std::min(kPieceBytes, packed.bytes));
  for (std::size_t at = 0; at < packed.bytes; at += piece.size()) {
    const std::size_t n = std::min(piece.size(), packed.bytes - at);
    if (progress) progress(at, packed.bytes);
    packed.read(piece.data(), n);
    backend.write(base + at, piece.data(), n);
  }
}

}  // namespace

Weights load_weights(const ModelConfig& config, WeightSource source, const WeightDTypes& dtypes,
                     Backend& backend, const LoadProgress& progress, const Shard& shard) {
  check_shard(config, dtypes.matrices, shard);
  const auto* const packed = std::get_if<PackedArena>(&source);
  TensorSource tensors = packed != nullptr
                             ? TensorSource::of_shapes()
                             : TensorSource(std::move(std::get<std::vector<SourceTensor>>(source)));
  WeightBuilder builder(backend, dtypes, progress);
  Loader loader(config, tensors, builder, dtypes, shard);
  loader.load();  // measures, checks names and shapes
  const std::size_t bytes = builder.bytes();
  if (packed == nullptr)
    tensors.check_all_used();
  else
    check<CheckpointError>(packed->bytes == bytes, "packed weights: expected ", bytes,
                           " bytes for this config.json, ", dtype_name(dtypes.rows), " and ",
                           dtype_name(dtypes.matrices), " weights, found ", packed->bytes);
  auto arena = backend.allocate(bytes);
  auto* const base = static_cast<std::byte*>(arena->data());
  if (packed == nullptr) {
    builder.start_filling(base, bytes);
  } else {
    read_arena(*packed, backend, base, progress);
    builder.start_placing(base);
  }
  Weights weights = loader.load();
  weights.arena = std::move(arena);
  if (progress) progress(bytes, bytes);
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

std::uint64_t arena_hash(const Weights& weights, Backend& backend) {
  FastHash hash;
  write_arena(weights, backend, [&](const std::byte* from, std::size_t n) { hash.add(from, n); });
  return hash.value();
}

}  // namespace duplex
