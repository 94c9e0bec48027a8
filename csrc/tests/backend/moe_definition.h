// What a mixture of experts is by definition, in double precision, and how far a backend may be
// off.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "tests/backend/moe_scene.h"

namespace duplex::backend_tests {

struct Value {
  double value = 0;
  double size = 0;   // sum of the magnitudes
  double error = 0;  // what float32 may be off by: a unit a sum, as tensor cores cut off
};

inline Value dot(const RowBuffer& x, std::int64_t row, const RowBuffer& w, std::int64_t out) {
  Value sum;
  for (std::int64_t k = 0; k < w.stride(); ++k) {
    const double term = double{x.get(row, k)} * w.get(out, k);
    sum.value += term;
    sum.size += std::abs(term);
  }
  sum.error = static_cast<double>(2 * w.stride() + 2) * kUnit * sum.size;
  return sum;
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The experts of a row; `logits` get all of them.
inline std::vector<std::int32_t> route(const Experts& experts, const RowBuffer& x, std::int64_t row,
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
inline void add_expert(const Experts& experts, std::int32_t e, const RowBuffer& x, std::int64_t row,
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

inline std::vector<std::vector<Value>> expected_rows(const Experts& experts, const RowBuffer& x) {
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

}  // namespace duplex::backend_tests
