// The CUDA backend's products with weights in codes, for any number of rows and matrices of any
// size: int8 and int4 have the CPU backend's bytes, MXFP8 those of bfloat16 weights. NVFP4 is in
// cuda_nvfp4_test.cpp.
#include <algorithm>
#include <cmath>

#include "tests/simt/experts.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

RowBuffer slice(const RowBuffer& x, std::int64_t begin, std::int64_t n_rows) {
  RowBuffer rows(n_rows, 0, x.stride(), const_cast<RowBuffer&>(x).rows().dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < x.stride(); ++c) rows.set(row, c, x.get(begin + row, c));
  return rows;
}

// Weights and rows of every kind: groups of zeros, tiny and huge ones, numbers half way between.
RowBuffer varied_rows(Random& random, std::int64_t n_rows, std::int64_t width, std::int64_t stride,
                      DType dtype) {
  RowBuffer rows = random_rows(random, n_rows, width, stride, dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < width; ++c) {
      const std::int64_t kind = (row + c / 32) % 7;
      if (kind == 0) rows.set(row, c, 0.0f);
      if (kind == 1) rows.set(row, c, std::ldexp(rows.get(row, c), random.below(30) - 15));
      if (kind == 2) rows.set(row, c, static_cast<float>(random.below(255) - 127) * 0.5f);
    }
  return rows;
}

struct Case {
  Case(std::int32_t inputs, std::int32_t outputs, DType type, DType of_rows, DType source)
      : n_in(inputs),
        n_out(outputs),
        format(type),
        random(23),
        w(varied_rows(random, outputs, inputs, inputs + 3, source)),
        x(varied_rows(random, 70, inputs, round_up(inputs, kColumnAlign) + 16, of_rows)) {}

  // The product of n rows of x from `begin` on.
  RowBuffer run(Backend& backend, std::int64_t begin, std::int32_t n_rows, float divisor) {
    Memory memory(backend);
    const auto padded = static_cast<std::int32_t>(round_up(n_in, kColumnAlign));
    const PackedMatrix packed = memory.pack(w, {n_in, n_in, padded, format}, n_out);
    RowBuffer y(n_rows, 0, round_up(n_out, kPanelOutputs) + 16, DType::kF32);
    float* const there = memory.put_floats(y);
    RowBuffer rows = slice(x, begin, n_rows);
    backend.linear({packed, memory.put(rows), n_rows, there, y.stride(), divisor});
    memory.get(y, there);
    return y;
  }

  std::int32_t n_in, n_out;
  DType format;
  Random random;
  RowBuffer w, x;
};

TEST_CASE("cuda: quantised linear has the CPU's bytes, whatever the sizes and types", "[simt]") {
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  const DType of_rows = GENERATE(DType::kF32, DType::kBF16);
  // Part of a group, of a chunk; several rounds of the warps, the last not for all of them.
  const std::int32_t n_in = GENERATE(16, 40, 336, 2100);
  const std::int32_t n_out = n_in == 40 ? 70 : 64;
  const float divisor = n_in == 40 ? 3.5f : 1.0f;
  CAPTURE(dtype_name(format), dtype_name(of_rows), n_in);
  if (!has_fused_cpu()) return;
  Case given(n_in, n_out, format, of_rows, of_rows);
  CpuBackend cpu({1, ""});
  const RowBuffer expected = given.run(cpu, 0, 70, divisor);
  in_every_order([&](Backend& backend) {
    for (const std::int32_t n_rows : {1, 20, 70})
      CHECK(n_different(given.run(backend, 70 - n_rows, n_rows, divisor), expected, 70 - n_rows) ==
            0);
  });
}

TEST_CASE("cuda: quantised linear has the CPU's bytes for every number of rows", "[simt][races]") {
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  if (!has_fused_cpu()) return;
  Case given(208, 64, format, DType::kF32, DType::kBF16);
  CpuBackend cpu({1, ""});
  const RowBuffer expected = given.run(cpu, 0, 70, 1.0f);
  const Arrange arrange(simt::Order::kRandom);
  cuda::CudaBackend backend({});
  for (std::int32_t n_rows = 1; n_rows <= 65; ++n_rows) {
    CAPTURE(n_rows);
    CHECK(n_different(given.run(backend, 0, n_rows, 1.0f), expected) == 0);
  }
}

// Columns in groups, two sources behind each other: as the model packs heads, gates and ups.
TEST_CASE("cuda: pack quantises groups of columns, and outputs behind others", "[simt][races]") {
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  constexpr std::int32_t kGroups = 9, kGroup = 13, kIn = kGroups * kGroup, kPadded = kGroups * 16;
  constexpr std::int32_t kFirst = 37, kSecond = 44, kOut = kFirst + kSecond;
  Random random(8);
  RowBuffer sources = varied_rows(random, kOut, kIn, kIn + 2, GENERATE(DType::kF32, DType::kBF16));
  RowBuffer x = random_rows(random, 3, kPadded, kPadded);
  check_same_bytes([&](Backend& backend) {
    Memory memory(backend);
    const auto packed = backend.allocate(backend.packed_bytes(kOut, kPadded, format));
    const DType source = sources.rows().dtype;
    const PackShape shape{kIn, kGroup, 16, format};
    backend.pack({sources.address(0), source, kFirst, sources.stride()}, shape, 0, packed->data());
    backend.pack({sources.address(kFirst), source, kSecond, sources.stride()}, shape, kFirst,
                 packed->data());
    RowBuffer y(3, 0, 128, DType::kF32);
    float* const there = memory.put_floats(y);
    backend.linear({{packed->data(), kOut, kPadded, format}, memory.put(x), 3, there, 128, 1.0f});
    memory.get(y, there);
    return y;
  });
}

// ---- MXFP8

// The number of MXFP8 next to each, by trying all codes; ties go to the even one.
RowBuffer in_mxfp8(const RowBuffer& w, std::int64_t n_in) {
  RowBuffer out(w.n_rows(), n_in, w.stride(), DType::kF32);
  for (std::int64_t row = 0; row < w.n_rows(); ++row)
    for (std::int64_t begin = 0; begin < n_in; begin += 32) {
      const std::int64_t end = std::min(begin + 32, n_in);
      float largest = 0.0f;
      for (std::int64_t c = begin; c < end; ++c)
        largest = std::max(largest, std::abs(w.get(row, c)));
      int exponent = -127;
      while (448.0 * std::ldexp(1.0, exponent) < double{largest}) ++exponent;
      for (std::int64_t c = begin; c < end; ++c) {
        const double size = std::abs(double{w.get(row, c)});
        double nearest = 0.0;
        int nearest_code = 0;
        for (int code = 0; code < 127; ++code) {
          const double number = code < 8 ? std::ldexp(code, exponent - 9)
                                         : std::ldexp(8 + code % 8, code / 8 - 10 + exponent);
          const double off = std::abs(number - size), best = std::abs(nearest - size);
          if (off > best || (off == best && nearest_code % 2 == 0)) continue;
          nearest = number;
          nearest_code = code;
        }
        out.set(row, c, std::copysign(static_cast<float>(nearest), w.get(row, c)));
      }
    }
  return out;
}

TEST_CASE("cuda: MXFP8 has the bytes of bfloat16 weights of the same values", "[simt][races]") {
  const std::int32_t n_in = GENERATE(16, 40, 336, 1104);
  const std::int32_t n_out = n_in == 40 ? 70 : 64;
  CAPTURE(n_in);
  Case coded(n_in, n_out, DType::kMxfp8, DType::kBF16, DType::kF32);
  Case plain = coded;
  plain.format = DType::kBF16;
  plain.w = in_mxfp8(coded.w, n_in);
  const float divisor = n_in == 40 ? 3.5f : 1.0f;
  in_every_order([&](Backend& backend) {
    for (const std::int32_t n_rows : {1, 9, 20, 28, 70}) {
      CAPTURE(n_rows);
      const RowBuffer expected = plain.run(backend, 0, n_rows, divisor);
      CHECK(n_different(coded.run(backend, 0, n_rows, divisor), expected) == 0);
    }
  });
  Case again = coded;  // numbers of the format keep their values
  again.w = plain.w;
  cuda::CudaBackend backend({});
  CHECK(n_different(again.run(backend, 0, 3, 1.0f), plain.run(backend, 0, 3, 1.0f)) == 0);
}

TEST_CASE("MXFP8 is refused by the CPU, and for float32 rows", "[simt]") {
  CpuBackend cpu({1, ""});
  CHECK_THROWS_AS(cpu.packed_bytes(64, 64, DType::kMxfp8), InvalidArgument);
  cuda::CudaBackend backend({});
  Case given(32, 64, DType::kMxfp8, DType::kF32, DType::kF32);
  CHECK_THROWS_AS(given.run(backend, 0, 1, 1.0f), InvalidArgument);
}

// ---- experts

// Weights of experts come from the C library's exp, which may differ by a unit. Here they are the
// same on both: one expert a row, whatever its logit; or all logits alike.
TEST_CASE("cuda: experts of quantised weights have the CPU's bytes", "[simt][races]") {
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  const bool is_alone = GENERATE(true, false);
  const std::int64_t n_rows = GENERATE(1, 70);  // fewer pairs than experts, and more
  const DType of_rows = is_alone ? DType::kBF16 : DType::kF32;
  CAPTURE(dtype_name(format), is_alone, n_rows);
  Experts experts(is_alone ? MoeConfig{5, 0, 1, 40, 2.5f} : MoeConfig{4, 1, 2, 24, 1.0f}, format);
  if (is_alone) experts.router = random_rows(experts.random, 5, Experts::kModel, Experts::kModel);
  RowBuffer x =
      varied_rows(experts.random, n_rows, Experts::kModel, Experts::kModelPadded, of_rows);
  check_same_bytes([&](Backend& backend) { return experts.run(backend, x); });
}

TEST_CASE("cuda: experts in MXFP8 have the bytes of those in bfloat16", "[simt][races]") {
  const std::int64_t n_rows = GENERATE(1, 20);
  Experts coded({4, 1, 2, 40, 1.0f}, DType::kMxfp8);
  coded.router = random_rows(coded.random, 5, Experts::kModel, Experts::kModel);
  coded.up = in_mxfp8(coded.up, Experts::kModel);
  coded.down = in_mxfp8(coded.down, 40);
  RowBuffer x =
      random_rows(coded.random, n_rows, Experts::kModel, Experts::kModelPadded, DType::kBF16);
  Experts plain = coded;
  plain.format = DType::kBF16;
  in_every_order([&](Backend& backend) {
    CHECK(n_different(coded.run(backend, x), plain.run(backend, x)) == 0);
  });
}

}  // namespace
}  // namespace duplex::simt_tests
