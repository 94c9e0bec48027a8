// The CUDA backend's mixture of experts: against the CPU backend in float32, against double
// precision in bfloat16, the choice on a tie, and each row's bytes whatever rows are beside it.
#include <cmath>

#include "tests/backend/moe_definition.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

using backend_tests::at;
using backend_tests::Experts;
using backend_tests::slice;
using backend_tests::Value;

constexpr std::int32_t kRows = 40;

TEST_CASE("cuda: experts are weighed and added as defined, in any company", "[simt]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  // Experts, shared, top k, width, scale. Of the last two with 40 rows there are fewer pairs than
  // experts, and slices of the router, the last one short.
  const auto [config, width] = GENERATE(
      std::pair{MoeConfig{3, 1, 2, 20, 2.5f}, 24}, std::pair{MoeConfig{8, 2, 3, 16, 1.0f}, 24},
      std::pair{MoeConfig{1, 3, 1, 5, 0.5f}, 24}, std::pair{MoeConfig{70, 1, 4, 33, 1.0f}, 24},
      std::pair{MoeConfig{81, 1, 1, 6, 1.0f}, 24}, std::pair{MoeConfig{5, 1, 2, 6, 1.0f}, 300});
  CAPTURE(dtype_name(dtype), config.n_experts, width);
  Random random(17);
  Experts experts(random, config, dtype, width);
  RowBuffer x = random_rows(random, kRows, width, experts.model_padded, dtype);
  const std::vector<std::vector<Value>> expected = backend_tests::expected_rows(experts, x);
  CpuBackend cpu({1, ""});
  const RowBuffer on_cpu = experts.run(cpu, x);
  in_every_order([&](Backend& backend) {
    const RowBuffer together = experts.run(backend, x);
    Deviation from_definition, from_cpu;
    // In float32 the weights alone may differ, by a unit each, and the roundings after them.
    const double n_units = 2.0 * (config.top_k + config.n_shared) + 2;
    for (std::int64_t row = 0; row < kRows; ++row)
      for (std::int64_t c = 0; c < experts.out_padded; ++c) {
        const Value y = c < width
                            ? expected[static_cast<std::size_t>(row)][static_cast<std::size_t>(c)]
                            : Value{};
        from_definition.add(together.get(row, c), y.value, y.error + 1e-38);
        from_cpu.add(together.get(row, c), on_cpu.get(row, c), n_units * kUnit * y.size + 1e-38);
      }
    CHECK(from_definition.worst <= 1);
    if (dtype == DType::kF32 && has_fused_cpu()) CHECK(from_cpu.worst <= 1);
    std::int64_t n_other = 0;
    for (std::int64_t row = 0; row < 20; row += config.n_experts == 3 ? 1 : 19) {
      RowBuffer alone = slice(x, row, 1, dtype);
      n_other += n_different(experts.run(backend, alone), together, row);
    }
    RowBuffer some = slice(x, 13, 20, dtype);
    n_other += n_different(experts.run(backend, some), together, 13);
    CHECK(n_other == 0);
  });
}

TEST_CASE("cuda: experts of more rows than one launch looks through", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  constexpr std::int64_t kMany = 259, kFirst = 250;
  Random random(18);
  Experts experts(random, {3, 1, 1, 4, 1.0f}, dtype);
  RowBuffer x = random_rows(random, kMany, experts.model, experts.model_padded, dtype);
  RowBuffer last = slice(x, kFirst, kMany - kFirst, dtype);
  in_every_order([&](Backend& backend) {
    CHECK(n_different(experts.run(backend, last), experts.run(backend, x), kFirst) == 0);
  });
}

TEST_CASE("cuda: experts of rows that are no numbers leave the others alone", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const MoeConfig config = GENERATE(MoeConfig{4, 1, 3, 5, 1.0f}, MoeConfig{40, 2, 3, 5, 1.0f});
  Random random(19);
  Experts experts(random, config, dtype);
  RowBuffer x = random_rows(random, 5, experts.model, experts.model_padded, dtype);
  const RowBuffer numbers = slice(x, 0, 5, dtype);
  for (std::int64_t c = 0; c < experts.model; ++c) x.set(2, c, NAN);
  in_every_order([&](Backend& backend) {
    RowBuffer without = slice(numbers, 0, 5, dtype);
    const RowBuffer y = experts.run(backend, x), expected = experts.run(backend, without);
    for (std::int64_t row = 0; row < 5; ++row) {
      CAPTURE(row);
      if (row == 2)
        CHECK(std::isnan(y.get(row, 0)));
      else
        CHECK(y.same_row(row, expected, row, experts.out_padded));
    }
  });
}

TEST_CASE("cuda: the router takes the lower index on a tie, and the bias does not weigh",
          "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  struct Case {
    std::vector<float> logits;  // the last is shared
    std::vector<float> bias;
    std::int32_t top_k;
  };
  const Case given = GENERATE(Case{{0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0}, 3},
                              Case{{1, 5, 1, 5, 1, 1, 0}, {0, 0, 0, 0, 0, 0}, 3},
                              Case{{-3, -2, -3, -3, -1, -3, 0}, {0, 0, 0, 0, 0, 0}, 4},
                              Case{{0, 0, 0, 30, 0, 40, 0}, {0, 0, 0, 0, 0, 0}, 1},
                              Case{{0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0}, 6},
                              Case{{0.5f, 1, 0.25f, 2, -1}, {0, 0, 3, 2}, 2},
                              Case{{-200, -201, -400, -200}, {0, 0, 0}, 2});
  Experts experts = backend_tests::answering(given.logits, given.bias, given.top_k, dtype);
  RowBuffer x(1, experts.model, experts.model_padded, dtype);
  x.set(0, 0, 1.0f);
  CpuBackend cpu({1, ""});
  const RowBuffer expected = experts.run(cpu, x);
  in_every_order([&](Backend& backend) {
    const RowBuffer y = experts.run(backend, x);
    for (std::int64_t c = 0; c < experts.out_padded; ++c) {
      CHECK((y.get(0, c) == 0) == (expected.get(0, c) == 0));
      CHECK(y.get(0, c) == Approx(expected.get(0, c)).epsilon(8 * kUnit));
    }
  });
}

}  // namespace
}  // namespace duplex::simt_tests
