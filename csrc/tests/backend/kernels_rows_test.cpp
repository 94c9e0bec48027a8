// The row operations of kernels_rows.h on every instruction set, against double precision: norms,
// activations, embeddings and the helpers of the experts.
#include <cmath>
#include <numbers>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

constexpr float kEps = 1e-6f;

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2)); }
double silu(double x) { return x / (1 + std::exp(-x)); }

// The relative error of x / rms(x) * weight: a sum of squares whose root halves the error, and six
// more operations.
double norm_error(std::int64_t width) { return (static_cast<double>(width) / 2 + 6) * kUnit; }

double output_error(DType dtype) { return dtype == DType::kF32 ? kUnit : kBf16Unit; }

std::vector<double> normalised(const RowBuffer& x, std::int64_t row, std::int64_t width,
                               const std::vector<float>& weight) {
  double squares = 0;
  for (std::int64_t c = 0; c < width; ++c) squares += double{x.get(row, c)} * x.get(row, c);
  const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + double{kEps});
  std::vector<double> values;
  for (std::int64_t c = 0; c < width; ++c)
    values.push_back(x.get(row, c) * scale * weight[static_cast<std::size_t>(c)]);
  return values;
}

std::vector<float> norm_weight(Random& random, std::int64_t width) {
  std::vector<float> weight = random.normals(width);
  weight.resize(static_cast<std::size_t>(round_up(width, kColumnAlign)), 0.0f);
  return weight;
}

bool padding_is_zero(const RowBuffer& rows, std::int64_t width) {
  for (std::int64_t row = 0; row < rows.n_rows(); ++row)
    for (std::int64_t c = width; c < round_up(width, kColumnAlign); ++c)
      if (rows.get(row, c) != 0) return false;
  return true;
}

TEST_CASE("norm divides by the root of the mean square, and GELU is exact") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t width = GENERATE(1, 7, 16, 40, 257);
  const Activation activation = GENERATE(Activation::kNone, Activation::kGelu);
  CAPTURE(isa, dtype_name(dtype), width, static_cast<int>(activation));
  constexpr std::int32_t kRows = 5;
  CpuBackend backend({1, isa});
  Random random(3);
  RowBuffer x = random_rows(random, kRows, width, round_up(width, kColumnAlign) + 16);
  for (std::int64_t c = 0; c < width; ++c) {
    x.set(1, c, 0.0f);                   // eps alone
    x.set(2, c, x.get(2, c) * 1e-12f);   // below eps
    x.set(3, c, x.get(3, c) * 3000.0f);  // far above
  }
  const std::vector<float> weight = norm_weight(random, width);
  RowBuffer out(kRows, width, round_up(width, kColumnAlign), dtype);
  backend.norm({x.floats(), x.stride(), weight.data(), kEps, width, kRows, activation, out.rows()});

  Deviation deviation;
  for (std::int64_t row = 0; row < kRows; ++row) {
    const std::vector<double> expected = normalised(x, row, width, weight);
    for (std::int64_t c = 0; c < width; ++c) {
      const double v = expected[static_cast<std::size_t>(c)];
      const bool is_gelu = activation == Activation::kGelu;
      // 1.13 is the steepest GELU gets; its own formula takes six operations on numbers below |v|.
      const double error =
          std::abs(v) * (is_gelu ? 1.13 * norm_error(width) + 6 * kUnit : norm_error(width));
      const double y = is_gelu ? gelu(v) : v;
      deviation.add(out.get(row, c), y, error + std::abs(y) * output_error(dtype) + 1e-37);
    }
  }
  CHECK(deviation.worst <= 1);
  CHECK(padding_is_zero(out, width));
}

// exp is good to about one unit in the last place; eight operations surround it.
TEST_CASE("silu_mul is accurate over the whole range") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  CAPTURE(isa, dtype_name(dtype));
  constexpr std::int32_t kWidth = 4096;
  constexpr std::int64_t kUpOffset = kWidth + 32;
  CpuBackend backend({1, isa});
  Random random(4);
  RowBuffer x(2, kUpOffset + kWidth, kUpOffset + kWidth, DType::kF32);
  for (std::int64_t c = 0; c < kWidth; ++c) {
    x.set(0, c, -90.0f + 180.0f * static_cast<float>(c) / kWidth);    // even steps
    x.set(1, c, std::ldexp(random.normal(), random.below(40) - 20));  // every magnitude
    for (std::int64_t row = 0; row < 2; ++row) x.set(row, kUpOffset + c, random.normal());
  }
  x.set(0, 0, 0.0f);
  RowBuffer out(2, kWidth, kWidth, dtype);
  backend.silu_mul({x.floats(), x.stride(), kWidth, kUpOffset, 2, out.rows()});

  Deviation deviation;
  for (std::int64_t row = 0; row < 2; ++row)
    for (std::int64_t c = 0; c < kWidth; ++c) {
      const double gate = x.get(row, c);
      const double up = x.get(row, kUpOffset + c);
      const double expected = silu(gate) * up;
      // Left of -87.3 the exponential stays at its smallest value, about 1.2e-38.
      deviation.add(out.get(row, c), expected,
                    (10 * kUnit + output_error(dtype)) * std::abs(expected) +
                        2e-38 * std::abs(gate * up) + 1e-37);
    }
  CHECK(deviation.worst <= 1);
  CHECK(out.get(0, 0) == 0.0f);
}

TEST_CASE("embed_text normalises rows of the table") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t width = GENERATE(16, 40);
  CAPTURE(isa, dtype_name(dtype), width);
  CpuBackend backend({1, isa});
  Random random(5);
  const std::int64_t padded = round_up(width, kColumnAlign);
  RowBuffer table = random_rows(random, 11, width, padded, dtype);
  const std::vector<float> weight = norm_weight(random, width);
  const std::vector<std::int32_t> ids = {10, 0, 3, 3, 7};
  RowBuffer out(5, width, padded + 16, DType::kF32);
  backend.embed_text({ids.data(), table.address(0), dtype, weight.data(), kEps, width, 5,
                      out.floats(), out.stride()});
  Deviation deviation;
  for (std::int64_t row = 0; row < 5; ++row) {
    const std::vector<double> expected =
        normalised(table, ids[static_cast<std::size_t>(row)], width, weight);
    for (std::int64_t c = 0; c < width; ++c) {
      const double v = expected[static_cast<std::size_t>(c)];
      deviation.add(out.get(row, c), v, std::abs(v) * norm_error(width));
    }
  }
  CHECK(deviation.worst <= 1);
  CHECK(padding_is_zero(out, width));
}

TEST_CASE("embed_audio normalises the sum of one table row per mel") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  CAPTURE(isa, dtype_name(dtype));
  constexpr std::int32_t kMels = 9, kLevels = 4, kWidth = 24, kRows = 6;
  CpuBackend backend({1, isa});
  Random random(6);
  RowBuffer table = random_rows(random, kMels * kLevels, kWidth, 32, dtype);
  const std::vector<float> weight = norm_weight(random, kWidth);
  std::vector<std::uint8_t> bins;
  for (int i = 0; i < kRows * kMels; ++i)
    bins.push_back(static_cast<std::uint8_t>(random.below(kLevels)));
  RowBuffer out(kRows, kWidth, 32, DType::kF32);
  backend.embed_audio({bins.data(), kMels, kLevels, table.address(0), dtype, weight.data(), kEps,
                       kWidth, kRows, out.floats(), out.stride()});

  RowBuffer sums(1, kWidth, 32, DType::kF32);
  Deviation deviation;
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t c = 0; c < kWidth; ++c) {
      float sum = 0;
      for (std::int64_t mel = 0; mel < kMels; ++mel)
        sum += table.get(mel * kLevels + bins[static_cast<std::size_t>(row * kMels + mel)], c);
      sums.set(0, c, sum);  // the same additions in the same order
    }
    const std::vector<double> expected = normalised(sums, 0, kWidth, weight);
    for (std::int64_t c = 0; c < kWidth; ++c) {
      const double v = expected[static_cast<std::size_t>(c)];
      deviation.add(out.get(row, c), v, std::abs(v) * norm_error(kWidth));
    }
  }
  CHECK(deviation.worst <= 1);
  CHECK(padding_is_zero(out, kWidth));
}

TEST_CASE("to_float is exact and add_scaled rounds at most twice") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  CAPTURE(isa, dtype_name(dtype));
  const CpuKernels& kernels = choose_kernels(isa);
  Random random(7);
  RowBuffer x = random_rows(random, 1, 48, 48, dtype);
  std::vector<float> converted(48, kNan);
  kernels.to_float(x.address(0), dtype, 48, converted.data());
  for (std::int64_t c = 0; c < 48; ++c)
    CHECK(converted[static_cast<std::size_t>(c)] == x.get(0, c));

  const std::vector<float> before = random.normals(48);
  std::vector<float> y = before;
  kernels.add_scaled(y.data(), converted.data(), 0.37f, 48);
  Deviation deviation;
  for (std::size_t i = 0; i < 48; ++i) {
    const double term = 0.37f * double{converted[i]};
    deviation.add(y[i], before[i] + term,
                  2 * kUnit * (std::abs(term) + std::abs(double{before[i]})));
  }
  CHECK(deviation.worst <= 1);
}

TEST_CASE("tau grows with the logarithm of the position, from the floor on") {
  CHECK(log_scaling_tau(1000, 0, 0.5f) == 1.0f);  // off
  CHECK(log_scaling_tau(0, 8, 0.5f) == 1.0f);
  CHECK(log_scaling_tau(7, 8, 0.5f) == 1.0f);
  CHECK(log_scaling_tau(8, 8, 0.5f) == Approx(1 + 0.5 * std::log(9.0 / 8)));
  CHECK(log_scaling_tau(799, 8, 0.5f) == Approx(1 + 0.5 * std::log(100.0)));
}

}  // namespace
}  // namespace duplex::backend_tests
