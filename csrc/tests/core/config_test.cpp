// ModelConfig::validate: a config that can run passes, and every problem is listed at once.
#include "core/config.h"

#include <catch2/catch.hpp>
#include <functional>

#include "core/error.h"

namespace duplex {
namespace {

ModelConfig valid() {
  ModelConfig config;
  config.vocab_size = 50;
  config.unpadded_vocab_size = 48;
  config.d_model = 32;
  config.d_rel = 4;
  config.d_ff = 64;
  config.global = {4, 2, 16, 32, 0};
  config.local = {4, 4, 8, 8, 8};
  config.moe = {4, 1, 2, 16, 1.0f};
  config.layers = {{true, false}, {false, true}};
  config.vision = VisionConfig{4, 2, 3, {{2, 4, 96, 32}}};
  config.interaction = InteractionConfig{4, 3, 10, 1, 2, 3, 4, 5, 6, 7};
  return config;
}

std::string problems(const ModelConfig& config) {
  try {
    config.validate();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

TEST_CASE("a config that can run passes") { CHECK(problems(valid()) == ""); }

TEST_CASE("what a model does not have is not checked") {
  ModelConfig config = valid();
  config.layers = {{false, false}};
  config.local = {};
  config.moe = {};
  config.vision.reset();
  config.interaction.reset();
  CHECK(problems(config) == "");
  CHECK(config.has_global());
  CHECK_FALSE(config.has_local());
  CHECK_FALSE(config.has_moe());
  config.layers = {{true, true}};
  config.local = {4, 4, 8, 8, 8};
  config.moe = {4, 1, 2, 16, 1.0f};
  config.global = {};
  config.d_ff = 0;
  CHECK(problems(config) == "");
  CHECK(config.attention(config.layers[0]).d_head == 8);
  CHECK(config.n_layers() == 1);
}

TEST_CASE("each impossible value is named") {
  const std::vector<std::pair<const char*, std::function<void(ModelConfig&)>>> faults = {
      {"vocab_size", [](ModelConfig& c) { c.vocab_size = 0; }},
      {"unpadded_vocab_size", [](ModelConfig& c) { c.unpadded_vocab_size = 51; }},
      {"unpadded_vocab_size", [](ModelConfig& c) { c.unpadded_vocab_size = 0; }},
      {"d_model", [](ModelConfig& c) { c.d_model = -1; }},
      {"d_rel", [](ModelConfig& c) { c.d_rel = 0; }},
      {"d_ff", [](ModelConfig& c) { c.d_ff = 0; }},
      {"layers", [](ModelConfig& c) { c.layers.clear(); }},
      {"conv_kernel", [](ModelConfig& c) { c.conv_kernel = 9; }},
      {"logit_divisor", [](ModelConfig& c) { c.logit_divisor = 0; }},
      {"log_scaling_floor", [](ModelConfig& c) { c.log_scaling_floor = -1; }},
      {"n_heads", [](ModelConfig& c) { c.global.n_heads = 0; }},
      {"n_kv_heads", [](ModelConfig& c) { c.global.n_kv_heads = 3; }},
      {"n_kv_heads", [](ModelConfig& c) { c.local.n_kv_heads = 0; }},
      {"d_head", [](ModelConfig& c) { c.global.d_head = 1025; }},
      {"rel_extent", [](ModelConfig& c) { c.local.rel_extent = 0; }},
      {"window", [](ModelConfig& c) { c.local.window = 0; }},
      {"window", [](ModelConfig& c) { c.global.window = -1; }},
      {"n_experts", [](ModelConfig& c) { c.moe.n_experts = 0; }},
      {"n_shared", [](ModelConfig& c) { c.moe.n_shared = 0; }},
      {"top_k", [](ModelConfig& c) { c.moe.top_k = 5; }},
      {"d_expert", [](ModelConfig& c) { c.moe.d_expert = 0; }},
      {"n_experts",
       [](ModelConfig& c) {
         c.moe.n_experts = 0;
         c.layers = {{false, false}};
         c.mtp.layers = {{false, true}};
       }},
      {"vision.stages", [](ModelConfig& c) { c.vision->stages.clear(); }},
      {"interaction.listen", [](ModelConfig& c) { c.interaction->listen = -1; }},
      {"interaction.user_text_end", [](ModelConfig& c) { c.interaction->user_text_end = 50; }},
      {"interaction.audio_frames", [](ModelConfig& c) { c.interaction->audio_frames = 0; }},
  };
  for (const auto& [name, spoil] : faults) {
    ModelConfig config = valid();
    spoil(config);
    CAPTURE(name);
    CHECK_THAT(problems(config), Catch::Contains(std::string(name) + ": expected "));
  }
}

TEST_CASE("all problems come in one message") {
  ModelConfig config = valid();
  config.d_model = 0;
  config.conv_kernel = 0;
  config.moe.top_k = 9;
  CHECK_THAT(problems(config), Catch::StartsWith("model config: ") && Catch::Contains("d_model") &&
                                   Catch::Contains("conv_kernel") && Catch::Contains("found 9"));
}

}  // namespace
}  // namespace duplex
