// A mixture of experts with weights of its own, for the tests of formats of weights.
#pragma once

#include <vector>

#include "tests/simt/coded.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {

// Gates, ups and downs of all experts; routed by `router` and bias alone.
struct Experts {
  static constexpr std::int32_t kModel = 136, kModelPadded = 144;

  Experts(const MoeConfig& of, DType type)
      : config(of),
        format(type),
        n_all(of.n_experts + of.n_shared),
        padded(static_cast<std::int32_t>(round_up(of.d_expert, kColumnAlign))),
        random(29),
        router(n_all, kModel, kModel, DType::kF32),
        bias(random.normals(of.n_experts)),
        up(random_rows(random, std::int64_t{2} * n_all * of.d_expert, kModel, kModel)),
        down(random_rows(random, std::int64_t{n_all} * kModel, of.d_expert, of.d_expert)) {}

  bool pairs(const Backend& backend, DType of_e) const {
    return may_pair && backend.pairs_gate_up(of_e);
  }
  // Routed experts may be in NVFP4, shared ones behind them are in `format`.
  bool is_coded(std::int32_t e) const { return coded_up != nullptr && e < config.n_experts; }
  PackSource rows(std::int32_t e, RowBuffer& plain, const CodedTensor* coded, std::int64_t begin,
                  std::int32_t n) const {
    if (is_coded(e)) return coded->rows(begin, n);
    return {plain.address(begin), DType::kF32, n, plain.stride()};
  }

  // The columns of downs from one on.
  static PackSource from_column(PackSource rows, std::int64_t column) {
    const bool is_in_codes = rows.dtype == DType::kNvfp4;
    rows.data = static_cast<const std::byte*>(rows.data) + (is_in_codes ? column / 2 : column * 4);
    if (is_in_codes)
      rows.scales = static_cast<const std::byte*>(rows.scales) + column / kNvfp4Group;
    return rows;
  }

  // Parts one behind the other.
  RowBuffer run(Backend& backend, RowBuffer& x, std::int32_t n_parts = 1) {
    Memory memory(backend);
    RowBuffer y(n_parts * x.n_rows(), 0, round_up(kModel, kPanelOutputs), DType::kF32);
    float* const there = memory.put_floats(y);
    const auto n_rows = static_cast<std::int32_t>(x.n_rows());
    backend.moe(pack(backend, memory, memory.put(x), n_rows, there, n_parts));
    memory.get(y, there);
    return y;
  }
  // Of rows that lie in the backend's memory; y is (n_parts, n_rows, kModel padded to panels).
  MoeArgs pack(Backend& backend, Memory& memory, const Rows& x, std::int32_t n_rows, float* y,
               std::int32_t n_parts = 1) {
    const std::int32_t n_runs = backend.packs_parts_apart() ? n_parts : 1;
    const Matrices ups(*this, backend, memory, 2 * padded, kModelPadded);
    const Matrices downs(*this, backend, memory, kModel, padded, n_runs);
    for (std::int32_t e = 0; e < n_all; ++e) {
      const DType of_e = is_coded(e) ? DType::kNvfp4 : format;
      const PackShape from_model{kModel, kModel, kModelPadded, of_e,
                                 pairs(backend, of_e) ? padded : 0};
      const PackShape from_expert{config.d_expert / n_runs, config.d_expert / n_runs,
                                  padded / n_runs, of_e};
      const std::int32_t n = config.d_expert;
      for (const std::int32_t i : {0, 1})
        backend.pack(rows(e, up, coded_up, (std::int64_t{2} * e + i) * n, n), from_model,
                     i * padded, ups.at(e));
      for (std::int32_t i = 0; i < n_runs; ++i)
        backend.pack(from_column(rows(e, down, coded_down, std::int64_t{e} * kModel, kModel),
                                 i * from_expert.n_in),
                     from_expert, 0,
                     downs.at(e) + static_cast<std::size_t>(i) * downs.run_bytes(e));
    }
    ExpertMatrix first_up = ups.of(0), shared_up = ups.shared();
    first_up.first.is_paired = pairs(backend, ups.dtype(0));
    shared_up.first.is_paired = first_up.first.is_paired;
    const std::int64_t y_stride = round_up(kModel, kPanelOutputs);
    return {{.router = memory.pack(router, {kModel, kModel, kModelPadded, DType::kF32}, n_all),
             .selection_bias = memory.put(bias),
             .global_scale = 1.25f,
             .gate_up = first_up.first,
             .down = downs.of(0).first,
             .gate_up_stride_bytes = ups.of(0).stride_bytes,
             .down_stride_bytes = downs.of(0).stride_bytes,
             .shared_gate_up = shared_up,
             .shared_down = downs.shared()},
            config,
            n_rows,
            x,
            y,
            y_stride,
            memory.zeros(backend.moe_scratch_bytes(config, kModel, n_rows, n_parts)),
            n_parts,
            n_rows * y_stride};
  }

  // One matrix of all experts, one behind the other, each as runs of its columns.
  struct Matrices {
    Matrices(const Experts& of_all, Backend& backend, Memory& memory, std::int32_t outputs,
             std::int32_t inputs, std::int32_t runs = 1)
        : experts(of_all), n_out(outputs), n_in(inputs), n_runs(runs) {
      offsets.push_back(0);
      for (std::int32_t e = 0; e < experts.n_all; ++e)
        offsets.push_back(offsets.back() +
                          static_cast<std::size_t>(n_runs) *
                              backend.packed_bytes(n_out, n_in / n_runs, dtype(e)));
      data = static_cast<std::byte*>(memory.zeros(offsets.back()));
    }
    DType dtype(std::int32_t e) const {
      return experts.is_coded(e) ? DType::kNvfp4 : experts.format;
    }
    std::size_t run_bytes(std::int32_t e) const {
      return static_cast<std::size_t>(at(e + 1) - at(e)) / static_cast<std::size_t>(n_runs);
    }
    std::byte* at(std::int32_t e) const { return data + offsets[static_cast<std::size_t>(e)]; }
    ExpertMatrix of(std::int32_t e) const {
      return {{at(e), n_out, n_in, dtype(e)}, at(e + 1) - at(e)};
    }
    ExpertMatrix shared() const {
      return experts.coded_up == nullptr ? ExpertMatrix{} : of(experts.config.n_experts);
    }

    const Experts& experts;
    std::int32_t n_out, n_in, n_runs;
    std::vector<std::size_t> offsets;
    std::byte* data = nullptr;
  };

  MoeConfig config;
  DType format;
  std::int32_t n_all, padded;
  Random random;
  RowBuffer router;
  std::vector<float> bias;
  RowBuffer up, down;
  const CodedTensor* coded_up = nullptr;  // of routed experts, in place of up and down
  const CodedTensor* coded_down = nullptr;
  bool may_pair = true;  // gates and ups, where the backend wants them so
};

}  // namespace duplex::simt_tests
