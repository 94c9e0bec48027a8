// The mixture of experts: route, group the rows by expert, run each touched expert once over its
// rows, add the results per row in ascending expert order.
#include <algorithm>
#include <array>
#include <cmath>

#include "backend/cpu/cpu_backend.h"
#include "backend/moe_layout.h"

namespace duplex {
namespace {

constexpr std::int32_t kMaxRowsPerCall = 64;  // rows of one expert handed to a panel at once

// The scratch buffer.
struct CpuMoeScratch : MoeScratch {
  float* x;                    // (n_rows, d_model padded) float32 rows for the router
  float* router_logits;        // (n_rows, n_experts + n_shared padded to 64)
  std::int32_t* pair_row;      // (n_pairs) batch row of the pair at each place
  std::int32_t* expert_begin;  // (n_experts + n_shared + 1) first place of each expert
  std::int32_t* touched;       // experts with rows, ascending
  float* scores;               // (n_rows, n_experts)
};

CpuMoeScratch lay_out(const MoeSizes& s, Places& places) {
  CpuMoeScratch scratch{};
  static_cast<MoeScratch&>(scratch) = lay_out_moe(s, places);
  places.take(scratch.x, s.n_rows * round_up(s.d_model, kColumnAlign));
  places.take(scratch.router_logits, s.n_rows * s.router_stride());
  places.take(scratch.pair_row, s.n_pairs());
  places.take(scratch.expert_begin, s.n_all + 1);
  places.take(scratch.touched, s.n_all);
  places.take(scratch.scores, s.n_rows * s.n_all);
  return scratch;
}

double log_sigmoid(double x) {
  return x >= 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x));
}

// Picks top_k experts by sigmoid(logit) + bias (the lower index wins a tie), then weighs routed and
// shared experts together by their sigmoids.
void route_row(const MoeArgs& args, const float* logits, float* scores, MoeChoice* choices) {
  const MoeConfig& config = args.config;
  for (std::int32_t e = 0; e < config.n_experts; ++e)
    scores[e] = 1.0f / (1.0f + std::exp(-logits[e])) + args.selection_bias[e];
  for (std::int32_t k = 0; k < config.top_k; ++k) {
    const float* best = std::max_element(scores, scores + config.n_experts);
    choices[k].expert = static_cast<std::int32_t>(best - scores);
    scores[choices[k].expert] = -INFINITY;
  }
  std::sort(choices, choices + config.top_k,
            [](const MoeChoice& a, const MoeChoice& b) { return a.expert < b.expert; });
  const std::int32_t n = config.top_k + config.n_shared;
  for (std::int32_t s = 0; s < config.n_shared; ++s)
    choices[config.top_k + s].expert = config.n_experts + s;
  double largest = -INFINITY;
  for (std::int32_t i = 0; i < n; ++i)
    largest = std::max(largest, log_sigmoid(logits[choices[i].expert]));
  double sum = 0;
  for (std::int32_t i = 0; i < n; ++i)
    sum += std::exp(log_sigmoid(logits[choices[i].expert]) - largest);
  for (std::int32_t i = 0; i < n; ++i)
    choices[i].weight =
        static_cast<float>(std::exp(log_sigmoid(logits[choices[i].expert]) - largest) / sum *
                           config.route_scale * args.global_scale);
}

// Sorts the pairs by expert, rows ascending inside one; returns the number of touched experts.
std::int32_t group_by_expert(const MoeSizes& s, const CpuMoeScratch& scratch) {
  std::fill_n(scratch.expert_begin, s.n_all + 1, 0);
  for (std::int64_t i = 0; i < s.n_pairs(); ++i)
    ++scratch.expert_begin[scratch.choices[i].expert + 1];
  std::int32_t n_touched = 0;
  for (std::int32_t e = 0; e < s.n_all; ++e) {
    if (scratch.expert_begin[e + 1] > 0) scratch.touched[n_touched++] = e;
    scratch.expert_begin[e + 1] += scratch.expert_begin[e];
  }
  for (std::int64_t i = 0; i < s.n_pairs(); ++i) {
    MoeChoice& choice = scratch.choices[i];
    choice.place = scratch.expert_begin[choice.expert]++;
    scratch.pair_row[choice.place] = static_cast<std::int32_t>(i / s.per_row);
  }
  for (std::int64_t e = s.n_all; e > 0; --e) scratch.expert_begin[e] = scratch.expert_begin[e - 1];
  scratch.expert_begin[0] = 0;
  return n_touched;
}

// One panel of one expert over the rows that chose it.
template <class RowAt>
void run_panel(const CpuKernels& kernels, const PackedMatrix& w, std::int64_t expert_stride,
               std::int64_t panel_bytes, const CpuMoeScratch& scratch, std::int32_t expert,
               std::int64_t panel, const RowAt& row_at, float* y, std::int64_t y_stride) {
  std::array<const void*, kMaxRowsPerCall> rows;
  std::array<float*, kMaxRowsPerCall> outs;
  const std::int32_t end = scratch.expert_begin[expert + 1];
  for (std::int32_t begin = scratch.expert_begin[expert]; begin < end; begin += kMaxRowsPerCall) {
    const std::int32_t n = std::min(kMaxRowsPerCall, end - begin);
    for (std::int32_t i = 0; i < n; ++i) {
      rows[static_cast<std::size_t>(i)] = row_at(begin + i);
      outs[static_cast<std::size_t>(i)] = y + (begin + i) * y_stride + panel * kPanelOutputs;
    }
    const auto* data = static_cast<const std::byte*>(w.data) + expert * expert_stride;
    kernels.linear_panel(
        {rows.data(), n, data + panel * panel_bytes, w.n_in, w.dtype, outs.data(), 1.0f});
  }
}

// The parts of one row of the output.
void add_experts(const CpuKernels& kernels, const MoeArgs& args, const MoeSizes& s,
                 const CpuMoeScratch& scratch, std::int32_t row) {
  for (std::int32_t p = 0; p < args.n_parts; ++p) {
    float* const y = args.y + p * args.y_part_stride + row * args.y_stride;
    std::fill_n(y, s.down_width(), 0.0f);
    for (std::int64_t i = 0; i < s.per_row; ++i) {
      const MoeChoice& choice = scratch.choices[row * s.per_row + i];
      kernels.add_scaled(y, scratch.down + choice.place * s.down_stride() + p * s.down_width(),
                         choice.weight, s.down_width());
    }
  }
}

}  // namespace

std::size_t CpuBackend::moe_scratch_bytes(const MoeConfig& config, std::int64_t d_model,
                                          std::int64_t max_rows, std::int32_t n_parts) const {
  Places places(nullptr);
  lay_out(moe_sizes(config, d_model, max_rows, n_parts), places);
  return places.bytes();
}

void CpuBackend::do_moe(const MoeArgs& args) {
  const MoeSizes s = moe_sizes(args.config, args.down.n_out, args.n_rows, args.n_parts);
  Places places(args.scratch);
  const CpuMoeScratch scratch = lay_out(s, places);
  const std::int64_t element = static_cast<std::int64_t>(dtype_bytes(args.x.dtype));
  const auto x_row = [&](std::int64_t row) {
    return static_cast<const std::byte*>(args.x.data) + row * args.x.stride * element;
  };
  const std::int64_t x_width = args.gate_up.n_in;
  for_rows(args.n_rows, x_width, [&](std::int32_t row) {
    kernels_.to_float(x_row(row), args.x.dtype, x_width, scratch.x + row * x_width);
  });
  do_linear({args.router,
             {scratch.x, x_width, DType::kF32},
             args.n_rows,
             scratch.router_logits,
             s.router_stride()});
  // A score costs an exponential, as much as a dozen elements elsewhere.
  for_rows(args.n_rows, 12 * s.n_all, [&](std::int32_t row) {
    route_row(args, scratch.router_logits + row * s.router_stride(),
              scratch.scores + row * args.config.n_experts, scratch.choices + row * s.per_row);
  });
  const std::int32_t n_touched = group_by_expert(s, scratch);

  const PanelRows x_rows = panel_rows(args.x, args.n_rows, x_width, args.gate_up.dtype);
  const std::int64_t up_panels = div_up(args.gate_up.n_out, kPanelOutputs);
  const auto up_bytes =
      static_cast<std::int64_t>(packed_bytes(1, args.gate_up.n_in, args.gate_up.dtype));
  pool_->parallel_for(lane_, n_touched * up_panels, [&](std::int64_t task, int) {
    run_panel(
        kernels_, args.gate_up, args.gate_up_stride_bytes, up_bytes, scratch,
        scratch.touched[task / up_panels], task % up_panels,
        [&](std::int32_t place) { return x_rows.at(scratch.pair_row[place]); }, scratch.gate_up,
        s.gate_up_stride());
  });
  const Rows activated{scratch.activated, s.d_expert_padded, args.x.dtype};
  do_silu_mul({scratch.gate_up, s.gate_up_stride(), static_cast<std::int32_t>(s.d_expert_padded),
               s.d_expert_padded, static_cast<std::int32_t>(s.n_pairs()), activated});
  const PanelRows down_rows = panel_rows(activated, static_cast<std::int32_t>(s.n_pairs()),
                                         args.down.n_in, args.down.dtype);
  const PanelParts parts = panel_parts(args.down, args.n_parts, args.x.dtype);
  const std::int64_t down_panels = div_up(args.down.n_out, kPanelOutputs);
  const auto down_bytes =
      static_cast<std::int64_t>(packed_bytes(1, args.down.n_in, args.down.dtype));
  pool_->parallel_for(lane_, n_touched * down_panels, [&](std::int64_t task, int) {
    PackedMatrix w = args.down;
    w.n_in = parts.n_in;
    for (std::int32_t p = 0; p < args.n_parts; ++p) {
      w.data = static_cast<const std::byte*>(args.down.data) + p * parts.panel_bytes;
      run_panel(
          kernels_, w, args.down_stride_bytes, down_bytes, scratch,
          scratch.touched[task / down_panels], task % down_panels,
          [&](std::int32_t place) { return down_rows.at(place) + p * parts.row_bytes; },
          scratch.down + p * s.down_width(), s.down_stride());
    }
  });
  for_rows(args.n_rows, s.down_stride() * s.per_row,
           [&](std::int32_t row) { add_experts(kernels_, args, s, scratch, row); });
}

}  // namespace duplex
