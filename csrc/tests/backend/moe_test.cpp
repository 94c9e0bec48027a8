// The mixture of experts (cpu_moe.cpp): which experts a row takes, how they are weighed, the sum
// against double precision, and the same bytes alone and among other rows.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

constexpr std::int32_t kModel = 24, kModelPadded = 32, kOutPadded = 64;

// The experts of one layer as numbers and as the backend wants them.
struct Experts {
  Experts(CpuBackend& owner, const MoeConfig& of, DType type)
      : backend(owner),
        config(of),
        dtype(type),
        n_all(of.n_experts + of.n_shared),
        padded(round_up(of.d_expert, kColumnAlign)),
        router(n_all, kModel, kModel, DType::kF32),
        bias(static_cast<std::size_t>(of.n_experts), 0.0f) {
    for (std::int32_t e = 0; e < n_all; ++e) {
      gate.emplace_back(config.d_expert, kModel, kModel, dtype);
      up.emplace_back(config.d_expert, kModel, kModel, dtype);
      down.emplace_back(kModel, config.d_expert, config.d_expert, dtype);
    }
  }
  void fill(Random& random) {
    const auto set_all = [&random](RowBuffer& rows, float size) {
      for (std::int64_t row = 0; row < rows.n_rows(); ++row)
        for (std::int64_t c = 0; c < rows.stride(); ++c) rows.set(row, c, size * random.normal());
    };
    set_all(router, 0.4f);
    for (float& b : bias) b = 0.2f * random.normal();
    for (std::int32_t e = 0; e < n_all; ++e) {
      set_all(gate[at(e)], 0.4f);
      set_all(up[at(e)], 0.4f);
      set_all(down[at(e)], 0.4f);
    }
  }
  static std::size_t at(std::int32_t e) { return static_cast<std::size_t>(e); }

  // Packs, runs all rows of x and gives back (n_rows, kOutPadded).
  RowBuffer run(RowBuffer& x) {
    const auto n_rows = static_cast<std::int32_t>(x.n_rows());
    const std::size_t up_bytes = backend.packed_bytes(2 * padded, kModelPadded, dtype);
    const std::size_t down_bytes = backend.packed_bytes(kModel, padded, dtype);
    std::vector<std::byte> packed_router(backend.packed_bytes(n_all, kModelPadded, DType::kF32));
    std::vector<std::byte> packed_up(at(n_all) * up_bytes), packed_down(at(n_all) * down_bytes);
    const PackShape from_model{kModel, kModel, kModelPadded, dtype};
    const PackShape from_expert{config.d_expert, config.d_expert, static_cast<std::int32_t>(padded),
                                dtype};
    backend.pack({router.address(0), DType::kF32, n_all, kModel},
                 {kModel, kModel, kModelPadded, DType::kF32}, 0, packed_router.data());
    for (std::int32_t e = 0; e < n_all; ++e) {
      std::byte* const up_of_e = packed_up.data() + at(e) * up_bytes;
      backend.pack({gate[at(e)].address(0), dtype, config.d_expert, kModel}, from_model, 0,
                   up_of_e);
      backend.pack({up[at(e)].address(0), dtype, config.d_expert, kModel}, from_model, padded,
                   up_of_e);
      backend.pack({down[at(e)].address(0), dtype, kModel, config.d_expert}, from_expert, 0,
                   packed_down.data() + at(e) * down_bytes);
    }
    std::vector<std::byte> scratch(backend.moe_scratch_bytes(config, kModel, n_rows));
    RowBuffer y(n_rows, 0, kOutPadded, DType::kF32);
    backend.moe(
        {.config = config,
         .n_rows = n_rows,
         .x = x.rows(),
         .router = {packed_router.data(), n_all, kModelPadded, DType::kF32},
         .selection_bias = bias.data(),
         .global_scale = kGlobalScale,
         .gate_up = {packed_up.data(), static_cast<std::int32_t>(2 * padded), kModelPadded, dtype},
         .down = {packed_down.data(), kModel, static_cast<std::int32_t>(padded), dtype},
         .gate_up_stride_bytes = static_cast<std::int64_t>(up_bytes),
         .down_stride_bytes = static_cast<std::int64_t>(down_bytes),
         .y = y.floats(),
         .y_stride = kOutPadded,
         .scratch = scratch.data()});
    return y;
  }

  static constexpr float kGlobalScale = 1.3f;
  CpuBackend& backend;
  MoeConfig config;
  DType dtype;
  std::int32_t n_all;
  std::int64_t padded;
  RowBuffer router;
  std::vector<float> bias;
  std::vector<RowBuffer> gate, up, down;
};

struct Value {
  double value = 0;
  double size = 0;   // sum of the magnitudes
  double error = 0;  // what float32 may be off by
};

Value dot(const RowBuffer& x, std::int64_t row, const RowBuffer& w, std::int64_t out) {
  Value sum;
  for (std::int64_t k = 0; k < w.stride(); ++k) {
    const double term = double{x.get(row, k)} * w.get(out, k);
    sum.value += term;
    sum.size += std::abs(term);
  }
  sum.error = static_cast<double>(2 * w.stride()) * kUnit * sum.size;
  return sum;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The experts of a row, and their logits.
std::vector<std::int32_t> route(const Experts& experts, const RowBuffer& x, std::int64_t row,
                                std::vector<Value>& logits) {
  const MoeConfig& config = experts.config;
  for (std::int32_t e = 0; e < experts.n_all; ++e) logits.push_back(dot(x, row, experts.router, e));
  std::vector<std::pair<double, std::int32_t>> order;
  for (std::int32_t e = 0; e < config.n_experts; ++e)
    order.emplace_back(-sigmoid(logits[Experts::at(e)].value) - experts.bias[Experts::at(e)], e);
  std::sort(order.begin(), order.end());
  const auto top_k = static_cast<std::size_t>(config.top_k);
  // The comparison would mean nothing where float32 cannot tell the last one in from the next.
  if (config.top_k < config.n_experts) REQUIRE(order[top_k].first - order[top_k - 1].first > 1e-5);
  std::vector<std::int32_t> chosen;
  for (std::size_t i = 0; i < top_k; ++i) chosen.push_back(order[i].second);
  for (std::int32_t s = 0; s < config.n_shared; ++s) chosen.push_back(config.n_experts + s);
  return chosen;
}

// Adds weight * expert(x) to the outputs of a row.
void add_expert(const Experts& experts, std::int32_t e, const RowBuffer& x, std::int64_t row,
                double weight, double weight_error, std::vector<Value>& out) {
  const double unit = experts.dtype == DType::kF32 ? kUnit : kBf16Unit;
  for (std::int64_t j = 0; j < experts.config.d_expert; ++j) {
    const Value gate = dot(x, row, experts.gate[Experts::at(e)], j);
    const Value up = dot(x, row, experts.up[Experts::at(e)], j);
    const double silu = gate.value * sigmoid(gate.value);
    const double active = silu * up.value;
    // SiLU is nowhere steeper than 1.1; its own ten operations as in kernels_rows_test.
    const double error = 1.1 * gate.error * std::abs(up.value) + std::abs(silu) * up.error +
                         std::abs(active) * (10 * kUnit + unit);
    for (std::int64_t c = 0; c < kModel; ++c) {
      const double w = weight * experts.down[Experts::at(e)].get(c, j);
      Value& y = out[static_cast<std::size_t>(c)];
      y.value += w * active;
      y.size += std::abs(w * active);
      y.error += std::abs(w) * (error + std::abs(active) * weight_error);
    }
  }
}

double worst_deviation(const Experts& experts, const RowBuffer& x, const RowBuffer& y) {
  const MoeConfig& config = experts.config;
  Deviation deviation;
  for (std::int64_t row = 0; row < x.n_rows(); ++row) {
    std::vector<Value> logits;
    const std::vector<std::int32_t> chosen = route(experts, x, row, logits);
    double sum = 0, logit_error = 0;
    for (const std::int32_t e : chosen) {
      sum += sigmoid(logits[Experts::at(e)].value);
      logit_error = std::max(logit_error, logits[Experts::at(e)].error);
    }
    std::vector<Value> out(kModel);
    for (const std::int32_t e : chosen)
      add_expert(experts, e, x, row,
                 sigmoid(logits[Experts::at(e)].value) / sum * double{config.route_scale} *
                     double{Experts::kGlobalScale},
                 2 * logit_error + 4 * kUnit, out);
    const double n_terms = 2.0 * (config.d_expert + config.top_k + config.n_shared);
    for (std::int64_t c = 0; c < kModel; ++c) {
      const Value& expected = out[static_cast<std::size_t>(c)];
      deviation.add(y.get(row, c), expected.value,
                    expected.error + n_terms * kUnit * expected.size);
    }
    for (std::int64_t c = kModel; c < kOutPadded; ++c) deviation.add(y.get(row, c), 0, 1e-38);
  }
  return deviation.worst;
}

RowBuffer slice(const RowBuffer& x, std::int64_t begin, std::int64_t n_rows, DType dtype) {
  RowBuffer rows(n_rows, kModel, x.stride(), dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < kModel; ++c) rows.set(row, c, x.get(begin + row, c));
  return rows;
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
  Experts experts(backend, config, dtype);
  experts.fill(random);
  RowBuffer x = random_rows(random, kRows, kModel, kModelPadded, dtype);
  const RowBuffer together = experts.run(x);
  CHECK(worst_deviation(experts, x, together) <= 1);

  std::int64_t n_different = 0;
  const auto compare = [&](const RowBuffer& y, std::int64_t begin) {
    for (std::int64_t row = 0; row < y.n_rows(); ++row)
      n_different += y.same_row(row, together, begin + row, kOutPadded) ? 0 : 1;
  };
  for (std::int64_t row = 0; row < kRows; row += 9) {
    RowBuffer alone = slice(x, row, 1, dtype);
    compare(experts.run(alone), row);
  }
  RowBuffer some = slice(x, 31, 7, dtype);
  compare(experts.run(some), 31);
  Experts same_experts(threaded, config, dtype);
  Random again(17);
  same_experts.fill(again);
  compare(same_experts.run(x), 0);
  CHECK(n_different == 0);
}

// Experts whose logits are given, each of which answers in its own output.
std::vector<float> answers(const std::vector<float>& logits, const std::vector<float>& bias,
                           std::int32_t top_k) {
  CpuBackend backend({1, ""});
  const auto n_experts = static_cast<std::int32_t>(bias.size());
  const auto n_shared = static_cast<std::int32_t>(logits.size()) - n_experts;
  Experts experts(backend, {n_experts, n_shared, top_k, 4, 1.0f}, DType::kF32);
  experts.bias = bias;
  for (std::int32_t e = 0; e < experts.n_all; ++e) {
    experts.router.set(e, 0, logits[Experts::at(e)]);
    experts.gate[Experts::at(e)].set(0, 0, 40.0f);  // silu(40) = 40
    experts.up[Experts::at(e)].set(0, 0, 1.0f);
    experts.down[Experts::at(e)].set(e, 0, 1.0f / (40 * Experts::kGlobalScale));
  }
  RowBuffer x(1, kModel, kModelPadded, DType::kF32);
  x.set(0, 0, 1.0f);
  const RowBuffer y = experts.run(x);
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
