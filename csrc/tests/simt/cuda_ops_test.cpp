// The CUDA backend's operations on rows, and its matrix products, against the CPU backend: the same
// bytes in float32, derived bounds in bfloat16, and each row's bytes whatever rows are beside it.
#include <cmath>

#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

constexpr float kEps = 1e-6f;

std::vector<float> norm_weight(Random& random, std::int64_t width) {
  std::vector<float> weight = random.normals(width);
  weight.resize(static_cast<std::size_t>(round_up(width, kColumnAlign)), 0.0f);
  return weight;
}

// Rows from `begin` on, as a buffer of their own.
RowBuffer slice(const RowBuffer& x, std::int64_t begin, std::int64_t n_rows, DType dtype) {
  RowBuffer rows(n_rows, 0, x.stride(), dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < x.stride(); ++c) rows.set(row, c, x.get(begin + row, c));
  return rows;
}

// ---- operations on rows

TEST_CASE("cuda: embed_text", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t width = GENERATE(16, 40, 300);
  Random random(5);
  RowBuffer table = random_rows(random, 11, width, round_up(width, kColumnAlign), dtype);
  const std::vector<float> weight = norm_weight(random, width);
  const std::vector<std::int32_t> ids = {10, 0, 3, 3, 7};
  check_same_bytes([&](Backend& backend) {
    Memory memory(backend);
    RowBuffer out(5, 0, round_up(width, kColumnAlign) + 16, DType::kF32);
    float* const there = memory.put_floats(out);
    backend.embed_text({ids.data(), memory.put(table).data, dtype, memory.put(weight), kEps, width,
                        5, there, out.stride()});
    memory.get(out, there);
    return out;
  });
}

TEST_CASE("cuda: embed_audio", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  constexpr std::int32_t kMels = 9, kLevels = 4, kWidth = 24, kRows = 6;
  Random random(6);
  RowBuffer table = random_rows(random, kMels * kLevels, kWidth, 32, dtype);
  const std::vector<float> weight = norm_weight(random, kWidth);
  std::vector<std::uint8_t> bins;
  for (int i = 0; i < kRows * kMels; ++i)
    bins.push_back(static_cast<std::uint8_t>(random.below(kLevels)));
  check_same_bytes([&](Backend& backend) {
    Memory memory(backend);
    RowBuffer out(kRows, 0, 32, DType::kF32);
    float* const there = memory.put_floats(out);
    backend.embed_audio({bins.data(), kMels, kLevels, memory.put(table).data, dtype,
                         memory.put(weight), kEps, kWidth, kRows, there, out.stride()});
    memory.get(out, there);
    return out;
  });
}

RowBuffer run_norm(Backend& backend, RowBuffer& x, const std::vector<float>& weight,
                   std::int32_t width, Activation activation, DType dtype) {
  Memory memory(backend);
  RowBuffer out(x.n_rows(), 0, round_up(width, kColumnAlign) + 16, dtype);
  const Rows there = memory.put(out);
  backend.norm({memory.put_floats(x), x.stride(), memory.put(weight), kEps, width,
                static_cast<std::int32_t>(x.n_rows()), activation, there});
  memory.get(out, there.data);
  return out;
}

TEST_CASE("cuda: norm", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t width = GENERATE(1, 7, 16, 40, 257, 520);
  CAPTURE(dtype_name(dtype), width);
  constexpr std::int32_t kRows = 20;
  Random random(3);
  RowBuffer x = random_rows(random, kRows, width, round_up(width, kColumnAlign) + 16);
  for (std::int64_t c = 0; c < width; ++c) {
    x.set(1, c, 0.0f);                   // eps alone
    x.set(2, c, x.get(2, c) * 1e-12f);   // below eps
    x.set(3, c, x.get(3, c) * 3000.0f);  // far above
  }
  const std::vector<float> weight = norm_weight(random, width);
  check_same_bytes([&](Backend& backend) {
    return run_norm(backend, x, weight, width, Activation::kNone, dtype);
  });
  // GELU calls erf, which two libraries may round to neighbours: by up to 2 units in the last place
  // of 1 each, times half the input; three more roundings of the result.
  CpuBackend cpu({1, ""});
  const RowBuffer input = run_norm(cpu, x, weight, width, Activation::kNone, DType::kF32);
  const RowBuffer expected = run_norm(cpu, x, weight, width, Activation::kGelu, DType::kF32);
  in_every_order([&](Backend& backend) {
    const RowBuffer out = run_norm(backend, x, weight, width, Activation::kGelu, dtype);
    Deviation deviation;
    for (std::int64_t row = 0; row < kRows; ++row)
      for (std::int64_t c = 0; c < round_up(width, kColumnAlign); ++c) {
        const double y = expected.get(row, c);
        const double rounding = 3 * kUnit + (dtype == DType::kF32 ? kUnit : kBf16Unit);
        deviation.add(out.get(row, c), y,
                      4 * kUnit * std::abs(input.get(row, c)) + rounding * std::abs(y) + 1e-37);
      }
    CHECK(deviation.worst <= 1);
    std::int64_t n_other = 0;
    for (std::int64_t row = 0; row < kRows; ++row) {
      RowBuffer alone = slice(x, row, 1, DType::kF32);
      n_other +=
          n_different(run_norm(backend, alone, weight, width, Activation::kGelu, dtype), out, row);
    }
    CHECK(n_other == 0);
  });
}

TEST_CASE("cuda: silu_mul", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  constexpr std::int32_t kWidth = 1040;
  constexpr std::int64_t kUpOffset = kWidth + 32;
  Random random(4);
  RowBuffer x(2, kUpOffset + kWidth, kUpOffset + kWidth, DType::kF32);
  for (std::int64_t c = 0; c < kWidth; ++c) {
    x.set(0, c, -90.0f + 180.0f * static_cast<float>(c) / kWidth);    // even steps
    x.set(1, c, std::ldexp(random.normal(), random.below(40) - 20));  // every magnitude
    for (std::int64_t row = 0; row < 2; ++row) x.set(row, kUpOffset + c, random.normal());
  }
  x.set(0, 0, 0.0f);
  x.set(0, 1, -0.0f);
  // bfloat16 has the range of float32, but the CPU's conversion takes its smallest numbers for
  // zero.
  for (std::int64_t c = 0; c < 40; ++c) x.set(0, kUpOffset + c, 3.0f);
  check_same_bytes([&](Backend& backend) {
    Memory memory(backend);
    RowBuffer out(2, 0, kWidth + 16, dtype);
    const Rows there = memory.put(out);
    backend.silu_mul({memory.put_floats(x), x.stride(), kWidth, kUpOffset, 2, there});
    memory.get(out, there.data);
    return out;
  });
}

TEST_CASE("cuda: fold", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  constexpr std::int32_t kPatches = 3, kT = 4, kH = 6, kW = 9, kC = 5, kTFold = 2, kHwFold = 3;
  constexpr std::int64_t kCellStride = 16;
  constexpr std::int64_t kRows = kPatches * (kT / kTFold) * (kH / kHwFold) * (kW / kHwFold);
  const std::int64_t stride = GENERATE(90, 96, 128);  // the width, padded, and more
  Random random(19);
  RowBuffer cells = random_rows(random, kPatches * kT * kH * kW, kC, kCellStride);
  check_same_bytes([&](Backend& backend) {
    Memory memory(backend);
    RowBuffer out(kRows, 0, stride, dtype);
    const Rows there = memory.put(out);
    backend.fold({.x = memory.put_floats(cells),
                  .x_stride = kCellStride,
                  .n_patches = kPatches,
                  .t = kT,
                  .h = kH,
                  .w = kW,
                  .c = kC,
                  .t_fold = kTFold,
                  .hw_fold = kHwFold,
                  .out = there});
    memory.get(out, there.data);
    return out;
  });
}

// ---- matrix products

struct Matrix {
  Matrix(Random& random, std::int32_t inputs, std::int32_t outputs, DType type)
      : n_in(inputs),
        n_out(outputs),
        dtype(type),
        w(random_rows(random, outputs, inputs, inputs + 3, type)) {}

  std::int64_t padded() const { return round_up(n_in, kColumnAlign); }
  // Rows of x (n_rows, padded) times the matrix, in `as` of the backend.
  RowBuffer run(Backend& backend, RowBuffer& x, float divisor, DType as) {
    Memory memory(backend);
    const auto n_rows = static_cast<std::int32_t>(x.n_rows());
    const PackedMatrix packed =
        memory.pack(w, {n_in, n_in, static_cast<std::int32_t>(padded()), as}, n_out);
    RowBuffer y(n_rows, 0, round_up(n_out, kPanelOutputs) + 16, DType::kF32);
    float* const there = memory.put_floats(y);
    RowBuffer rows = slice(x, 0, n_rows, as);
    backend.linear({packed, memory.put(rows), n_rows, there, y.stride(), divisor});
    memory.get(y, there);
    return y;
  }

  std::int32_t n_in;
  std::int32_t n_out;
  DType dtype;
  RowBuffer w;
};

RowBuffer magnitudes(RowBuffer x) {
  for (std::int64_t row = 0; row < x.n_rows(); ++row)
    for (std::int64_t c = 0; c < x.stride(); ++c) x.set(row, c, std::abs(x.get(row, c)));
  return x;
}

constexpr std::int32_t kBatches[] = {1, 3, 8, 9, 20, 28, 33, 70};

TEST_CASE("cuda: linear in float32", "[simt][races]") {
  const std::int32_t n_in = GENERATE(16, 40, 416);
  const std::int32_t n_out = GENERATE(64, 70);
  const float divisor = GENERATE(1.0f, 3.5f);
  CAPTURE(n_in, n_out, divisor);
  if (!has_fused_cpu()) return;
  Random random(1);
  Matrix matrix(random, n_in, n_out, DType::kF32);
  RowBuffer x = random_rows(random, 70, n_in, matrix.padded() + 16);
  CpuBackend cpu({1, ""});
  const RowBuffer expected = matrix.run(cpu, x, divisor, DType::kF32);
  in_every_order([&](Backend& backend) {
    for (const std::int32_t n_rows : kBatches) {
      RowBuffer some = slice(x, 0, n_rows, DType::kF32);
      CHECK(n_different(matrix.run(backend, some, divisor, DType::kF32), expected) == 0);
    }
  });
}

// Products of bfloat16 numbers are exact in float32; each of the n sums is off by a unit in the
// last place of what has been added up by then (tensor cores cut off), on the CPU by half of one.
TEST_CASE("cuda: linear in bfloat16, with the same bytes in any company", "[simt]") {
  const std::int32_t n_in = GENERATE(16, 40, 1072);  // below, not a multiple of, beyond one round
  const std::int32_t n_out = n_in == 1072 ? 64 : GENERATE(64, 70);
  const float divisor = GENERATE(1.0f, 3.5f);
  CAPTURE(n_in, n_out, divisor);
  Random random(1);
  Matrix matrix(random, n_in, n_out, DType::kBF16);
  RowBuffer x = random_rows(random, 70, n_in, matrix.padded() + 16, DType::kBF16);
  CpuBackend cpu({1, ""});
  const RowBuffer expected = matrix.run(cpu, x, divisor, DType::kF32);
  Matrix absolute = matrix;
  absolute.w = magnitudes(matrix.w);
  RowBuffer absolute_x = magnitudes(x);
  const RowBuffer size = absolute.run(cpu, absolute_x, divisor, DType::kF32);
  RowBuffer first(0, 0, 0, DType::kF32);
  in_every_order([&](Backend& backend) {
    const RowBuffer together = matrix.run(backend, x, divisor, DType::kBF16);
    if (first.n_rows() == 0) first = together;
    CHECK(n_different(together, first) == 0);
    Deviation deviation;
    for (std::int64_t row = 0; row < 70; ++row)
      for (std::int64_t c = 0; c < round_up(n_out, kPanelOutputs); ++c)
        deviation.add(
            together.get(row, c), expected.get(row, c),
            static_cast<double>(3 * matrix.padded() + 4) * kUnit * size.get(row, c) + 1e-38);
    CHECK(deviation.worst <= 1);
    for (const std::int32_t n_rows : kBatches) {
      RowBuffer some = slice(x, 70 - n_rows, n_rows, DType::kBF16);
      CHECK(n_different(matrix.run(backend, some, divisor, DType::kBF16), together, 70 - n_rows) ==
            0);
    }
    for (std::int64_t row = 0; row < 20; row += n_in > 1000 ? 19 : 1) {
      RowBuffer alone = slice(x, row, 1, DType::kBF16);
      CHECK(n_different(matrix.run(backend, alone, divisor, DType::kBF16), together, row) == 0);
    }
  });
}

// Many rows of many outputs go to another kernel, which must sum as the one for few rows does: in
// squares of 64, and of 128 where there are many. Nine steps of the reduction and a tail; an odd
// half square.
TEST_CASE("cuda: linear of many rows, with the bytes of few", "[simt]") {
  const auto [n_in, n_out, n_rows] = GENERATE(table<std::int32_t, std::int32_t, std::int32_t>(
      {{304, 200, 150}, {304, 8390, 70}, {48, 8448, 257}}));
  const float divisor = n_rows == 70 ? 3.5f : 1.0f;
  CAPTURE(n_in, n_out, n_rows);
  Random random(2);
  Matrix matrix(random, n_in, n_out, DType::kBF16);
  RowBuffer x = random_rows(random, n_rows, n_in, matrix.padded() + 16, DType::kBF16);
  const auto check = [&](Backend& backend) {
    const RowBuffer together = matrix.run(backend, x, divisor, DType::kBF16);
    for (const std::int32_t first : {0, 63, n_rows - 2}) {
      RowBuffer few = slice(x, first, 2, DType::kBF16);
      CHECK(n_different(matrix.run(backend, few, divisor, DType::kBF16), together, first) == 0);
    }
  };
  if (n_rows < 257) {
    in_every_order(check);
  } else {  // many thread blocks
    cuda::CudaBackend backend({});
    check(backend);
  }
}

// Columns in groups, rows of two sources: as the model packs heads, and experts' gates and ups.
TEST_CASE("cuda: pack places groups of columns, and outputs behind others", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  constexpr std::int32_t kGroups = 3, kGroup = 5, kIn = kGroups * kGroup, kPadded = kGroups * 16;
  constexpr std::int32_t kFirst = 37, kSecond = 44, kOut = kFirst + kSecond;
  Random random(8);
  RowBuffer sources = random_rows(random, kOut, kIn, kIn + 2, GENERATE(DType::kF32, DType::kBF16));
  RowBuffer x(1, kPadded, kPadded, dtype);
  const auto run = [&](Backend& backend) {
    Memory memory(backend);
    const auto packed = backend.allocate(backend.packed_bytes(kOut, kPadded, dtype));
    const DType source = sources.rows().dtype;
    const PackShape shape{kIn, kGroup, 16, dtype};
    backend.pack({sources.address(0), source, kFirst, sources.stride()}, shape, 0, packed->data());
    backend.pack({sources.address(kFirst), source, kSecond, sources.stride()}, shape, kFirst,
                 packed->data());
    RowBuffer y(1, 0, 128, DType::kF32);
    float* const there = memory.put_floats(y);
    backend.linear({{packed->data(), kOut, kPadded, dtype}, memory.put(x), 1, there, 128, 1.0f});
    memory.get(y, there);
    return y;
  };
  for (std::int64_t c = 0; c < kPadded; c += 7) {  // one column at a time: exact sums
    RowBuffer none(1, kPadded, kPadded, dtype);
    x = none;
    x.set(0, c, 2.0f);
    check_same_bytes(run);
  }
  sources.set(50, 3, INFINITY);
  in_every_order([&](Backend& backend) {
    const auto packed = backend.allocate(backend.packed_bytes(kOut, kPadded, dtype));
    CHECK(backend.pack({sources.address(kFirst), sources.rows().dtype, kSecond, sources.stride()},
                       {kIn, kGroup, 16, dtype}, kFirst, packed->data()) == 50 - kFirst);
  });
}

}  // namespace
}  // namespace duplex::simt_tests
