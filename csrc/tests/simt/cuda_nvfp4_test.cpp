// The CUDA backend's products with NVFP4 weights: the bytes of bfloat16 weights of the values that
// loading gives, for any number of rows and matrices of any size.
#include <cmath>
#include <limits>

#include "tests/simt/coded.h"
#include "tests/simt/coded_experts.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

constexpr MatrixScale kScales[] = {{1.7e-3f, false}, {-611.3f, true}};

// The codes in memory as a matrix in NVFP4, or their values as one in bfloat16.
PackedMatrix pack(Backend& backend, Memory& memory, const CodedTensor& w, std::int32_t n_out,
                  std::int32_t n_in, DType format) {
  const auto padded = static_cast<std::int32_t>(round_up(n_in, kColumnAlign));
  const PackShape shape{n_in, n_in, padded, format};
  if (format == DType::kBF16) {
    RowBuffer values = w.values();
    return memory.pack(values, shape, n_out);
  }
  void* const packed = memory.zeros(backend.packed_bytes(n_out, padded, format));
  REQUIRE(backend.pack(w.rows(0, n_out), shape, 0, packed) == -1);
  return {packed, n_out, padded, format};
}

RowBuffer product(Backend& backend, const CodedTensor& w, std::int32_t n_out, std::int32_t n_in,
                  DType format, RowBuffer& x, std::int32_t n_rows, float divisor = 1.0f) {
  Memory memory(backend);
  const PackedMatrix packed = pack(backend, memory, w, n_out, n_in, format);
  RowBuffer y(n_rows, 0, round_up(n_out, kPanelOutputs) + 16, DType::kF32);
  float* const there = memory.put_floats(y);
  backend.linear({packed, memory.put(x), n_rows, there, y.stride(), divisor});
  memory.get(y, there);
  return y;
}

RowBuffer bf16_rows(Random& random, std::int64_t n_rows, std::int64_t width) {
  return random_rows(random, n_rows, width, round_up(width, kColumnAlign) + 16, DType::kBF16);
}

TEST_CASE("cuda: NVFP4 has the bytes of bfloat16 weights of the same values", "[simt][races]") {
  const std::int32_t n_in = GENERATE(16, 40, 336, 1104);
  const MatrixScale of_matrix = kScales[n_in == 40 || n_in == 1104 ? 1 : 0];
  const std::int32_t n_out = n_in == 40 ? 70 : 64;
  const float divisor = n_in == 40 ? 3.5f : 1.0f;
  CAPTURE(n_in);
  Random random(31);
  const CodedTensor w(random, n_out, n_in, of_matrix);
  RowBuffer x = bf16_rows(random, 70, n_in);
  in_every_order([&](Backend& backend) {
    for (const std::int32_t n_rows : {1, 9, 20, 28, 70}) {
      CAPTURE(n_rows);
      const auto run = [&](DType format) {
        return product(backend, w, n_out, n_in, format, x, n_rows, divisor);
      };
      CHECK(n_different(run(DType::kNvfp4), run(DType::kBF16)) == 0);
    }
  });
}

TEST_CASE("cuda: NVFP4 has the bytes of bfloat16 weights for every number of rows", "[simt]") {
  Random random(32);
  const CodedTensor w(random, 64, 208, kScales[0]);
  RowBuffer x = bf16_rows(random, 65, 208);
  const Arrange arrange(simt::Order::kRandom);
  cuda::CudaBackend backend({});
  const RowBuffer all = product(backend, w, 64, 208, DType::kBF16, x, 65);
  for (std::int32_t n_rows = 1; n_rows <= 65; ++n_rows) {
    CAPTURE(n_rows);
    CHECK(n_different(product(backend, w, 64, 208, DType::kNvfp4, x, n_rows), all) == 0);
  }
}

// A row of the unit matrix picks one weight of each output, so every code is seen under every
// scale.
TEST_CASE("cuda: every NVFP4 code under every scale is the bfloat16 number that loading gives",
          "[simt]") {
  constexpr std::int32_t kOut = 256, kIn = 16;
  // Numbers below the normal ones; products that float32 rounds; a scale that divides.
  const MatrixScale of_matrix = GENERATE(MatrixScale{1.0f, false}, MatrixScale{3.1e-38f, false},
                                         MatrixScale{-7.77e-5f, false},
                                         MatrixScale{0.3333333f, true}, MatrixScale{2.9e37f, true});
  CAPTURE(of_matrix.value, of_matrix.is_divisor);
  Random random(33);
  CodedTensor w(random, kOut, kIn, of_matrix);
  for (std::size_t i = 0; i < kOut; ++i) {
    w.scales()[i] = static_cast<std::uint8_t>(i % 128 == 127 ? 0 : i);
    for (std::size_t j = 0; j < kIn / 2; ++j)
      w.codes()[i * kIn / 2 + j] = static_cast<std::uint8_t>(2 * j | (2 * j + 1) << 4);
  }
  RowBuffer x(kIn, kIn, kIn, DType::kBF16);
  for (std::int64_t i = 0; i < kIn; ++i) x.set(i, i, 1.0f);
  cuda::CudaBackend backend({});
  const RowBuffer y = product(backend, w, kOut, kIn, DType::kNvfp4, x, kIn);
  const RowBuffer values = w.values();
  for (std::int64_t output = 0; output < kOut; ++output)
    for (std::int64_t i = 0; i < kIn; ++i) {
      CAPTURE(output, i);
      REQUIRE(y.get(i, output) == bf16_to_float(float_to_bf16(values.get(output, i))));
    }
}

TEST_CASE("cuda: NVFP4 that is no number is refused by its row, other values are no NVFP4",
          "[simt]") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  cuda::CudaBackend backend({});
  Memory memory(backend);
  Random random(34);
  const PackShape shape{48, 48, 48, DType::kNvfp4};
  void* const packed = memory.zeros(backend.packed_bytes(64, 48, DType::kNvfp4));
  const auto bad_row = [&](const MatrixScale& of_matrix, std::uint8_t scale, std::uint8_t pair) {
    CodedTensor w(random, 64, 48, of_matrix);
    w.scales().assign(w.scales().size(), 1);
    w.scales()[5 * 3 + 2] = scale;
    w.codes()[5 * 24 + 23] = pair;
    return backend.pack(w.rows(0, 64), shape, 0, packed);
  };
  CHECK(bad_row({1.0f, false}, 126, 0x77) == -1);
  CHECK(bad_row({1.0f, false}, 127, 0x00) == 5);
  CHECK(bad_row({1.0f, false}, 255, 0x00) == 5);
  CHECK(bad_row({1.5e35f, false}, 126, 0x70) == 5);  // 6 * 448 of it is too much, 4 * 448 is not
  CHECK(bad_row({1.5e35f, false}, 126, 0x60) == -1);
  for (const MatrixScale& none : {MatrixScale{kInfinity, false}, MatrixScale{-kInfinity, false},
                                  MatrixScale{0.0f, true}, MatrixScale{NAN, false}})
    CHECK(bad_row(none, 1, 0) == 0);
  RowBuffer plain = random_rows(random, 64, 48, 48);
  CHECK_THROWS_WITH(backend.pack({plain.address(0), DType::kF32, 64, 48}, shape, 0, packed),
                    Catch::Contains("expected NVFP4 codes"));
  CpuBackend cpu({1, ""});
  CHECK_THROWS_WITH(cpu.packed_bytes(64, 64, DType::kNvfp4), Catch::Contains("found nvfp4"));
}

// As published: routed experts in NVFP4, shared ones in bfloat16.
TEST_CASE("cuda: experts in NVFP4 have the bytes of those in bfloat16", "[simt][races]") {
  const std::int64_t n_rows = GENERATE(1, 20);  // fewer pairs than routed experts, and more
  constexpr std::int32_t kExpert = 40;
  CodedExperts experts(kExpert, kScales[0], kScales[1]);
  RowBuffer x = bf16_rows(experts.plain.random, n_rows, Experts::kModel);
  in_every_order([&](Backend& backend) {
    CHECK(n_different(experts.coded.run(backend, x), experts.plain.run(backend, x)) == 0);
  });
}

}  // namespace
}  // namespace duplex::simt_tests
