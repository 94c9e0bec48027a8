// The matrix tiles of kernels_gemm.h: a panel gives the dot products of every row, and a row gets
// the same bytes whatever rows are beside it.
#include <cmath>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

// One panel of 64 outputs: weights (n_in, 64) as numbers, and packed.
struct Panel {
  Panel(Random& random, std::int32_t inputs, DType type)
      : n_in(inputs), dtype(type), packed(1, n_in * kPanelOutputs, n_in * kPanelOutputs, dtype) {
    for (std::int64_t k = 0; k < n_in; ++k)
      for (std::int64_t out = 0; out < kPanelOutputs; ++out) {
        const float weight = rounded(random.normal(), dtype);
        weights.push_back(weight);
        packed.set(0,
                   dtype == DType::kF32 ? k * kPanelOutputs + out
                                        : (k / 2 * kPanelOutputs + out) * 2 + k % 2,
                   weight);
      }
  }
  float at(std::int64_t k, std::int64_t out) const {
    return weights[static_cast<std::size_t>(k * kPanelOutputs + out)];
  }

  std::int32_t n_in;
  DType dtype;
  std::vector<float> weights;
  RowBuffer packed;
};

// Rows [begin, begin + n_rows) of x through the panel.
RowBuffer multiply(const CpuKernels& kernels, Panel& panel, RowBuffer& x, std::int64_t begin,
                   std::int32_t n_rows, float divisor) {
  RowBuffer y(n_rows, 0, kPanelOutputs, DType::kF32);
  std::vector<const void*> rows;
  std::vector<float*> outs;
  for (std::int64_t i = 0; i < n_rows; ++i) {
    rows.push_back(x.address(begin + i));
    outs.push_back(static_cast<float*>(y.address(i)));
  }
  kernels.linear_panel({rows.data(), n_rows, panel.packed.address(0), panel.n_in, panel.dtype,
                        outs.data(), divisor});
  return y;
}

// A product and a sum a term, and the division.
double worst_deviation(const Panel& panel, const RowBuffer& x, const RowBuffer& y, float divisor) {
  Deviation deviation;
  for (std::int64_t row = 0; row < y.n_rows(); ++row)
    for (std::int64_t out = 0; out < kPanelOutputs; ++out) {
      double sum = 0;
      double magnitude = 0;
      for (std::int64_t k = 0; k < panel.n_in; ++k) {
        const double term = double{x.get(row, k)} * panel.at(k, out);
        sum += term;
        magnitude += std::abs(term);
      }
      deviation.add(y.get(row, out), sum / divisor,
                    (2 * panel.n_in + 1) * kUnit * magnitude / divisor);
    }
  return deviation.worst;
}

TEST_CASE("a panel holds the dot products of each row, with the same bytes in any company") {
  constexpr std::int32_t kRows = 64;
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t n_in = GENERATE(16, 48, 416);
  const float divisor = GENERATE(1.0f, 3.5f);
  CAPTURE(isa, dtype_name(dtype), n_in, divisor);
  const CpuKernels& kernels = choose_kernels(isa);
  REQUIRE(kernels.name == isa);
  Random random(1);
  Panel panel(random, n_in, dtype);
  RowBuffer x = random_rows(random, kRows, n_in, n_in + 16, dtype);
  const RowBuffer together = multiply(kernels, panel, x, 0, kRows, divisor);
  CHECK(worst_deviation(panel, x, together, divisor) <= 1);

  std::int64_t n_different = 0;
  for (std::int32_t n_rows = 1; n_rows <= 13; ++n_rows)
    for (std::int64_t begin = 0; begin + n_rows <= kRows; begin += n_rows) {
      const RowBuffer y = multiply(kernels, panel, x, begin, n_rows, divisor);
      for (std::int64_t i = 0; i < n_rows; ++i)
        n_different += y.same_row(i, together, begin + i, kPanelOutputs) ? 0 : 1;
    }
  CHECK(n_different == 0);
}

TEST_CASE("the instruction sets agree on sums that are exact") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  Random random(2);
  Panel panel(random, 64, dtype);
  RowBuffer x(5, 64, 64, dtype);
  // Multiples of 1/8 below 8: every partial sum is a float32.
  for (std::int64_t i = 0; i < 64 * kPanelOutputs; ++i) {
    const float weight = static_cast<float>(random.below(128) - 64) / 8;
    panel.packed.set(0, i, weight);
  }
  for (std::int64_t row = 0; row < 5; ++row)
    for (std::int64_t k = 0; k < 64; ++k)
      x.set(row, k, static_cast<float>(random.below(128) - 64) / 8);
  const RowBuffer expected = multiply(portable_kernels(), panel, x, 0, 5, 1.0f);
  for (const std::string& isa : instruction_sets()) {
    const RowBuffer y = multiply(choose_kernels(isa), panel, x, 0, 5, 1.0f);
    for (std::int64_t row = 0; row < 5; ++row) CHECK(y.same_row(row, expected, row, kPanelOutputs));
  }
}

TEST_CASE("an unknown instruction set is refused with the names there are") {
  CHECK_THROWS_AS(choose_kernels("sse9"), InvalidArgument);
  CHECK_THROWS_WITH(choose_kernels("sse9"), Catch::Contains("'portable'"));
  CHECK(std::string(choose_kernels("").name) == instruction_sets().back());
}

}  // namespace
}  // namespace duplex::backend_tests
