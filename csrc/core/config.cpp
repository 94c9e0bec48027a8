#include "core/config.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "core/error.h"

namespace duplex {
namespace {

class Problems {
 public:
  template <class Value>
  void require(bool ok, const char* name, const char* expected, const Value& found) {
    if (ok) return;
    text_ << (count_++ == 0 ? "" : "; ") << name << ": expected " << expected << ", found "
          << found;
  }
  void raise_if_any() const {
    if (count_ > 0) fail<InvalidArgument>("model config: ", text_.str());
  }

 private:
  std::ostringstream text_;
  int count_ = 0;
};

void check_attention(Problems& problems, const AttentionShape& shape) {
  problems.require(shape.n_heads > 0, "n_heads", "a positive number", shape.n_heads);
  problems.require(shape.n_kv_heads > 0 && shape.n_heads % std::max(shape.n_kv_heads, 1) == 0,
                   "n_kv_heads", "a positive divisor of n_heads", shape.n_kv_heads);
  problems.require(shape.d_head > 0 && shape.d_head <= 1024, "d_head", "1 to 1024", shape.d_head);
  problems.require(shape.rel_extent > 0, "rel_extent", "a positive number", shape.rel_extent);
  problems.require(shape.window >= 0, "window", "0 (all) or a positive number", shape.window);
}

// The engine puts these tokens into sequences itself.
void check_interaction(Problems& problems, const InteractionConfig& interaction,
                       std::int32_t vocab_size) {
  const std::pair<const char*, std::int32_t> ids[] = {
      {"interaction.listen", interaction.listen},
      {"interaction.delegate", interaction.delegate},
      {"interaction.delegate_end", interaction.delegate_end},
      {"interaction.result", interaction.result},
      {"interaction.result_end", interaction.result_end},
      {"interaction.user_text", interaction.user_text},
      {"interaction.user_text_end", interaction.user_text_end}};
  for (const auto& [name, id] : ids)
    problems.require(id >= 0 && id < vocab_size, name, "a token id below vocab_size", id);
  problems.require(interaction.audio_frames > 0, "interaction.audio_frames", "a positive number",
                   interaction.audio_frames);
}

}  // namespace

bool ModelConfig::has_local() const { return std::ranges::any_of(layers, &LayerConfig::is_local); }
bool ModelConfig::has_global() const {
  return !std::ranges::all_of(layers, &LayerConfig::is_local);
}
bool ModelConfig::has_moe() const { return std::ranges::any_of(layers, &LayerConfig::is_moe); }
bool ModelConfig::has_dense() const { return !std::ranges::all_of(layers, &LayerConfig::is_moe); }

ModelConfig ModelConfig::mtp_model() const {
  ModelConfig model = *this;
  model.layers = std::exchange(model.mtp.layers, {});
  return model;
}

void ModelConfig::validate() const {
  Problems problems;
  problems.require(vocab_size > 0, "vocab_size", "a positive number", vocab_size);
  problems.require(unpadded_vocab_size > 0 && unpadded_vocab_size <= vocab_size,
                   "unpadded_vocab_size", "1 to vocab_size", unpadded_vocab_size);
  problems.require(d_model > 0, "d_model", "a positive number", d_model);
  problems.require(d_rel > 0, "d_rel", "a positive number", d_rel);
  problems.require(!layers.empty(), "layers", "at least one", layers.size());
  problems.require(conv_kernel >= 1 && conv_kernel <= 8, "conv_kernel", "1 to 8", conv_kernel);
  problems.require(logit_divisor > 0, "logit_divisor", "a positive number", logit_divisor);
  problems.require(log_scaling_floor >= 0, "log_scaling_floor", "0 (off) or more",
                   log_scaling_floor);
  problems.require(!has_dense() || d_ff > 0, "d_ff", "a positive number", d_ff);
  if (has_global()) check_attention(problems, global);
  if (has_local()) {
    check_attention(problems, local);
    problems.require(local.window > 0, "window", "a positive number for local layers",
                     local.window);
  }
  if (has_moe()) {
    problems.require(moe.n_experts > 0, "n_experts", "a positive number", moe.n_experts);
    problems.require(moe.n_shared >= 1, "n_shared", "at least 1", moe.n_shared);
    problems.require(moe.top_k > 0 && moe.top_k <= moe.n_experts, "top_k", "1 to n_experts",
                     moe.top_k);
    problems.require(moe.d_expert > 0, "d_expert", "a positive number", moe.d_expert);
  }
  if (interaction) check_interaction(problems, *interaction, vocab_size);
  if (vision) problems.require(!vision->stages.empty(), "vision.stages", "at least one", 0);
  problems.raise_if_any();
  if (!mtp.layers.empty()) mtp_model().validate();
}

}  // namespace duplex
