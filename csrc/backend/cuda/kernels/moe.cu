// The mixture of experts: route, group the rows by expert, run every expert over its rows, add the
// results per row in ascending expert order (csrc/backend/cpu/cpu_moe.cpp).
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kThreads = 256;

// One (row, expert) pair; a row has top_k + n_shared of them in ascending expert order.
struct Choice {
  std::int32_t expert;
  float weight;
  std::int32_t place;  // among the pairs sorted by expert
};

// The parts of the scratch buffer, in order.
struct Scratch {
  float* x;                    // (n_rows, d_model padded) float32 rows for the router
  float* router_logits;        // (n_rows, n_experts + n_shared padded to 64)
  float* gate_up;              // (n_pairs, 2 * d_expert padded, to 64)
  std::byte* activated;        // (n_pairs, d_expert padded) in the dtype of the experts
  float* down;                 // (n_pairs, d_model padded to 64)
  Choice* choices;             // (n_rows, top_k + n_shared)
  std::int32_t* pair_row;      // (n_pairs) batch row of the pair at each place
  std::int32_t* expert_begin;  // (n_experts + n_shared + 1) first place of each expert
};

struct Sizes {
  std::int64_t n_rows, d_model, n_all, per_row, d_expert_padded;

  std::int64_t n_pairs() const { return n_rows * per_row; }
  std::int64_t router_stride() const { return round_up(n_all, kPanelOutputs); }
  std::int64_t gate_up_stride() const { return round_up(2 * d_expert_padded, kPanelOutputs); }
  std::int64_t down_stride() const { return round_up(d_model, kPanelOutputs); }
};

Sizes sizes_of(const MoeConfig& config, std::int64_t d_model, std::int64_t n_rows) {
  return {n_rows, d_model, config.n_experts + config.n_shared, config.top_k + config.n_shared,
          round_up(config.d_expert, kColumnAlign)};
}

// Places the parts from `base` on; returns the bytes they take.
std::size_t lay_out(const Sizes& s, void* base, Scratch& scratch) {
  std::size_t offset = 0;
  const auto take = [&](auto*& pointer, std::int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<Element*>(reinterpret_cast<std::uintptr_t>(base) + offset);
    offset +=
        static_cast<std::size_t>(round_up(count * static_cast<std::int64_t>(sizeof(Element)), 256));
  };
  take(scratch.x, s.n_rows * round_up(s.d_model, kColumnAlign));
  take(scratch.router_logits, s.n_rows * s.router_stride());
  take(scratch.gate_up, s.n_pairs() * s.gate_up_stride());
  take(scratch.activated, s.n_pairs() * s.d_expert_padded * 4);
  take(scratch.down, s.n_pairs() * s.down_stride());
  take(scratch.choices, s.n_pairs());
  take(scratch.pair_row, s.n_pairs());
  take(scratch.expert_begin, s.n_all + 1);
  return offset;
}

struct ToFloatArgs {
  Rows x;
  std::int64_t width;  // padded
  float* out;          // (n_rows, width)
};

DUPLEX_KERNEL to_float_kernel(ToFloatArgs args) {
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
  Choice* choices;
};

DUPLEX_DEVICE double log_sigmoid(double x) { return x >= 0 ? -log1p(exp(-x)) : x - log1p(exp(x)); }

// Routed and shared experts of one row, weighed together by their sigmoids.
DUPLEX_DEVICE void weigh_choices(const RouteArgs& args, const float* logits, Choice* choices) {
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
  auto* const scores = reinterpret_cast<float*>(shared_memory());
  const MoeConfig& config = args.config;
  const float* logits = args.logits + block_x() * args.stride;
  Choice* const choices = args.choices + block_x() * (config.top_k + config.n_shared);
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
  Choice* choices;
  std::int32_t* pair_row;
  std::int32_t* expert_begin;
};

// One thread block: sorts the pairs by expert, rows ascending inside one.
DUPLEX_KERNEL group_kernel(GroupArgs args) {
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
  const Choice* choices;
  std::int32_t per_row;
  const float* down;
  std::int64_t down_stride;
  float* y;
  std::int64_t y_stride;
};

DUPLEX_KERNEL combine_kernel(CombineArgs args) {
  const Choice* const choices = args.choices + block_x() * args.per_row;
  for (std::int64_t c = thread_index(); c < args.down_stride; c += n_threads()) {
    float sum = 0.0f;
    for (std::int32_t i = 0; i < args.per_row; ++i)
      sum = fmaf(args.down[choices[i].place * args.down_stride + c], choices[i].weight, sum);
    args.y[block_x() * args.y_stride + c] = sum;
  }
}

void route(Runtime& runtime, const MoeArgs& args, const Sizes& s, const Scratch& scratch) {
  const std::int64_t width = args.gate_up.n_in;
  runtime.launch(to_float_kernel, {s.n_rows, div_up(width, kThreads)}, kThreads, 0,
                 ToFloatArgs{args.x, width, scratch.x});
  launch_linear(runtime, {args.router,
                          {scratch.x, width, DType::kF32},
                          args.n_rows,
                          scratch.router_logits,
                          s.router_stride()});
  runtime.launch(route_kernel, {s.n_rows}, kWarp,
                 static_cast<std::size_t>(args.config.n_experts) * sizeof(float),
                 RouteArgs{args.config, scratch.router_logits, s.router_stride(),
                           args.selection_bias, args.global_scale, scratch.choices});
  runtime.launch(
      group_kernel, {}, kThreads, 0,
      GroupArgs{static_cast<std::int32_t>(s.n_all), static_cast<std::int32_t>(s.n_pairs()),
                static_cast<std::int32_t>(s.per_row), scratch.choices, scratch.pair_row,
                scratch.expert_begin});
}

}  // namespace

std::size_t moe_bytes(const MoeConfig& config, std::int64_t d_model, std::int64_t n_rows) {
  Scratch scratch;
  return lay_out(sizes_of(config, d_model, n_rows), nullptr, scratch);
}

void launch_moe(Runtime& runtime, const MoeArgs& args) {
  const Sizes s = sizes_of(args.config, args.down.n_out, args.n_rows);
  Scratch scratch;
  lay_out(s, args.scratch, scratch);
  route(runtime, args, s, scratch);
  const auto n_all = static_cast<std::int32_t>(s.n_all);
  launch_expert_linear(runtime,
                       {args.gate_up, args.gate_up_stride_bytes, n_all, scratch.expert_begin,
                        scratch.pair_row, args.x, scratch.gate_up, s.gate_up_stride()});
  const Rows activated{scratch.activated, s.d_expert_padded, args.x.dtype};
  launch_silu_mul(
      runtime, {scratch.gate_up, s.gate_up_stride(), static_cast<std::int32_t>(s.d_expert_padded),
                s.d_expert_padded, static_cast<std::int32_t>(s.n_pairs()), activated});
  launch_expert_linear(runtime, {args.down, args.down_stride_bytes, n_all, scratch.expert_begin,
                                 nullptr, activated, scratch.down, s.down_stride()});
  runtime.launch(combine_kernel, {s.n_rows}, kThreads, 0,
                 CombineArgs{scratch.choices, static_cast<std::int32_t>(s.per_row), scratch.down,
                             s.down_stride(), args.y, args.y_stride});
}

}  // namespace duplex::cuda
