// The CUDA backend's mixture of experts: against the CPU backend in float32, against double
// precision in bfloat16, the choice on a tie, and each row's bytes whatever rows are beside it.
#include <algorithm>
#include <cmath>

#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

constexpr std::int32_t kRows = 40;
constexpr float kGlobalScale = 1.3f;

std::size_t at(std::int32_t e) { return static_cast<std::size_t>(e); }

// The experts of one layer as numbers: gates and ups (n_all * d_expert, model), downs
// (n_all * model, d_expert).
struct Experts {
  Experts(Random& random, const MoeConfig& of, DType type, std::int32_t width = 24)
      : config(of),
        dtype(type),
        model(width),
        model_padded(static_cast<std::int32_t>(round_up(width, kColumnAlign))),
        out_padded(round_up(width, kPanelOutputs)),
        n_all(of.n_experts + of.n_shared),
        padded(static_cast<std::int32_t>(round_up(of.d_expert, kColumnAlign))),
        router(scaled(random, n_all, model, DType::kF32)),
        bias(random.normals(of.n_experts)),
        gate(scaled(random, n_all * of.d_expert, model, type)),
        up(scaled(random, n_all * of.d_expert, model, type)),
        down(scaled(random, n_all * model, of.d_expert, type)) {
    for (float& b : bias) b *= 0.2f;
  }
  static RowBuffer scaled(Random& random, std::int64_t n_rows, std::int64_t width, DType type) {
    RowBuffer rows(n_rows, width, width, type);
    for (std::int64_t row = 0; row < n_rows; ++row)
      for (std::int64_t c = 0; c < width; ++c) rows.set(row, c, 0.4f * random.normal());
    return rows;
  }

  // Packs, runs all rows of x and gives back (n_rows, out_padded).
  RowBuffer run(Backend& backend, RowBuffer& x) {
    Memory memory(backend);
    const auto n_rows = static_cast<std::int32_t>(x.n_rows());
    const std::size_t up_bytes = backend.packed_bytes(2 * padded, model_padded, dtype);
    const std::size_t down_bytes = backend.packed_bytes(model, padded, dtype);
    const auto ups = backend.allocate(at(n_all) * up_bytes);
    const auto downs = backend.allocate(at(n_all) * down_bytes);
    const bool is_paired = backend.pairs_gate_up(dtype);
    const PackShape from_model{model, model, model_padded, dtype, is_paired ? padded : 0};
    const PackShape from_expert{config.d_expert, config.d_expert, padded, dtype};
    for (std::int32_t e = 0; e < n_all; ++e) {
      std::byte* const up_of_e = static_cast<std::byte*>(ups->data()) + at(e) * up_bytes;
      const auto rows = [&](RowBuffer& source, std::int32_t n) {
        return PackSource{source.address(std::int64_t{e} * n), dtype, n, source.stride()};
      };
      backend.pack(rows(gate, config.d_expert), from_model, 0, up_of_e);
      backend.pack(rows(up, config.d_expert), from_model, padded, up_of_e);
      backend.pack(rows(down, model), from_expert, 0,
                   static_cast<std::byte*>(downs->data()) + at(e) * down_bytes);
    }
    const auto scratch = backend.allocate(backend.moe_scratch_bytes(config, model, n_rows));
    RowBuffer y(n_rows, 0, out_padded, DType::kF32);
    float* const there = memory.put_floats(y);
    backend.moe({.config = config,
                 .n_rows = n_rows,
                 .x = memory.put(x),
                 .router = memory.pack(router, {model, model, model_padded, DType::kF32}, n_all),
                 .selection_bias = memory.put(bias),
                 .global_scale = kGlobalScale,
                 .gate_up = {ups->data(), 2 * padded, model_padded, dtype, is_paired},
                 .down = {downs->data(), model, padded, dtype},
                 .gate_up_stride_bytes = static_cast<std::int64_t>(up_bytes),
                 .down_stride_bytes = static_cast<std::int64_t>(down_bytes),
                 .y = there,
                 .y_stride = out_padded,
                 .scratch = scratch->data()});
    memory.get(y, there);
    return y;
  }

  MoeConfig config;
  DType dtype;
  std::int32_t model, model_padded;
  std::int64_t out_padded;
  std::int32_t n_all;
  std::int32_t padded;
  RowBuffer router;
  std::vector<float> bias;
  RowBuffer gate, up, down;
};

struct Value {
  double value = 0;
  double size = 0;   // sum of the magnitudes
  double error = 0;  // what float32 may be off by: a unit a sum, as tensor cores cut off
};

Value dot(const RowBuffer& x, std::int64_t row, const RowBuffer& w, std::int64_t out) {
  Value sum;
  for (std::int64_t k = 0; k < w.stride(); ++k) {
    const double term = double{x.get(row, k)} * w.get(out, k);
    sum.value += term;
    sum.size += std::abs(term);
  }
  sum.error = static_cast<double>(2 * w.stride() + 2) * kUnit * sum.size;
  return sum;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The experts of a row; `logits` get all of them.
std::vector<std::int32_t> route(const Experts& experts, const RowBuffer& x, std::int64_t row,
                                std::vector<Value>& logits) {
  const MoeConfig& config = experts.config;
  for (std::int32_t e = 0; e < experts.n_all; ++e) logits.push_back(dot(x, row, experts.router, e));
  std::vector<std::pair<double, std::int32_t>> order;
  for (std::int32_t e = 0; e < config.n_experts; ++e)
    order.emplace_back(-sigmoid(logits[at(e)].value) - double{experts.bias[at(e)]}, e);
  std::sort(order.begin(), order.end());
  const std::size_t top_k = at(config.top_k);
  // The comparison would mean nothing where float32 cannot tell the last one in from the next.
  if (config.top_k < config.n_experts) REQUIRE(order[top_k].first - order[top_k - 1].first > 1e-5);
  std::vector<std::int32_t> chosen;
  for (std::size_t i = 0; i < top_k; ++i) chosen.push_back(order[i].second);
  for (std::int32_t s = 0; s < config.n_shared; ++s) chosen.push_back(config.n_experts + s);
  return chosen;
}

// Adds weight * expert(x) to the outputs of a row. SiLU is nowhere steeper than 1.1, and takes ten
// operations of its own.
void add_expert(const Experts& experts, std::int32_t e, const RowBuffer& x, std::int64_t row,
                double weight, double weight_error, std::vector<Value>& out) {
  const double unit = experts.dtype == DType::kF32 ? kUnit : kBf16Unit;
  for (std::int64_t j = 0; j < experts.config.d_expert; ++j) {
    const Value gate = dot(x, row, experts.gate, e * experts.config.d_expert + j);
    const Value up = dot(x, row, experts.up, e * experts.config.d_expert + j);
    const double silu = gate.value * sigmoid(gate.value);
    const double active = silu * up.value;
    const double error = 1.1 * gate.error * std::abs(up.value) + std::abs(silu) * up.error +
                         std::abs(active) * (10 * kUnit + unit);
    for (std::int64_t c = 0; c < experts.model; ++c) {
      const double w = weight * experts.down.get(e * experts.model + c, j);
      Value& y = out[static_cast<std::size_t>(c)];
      y.value += w * active;
      y.size += std::abs(w * active);
      y.error += std::abs(w) * (error + std::abs(active) * weight_error);
    }
  }
}

std::vector<std::vector<Value>> expected_rows(const Experts& experts, const RowBuffer& x) {
  std::vector<std::vector<Value>> rows;
  for (std::int64_t row = 0; row < x.n_rows(); ++row) {
    std::vector<Value> logits, out(at(experts.model));
    const std::vector<std::int32_t> chosen = route(experts, x, row, logits);
    double sum = 0, logit_error = 0;
    for (const std::int32_t e : chosen) {
      sum += sigmoid(logits[at(e)].value);
      logit_error = std::max(logit_error, logits[at(e)].error);
    }
    const double scale = double{experts.config.route_scale} * double{kGlobalScale} / sum;
    for (const std::int32_t e : chosen)
      add_expert(experts, e, x, row, sigmoid(logits[at(e)].value) * scale,
                 2 * logit_error + 4 * kUnit, out);
    const double n_terms =
        2.0 * (experts.config.d_expert + experts.config.top_k + experts.config.n_shared + 1);
    for (Value& y : out) y.error += n_terms * kUnit * y.size;
    rows.push_back(out);
  }
  return rows;
}

RowBuffer slice(const RowBuffer& x, std::int64_t begin, std::int64_t n_rows, DType dtype) {
  RowBuffer rows(n_rows, x.stride(), x.stride(), dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < x.stride(); ++c) rows.set(row, c, x.get(begin + row, c));
  return rows;
}

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
  const std::vector<std::vector<Value>> expected = expected_rows(experts, x);
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

TEST_CASE("cuda: experts of more rows than one launch looks through", "[simt]") {
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

TEST_CASE("cuda: experts of rows that are no numbers leave the others alone", "[simt]") {
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

// Experts with given logits, each of which answers in its own output: the weights.
TEST_CASE("cuda: the router takes the lower index on a tie, and the bias does not weigh",
          "[simt]") {
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
  Random random(1);
  const auto n_experts = static_cast<std::int32_t>(given.bias.size());
  Experts experts(random, {n_experts, 1, given.top_k, 4, 1.0f}, dtype);
  for (RowBuffer* rows : {&experts.router, &experts.gate, &experts.up, &experts.down})
    for (std::int64_t row = 0; row < rows->n_rows(); ++row)
      for (std::int64_t c = 0; c < rows->stride(); ++c) rows->set(row, c, 0.0f);
  experts.bias = given.bias;
  for (std::int32_t e = 0; e < experts.n_all; ++e) {
    experts.router.set(e, 0, given.logits[at(e)]);
    experts.gate.set(std::int64_t{e} * 4, 0, 40.0f);  // silu(40) = 40
    experts.up.set(std::int64_t{e} * 4, 0, 1.0f);
    experts.down.set(std::int64_t{e} * experts.model + e, 0, 1.0f / 64);
  }
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
