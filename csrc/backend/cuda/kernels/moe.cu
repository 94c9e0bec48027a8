// The mixture of experts: route, group the rows by expert, run every expert over its rows, add the
// results per row in ascending expert order (csrc/backend/cpu/cpu_moe.cpp). Parts of a product with
// `down` are computed one after the other, in the same scratch.
#include "backend/moe_layout.h"
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kThreads = 256;

struct ToFloatArgs {
  Rows x;
  std::int64_t width;  // padded
  float* out;          // (n_rows, width)
};

DUPLEX_KERNEL to_float_kernel(ToFloatArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  const std::int64_t i = std::int64_t{block_y()} * n_threads() + thread_index();
  if (i < args.width)
    args.out[block_x() * args.width + i] =
        load(args.x.data, args.x.dtype, block_x() * args.x.stride + i);
}

struct RouteArgs {
  MoeConfig config;
  const float* logits;  // (n_rows, stride)
  std::int64_t stride;
  const float* selection_bias;
  float global_scale;
  MoeChoice* choices;
};

DUPLEX_DEVICE double log_sigmoid(double x) { return x >= 0 ? -log1p(exp(-x)) : x - log1p(exp(x)); }

// Routed and shared experts of one row, weighed together by their sigmoids.
DUPLEX_DEVICE void weigh_choices(const RouteArgs& args, const float* logits, MoeChoice* choices) {
  const MoeConfig& config = args.config;
  const std::int32_t n = config.top_k + config.n_shared;
  for (std::int32_t s = 0; s < config.n_shared; ++s)
    choices[config.top_k + s].expert = config.n_experts + s;
  double largest = -INFINITY;
  for (std::int32_t i = 0; i < n; ++i)
    largest = fmax(largest, log_sigmoid(logits[choices[i].expert]));
  double sum = 0;
  for (std::int32_t i = 0; i < n; ++i) sum += exp(log_sigmoid(logits[choices[i].expert]) - largest);
  for (std::int32_t i = 0; i < n; ++i)
    choices[i].weight = static_cast<float>(exp(log_sigmoid(logits[choices[i].expert]) - largest) /
                                           sum * config.route_scale * args.global_scale);
}

// One warp a row: top_k times the expert with the best sigmoid(logit) + bias, the lower index where
// two are alike; then in ascending order.
DUPLEX_KERNEL route_kernel(RouteArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  auto* const scores = reinterpret_cast<float*>(shared_memory());
  const MoeConfig& config = args.config;
  const float* logits = args.logits + block_x() * args.stride;
  MoeChoice* const choices = args.choices + block_x() * (config.top_k + config.n_shared);
  for (std::int32_t e = thread_index(); e < config.n_experts; e += kWarp)
    scores[e] = 1.0f / (1.0f + static_cast<float>(exp(-static_cast<double>(logits[e])))) +
                args.selection_bias[e];
  sync_block();
  for (std::int32_t k = 0; k < config.top_k; ++k) {
    float best = kMinusInfinity;
    auto expert = static_cast<float>(config.n_experts);  // as a float: it goes through a shuffle
    for (std::int32_t e = thread_index(); e < config.n_experts; e += kWarp)
      if (scores[e] > best) {
        best = scores[e];
        expert = static_cast<float>(e);
      }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const float other = shuffle_xor(best, mask, kWarp);
      const float other_expert = shuffle_xor(expert, mask, kWarp);
      if (other > best || (other == best && other_expert < expert)) {
        best = other;
        expert = other_expert;
      }
    }
    if (thread_index() == 0) {
      // Rows that are not numbers choose nothing: any expert will do, they stay what they are.
      const auto chosen =
          expert < static_cast<float>(config.n_experts) ? static_cast<std::int32_t>(expert) : 0;
      scores[chosen] = kMinusInfinity;
      std::int32_t at = k;
      for (; at > 0 && choices[at - 1].expert > chosen; --at) choices[at] = choices[at - 1];
      choices[at].expert = chosen;
    }
    sync_block();
  }
  if (thread_index() == 0) weigh_choices(args, logits, choices);
}

struct GroupArgs {
  std::int32_t n_all;  // experts
  std::int32_t n_pairs;
  std::int32_t per_row;
  MoeChoice* choices;
  std::int32_t* pair_row;
  std::int32_t* expert_begin;
};

// One thread block: sorts the pairs by expert, rows ascending inside one.
DUPLEX_KERNEL group_kernel(GroupArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  for (std::int32_t e = thread_index(); e < args.n_all; e += n_threads()) {
    std::int32_t n = 0;
    for (std::int32_t i = 0; i < args.n_pairs; ++i) n += args.choices[i].expert == e;
    args.expert_begin[e + 1] = n;
  }
  sync_block();
  if (thread_index() == 0) {
    args.expert_begin[0] = 0;
    for (std::int32_t e = 0; e < args.n_all; ++e) args.expert_begin[e + 1] += args.expert_begin[e];
  }
  sync_block();
  for (std::int32_t e = thread_index(); e < args.n_all; e += n_threads()) {
    std::int32_t place = args.expert_begin[e];
    for (std::int32_t i = 0; i < args.n_pairs; ++i) {
      if (args.choices[i].expert != e) continue;
      args.pair_row[place] = i / args.per_row;
      args.choices[i].place = place++;
    }
  }
}

struct CombineArgs {
  const MoeChoice* choices;
  std::int32_t per_row;
  const float* down;
  std::int64_t down_stride;
  float* y;
  std::int64_t y_stride;
};

DUPLEX_KERNEL combine_kernel(CombineArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  const MoeChoice* const choices = args.choices + block_x() * args.per_row;
  for (std::int64_t c = thread_index(); c < args.down_stride; c += n_threads()) {
    float sum = 0.0f;
    for (std::int32_t i = 0; i < args.per_row; ++i)
      sum = fmaf(args.down[choices[i].place * args.down_stride + c], choices[i].weight, sum);
    args.y[block_x() * args.y_stride + c] = sum;
  }
}

void route(Runtime& runtime, const MoeArgs& args, const MoeSizes& s, const MoeScratch& scratch) {
  const std::int64_t width = args.gate_up.n_in;
  runtime.launch_early(to_float_kernel, {s.n_rows, div_up(width, kThreads)}, kThreads, 0,
                       ToFloatArgs{args.x, width, scratch.x});
  launch_linear(runtime, {args.router,
                          {scratch.x, width, DType::kF32},
                          args.n_rows,
                          scratch.router_logits,
                          s.router_stride()});
  runtime.launch_early(route_kernel, {s.n_rows}, kWarp,
                       static_cast<std::size_t>(args.config.n_experts) * sizeof(float),
                       RouteArgs{args.config, scratch.router_logits, s.router_stride(),
                                 args.selection_bias, args.global_scale, scratch.choices});
  runtime.launch_early(
      group_kernel, {}, kThreads, 0,
      GroupArgs{static_cast<std::int32_t>(s.n_all), static_cast<std::int32_t>(s.n_pairs()),
                static_cast<std::int32_t>(s.per_row), scratch.choices, scratch.pair_row,
                scratch.expert_begin});
}

// One of the experts' matrices; shared experts of another format have a launch of their own.
void multiply(Runtime& runtime, const MoeArgs& args, ExpertLinearArgs experts,
              const ExpertMatrix& shared) {
  if (shared.first.data != nullptr) {
    ExpertLinearArgs of_shared = experts;
    of_shared.w = shared.first;
    of_shared.expert_stride_bytes = shared.stride_bytes;
    of_shared.n_experts = args.config.n_shared;
    of_shared.expert_begin += args.config.n_experts;
    launch_expert_linear(runtime, of_shared);
    experts.n_experts = args.config.n_experts;
  }
  launch_expert_linear(runtime, experts);
}

}  // namespace

std::size_t moe_quantised_bytes(const MoeArgs& args) {
  const std::int64_t n_pairs = moe_sizes(args.config, args.down.n_out, args.n_rows).n_pairs();
  const std::size_t up = quantised_rows_bytes(args.n_rows, args.gate_up);
  const std::size_t down = quantised_rows_bytes(n_pairs, args.down);
  return up > down ? up : down;
}

void launch_moe(Runtime& runtime, const MoeArgs& args, void* quantised) {
  const MoeSizes s = moe_sizes(args.config, args.down.n_out, args.n_rows);
  const MoeScratch scratch = lay_out_moe(s, args.scratch);
  route(runtime, args, s, scratch);
  const auto n_all = static_cast<std::int32_t>(s.n_all);
  const auto n_pairs = static_cast<std::int32_t>(s.n_pairs());
  const Rows x = launch_quantise_rows(runtime, args.x, args.n_rows, args.gate_up, quantised);
  multiply(runtime, args,
           {args.gate_up, args.gate_up_stride_bytes, n_all, scratch.expert_begin, scratch.pair_row,
            x, scratch.gate_up, s.gate_up_stride()},
           args.shared_gate_up);
  const Rows activated{scratch.activated, s.d_expert_padded, args.x.dtype};
  launch_silu_mul(
      runtime, {scratch.gate_up, s.gate_up_stride(), static_cast<std::int32_t>(s.d_expert_padded),
                s.d_expert_padded, n_pairs, activated});
  for (std::int32_t p = 0; p < args.n_parts; ++p) {
    const PackedMatrix down = part_of(args.down, args.n_parts, p);
    const Rows pairs = launch_quantise_rows(runtime, columns_from(activated, p * down.n_in),
                                            n_pairs, down, quantised);
    multiply(runtime, args,
             {down, args.down_stride_bytes, n_all, scratch.expert_begin, nullptr, pairs,
              scratch.down, s.down_stride()},
             {part_of(args.shared_down.first, args.n_parts, p), args.shared_down.stride_bytes});
    runtime.launch_early(
        combine_kernel, {s.n_rows}, kThreads, 0,
        CombineArgs{scratch.choices, static_cast<std::int32_t>(s.per_row), scratch.down,
                    s.down_stride(), args.y + p * args.y_part_stride, args.y_stride});
  }
}

}  // namespace duplex::cuda
