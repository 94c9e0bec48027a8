// A random checkpoint in memory, for a model that has one of everything: local and global layers,
// dense and expert layers, sizes that need padding, both towers.
#pragma once

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/config.h"
#include "model/tensor_source.h"

namespace duplex::model_tests {

inline ModelConfig tiny_config() {
  ModelConfig config;
  config.vocab_size = 40;
  config.unpadded_vocab_size = 37;
  config.d_model = 20;
  config.d_rel = 3;
  config.d_ff = 18;
  config.conv_kernel = 3;
  config.logit_divisor = 2.0f;
  config.log_scaling_floor = 8;
  config.log_scaling_alpha = 0.1f;
  config.global = {4, 2, 12, 24, 0};
  config.local = {2, 1, 8, 5, 5};
  config.moe = {4, 2, 2, 12, 1.5f};
  config.layers = {{true, false}, {false, true}, {true, true}};
  config.eos_ids = {1};
  config.audio = AudioConfig{8, 16};
  config.vision = VisionConfig{4, 2, 3, {{1, 2, 12, 8}, {2, 2, 64, 20}}};
  return config;
}

struct OwnTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

// What the engine takes; valid while the tensors live where they are.
inline std::vector<SourceTensor> views(const std::vector<OwnTensor>& tensors) {
  std::vector<SourceTensor> views;
  for (const OwnTensor& tensor : tensors)
    views.push_back({tensor.name,
                     FileType::kF32,
                     tensor.shape,
                     reinterpret_cast<const std::byte*>(tensor.values.data()),
                     false,
                     {}});
  return views;
}

// Tensors in the published spelling; every value is different from zero.
class RandomCheckpoint {
 public:
  RandomCheckpoint(const ModelConfig& config, std::uint32_t seed) : config_(config), random_(seed) {
    const std::int64_t d = config.d_model;
    add("model.llm.embed.weight", {config.vocab_size, d}, 1.0f);
    add_norm("model.llm.embed_norm.weight", d);
    add_norm("model.llm.norm.weight", d);
    add("model.llm.unembed.weight", {config.vocab_size, d}, 1.0f);
    for (std::size_t i = 0; i < config.layers.size(); ++i)
      add_layer("model.llm.layers." + std::to_string(i) + ".", config.layers[i]);
    for (std::size_t i = 0; i < config.mtp.layers.size(); ++i) add_depth(i);
    if (config.mtp.has_chain_norm) add_norm("model.mtp.chain_norm.weight", d);
    if (config.audio) {
      add("model.audio.encoder.weight", {config.audio->n_mels * config.audio->n_levels, d}, 1.0f);
      add_norm("model.audio.final_norm.weight", d);
    }
    if (config.vision) add_vision();
  }

  std::vector<OwnTensor>& tensors() { return tensors_; }

 private:
  void add(const std::string& name, std::vector<std::int64_t> shape, float size, float mean = 0) {
    std::int64_t n = 1;
    for (const std::int64_t dimension : shape) n *= dimension;
    OwnTensor tensor{name, std::move(shape), std::vector<float>(static_cast<std::size_t>(n))};
    for (float& value : tensor.values) value = mean + size * normal_(random_);
    tensors_.push_back(std::move(tensor));
  }
  void add_norm(const std::string& name, std::int64_t width) { add(name, {width}, 0.1f, 1.0f); }

  void add_depth(std::size_t index) {
    const std::string prefix = "model.mtp.layers." + std::to_string(index) + ".";
    add_norm(prefix + "hidden_norm.weight", config_.d_model);
    add_norm(prefix + "embed_norm.weight", config_.d_model);
    add(prefix + "input_proj.weight", {config_.d_model, 2 * config_.d_model}, 0.3f);
    add_layer(prefix + "transformer_block.", config_.mtp.layers[index]);
  }
  void add_layer(const std::string& prefix, const LayerConfig& layer) {
    const AttentionShape& shape = config_.attention(layer);
    const std::int64_t d = config_.d_model, n_kv = shape.n_kv_heads * shape.d_head;
    add_norm(prefix + "attn_norm.weight", d);
    add_norm(prefix + "mlp_norm.weight", d);
    add_norm(prefix + "attn.q_norm.weight", shape.d_head);
    add_norm(prefix + "attn.k_norm.weight", shape.d_head);
    for (const auto& [name, channels] :
         {std::pair{"attn.k_sconv.weight", n_kv}, std::pair{"attn.v_sconv.weight", n_kv},
          std::pair{"attn_sconv.weight", d}, std::pair{"mlp_sconv.weight", d}})
      add(prefix + name, {channels, 1, config_.conv_kernel}, 0.3f);
    add(prefix + "attn.rel_logits_proj.proj", {config_.d_rel, shape.rel_extent}, 0.5f);
    add(prefix + "attn.wq_du.weight", {shape.n_heads * shape.d_head, d}, 0.3f);
    add(prefix + "attn.wk_dv.weight", {n_kv, d}, 0.3f);
    add(prefix + "attn.wv_dv.weight", {n_kv, d}, 0.3f);
    add(prefix + "attn.wr_du.weight", {shape.n_heads * config_.d_rel, d}, 0.3f);
    add(prefix + "attn.wo_ud.weight", {d, shape.n_heads * shape.d_head}, 0.3f);
    if (layer.is_moe)
      add_experts(prefix + "mlp.");
    else
      add_dense(prefix + "mlp.");
  }
  void add_dense(const std::string& prefix) {
    add(prefix + "global_scale", {1}, 0.1f, 1.0f);
    add(prefix + "w13_dn.weight", {2 * config_.d_ff, config_.d_model}, 0.3f);
    add(prefix + "w2_md.weight", {config_.d_model, config_.d_ff}, 0.3f);
  }
  void add_experts(const std::string& prefix) {
    const MoeConfig& moe = config_.moe;
    const std::int64_t d = config_.d_model;
    add(prefix + "gate.weight", {moe.n_experts + moe.n_shared, d}, 0.3f);
    add(prefix + "gate.bias", {moe.n_experts}, 0.2f);
    add(prefix + "gate.global_scale", {1}, 0.1f, 1.0f);
    add(prefix + "experts.w13_weight", {moe.n_experts, 2 * moe.d_expert, d}, 0.3f);
    add(prefix + "experts.w2_weight", {moe.n_experts, d, moe.d_expert}, 0.3f);
    add(prefix + "shared_experts.shared_w13_weight", {moe.n_shared, 2 * moe.d_expert, d}, 0.3f);
    add(prefix + "shared_experts.shared_w2_weight", {moe.n_shared, d, moe.d_expert}, 0.3f);
  }
  void add_vision() {
    const auto& stages = config_.vision->stages;
    for (std::size_t i = 0; i < stages.size(); ++i) {
      const std::string number = std::to_string(i) + ".weight";
      add("model.visual.layers.linear_" + number, {stages[i].d_out, stages[i].d_in}, 0.3f);
      if (i + 1 < stages.size()) add_norm("model.visual.layers.norm_" + number, stages[i].d_out);
    }
    add_norm("model.visual.final_norm.weight", config_.d_model);
  }

  ModelConfig config_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::vector<OwnTensor> tensors_;
};

}  // namespace duplex::model_tests
