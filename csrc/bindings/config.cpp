// ModelConfig and EngineOptions from dicts of plain values.
#include <string>
#include <tuple>

#include "bindings/bindings.h"
#include "core/error.h"

namespace duplex {
namespace {

template <class T>
void read(const py::dict& values, const char* key, T& out) {
  out = values[key].cast<T>();
}

void read(const py::dict& values, const char* key, DType& out) {
  const auto name = values[key].cast<std::string>();
  for (const DType dtype :
       {DType::kF32, DType::kBF16, DType::kInt8, DType::kInt4, DType::kMxfp8, DType::kNvfp4})
    if (name == dtype_name(dtype)) {
      out = dtype;
      return;
    }
  fail(key, ": expected float32, bfloat16, int8, int4, mxfp8 or nvfp4, found ", name);
}

Reduction reduction_from(const std::string& name) {
  if (name == "ranks") return Reduction::kRanks;
  if (name == "invariant") return Reduction::kInvariant;
  if (name == "switch") return Reduction::kSwitch;
  fail("reduction: expected 'ranks', 'invariant' or 'switch', found '", name, "'");
}

AttentionShape attention(const py::dict& values) {
  AttentionShape shape;
  read(values, "n_heads", shape.n_heads);
  read(values, "n_kv_heads", shape.n_kv_heads);
  read(values, "d_head", shape.d_head);
  read(values, "rel_extent", shape.rel_extent);
  read(values, "window", shape.window);
  return shape;
}

MoeConfig moe(const py::dict& values) {
  MoeConfig config;
  read(values, "n_experts", config.n_experts);
  read(values, "n_shared", config.n_shared);
  read(values, "top_k", config.top_k);
  read(values, "d_expert", config.d_expert);
  read(values, "route_scale", config.route_scale);
  return config;
}

VisionConfig vision(const py::dict& values) {
  VisionConfig config;
  read(values, "patch_size", config.patch_size);
  read(values, "temporal_patch_size", config.temporal_patch_size);
  read(values, "n_channels", config.n_channels);
  for (const py::handle stage : values["stages"]) {
    const auto [t_fold, hw_fold, d_in, d_out] =
        stage.cast<std::tuple<std::int32_t, std::int32_t, std::int32_t, std::int32_t>>();
    config.stages.push_back({t_fold, hw_fold, d_in, d_out});
  }
  return config;
}

InteractionConfig interaction(const py::dict& values) {
  InteractionConfig config;
  read(values, "audio_frames", config.audio_frames);
  read(values, "max_output_tokens", config.max_output_tokens);
  read(values, "max_image_patches", config.max_image_patches);
  read(values, "listen", config.listen);
  read(values, "delegate", config.delegate);
  read(values, "delegate_end", config.delegate_end);
  read(values, "result", config.result);
  read(values, "result_end", config.result_end);
  read(values, "user_text", config.user_text);
  read(values, "user_text_end", config.user_text_end);
  return config;
}

}  // namespace

ModelConfig config_from_dict(const PlainDict& values) {
  ModelConfig config;
  read(values, "vocab_size", config.vocab_size);
  read(values, "unpadded_vocab_size", config.unpadded_vocab_size);
  read(values, "d_model", config.d_model);
  read(values, "d_rel", config.d_rel);
  read(values, "d_ff", config.d_ff);
  read(values, "conv_kernel", config.conv_kernel);
  read(values, "norm_eps", config.norm_eps);
  read(values, "logit_divisor", config.logit_divisor);
  read(values, "log_scaling_floor", config.log_scaling_floor);
  read(values, "log_scaling_alpha", config.log_scaling_alpha);
  read(values, "eos_ids", config.eos_ids);
  config.global = attention(values["global"]);
  config.local = attention(values["local"]);
  for (const py::handle layer : values["layers"]) {
    const auto [is_local, is_moe] = layer.cast<std::tuple<bool, bool>>();
    config.layers.push_back({is_local, is_moe});
  }
  const py::dict mtp = values["mtp"];
  read(mtp, "has_chain_norm", config.mtp.has_chain_norm);
  for (const py::handle is_local : mtp["is_local"])
    config.mtp.layers.push_back({is_local.cast<bool>(), false});
  const auto is_given = [&](const char* key) { return !values[key].is_none(); };
  if (is_given("moe")) config.moe = moe(values["moe"]);
  if (is_given("audio")) {
    const py::dict audio = values["audio"];
    config.audio.emplace();
    read(audio, "n_mels", config.audio->n_mels);
    read(audio, "n_levels", config.audio->n_levels);
  }
  if (is_given("vision")) config.vision = vision(values["vision"]);
  if (is_given("interaction")) config.interaction = interaction(values["interaction"]);
  return config;
}

EngineOptions options_from_dict(const PlainDict& values) {
  EngineOptions options;
  read(values, "device", options.device);
  read(values, "n_threads", options.backend.n_threads);
  read(values, "isa", options.backend.isa);
  read(values, "gpu", options.backend.gpu);
  read(values, "dtype", options.dtype);
  read(values, "weights", options.weights);
  read(values, "kv_dtype", options.kv_dtype);
  read(values, "memory_bytes", options.memory_bytes);
  read(values, "page_bytes", options.page_bytes);
  read(values, "max_batch_rows", options.max_batch_rows);
  read(values, "max_positions", options.max_positions);
  read(values, "rewind_rows", options.rewind_rows);
  read(values, "n_ranks", options.n_ranks);
  options.reduction = reduction_from(values["reduction"].cast<std::string>());
  read(values, "transport", options.transport);
  return options;
}

}  // namespace duplex
