// The mixture of experts (cpu_moe.cpp): which experts a row takes, how they are weighed, the sum
// against double precision, and the same bytes alone and among other rows.
#include <cmath>

#include "tests/backend/moe_definition.h"

namespace duplex::backend_tests {
namespace {

double worst_deviation(const Experts& experts, const RowBuffer& x, const RowBuffer& y) {
  const std::vector<std::vector<Value>> expected = expected_rows(experts, x);
  Deviation deviation;
  for (std::int64_t row = 0; row < x.n_rows(); ++row)
    for (std::int64_t c = 0; c < y.stride(); ++c) {
      const Value value = c < experts.model
                              ? expected[static_cast<std::size_t>(row)][static_cast<std::size_t>(c)]
                              : Value{};
      deviation.add(y.get(row, c), value.value, value.error + 1e-38);
    }
  return deviation.worst;
}

TEST_CASE("experts are weighed and added as defined, in any company") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  // Experts, shared, top k, width, scale; the first gives an expert more rows than one call takes.
  const MoeConfig config = GENERATE(MoeConfig{3, 1, 2, 20, 2.5f}, MoeConfig{8, 2, 3, 16, 1.0f},
                                    MoeConfig{1, 3, 1, 5, 0.5f}, MoeConfig{70, 1, 4, 33, 1.0f});
  CAPTURE(isa, dtype_name(dtype), config.n_experts);
  constexpr std::int64_t kRows = 110;
  CpuBackend backend({1, isa});
  CpuBackend threaded({3, isa});
  Random random(17);
  Experts experts(random, config, dtype);
  RowBuffer x = random_rows(random, kRows, experts.model, experts.model_padded, dtype);
  const RowBuffer together = experts.run(backend, x);
  CHECK(worst_deviation(experts, x, together) <= 1);

  std::int64_t n_other = n_different(experts.run(threaded, x), together);
  for (std::int64_t row = 0; row < kRows; row += 9) {
    RowBuffer alone = slice(x, row, 1, dtype);
    n_other += n_different(experts.run(backend, alone), together, row);
  }
  RowBuffer some = slice(x, 31, 7, dtype);
  n_other += n_different(experts.run(backend, some), together, 31);
  CHECK(n_other == 0);
}

// The weights of experts whose logits are given.
std::vector<float> answers(const std::vector<float>& logits, const std::vector<float>& bias,
                           std::int32_t top_k) {
  CpuBackend backend({1, ""});
  Experts experts = answering(logits, bias, top_k, DType::kF32);
  RowBuffer x(1, experts.model, experts.model_padded, DType::kF32);
  x.set(0, 0, 1.0f);
  const RowBuffer y = experts.run(backend, x);
  std::vector<float> weights;
  for (std::int32_t e = 0; e < experts.n_all; ++e) weights.push_back(y.get(0, e));
  return weights;
}

std::vector<std::int32_t> chosen(const std::vector<float>& weights, std::size_t n_experts) {
  std::vector<std::int32_t> experts;
  for (std::size_t e = 0; e < n_experts; ++e)
    if (weights[e] != 0) experts.push_back(static_cast<std::int32_t>(e));
  return experts;
}

TEST_CASE("the router takes the lower index on a tie") {
  using Ids = std::vector<std::int32_t>;
  const std::vector<float> none(6, 0.0f);
  CHECK(chosen(answers({0, 0, 0, 0, 0, 0, 0}, none, 3), 6) == Ids{0, 1, 2});
  CHECK(chosen(answers({1, 5, 1, 5, 1, 1, 0}, none, 3), 6) == Ids{0, 1, 3});
  CHECK(chosen(answers({-3, -2, -3, -3, -1, -3, 0}, none, 4), 6) == Ids{0, 1, 2, 4});
  // Both sigmoids are 1 in float32.
  CHECK(chosen(answers({0, 0, 0, 30, 0, 40, 0}, none, 1), 6) == Ids{3});
  CHECK(chosen(answers({0, 0, 0, 0, 0, 0, 0}, none, 6), 6) == Ids{0, 1, 2, 3, 4, 5});
}

TEST_CASE("the selection bias chooses and does not weigh") {
  const std::vector<float> logits = {0.5f, 1.0f, 0.25f, 2.0f, -1.0f};  // the last is shared
  const std::vector<float> weights = answers(logits, {0, 0, 3, 2}, 2);
  CHECK(chosen(weights, 4) == std::vector<std::int32_t>{2, 3});
  const double sum = sigmoid(0.25) + sigmoid(2.0) + sigmoid(-1.0);
  CHECK(weights[2] == Approx(sigmoid(0.25) / sum));
  CHECK(weights[3] == Approx(sigmoid(2.0) / sum));
  CHECK(weights[4] == Approx(sigmoid(-1.0) / sum));
}

TEST_CASE("weights are right where sigmoids vanish") {
  const std::vector<float> weights = answers({-200, -201, -400, -200}, {0, 0, 0}, 2);
  CHECK(weights[0] == Approx(1 / (2 + std::exp(-1.0))));
  CHECK(weights[1] == Approx(std::exp(-1.0) / (2 + std::exp(-1.0))));
  CHECK(weights[3] == Approx(weights[0]));
}

}  // namespace
}  // namespace duplex::backend_tests
