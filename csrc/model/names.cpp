// The tables of tensor spellings. Left: as published, and as save_pretrained writes. Right: the
// module path of the transformers implementation. "#" stands for a number.
#include <array>
#include <cctype>
#include <utility>

#include "model/tensor_source.h"

namespace duplex {
namespace {

using Spelling = std::pair<const char*, const char*>;

constexpr std::array kSpellings = {
    Spelling{"model.llm.embed.weight", "model.language_model.embed_tokens.weight"},
    Spelling{"model.llm.embed_norm.weight", "model.language_model.embed_tokens.embed_norm.weight"},
    Spelling{"model.llm.norm.weight", "model.language_model.norm.weight"},
    Spelling{"model.llm.unembed.weight", "lm_head.weight"},
    Spelling{"model.llm.layers.#.attn_norm.weight",
             "model.language_model.layers.#.input_layernorm.weight"},
    Spelling{"model.llm.layers.#.attn.wq_du.weight",
             "model.language_model.layers.#.self_attn.q_proj.weight"},
    Spelling{"model.llm.layers.#.attn.wk_dv.weight",
             "model.language_model.layers.#.self_attn.k_proj.weight"},
    Spelling{"model.llm.layers.#.attn.wv_dv.weight",
             "model.language_model.layers.#.self_attn.v_proj.weight"},
    Spelling{"model.llm.layers.#.attn.wr_du.weight",
             "model.language_model.layers.#.self_attn.r_proj.weight"},
    Spelling{"model.llm.layers.#.attn.wo_ud.weight",
             "model.language_model.layers.#.self_attn.o_proj.weight"},
    Spelling{"model.llm.layers.#.attn.q_norm.weight",
             "model.language_model.layers.#.self_attn.q_norm.weight"},
    Spelling{"model.llm.layers.#.attn.k_norm.weight",
             "model.language_model.layers.#.self_attn.k_norm.weight"},
    Spelling{"model.llm.layers.#.attn.k_sconv.weight",
             "model.language_model.layers.#.self_attn.k_sconv.conv1d.weight"},
    Spelling{"model.llm.layers.#.attn.v_sconv.weight",
             "model.language_model.layers.#.self_attn.v_sconv.conv1d.weight"},
    Spelling{"model.llm.layers.#.attn.rel_logits_proj.proj",
             "model.language_model.layers.#.self_attn.rel_logits_proj.proj"},
    Spelling{"model.llm.layers.#.attn_sconv.weight",
             "model.language_model.layers.#.attn_sconv.conv1d.weight"},
    Spelling{"model.llm.layers.#.mlp_sconv.weight",
             "model.language_model.layers.#.mlp_sconv.conv1d.weight"},
    Spelling{"model.llm.layers.#.mlp_norm.weight",
             "model.language_model.layers.#.post_attention_layernorm.weight"},
    Spelling{"model.llm.layers.#.mlp.global_scale",
             "model.language_model.layers.#.mlp.global_scale"},
    Spelling{"model.llm.layers.#.mlp.w2_md.weight",
             "model.language_model.layers.#.mlp.down_proj.weight"},
    Spelling{"model.llm.layers.#.mlp.gate.weight", "model.language_model.layers.#.mlp.gate.weight"},
    Spelling{"model.llm.layers.#.mlp.gate.bias",
             "model.language_model.layers.#.mlp.gate.e_score_correction_bias"},
    Spelling{"model.llm.layers.#.mlp.gate.global_scale",
             "model.language_model.layers.#.mlp.gate.global_scale"},
    Spelling{"model.llm.layers.#.mlp.experts.w2_weight",
             "model.language_model.layers.#.mlp.experts.down_proj"},
    Spelling{"model.llm.layers.#.mlp.shared_experts.shared_w2_weight",
             "model.language_model.layers.#.mlp.shared_experts.down_proj"},
    Spelling{"model.audio.encoder.weight",
             "model.audio_tower.embed_audio_tokens.embed_audio_tokens.weight"},
    Spelling{"model.audio.final_norm.weight", "model.audio_tower.norm.weight"},
    Spelling{"model.visual.layers.linear_#.weight",
             "model.vision_tower.encoder_layers.#.projection.weight"},
    Spelling{"model.visual.layers.norm_#.weight",
             "model.vision_tower.encoder_layers.#.layer_norm.weight"},
    Spelling{"model.visual.final_norm.weight", "model.vision_tower.final_norm.weight"},
};

// Matches `name` against a pattern with at most one "#"; the number goes to `number`.
bool matches(const std::string& name, const std::string& pattern, std::string& number) {
  const std::size_t hole = pattern.find('#');
  if (hole == std::string::npos) return name == pattern;
  const std::size_t tail = pattern.size() - hole - 1;
  if (name.size() <= hole + tail || name.compare(0, hole, pattern, 0, hole) != 0 ||
      name.compare(name.size() - tail, tail, pattern, hole + 1, tail) != 0)
    return false;
  number = name.substr(hole, name.size() - hole - tail);
  for (const char c : number)
    if (std::isdigit(static_cast<unsigned char>(c)) == 0) return false;
  return true;
}

// The endings that name what accompanies a tensor "x.weight" or "x": of_module ones follow "x",
// the others the whole name. Published weights say ".scale", ModelOpt "weight_scale_2",
// compressed-tensors "weight_packed" and "weight_global_scale", fine-grained FP8
// "weight_scale_inv" or, of experts, "down_proj_scale_inv", which multiply in spite of their names.
struct CompanionSpelling {
  Companion companion;
  bool of_module;
  const char* ending;
};

constexpr std::array kCompanions = {
    CompanionSpelling{Companion::kCodes, true, ".weight_packed"},
    CompanionSpelling{Companion::kBlockScale, false, ".scale"},
    CompanionSpelling{Companion::kBlockScale, true, ".weight_scale"},
    CompanionSpelling{Companion::kBlockScale, true, "_scale"},
    CompanionSpelling{Companion::kBlockScale, false, "_scale_inv"},
    CompanionSpelling{Companion::kMultiplier, false, ".scale2"},
    CompanionSpelling{Companion::kMultiplier, true, ".weight_scale_2"},
    CompanionSpelling{Companion::kMultiplier, true, "_scale_2"},
    CompanionSpelling{Companion::kDivisor, true, ".weight_global_scale"},
    CompanionSpelling{Companion::kUnused, false, ".input_amax"},
    CompanionSpelling{Companion::kUnused, false, ".original_shape"},
    CompanionSpelling{Companion::kUnused, true, ".input_scale"},
    CompanionSpelling{Companion::kUnused, true, ".input_global_scale"},
};

}  // namespace

std::vector<std::string> companion_names(const std::string& name, Companion companion) {
  const std::string weight = ".weight";
  const bool is_module = name.size() > weight.size() &&
                         name.compare(name.size() - weight.size(), weight.size(), weight) == 0;
  const std::string module = is_module ? name.substr(0, name.size() - weight.size()) : name;
  std::vector<std::string> names;
  for (const CompanionSpelling& spelling : kCompanions)
    if (spelling.companion == companion)
      names.push_back((spelling.of_module ? module : name) + spelling.ending);
  return names;
}

std::string module_name(const std::string& canonical) {
  std::string number;
  for (const auto& [published, module] : kSpellings) {
    if (!matches(canonical, published, number)) continue;
    std::string name = module;
    const std::size_t hole = name.find('#');
    if (hole != std::string::npos) name.replace(hole, 1, number);
    return name;
  }
  return {};
}

std::string module_path(const std::string& name) {
  for (const char* start : {"model.embed_tokens.", "model.layers.", "model.norm."})
    if (name.rfind(start, 0) == 0)
      return "model.language_model." + name.substr(std::string("model.").size());
  return name;
}

}  // namespace duplex
