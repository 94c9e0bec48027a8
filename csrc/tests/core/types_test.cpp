// Element types and integer helpers (core/types.h).
#include "core/types.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

namespace duplex {
namespace {

TEST_CASE("bfloat16 rounds to the nearest, to the even one on a tie") {
  CHECK(float_to_bf16(1.0f) == 0x3f80);
  CHECK(bf16_to_float(0x3f80) == 1.0f);
  // Between 1 and its neighbour 1 + 2^-7.
  CHECK(float_to_bf16(1.0f + 0x1.0p-8f) == 0x3f80);
  CHECK(float_to_bf16(1.0f + 0x1.8p-8f) == 0x3f81);
  CHECK(float_to_bf16(1.0f + 0x1.0p-7f + 0x1.0p-8f) == 0x3f82);
  CHECK(float_to_bf16(-1.0f - 0x1.0p-8f) == 0xbf80);
  CHECK(bf16_to_float(float_to_bf16(0x1.0p-130f)) == 0x1.0p-130f);  // denormal
}

TEST_CASE("every bfloat16 survives the way to float32 and back") {
  int n_changed = 0;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = bf16_to_float(half);
    if (std::isnan(value))
      n_changed += std::isnan(bf16_to_float(float_to_bf16(value))) ? 0 : 1;
    else
      n_changed += float_to_bf16(value) == half ? 0 : 1;
  }
  CHECK(n_changed == 0);
}

TEST_CASE("infinity stays, overflow becomes infinity, NaN stays NaN") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CHECK(bf16_to_float(float_to_bf16(kInfinity)) == kInfinity);
  CHECK(bf16_to_float(float_to_bf16(-kInfinity)) == -kInfinity);
  CHECK(bf16_to_float(float_to_bf16(std::numeric_limits<float>::max())) == kInfinity);
  CHECK(std::isnan(bf16_to_float(float_to_bf16(std::numeric_limits<float>::quiet_NaN()))));
  // A NaN whose payload lies in the bits that are dropped.
  CHECK(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST_CASE("rounding up to multiples") {
  CHECK(div_up(0, 16) == 0);
  CHECK(div_up(1, 16) == 1);
  CHECK(div_up(16, 16) == 1);
  CHECK(div_up(17, 16) == 2);
  CHECK(round_up(0, 64) == 0);
  CHECK(round_up(65, 64) == 128);
  CHECK(dtype_bytes(DType::kF32) == 4);
  CHECK(dtype_bytes(DType::kBF16) == 2);
  CHECK(std::string(dtype_name(DType::kBF16)) == "bfloat16");
}

}  // namespace
}  // namespace duplex
