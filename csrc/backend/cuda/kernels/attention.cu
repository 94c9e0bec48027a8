// Attention of a tile of query vectors over the tape, block by block.
//
// A thread block takes one key/value head of one segment and up to kVectors query vectors of it
// (vector v is row v / group, head kv_head * group + v % group). Every vector walks its blocks of
// 64 positions in ascending order with a running maximum, in the order of operations of the CPU's
// kernels_attention.h, so its result depends on nothing but its own keys. In bfloat16 a walk is cut
// at fixed positions of the tape; the parts run side by side and are added in ascending order.
#include <algorithm>
#include <bit>

#include "kernels/attention.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr std::int64_t kPartBlocks = 4;  // of a walk in bfloat16
constexpr std::int64_t kWhole = std::int64_t{1} << 40;
constexpr std::int64_t kMaxPartialBytes = std::int64_t{256} << 20;

std::size_t tile_bytes(const AttentionArgs& args) {
  const std::int64_t n = args.d_head_padded;
  const auto element = static_cast<std::int64_t>(dtype_bytes(args.kv_dtype));
  return static_cast<std::size_t>(2 * n * kBlock * element +
                                  kVectors * (2 * n + kBlock + args.d_rel + 3) * 4);
}

// Starts the copy of the keys (or values) of a block, as one group; of no block, an empty group.
DUPLEX_DEVICE void fetch(std::byte* shared, const std::byte* from, std::int64_t bytes) {
  for (std::int64_t i = thread_index() * 16; i < bytes; i += kThreads * 16)
    copy_async(shared + i, from + i);
  commit_copies();
}

// scores[p][v] = q_v . k_p, the chain of products in ascending order.
DUPLEX_DEVICE void multiply_keys(const AttentionArgs& args, const Tile& tile) {
  const int p = thread_index() % kBlock;
  const float* q = tile.q + thread_index() / kBlock * kScoreVectors;
  float sum[kScoreVectors] = {};
  if (args.kv_dtype == DType::kF32) {
    const auto* key = reinterpret_cast<const float*>(tile.keys) + p;
#pragma unroll 8
    for (std::int32_t c = 0; c < args.d_head_padded; ++c)
      for (int v = 0; v < kScoreVectors; ++v)
        sum[v] = fmaf(key[c * kBlock], q[c * kVectors + v], sum[v]);
  } else {
    const auto* pairs = reinterpret_cast<const std::uint32_t*>(tile.keys) + p;
#pragma unroll 8
    for (std::int32_t c = 0; c < args.d_head_padded; c += 2) {
      const std::uint32_t pair = pairs[c / 2 * kBlock];
      const float k0 = bf16_to_float(static_cast<std::uint16_t>(pair & 0xffffu));
      const float k1 = bf16_to_float(static_cast<std::uint16_t>(pair >> 16));
      for (int v = 0; v < kScoreVectors; ++v) {
        sum[v] = fmaf(k0, q[c * kVectors + v], sum[v]);
        sum[v] = fmaf(k1, q[(c + 1) * kVectors + v], sum[v]);
      }
    }
  }
  float* const scores = tile.scores + p * kVectors + thread_index() / kBlock * kScoreVectors;
  for (int v = 0; v < kScoreVectors; ++v) scores[v] = sum[v];
}

// The learned bias of one key; `column` is that of the first lane of its sixteen.
DUPLEX_DEVICE float add_bias(const Walk& walk, const float* r, std::int64_t column, int lane,
                             float tau, float score) {
  if (column < 0) return score;  // beyond the extent the bias is zero
  float bias = 0.0f;
  for (std::int32_t k = 0; k < walk.args.d_rel; ++k)
    bias = fmaf(r[k], walk.args.rel_bank[k * walk.args.rel_stride + column + lane], bias);
  return fmaf(bias, tau, score);
}

// Scores to weights exp(score - max), by sixteen threads for each vector.
DUPLEX_DEVICE void weigh(const Walk& walk, const Tile& tile, std::int64_t block, Running& running) {
  const AttentionArgs& args = walk.args;
  const int v = thread_index() / kLanes, lane = thread_index() % kLanes;
  const std::int64_t block_begin = block * kBlock;
  const std::int64_t position = walk.position(v);
  const std::int64_t begin = walk.first_visible(v) - block_begin;
  std::int64_t end = position + 1 - block_begin;
  if (end > kBlock) end = kBlock;
  const bool sees = v < walk.count && begin < end;
  const bool biased = position - (block_begin + end - 1) < args.shape.rel_extent;
  const float tau = args.is_local || !biased
                        ? 1.0f
                        : log_scaling_tau(position, args.log_scaling_floor, args.log_scaling_alpha);
  const std::int64_t column = kBlock + args.shape.rel_extent - 1 - (position - block_begin);
  const float scale = 1.0f / static_cast<float>(args.shape.d_head);
  float best = kMinusInfinity;
  float scores[kBlock / kLanes];
  for (int i = 0; i < kBlock / kLanes; ++i) {
    const int p = i * kLanes + lane;
    scores[i] = kMinusInfinity;
    if (!sees || p < begin || p >= end) continue;
    scores[i] = tile.scores[p * kVectors + v] * scale;
    if (biased)
      scores[i] =
          add_bias(walk, tile.r + v * args.d_rel, column + i * kLanes, lane, tau, scores[i]);
    best = scores[i] > best ? scores[i] : best;
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(best, mask, kLanes);
    best = other > best ? other : best;
  }
  const float before = running.max;
  const float now = best > before ? best : before;
  const float shift = now == kMinusInfinity ? 0.0f : now;
  const float alpha =
      best > before && before != kMinusInfinity ? exp_nonpositive(before - now) : 1.0f;
  float sum = 0.0f;
  for (int i = 0; i < kBlock / kLanes; ++i) {
    const float weight = scores[i] == kMinusInfinity ? 0.0f : exp_nonpositive(scores[i] - shift);
    sum += weight;
    // As the values are stored, so are their weights.
    tile.scores[(i * kLanes + lane) * kVectors + v] =
        args.kv_dtype == DType::kF32 ? weight : bf16_to_float(float_to_bf16(weight));
  }
  for (int delta = kLanes / 2; delta > 0; delta /= 2) sum += shuffle_down(sum, delta, kLanes);
  running.max = now;
  running.sum = running.sum * alpha + sum;  // that of lane 0 counts
  if (lane == 0) tile.alpha[v] = alpha;
}

// out[v][c] = out[v][c] * alpha_v + sum over the positions before `end` of weight * value.
DUPLEX_DEVICE void add_values(const AttentionArgs& args, const Tile& tile, std::int32_t end) {
  constexpr int kHalf = kVectors / 2;  // of the vectors, for a thread
  const std::int32_t n = args.d_head_padded;
  for (std::int32_t i = thread_index(); i < 2 * n; i += kThreads) {
    const std::int32_t c = i % n, v0 = i / n * kHalf;
    const float* weights = tile.scores + v0;
    float sum[kHalf];
    for (int v = 0; v < kHalf; ++v) sum[v] = tile.out[(v0 + v) * n + c] * tile.alpha[v0 + v];
    if (args.kv_dtype == DType::kF32) {
      const auto* value = reinterpret_cast<const float*>(tile.values) + c;
#pragma unroll 4
      for (std::int32_t p = 0; p < end; ++p)
        for (int v = 0; v < kHalf; ++v)
          sum[v] = fmaf(value[p * n], weights[p * kVectors + v], sum[v]);
    } else {
      const auto* pairs = reinterpret_cast<const std::uint32_t*>(tile.values) + c;
#pragma unroll 4
      for (std::int32_t p = 0; p < end; p += 2) {
        const std::uint32_t pair = pairs[p / 2 * n];
        const float x0 = bf16_to_float(static_cast<std::uint16_t>(pair & 0xffffu));
        const float x1 = bf16_to_float(static_cast<std::uint16_t>(pair >> 16));
        for (int v = 0; v < kHalf; ++v) {
          sum[v] = fmaf(x0, weights[p * kVectors + v], sum[v]);
          sum[v] = fmaf(x1, weights[(p + 1) * kVectors + v], sum[v]);
        }
      }
    }
    for (int v = 0; v < kHalf; ++v) tile.out[(v0 + v) * n + c] = sum[v];
  }
}

DUPLEX_DEVICE void begin_tile(const Walk& walk, const Tile& tile) {
  const AttentionArgs& args = walk.args;
  const std::int32_t n = args.d_head_padded;
  for (std::int32_t i = thread_index(); i < kVectors * n; i += kThreads) {
    const std::int32_t v = i / n, c = i % n;
    const std::int64_t at =
        (walk.segment.row_begin + walk.row(v)) * args.q.stride + walk.head(v) * n + c;
    tile.q[c * kVectors + v] = v < walk.count ? load(args.q.data, args.q.dtype, at) : 0.0f;
    tile.out[i] = 0.0f;
  }
  for (std::int32_t i = thread_index(); i < walk.count * args.d_rel; i += kThreads) {
    const std::int32_t v = i / args.d_rel;
    tile.r[i] = args.r[(walk.segment.row_begin + walk.row(v)) * args.r_stride +
                       walk.head(v) * args.d_rel + i % args.d_rel];
  }
}

// The blocks from `block` to `end`. Keys are fetched while the values before them are in use, and
// values while their keys are.
DUPLEX_DEVICE void walk_blocks(const Walk& walk, const Tile& tile, std::int64_t block,
                               std::int64_t end, std::int64_t newest) {
  const std::int64_t bytes =
      walk.args.d_head_padded * kBlock * static_cast<std::int64_t>(dtype_bytes(walk.args.kv_dtype));
  Running running;
  block = walk.next(block, end);
  if (block < end) {
    fetch(tile.keys, walk.keys(block), bytes);
    fetch(tile.values, walk.keys(block) + bytes, bytes);
  }
  while (block < end) {
    const std::int64_t next = walk.next(block + 1, end);
    const std::int64_t visible = newest + 1 - block * kBlock;
    wait_copies<1>();
    sync_block();
    multiply_keys(walk.args, tile);
    sync_block();
    fetch(tile.keys, next < end ? walk.keys(next) : nullptr, next < end ? bytes : 0);
    if (thread_index() < kWeighThreads) weigh(walk, tile, block, running);
    wait_copies<1>();
    sync_block();
    add_values(walk.args, tile, static_cast<std::int32_t>(visible < kBlock ? visible : kBlock));
    sync_block();
    fetch(tile.values, next < end ? walk.keys(next) + bytes : nullptr, next < end ? bytes : 0);
    block = next;
  }
  if (thread_index() < kWeighThreads && thread_index() % kLanes == 0) {
    tile.max[thread_index() / kLanes] = running.max;
    tile.sum[thread_index() / kLanes] = running.sum;
  }
}

DUPLEX_KERNEL attention_kernel(Launch launch) {
  const Walk walk = walk_of(launch);
  const Part part = part_of(walk, launch.part_blocks, block_z());
  if (part.begin >= part.end) return;
  const Tile tile = lay_out(launch.args);
  begin_tile(walk, tile);  // the next barrier, in the walk or behind it, is for this too
  walk_blocks(walk, tile, part.begin, part.end, walk.position(walk.count - 1));
  sync_block();
  const std::int32_t n = launch.args.d_head_padded;
  if (launch.partial != nullptr) {
    float* const sums = launch.part(block_z());
    for (std::int32_t i = thread_index(); i < kVectors * n; i += kThreads) sums[i] = tile.out[i];
    for (std::int32_t i = thread_index(); i < 2 * kVectors; i += kThreads)
      sums[kVectors * n + i] = tile.max[i];  // the sums lie behind the maxima
    return;
  }
  for (std::int32_t i = thread_index(); i < walk.count * n; i += kThreads) {
    const std::int32_t v = i / n;
    store(launch.args.out, walk.segment.row_begin + walk.row(v), walk.head(v) * n + i % n,
          tile.out[i] / tile.sum[v]);
  }
}

// Adds the parts of every vector in ascending order. A part that a vector does not see adds
// nothing.
DUPLEX_KERNEL combine_kernel(Launch launch) {
  const Walk walk = walk_of(launch);
  const Part part = part_of(walk, launch.part_blocks, 0);
  const std::int32_t n = launch.args.d_head_padded;
  for (std::int32_t i = thread_index(); i < walk.count * n; i += kThreads) {
    const std::int32_t v = i / n;
    float largest = kMinusInfinity;
    for (std::int64_t z = 0; z <= part.last - part.first; ++z) {
      const float at = launch.part(z)[kVectors * n + v];
      largest = at > largest ? at : largest;
    }
    float out = 0.0f, sum = 0.0f;
    for (std::int64_t z = 0; z <= part.last - part.first; ++z) {
      const float* const sums = launch.part(z);
      if (sums[kVectors * n + v] == kMinusInfinity) continue;
      const float weight = exp_nonpositive(sums[kVectors * n + v] - largest);
      out = fmaf(sums[i], weight, out);
      sum = fmaf(sums[kVectors * n + kVectors + v], weight, sum);
    }
    store(launch.args.out, walk.segment.row_begin + walk.row(v), walk.head(v) * n + i % n,
          out / sum);
  }
}

}  // namespace

std::int64_t attention_reach(const Segments& segments) {
  std::int64_t n_parts = 1;
  for (std::int32_t i = 0; i < segments.count; ++i) {
    const std::int64_t last = segments.data[i].position + segments.data[i].n_rows - 1;
    n_parts = std::max(n_parts, last / (kBlock * kPartBlocks) + 1);
  }
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(n_parts)));
}

AttentionPlan plan_attention(const AttentionArgs& args) {
  const std::int32_t group = args.shape.n_heads / args.shape.n_kv_heads;
  AttentionPlan plan{0, 1, kWhole, 0, 0};
  std::int64_t most_rows = 0;
  for (std::int32_t i = 0; i < args.segments.count; ++i) {
    plan.n_tiles += div_up(std::int64_t{args.segments.data[i].n_rows} * group, kVectors);
    most_rows = std::max<std::int64_t>(most_rows, args.segments.data[i].n_rows);
  }
  if (args.kv_dtype == DType::kBF16) {
    plan.part_blocks = kPartBlocks;
    plan.n_parts = attention_reach(args.segments);
    // A window and the rows of a tile touch one part more than they fill.
    const std::int64_t span = args.shape.window + std::min<std::int64_t>(most_rows, kVectors) - 1;
    if (args.shape.window > 0)
      plan.n_parts = std::min(plan.n_parts, div_up(span - 1, kBlock * kPartBlocks) + 1);
  }
  const std::int64_t bytes = std::int64_t{args.shape.n_kv_heads} * plan.n_parts * kVectors *
                             (args.d_head_padded + 2) * std::int64_t{sizeof(float)};
  plan.launch_tiles = plan.n_parts == 1
                          ? plan.n_tiles
                          : std::clamp<std::int64_t>(kMaxPartialBytes / bytes, 1, plan.n_tiles);
  if (plan.n_parts > 1) plan.partial_bytes = static_cast<std::size_t>(plan.launch_tiles * bytes);
  return plan;
}

void launch_attention(Runtime& runtime, const AttentionArgs& args, const AttentionPlan& plan,
                      float* partial) {
  Launch launch{args, 0, plan.part_blocks, plan.n_parts, plan.n_parts > 1 ? partial : nullptr};
  for (; launch.first_tile < plan.n_tiles; launch.first_tile += plan.launch_tiles) {
    const std::int64_t n = std::min(plan.launch_tiles, plan.n_tiles - launch.first_tile);
    runtime.launch(attention_kernel, {n, args.shape.n_kv_heads, plan.n_parts}, kThreads,
                   tile_bytes(args), launch);
    if (plan.n_parts > 1)
      runtime.launch(combine_kernel, {n, args.shape.n_kv_heads}, kThreads, 0, launch);
  }
}

}  // namespace duplex::cuda
