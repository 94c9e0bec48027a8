// Which experts a row goes to, as the CPU chooses (csrc/backend/cpu/cpu_moe.cpp): the logits of all
// of them, the best, and what these weigh.
//
// A router has few outputs, and many columns in float32. For bfloat16 rows a thread block therefore
// has a slice of the columns, all of its weights on their way at once, and the choice adds the
// slices in their order: an output has the same bits whatever other rows there are.
#include <algorithm>
#include <limits>

#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kPanel = static_cast<int>(kPanelOutputs);
constexpr int kQuarters = 4;  // of a slice, a thread each
constexpr int kQuarter = static_cast<int>(kRouterSlice) / kQuarters;
constexpr int kQuarterFloats = kQuarter + kFour;  // in shared memory: the quarters in other banks
constexpr int kRowFloats = kQuarters * kQuarterFloats;
constexpr std::int32_t kRouterRows = 32;  // of a thread block

struct RouterArgs {
  PackedMatrix w;
  Rows x;
  std::int32_t n_rows;
  float* parts;  // (slices, n_rows, stride)
  std::int64_t stride;
};

// The thread's weights of an output; zeros behind the last column.
DUPLEX_DEVICE void load_weights(const PackedMatrix& w, std::int32_t first_column, int output,
                                float (&to)[kQuarter]) {
  const auto* const panel =
      static_cast<const float*>(w.data) + std::int64_t{block_x()} * w.n_in * kPanel;
#pragma unroll
  for (int k = 0; k < kQuarter; ++k) {
    const std::int64_t column = first_column + k;
    to[k] = column < w.n_in ? panel[column * kPanel + output] : 0.0f;
  }
}

// A slice of some rows, as numbers, to shared memory.
DUPLEX_DEVICE void load_rows(const RouterArgs& args, std::int32_t first_row, std::int32_t n_rows,
                             std::int32_t first_column, float* to) {
  constexpr int kPieces = kRouterSlice / kFour, kQuarterPieces = kQuarter / kFour;
#pragma unroll 4
  for (std::int32_t i = thread_index(); i < n_rows * kPieces; i += n_threads()) {
    const std::int32_t row = i / kPieces, piece = i % kPieces;
    const std::int32_t column = first_column + piece * kFour;
    Four x{};
    if (column < args.w.n_in)
      x = load_four(args.x.data, DType::kBF16, (first_row + row) * args.x.stride + column);
    store_four(to + row * kRowFloats + piece / kQuarterPieces * kQuarterFloats +
                   piece % kQuarterPieces * kFour,
               x);
  }
}

DUPLEX_DEVICE float sum_of_quarters(float sum) {
  sum += shuffle_xor(sum, 1, kQuarters);
  return sum + shuffle_xor(sum, 2, kQuarters);
}

// A panel of outputs, a slice of columns, some rows. Weights are nobody's, so they are on their way
// while the grid before ends.
DUPLEX_KERNEL router_kernel(RouterArgs args) {
  let_next_grid_begin();
  auto* const x = reinterpret_cast<float*>(shared_memory());
  const int output = thread_index() / kQuarters, quarter = thread_index() % kQuarters;
  const std::int32_t first_column = block_y() * static_cast<std::int32_t>(kRouterSlice);
  const std::int32_t first_row = block_z() * kRouterRows;
  const std::int32_t n_rows =
      args.n_rows - first_row < kRouterRows ? args.n_rows - first_row : kRouterRows;
  float w[kQuarter];
  load_weights(args.w, first_column + quarter * kQuarter, output, w);
  wait_for_previous_grid();
  load_rows(args, first_row, n_rows, first_column, x);
  sync_block();
  float* const parts = args.parts +
                       (std::int64_t{block_y()} * args.n_rows + first_row) * args.stride +
                       block_x() * kPanel + output;
  for (std::int32_t row = 0; row < n_rows; row += 2) {
    const bool two = row + 1 < n_rows;
    const float* const x0 = x + row * kRowFloats + quarter * kQuarterFloats;
    const float* const x1 = two ? x0 + kRowFloats : x0;
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
    for (int k = 0; k < kQuarter; k += kFour) {
      const Four of0 = load_four(x0 + k), of1 = load_four(x1 + k);
      for (int i = 0; i < kFour; ++i) {
        sum0 = fmaf(w[k + i], of0.v[i], sum0);
        sum1 = fmaf(w[k + i], of1.v[i], sum1);
      }
    }
    sum0 = sum_of_quarters(sum0);
    sum1 = sum_of_quarters(sum1);
    if (quarter == 0) parts[row * args.stride] = sum0;
    if (quarter == 1 && two) parts[(row + 1) * args.stride] = sum1;
  }
}

// ---- the choice

// A thread for each expert, up to the most that there may be.
int route_threads(const MoeConfig& config) {
  return static_cast<int>(
      std::min<std::int64_t>(round_up(config.n_experts + config.n_shared, kWarp), 1024));
}

struct RouteArgs {
  MoeConfig config;
  const float* parts;  // (n_slices, rows, stride)
  std::int32_t n_slices;
  std::int64_t slice_stride;
  std::int64_t stride;
  const float* selection_bias;
  float global_scale;
  MoeChoice* choices;
};

// The shared memory of one row.
struct RouteRoom {
  double* logs;    // of the sigmoids of those chosen
  double* shares;  // of the weight
  float* logits;
  float* scores;
  std::int32_t* chosen;
};
DUPLEX_DEVICE RouteRoom route_room(const MoeConfig& config) {
  const std::int32_t n = config.top_k + config.n_shared;
  auto* const logs = reinterpret_cast<double*>(shared_memory());
  auto* const logits = reinterpret_cast<float*>(logs + 2 * n);
  auto* const scores = logits + config.n_experts + config.n_shared;
  return {logs, logs + n, logits, scores,
          reinterpret_cast<std::int32_t*>(scores + config.n_experts)};
}
std::size_t route_room_bytes(const MoeConfig& config) {
  const auto n = static_cast<std::size_t>(config.top_k + config.n_shared);
  const auto n_all = static_cast<std::size_t>(2 * config.n_experts + config.n_shared);
  return n * (2 * sizeof(double) + sizeof(std::int32_t)) + n_all * sizeof(float);
}

DUPLEX_DEVICE double log_sigmoid(double x) { return x >= 0 ? -log1p(exp(-x)) : x - log1p(exp(x)); }

// What an expert is chosen by. No number, or none that is finite from below, comes last, so that
// each row has as many experts as it should.
DUPLEX_DEVICE float score_of(float logit, float bias) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  const float score = 1.0f / (1.0f + static_cast<float>(exp(-static_cast<double>(logit)))) + bias;
  return score >= kLowest ? score : kLowest;
}

DUPLEX_DEVICE void score_experts(const RouteArgs& args, const RouteRoom& room) {
  const MoeConfig& config = args.config;
  for (std::int32_t e = thread_index(); e < config.n_experts + config.n_shared; e += n_threads()) {
    const float* const parts = args.parts + block_x() * args.stride + e;
    float logit = parts[0];
#pragma unroll 16
    for (std::int32_t slice = 1; slice < args.n_slices; ++slice)
      logit += parts[slice * args.slice_stride];
    room.logits[e] = logit;
    if (e < config.n_experts) room.scores[e] = score_of(logit, args.selection_bias[e]);
  }
  for (std::int32_t s = thread_index(); s < config.n_shared; s += n_threads())
    room.chosen[config.top_k + s] = config.n_experts + s;
}

// One warp: the best of those that are left becomes choice number k, the lower index where two are
// alike. Choices stay in ascending order.
DUPLEX_DEVICE void choose_best(const RouteRoom& room, std::int32_t n_experts, std::int32_t k) {
  float best = kMinusInfinity;
  auto expert = static_cast<float>(n_experts);  // as a float: it goes through a shuffle
  for (std::int32_t e = thread_index(); e < n_experts; e += kWarp)
    if (room.scores[e] > best) {
      best = room.scores[e];
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
  const auto chosen = static_cast<std::int32_t>(expert);
  // By the thread that alone reads it here.
  if (chosen % kWarp == thread_index()) room.scores[chosen] = kMinusInfinity;
  if (thread_index() != 0) return;
  std::int32_t at = k;
  for (; at > 0 && room.chosen[at - 1] > chosen; --at) room.chosen[at] = room.chosen[at - 1];
  room.chosen[at] = chosen;
}

// Routed and shared experts of one row, weighed together by their sigmoids.
DUPLEX_DEVICE void weigh_choices(const RouteArgs& args, const RouteRoom& room) {
  const std::int32_t n = args.config.top_k + args.config.n_shared;
  for (std::int32_t i = thread_index(); i < n; i += n_threads())
    room.logs[i] = log_sigmoid(room.logits[room.chosen[i]]);
  sync_block();
  double largest = -INFINITY;
  for (std::int32_t i = 0; i < n; ++i) largest = fmax(largest, room.logs[i]);
  for (std::int32_t i = thread_index(); i < n; i += n_threads())
    room.shares[i] = exp(room.logs[i] - largest);
  sync_block();
  double sum = 0;
  for (std::int32_t i = 0; i < n; ++i) sum += room.shares[i];
  for (std::int32_t i = thread_index(); i < n; i += n_threads()) {
    MoeChoice& choice = args.choices[block_x() * n + i];
    choice.expert = room.chosen[i];
    choice.weight =
        static_cast<float>(room.shares[i] / sum * args.config.route_scale * args.global_scale);
  }
}

// A thread block a row.
DUPLEX_KERNEL route_kernel(RouteArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  const RouteRoom room = route_room(args.config);
  score_experts(args, room);
  sync_block();
  for (std::int32_t k = 0; k < args.config.top_k; ++k) {
    if (thread_index() < kWarp) choose_best(room, args.config.n_experts, k);
    sync_block();
  }
  weigh_choices(args, room);
}

std::int32_t launch_router(Runtime& runtime, const MoeArgs& args, float* parts,
                           std::int64_t stride) {
  if (args.x.dtype == DType::kF32) {
    launch_linear(runtime, {args.router, args.x, args.n_rows, parts, stride});
    return 1;
  }
  const std::int64_t n_slices = div_up(args.router.n_in, kRouterSlice);
  runtime.launch_early(
      router_kernel,
      {div_up(args.router.n_out, kPanelOutputs), n_slices, div_up(args.n_rows, kRouterRows)},
      kPanel * kQuarters,
      static_cast<std::size_t>(std::min(args.n_rows, kRouterRows)) * kRowFloats * sizeof(float),
      RouterArgs{args.router, args.x, args.n_rows, parts, stride});
  return static_cast<std::int32_t>(n_slices);
}

}  // namespace

void launch_route(Runtime& runtime, const MoeArgs& args, float* logits, MoeChoice* choices) {
  const std::int64_t stride = moe_sizes(args.config, args.down.n_out, args.n_rows).router_stride();
  const std::int32_t n_slices = launch_router(runtime, args, logits, stride);
  runtime.launch_early(route_kernel, {args.n_rows}, route_threads(args.config),
                       route_room_bytes(args.config),
                       RouteArgs{args.config, logits, n_slices, args.n_rows * stride, stride,
                                 args.selection_bias, args.global_scale, choices});
}

}  // namespace duplex::cuda
