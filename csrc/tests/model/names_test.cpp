// The two spellings of tensor names (names.cpp).
#include <catch2/catch.hpp>

#include "model/tensor_source.h"

namespace duplex {
namespace {

TEST_CASE("published names have a twin in the transformers spelling") {
  CHECK(module_name("model.llm.embed.weight") == "model.language_model.embed_tokens.weight");
  CHECK(module_name("model.llm.unembed.weight") == "lm_head.weight");
  CHECK(module_name("model.llm.layers.0.attn.wq_du.weight") ==
        "model.language_model.layers.0.self_attn.q_proj.weight");
  CHECK(module_name("model.llm.layers.17.attn.k_sconv.weight") ==
        "model.language_model.layers.17.self_attn.k_sconv.conv1d.weight");
  CHECK(module_name("model.llm.layers.123.mlp.gate.bias") ==
        "model.language_model.layers.123.mlp.gate.e_score_correction_bias");
  CHECK(module_name("model.audio.final_norm.weight") == "model.audio_tower.norm.weight");
  CHECK(module_name("model.visual.layers.linear_2.weight") ==
        "model.vision_tower.encoder_layers.2.projection.weight");
}

TEST_CASE("what the table does not hold has no twin") {
  CHECK(module_name("") == "");
  CHECK(module_name("model.llm.layers..attn.wq_du.weight") == "");
  CHECK(module_name("model.llm.layers.x.attn.wq_du.weight") == "");
  CHECK(module_name("model.llm.layers.-1.attn.wq_du.weight") == "");
  CHECK(module_name("model.llm.layers.1.2.attn.wq_du.weight") == "");
  CHECK(module_name("model.llm.layers.0.attn.wq_du.weight2") == "");
  CHECK(module_name("model.llm.layers.0.mlp.w13_dn.weight") == "");  // two tensors over there
}

TEST_CASE("the decoder alone is found under the path of the whole model") {
  CHECK(module_path("model.embed_tokens.weight") == "model.language_model.embed_tokens.weight");
  CHECK(module_path("model.layers.3.mlp.gate.weight") ==
        "model.language_model.layers.3.mlp.gate.weight");
  CHECK(module_path("model.norm.weight") == "model.language_model.norm.weight");
  CHECK(module_path("model.llm.norm.weight") == "model.llm.norm.weight");
  CHECK(module_path("lm_head.weight") == "lm_head.weight");
  CHECK(module_path("") == "");
}

}  // namespace
}  // namespace duplex
