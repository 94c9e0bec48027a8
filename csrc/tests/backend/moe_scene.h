// A mixture of experts for tests of any backend: the layer as numbers, and the way to a backend and
// back. What it is by definition: moe_definition.h.
#pragma once

#include <vector>

#include "tests/backend/memory.h"

namespace duplex::backend_tests {

inline constexpr float kGlobalScale = 1.3f;

inline std::size_t at(std::int32_t e) { return static_cast<std::size_t>(e); }

// The experts of one layer: gates and ups (n_all * d_expert, model), downs (n_all * model,
// d_expert).
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
    const MoeWeights weights{
        .router = memory.pack(router, {model, model, model_padded, DType::kF32}, n_all),
        .selection_bias = memory.put(bias),
        .global_scale = kGlobalScale,
        .gate_up = {ups->data(), 2 * padded, model_padded, dtype, is_paired},
        .down = {downs->data(), model, padded, dtype},
        .gate_up_stride_bytes = static_cast<std::int64_t>(up_bytes),
        .down_stride_bytes = static_cast<std::int64_t>(down_bytes)};
    backend.moe({weights, config, n_rows, memory.put(x), there, out_padded, scratch->data()});
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

// Experts with given logits for a row that begins with 1, each of which answers with its weight in
// its own output.
inline Experts answering(const std::vector<float>& logits, const std::vector<float>& bias,
                         std::int32_t top_k, DType dtype) {
  Random random(1);
  const auto n_experts = static_cast<std::int32_t>(bias.size());
  const auto n_shared = static_cast<std::int32_t>(logits.size()) - n_experts;
  Experts experts(random, {n_experts, n_shared, top_k, 4, 1.0f}, dtype);
  for (RowBuffer* rows : {&experts.router, &experts.gate, &experts.up, &experts.down})
    for (std::int64_t row = 0; row < rows->n_rows(); ++row)
      for (std::int64_t c = 0; c < rows->stride(); ++c) rows->set(row, c, 0.0f);
  experts.bias = bias;
  for (std::int32_t e = 0; e < experts.n_all; ++e) {
    experts.router.set(e, 0, logits[at(e)]);
    experts.gate.set(std::int64_t{e} * 4, 0, 40.0f);  // silu(40) = 40
    experts.up.set(std::int64_t{e} * 4, 0, 1.0f);
    experts.down.set(std::int64_t{e} * experts.model + e, 0, 1.0f / 40 / kGlobalScale);
  }
  return experts;
}

// Rows of x, from `begin` on.
inline RowBuffer slice(const RowBuffer& x, std::int64_t begin, std::int64_t n_rows, DType dtype) {
  RowBuffer rows(n_rows, x.stride(), x.stride(), dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < x.stride(); ++c) rows.set(row, c, x.get(begin + row, c));
  return rows;
}

}  // namespace duplex::backend_tests
