// Codes and their scales (source_tensor.cpp, attach_scales): every code's value, which element a
// scale belongs to, and what is said about scales that are missing or do not fit.
#include "model/source_tensor.h"

#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/error.h"
#include "model/tensor_source.h"

namespace duplex {
namespace {

using Shape = std::vector<std::int64_t>;

// A tensor with bytes of its own, which live as long as the test.
struct Bytes {
  std::string name;
  FileType type;
  Shape shape;
  std::vector<std::uint8_t> bytes;
};

std::vector<SourceTensor> views(const std::vector<Bytes>& tensors) {
  std::vector<SourceTensor> views;
  for (const Bytes& t : tensors)
    views.push_back(
        {t.name, t.type, t.shape, reinterpret_cast<const std::byte*>(t.bytes.data()), false, {}});
  return views;
}

std::vector<std::uint8_t> floats(const std::vector<float>& values) {
  std::vector<std::uint8_t> bytes(values.size() * 4);
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::vector<float> read_all(const SourceTensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.elements()));
  tensor.read(0, tensor.elements(), values.data());
  return values;
}

std::string problem(const std::vector<Bytes>& tensors) {
  TensorSource source(views(tensors));
  try {
    source.find("x.weight");
  } catch (const CheckpointError& e) {
    return e.what();
  }
  return "";
}

TEST_CASE("every code of a byte has its value") {
  std::vector<std::uint8_t> all(256);
  std::iota(all.begin(), all.end(), std::uint8_t{0});
  const auto* data = reinterpret_cast<const std::byte*>(all.data());
  const std::vector<float> e4m3 = read_all({"t", FileType::kE4M3, {256}, data, false, {}});
  const std::vector<float> e8m0 = read_all({"t", FileType::kE8M0, {256}, data, false, {}});
  const std::vector<float> e2m1 = read_all({"t", FileType::kE2M1, {512}, data, false, {}});
  for (int code = 0; code < 256; ++code) {
    CAPTURE(code);
    const auto i = static_cast<std::size_t>(code);
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const double sign = code < 128 ? 1 : -1;
    if ((code & 127) == 127)
      CHECK(std::isnan(e4m3[i]));
    else
      CHECK(e4m3[i] == sign * (exponent == 0 ? std::ldexp(mantissa, -9)
                                             : std::ldexp(8 + mantissa, exponent - 10)));
    if (code == 255)
      CHECK(std::isnan(e8m0[i]));
    else
      CHECK(e8m0[i] == std::ldexp(1.0, code - 127));
    constexpr std::array<double, 8> kSizes = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    CHECK(e2m1[2 * i] == kSizes[i & 7] * ((code & 8) != 0 ? -1 : 1));
    CHECK(e2m1[2 * i + 1] == kSizes[i >> 4 & 7] * (code >= 128 ? -1 : 1));
  }
  CHECK(e4m3[126] == 448.0f);
}

TEST_CASE("halves have their values, denormals and infinities too") {
  const std::array<std::uint16_t, 8> bits = {0, 1, 0x03ff, 0x0400, 0x3c00, 0xc500, 0x7bff, 0x7c00};
  const std::vector<float> values = read_all(
      {"t", FileType::kF16, {8}, reinterpret_cast<const std::byte*>(bits.data()), false, {}});
  CHECK(values == std::vector<float>{0, 0x1p-24f, 0x1.ff8p-15f, 0x1p-14f, 1, -5, 65504, INFINITY});
}

TEST_CASE("a block of 16 columns has its scale, a matrix its second one") {
  // Two matrices of 2 x 32; codes are all 1 (two in a byte: 0x22).
  const bool is_divisor = GENERATE(false, true);
  const std::vector<Bytes> tensors = {
      {"x.weight", FileType::kU8, {2, 2, 16}, std::vector<std::uint8_t>(64, 0x22)},
      {"x.weight_scale",
       FileType::kE4M3,
       {2, 2, 2},
       {0x38, 0x40, 0x44, 0x48, 0x38, 0x40, 0x44, 0x48}},
      {is_divisor ? "x.weight_global_scale" : "x.weight_scale_2",
       FileType::kF32,
       {2},
       floats({2, 8})},
      {"x.input_scale", FileType::kF32, {}, floats({9})}};
  TensorSource source(views(tensors));
  const SourceTensor& weight = source.find("x.weight", {2, 2, 32});
  const std::vector<float> values = read_all(weight);
  constexpr std::array<float, 4> kScales = {1, 2, 3, 4};
  for (std::size_t i = 0; i < 128; ++i) {
    const float second = i < 64 ? 2.0f : 8.0f;
    CHECK(values[i] == kScales[i / 16 % 4] * (is_divisor ? 1 / second : second));
  }
  std::array<float, 6> part{};
  weight.read(12, 6, part.data());
  CHECK(std::equal(part.begin(), part.end(), values.begin() + 12));
  CHECK_NOTHROW(source.check_all_used());
}

TEST_CASE("scales of exponents belong to 32 columns, the last block may be short") {
  const std::vector<Bytes> tensors = {
      {"x.weight", FileType::kE4M3, {2, 40}, std::vector<std::uint8_t>(80, 0x38)},
      {"x.weight_scale", FileType::kU8, {2, 2}, {127, 128, 126, 130}}};
  TensorSource source(views(tensors));
  const std::vector<float> values = read_all(source.find("x.weight"));
  for (std::size_t i = 0; i < 80; ++i)
    CHECK(values[i] == (i < 32 ? 1.0f : i < 40 ? 2.0f : i < 72 ? 0.5f : 8.0f));
}

TEST_CASE("float scales are for all, a matrix, a row, or a block of 128 x 128") {
  const std::vector<std::uint8_t> ones(2 * 130 * 129, 0x38);
  const auto values = [&](const Shape& shape, const std::vector<float>& scales) {
    const std::vector<Bytes> tensors = {
        {"x.weight", FileType::kE4M3, {2, 130, 129}, ones},
        {"x.weight_scale_inv", FileType::kF32, shape, floats(scales)}};
    TensorSource source(views(tensors));
    return read_all(source.find("x.weight"));
  };
  const auto at = [](const std::vector<float>& v, std::size_t matrix, std::size_t row,
                     std::size_t column) { return v[(matrix * 130 + row) * 129 + column]; };
  CHECK(at(values({}, {3}), 1, 129, 128) == 3);
  for (const Shape& shape : {Shape{2}, Shape{2, 1}, Shape{2, 1, 1}}) {
    CHECK(at(values(shape, {3, 4}), 0, 129, 128) == 3);
    CHECK(at(values(shape, {3, 4}), 1, 0, 0) == 4);
  }
  std::vector<float> rows(260);
  std::iota(rows.begin(), rows.end(), 1.0f);
  CHECK(at(values({2, 130, 1}, rows), 1, 7, 128) == 138);
  CHECK(at(values({2, 130}, rows), 0, 129, 0) == 130);
  const std::vector<float> blocks = values({2, 2, 2}, {1, 2, 3, 4, 5, 6, 7, 8});
  CHECK(at(blocks, 0, 127, 127) == 1);
  CHECK(at(blocks, 0, 127, 128) == 2);
  CHECK(at(blocks, 0, 128, 127) == 3);
  CHECK(at(blocks, 1, 129, 128) == 8);
}

TEST_CASE("scales that are missing or do not fit are named") {
  const Bytes weight{"x.weight", FileType::kU8, {2, 16}, std::vector<std::uint8_t>(32)};
  const Bytes scale{"x.weight_scale", FileType::kE4M3, {2, 2}, std::vector<std::uint8_t>(4, 0x38)};
  const Bytes second{"x.weight_scale_2", FileType::kF32, {}, floats({1})};
  CHECK(problem({weight, scale, second}) == "");
  CHECK_THAT(problem({weight}), Catch::Contains("'x.weight' holds E2M1 codes") &&
                                    Catch::Contains("'x.weight.scale', 'x.weight_scale'"));
  CHECK_THAT(problem({weight, scale}), Catch::Contains("second scale") &&
                                           Catch::Contains("'x.weight.scale2'") &&
                                           Catch::Contains("'x.weight_global_scale'"));
  Bytes wrong = scale;
  wrong.shape = {2, 1};
  CHECK_THAT(problem({weight, wrong, second}),
             Catch::Contains("'x.weight_scale': expected shape (2, 2), a scale for each 16 columns "
                             "of 'x.weight', found (2, 1)"));
  wrong = {"x.weight_scale", FileType::kF32, {2, 2}, floats({1, 1, 1, 1})};
  CHECK_THAT(problem({weight, wrong, second}),
             Catch::Contains("'x.weight_scale'") && Catch::Contains("found F32"));
  wrong = {"x.weight_scale_2", FileType::kF32, {3}, floats({1, 1, 1})};
  CHECK_THAT(problem({weight, scale, wrong}),
             Catch::Contains("'x.weight_scale_2': expected 1 float") && Catch::Contains("F32 (3)"));
  const Bytes fp8{"x.weight", FileType::kE4M3, {2, 16}, std::vector<std::uint8_t>(32)};
  wrong = {"x.weight_scale", FileType::kF32, {2, 3}, floats({1, 1, 1, 1, 1, 1})};
  CHECK_THAT(problem({fp8, wrong}), Catch::Contains("(2, 1) (one a row)") &&
                                        Catch::Contains("(1, 1) (one for 128 x 128)") &&
                                        Catch::Contains("found (2, 3)"));
  wrong = {"x.weight_scale", FileType::kI64, {}, std::vector<std::uint8_t>(8)};
  CHECK_THAT(problem({fp8, wrong}), Catch::Contains("F32, BF16 or F16 for the F8_E4M3 codes") &&
                                        Catch::Contains("found I64"));
  wrong = {"x.weight_scale_2", FileType::kI64, {}, std::vector<std::uint8_t>(8)};
  CHECK_THAT(problem({weight, scale, wrong}), Catch::Contains("expected 1 float of 'x.weight'"));
  // One code has no columns that could share a scale.
  CHECK_THAT(problem({{"x.weight", FileType::kE4M3, {}, {0x38}},
                      {"x.weight_scale", FileType::kU8, {2}, {127, 127}}}),
             Catch::Contains("expected shape (1)"));
  CHECK_THAT(problem({{"x.weight", FileType::kI64, {4}, std::vector<std::uint8_t>(32)}}),
             Catch::Contains("'x.weight': expected elements of F32") && Catch::Contains("I64"));
}

TEST_CASE("what makes a value infinite is found") {
  const auto culprit = [](std::uint8_t code, std::uint8_t scale, float second) {
    const std::vector<Bytes> tensors = {
        {"x.weight", FileType::kU8, {1, 16}, std::vector<std::uint8_t>(16, code)},
        {"x.weight_scale", FileType::kE4M3, {1, 2}, {0x38, scale}},
        {"x.weight_global_scale", FileType::kF32, {}, floats({second})}};
    TensorSource source(views(tensors));
    return source.find("x.weight").culprit(0, 32).name;
  };
  CHECK(culprit(0x22, 0x7f, 1) == "x.weight_scale");
  CHECK(culprit(0x22, 0x38, NAN) == "x.weight_global_scale");
  CHECK(culprit(0x22, 0x38, 0) == "x.weight_global_scale");
}

}  // namespace
}  // namespace duplex
