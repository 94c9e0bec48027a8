// How a model may be cut (core/shard.cpp): what does not divide is said together with what fits,
// and the slices of all ranks are the whole.
#include "core/shard.h"

#include <catch2/catch.hpp>

#include "core/error.h"

namespace duplex {
namespace {

// 4 heads of 64, 2 for keys and values; widths that 8 divides, in whole groups up to 4.
ModelConfig whole() {
  ModelConfig config;
  config.vocab_size = 50;
  config.unpadded_vocab_size = 45;
  config.d_model = 32;
  config.d_rel = 4;
  config.d_ff = 256;
  config.global = {4, 2, 64, 32, 0};
  config.local = {8, 4, 64, 8, 8};
  config.moe = {4, 1, 2, 512, 1.0f};
  config.layers = {{true, false}, {false, true}};
  return config;
}

std::string problem(const ModelConfig& config, DType matrices, std::int32_t rank, std::int32_t size,
                    Reduction reduction = Reduction::kRanks) {
  try {
    make_shard(config, matrices, rank, size, reduction);
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "";
}

std::string problem(const ModelConfig& config, std::int32_t size, DType matrices = DType::kF32) {
  return problem(config, matrices, 0, size);
}

TEST_CASE("what cannot be cut says which size does not divide and what fits") {
  for (const std::int32_t size : {1, 2, 4}) CHECK(problem(whole(), size) == "");
  CHECK(problem(whole(), 3) ==
        "tensor_parallel: expected a divisor of 4 heads, found 3; 1, 2 or 4 fit");
  CHECK(problem(whole(), 8) ==
        "tensor_parallel: expected a divisor of 4 heads, found 8; 1, 2 or 4 fit");
  ModelConfig config = whole();
  config.global = {6, 3, 64, 32, 0};
  config.local = {12, 12, 64, 8, 8};
  config.d_ff = 240;
  config.moe.d_expert = 480;
  CHECK(problem(config, 2) ==
        "tensor_parallel: expected a divisor or a multiple of 3 key/value heads, found 2; "
        "1, 3 or 6 fit");
  config.d_ff = 242;
  CHECK(problem(config, 3) == "tensor_parallel: expected a divisor of d_ff 242, found 3; 1 fits");
  config.layers = {{true, true}, {false, true}};  // now it has no d_ff
  config.moe.d_expert = 480;
  CHECK(problem(config, 3) == "");
  config.mtp.layers = {{true, false}};
  CHECK(problem(config, 3) != "");
  config.mtp.layers = {};
  config.moe.d_expert = 482;
  CHECK_THAT(problem(config, 3), Catch::Contains("a divisor of d_expert 482, found 3"));
  config = whole();
  config.unpadded_vocab_size = 3;
  CHECK_THAT(problem(config, 4), Catch::Contains("at most 3, the vocabulary"));
}

TEST_CASE("ranks and sizes that do not exist are refused") {
  CHECK(problem(whole(), 0) == "tensor_parallel: expected 1 to 8, found 0");
  CHECK(problem(whole(), -1) == "tensor_parallel: expected 1 to 8, found -1");
  CHECK(problem(whole(), 16) == "tensor_parallel: expected 1 to 8, found 16");
  CHECK(problem(whole(), DType::kF32, 2, 2) == "rank: expected 0 to 1, found 2");
  CHECK(problem(whole(), DType::kF32, -1, 2) == "rank: expected 0 to 1, found -1");
  CHECK_THROWS_WITH(check_shard(whole(), DType::kF32, {0, 4, 4}),
                    "tensor_parallel: expected 1 to 8, found 4 with 4 parts each");
}

TEST_CASE("slices of quantised weights are whole groups") {
  CHECK(problem(whole(), 4, DType::kInt8) == "");
  ModelConfig config = whole();
  config.d_ff = 128;
  CHECK(problem(config, 2, DType::kInt8) == "");
  CHECK(problem(config, 4, DType::kInt4) == "");
  CHECK(problem(config, 4, DType::kInt8) ==
        "tensor_parallel: expected slices of whole groups of 64 columns for int8 weights (of d_ff: "
        "32 columns), found 4; 1 or 2 fit");
  config = whole();
  config.global.d_head = 40;  // padded to 48
  CHECK_THAT(problem(config, 2, DType::kInt8), Catch::Contains("(of heads: 96 columns)"));
  CHECK(problem(config, 2, DType::kInt4) == "");
}

TEST_CASE("a model has as many virtual shards as it can be cut into") {
  CHECK(virtual_shards(whole(), DType::kF32) == 4);
  ModelConfig config = whole();
  config.global.n_heads = 8;
  CHECK(virtual_shards(config, DType::kBF16) == 8);
  CHECK(virtual_shards(config, DType::kInt4) == 8);
  CHECK(virtual_shards(config, DType::kInt8) == 4);
  config.d_ff = 255;
  CHECK(virtual_shards(config, DType::kF32) == 1);
  for (const std::int32_t size : {1, 2, 4}) {
    const Shard shard = make_shard(whole(), DType::kF32, 0, size, Reduction::kInvariant);
    CHECK(shard.total_parts() == 4);
    CHECK(shard.size == size);
  }
  CHECK(problem(whole(), DType::kF32, 0, 8, Reduction::kInvariant) ==
        "tensor_parallel: expected a divisor of 4 heads, found 8; 1, 2 or 4 fit");
  config = whole();
  config.global = {6, 6, 64, 32, 0};
  config.local = {12, 12, 64, 8, 8};
  config.d_ff = 240;
  config.moe.d_expert = 480;
  CHECK(problem(config, DType::kF32, 0, 3) == "");
  CHECK(problem(config, DType::kF32, 0, 3, Reduction::kInvariant) ==
        "tensor_parallel: expected a divisor of 2, the virtual shards of reduction 'invariant', "
        "found 3");
}

TEST_CASE("a rank sees its heads and padded widths") {
  CHECK(shard_config(whole(), {}).d_ff == 256);
  ModelConfig config = whole();
  config.d_ff = 24;
  config.moe.d_expert = 40;
  const ModelConfig sliced = shard_config(config, {1, 4, 2});  // widths of 3 and 5 a part
  CHECK(sliced.global.n_heads == 1);
  CHECK(sliced.global.n_kv_heads == 1);
  CHECK(sliced.local.n_heads == 2);
  CHECK(sliced.local.n_kv_heads == 1);
  CHECK(sliced.d_ff == 32);
  CHECK(sliced.moe.d_expert == 32);
  CHECK(sliced.unpadded_vocab_size == 45);
  CHECK_NOTHROW(sliced.validate());
}

TEST_CASE("the slices of all ranks are the whole, in order") {
  const ModelConfig config = whole();
  for (const std::int32_t size : {1, 2, 4}) {
    std::int64_t head = 0, token = 0;
    for (std::int32_t rank = 0; rank < size; ++rank) {
      const Shard shard{rank, size, 1};
      const Slice heads = head_slice(config.global, shard);
      const Slice kv_heads = kv_head_slice(config.global, shard);
      const Slice tokens = vocabulary_slice(config, rank, size);
      CHECK(heads.first == head);
      CHECK(tokens.first == token);
      head += heads.n;
      token += tokens.n;
      // The key/value heads are those that this rank's heads read: two heads share one.
      CHECK(kv_heads.first == heads.first / 2);
      CHECK(kv_heads.n == div_up(heads.n, 2));
    }
    CHECK(head == config.global.n_heads);
    CHECK(token == config.unpadded_vocab_size);
  }
}

}  // namespace
}  // namespace duplex
