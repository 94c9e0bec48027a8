// Where layers lie in a block, which windows tapes keep and which page size they share.
#include "sequence/layout.h"

#include <catch2/catch.hpp>

#include "tests/sequence/fixtures.h"

namespace duplex::sequence_tests {
namespace {

TEST_CASE("layers lie one after the other in the block of their kind") {
  const SequenceLayout layout = small_layout();
  // d_head 8 is padded to 16: one head is 2 panels of 16 x 64 bfloat16 = 4096 bytes.
  CHECK(layout.global.block_bytes == 2 * 1 * 4096);
  CHECK(layout.local.block_bytes == 3 * 2 * 4096);
  CHECK(layout.layers[1].kv_offset_bytes == 0);
  CHECK(layout.layers[4].kv_offset_bytes == 4096);
  CHECK(layout.layers[0].kv_offset_bytes == 0);
  CHECK(layout.layers[2].kv_offset_bytes == 2 * 4096);
  CHECK(layout.layers[3].kv_offset_bytes == 4 * 4096);
  // Convolutions: k and v have 32 (local) or 16 (global) floats, the two others 24 padded to 32.
  CHECK(layout.layers[0].v_conv_offset_bytes == 128);
  CHECK(layout.layers[0].attention_conv_offset_bytes == 256);
  CHECK(layout.layers[0].mlp_conv_offset_bytes == 384);
  CHECK(layout.layers[1].k_conv_offset_bytes == 512);
  CHECK(layout.layers[1].v_conv_offset_bytes == 576);
  CHECK(layout.conv.block_bytes == 3 * 512 + 2 * 384);
}

TEST_CASE("one page size serves all tapes") {
  const SequenceLayout small = small_layout();
  CHECK(small.page_bytes == 24576);
  CHECK(small.global.blocks_per_page == 3);
  CHECK(small.local.blocks_per_page == 1);
  CHECK(small.conv.blocks_per_page == 10);
  CHECK(small.local.window == 80);
  CHECK(small.conv.window == 13);
  CHECK(small.global.window == 0);

  ModelConfig config = small_config();
  config.global.d_head = config.local.d_head = 1024;
  const SequenceLayout large = SequenceLayout::make(config, DType::kF32, 4096, {0, 64});
  CHECK(large.local.block_bytes == 3 << 20);
  CHECK(large.page_bytes == 4 << 20);
}

TEST_CASE("a page holds whole blocks of the global tape") {
  ModelConfig config = small_config();
  config.global.n_heads = config.global.n_kv_heads =
      5;  // blocks of 2 layers that are not a multiple of the others
  const SequenceLayout layout = SequenceLayout::make(config, DType::kBF16, 4096, {0, 64});
  CHECK(layout.global.block_bytes == 2 * 5 * 4096);
  CHECK(layout.page_bytes == 2 * 5 * 4096);
  config.global.n_heads = config.global.n_kv_heads = 2;
  const SequenceLayout several = SequenceLayout::make(config, DType::kBF16, 4096, {0, 64});
  CHECK(several.local.block_bytes == 3 * 2 * 4096);
  CHECK(several.global.block_bytes == 2 * 2 * 4096);
  CHECK(several.page_bytes == 2 * 2 * 2 * 4096);
}

TEST_CASE("in int8 a position of a head has two scales of two bytes beside its codes") {
  const SequenceLayout dense = SequenceLayout::make(small_config(), DType::kBF16, 4096, {0, 64});
  const SequenceLayout codes = SequenceLayout::make(small_config(), DType::kInt8, 4096, {0, 64});
  CHECK(codes.kv_dtype == DType::kInt8);
  // One head: 2 panels of 64 scales of 2 bytes and 16 x 64 codes.
  CHECK(codes.global.block_bytes == 2 * 1 * 2 * (128 + 1024));
  CHECK(codes.local.block_bytes == 3 * 2 * 2 * (128 + 1024));
  CHECK(codes.layers[2].kv_offset_bytes == 2 * 2 * (128 + 1024));
  CHECK(codes.conv.block_bytes == dense.conv.block_bytes);
}

TEST_CASE("a kind without layers has an inert tape") {
  ModelConfig config = small_config();
  config.layers = {{false, false}};
  const SequenceLayout only_global = SequenceLayout::make(config, DType::kF32, 4096, {0, 64});
  CHECK(only_global.local.is_inert());
  CHECK(only_global.longest_window() == 3);
  config.layers = {{true, false}};
  const SequenceLayout only_local = SequenceLayout::make(config, DType::kF32, 4096, {0, 64});
  CHECK(only_local.global.is_inert());
  CHECK(only_local.growth_pages(1000) == 0);
}

TEST_CASE("the window promise covers a span that starts anywhere") {
  const SequenceLayout layout = small_layout({10, 130});
  // Local: 210 positions in pages of 64 touch at most 5; conv: 143 in pages of 10 at most 16.
  CHECK(layout.window_pages() == 5 + 16);
  // 193 touch at most 4, 126 at most 14.
  CHECK(small_layout({10, 113}).window_pages() == 4 + 14);
  CHECK(layout.growth_pages(192) == 1);
  CHECK(layout.growth_pages(193) == 2);
}

TEST_CASE("the longest window may be that of the convolutions, which is 1 at least") {
  ModelConfig config = small_config();
  config.local.window = 2;
  CHECK(SequenceLayout::make(config, DType::kF32, 4096, {0, 64}).longest_window() == 3);
  config.conv_kernel = 1;
  CHECK(SequenceLayout::make(config, DType::kF32, 4096, {0, 64}).conv.window == 1);
}

TEST_CASE("limits are checked") {
  CHECK_THROWS_AS(SequenceLayout::make(small_config(), DType::kF32, 0, {0, 64}), InvalidArgument);
  CHECK_THROWS_AS(small_layout({-1, 10}), InvalidArgument);
  CHECK_THROWS_AS(small_layout({0, 0}), InvalidArgument);
}

}  // namespace
}  // namespace duplex::sequence_tests
