// What a checkpoint says about the model: plain structs, filled by Python from config.json
// (duplex_engine/config.py checks the JSON) and read by every layer above the backends.
//
// Nothing here says how anything is computed: tile sizes and packing belong to the backends.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/types.h"

namespace duplex {

// One kind of attention layer; a model has a global kind and a sliding-window ("local") kind.
struct AttentionShape {
  std::int32_t n_heads = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t d_head = 0;
  std::int32_t rel_extent = 0;  // the learned bias covers distances 0 <= d < rel_extent
  std::int32_t window = 0;      // keys at distance d < window are visible; 0 = all

  std::int32_t d_head_padded() const {
    return static_cast<std::int32_t>(round_up(d_head, kColumnAlign));
  }
};

struct LayerConfig {
  bool is_local = false;
  bool is_moe = false;
};

// Multi-token prediction: dense layers behind the last that guess the tokens to come (model/mtp.h).
struct MtpConfig {
  std::vector<LayerConfig> layers;  // one a depth; those that are loaded
  bool has_chain_norm = false;      // one norm behind each of them
};

struct MoeConfig {
  std::int32_t n_experts = 0;
  std::int32_t n_shared = 0;
  std::int32_t top_k = 0;
  std::int32_t d_expert = 0;
  float route_scale = 1.0f;
};

// The audio and vision towers norm with this, whatever the config says for the layers.
inline constexpr float kTowerNormEps = 1e-6f;

struct AudioConfig {
  std::int32_t n_mels = 80;
  std::int32_t n_levels = 16;  // rows of the table for each mel
};

struct HmlpStage {
  std::int32_t t_fold = 1;
  std::int32_t hw_fold = 1;
  std::int32_t d_in = 0;   // features of one folded cell
  std::int32_t d_out = 0;  // d_model for the last stage
};

struct VisionConfig {
  std::int32_t patch_size = 40;
  std::int32_t temporal_patch_size = 2;
  std::int32_t n_channels = 3;
  std::vector<HmlpStage> stages;
};

// The `interaction` block: how micro-turns are laid out (docs/MODEL.md).
struct InteractionConfig {
  std::int32_t audio_frames = 4;
  std::int32_t max_output_tokens = 0;
  std::int32_t max_image_patches = 0;
  std::int32_t listen = -1;
  std::int32_t delegate = -1;
  std::int32_t delegate_end = -1;
  std::int32_t result = -1;
  std::int32_t result_end = -1;
  std::int32_t user_text = -1;
  std::int32_t user_text_end = -1;
};

struct ModelConfig {
  std::int32_t vocab_size = 0;           // rows of the embedding table
  std::int32_t unpadded_vocab_size = 0;  // logits that exist
  std::int32_t d_model = 0;
  std::int32_t d_rel = 0;
  std::int32_t d_ff = 0;  // dense MLP width
  std::int32_t conv_kernel = 4;
  float norm_eps = 1e-6f;
  float logit_divisor = 1.0f;          // muP width multiplier
  std::int32_t log_scaling_floor = 0;  // 0 = off; global layers only
  float log_scaling_alpha = 0.0f;
  AttentionShape global;
  AttentionShape local;
  MoeConfig moe;
  std::vector<LayerConfig> layers;
  MtpConfig mtp;
  std::vector<std::int32_t> eos_ids;
  std::optional<AudioConfig> audio;
  std::optional<VisionConfig> vision;
  std::optional<InteractionConfig> interaction;

  std::int32_t n_layers() const { return static_cast<std::int32_t>(layers.size()); }
  const AttentionShape& attention(const LayerConfig& layer) const {
    return layer.is_local ? local : global;
  }
  bool has_local() const;
  bool has_global() const;
  bool has_moe() const;
  bool has_dense() const;
  // The model that the multi-token-prediction layers are, for its layout.
  ModelConfig mtp_model() const;
  // Throws InvalidArgument that lists every problem at once.
  void validate() const;
};

}  // namespace duplex
