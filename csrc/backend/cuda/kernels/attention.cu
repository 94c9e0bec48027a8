// Attention of a tile of query vectors over the tape in float32, block by block; and how attention
// is cut, in any type.
//
// A thread block takes one key/value head of one segment and up to kVectors query vectors of it.
// Every vector walks its blocks of 64 positions in ascending order with a running maximum, in the
// order of operations of the CPU's kernels_attention.h, so its result depends on nothing but its
// own keys. What bfloat16 and int8 do is in attention_bf16.cu and attention_int8.cu.
#include <algorithm>
#include <bit>

#include "kernels/attention_walk.cuh"

namespace duplex::cuda {
namespace {

constexpr std::int32_t kGroupTiles = 4;  // at most, of a thread block that has a part
constexpr std::int64_t kMaxPartialBytes = std::int64_t{256} << 20;
constexpr int kScoreVectors = kVectors * kBlock / kThreads;  // of a thread
constexpr int kWeighThreads = kVectors * kLanes;

// Shared memory: one block of keys and of values, queries (d_head, kVectors), results
// (kVectors, d_head), scores (64, kVectors), what the bias is read from (kVectors, d_rel), per
// vector the sum at the end and what rescales the results, and what walk_of() needs.
struct Tile {
  float* keys;
  float* values;
  float* q;
  float* out;
  float* scores;
  float* r;
  float* sum;
  float* alpha;
  std::int32_t* n_groups;
};

// Of one vector so far, in the registers of the sixteen threads that weigh it.
struct Running {
  float max = kMinusInfinity;
  float sum = 0.0f;
};

DUPLEX_DEVICE Tile lay_out(const AttentionArgs& args) {
  const std::int64_t n = args.d_head_padded;
  Tile tile;
  tile.keys = reinterpret_cast<float*>(shared_memory());
  tile.values = tile.keys + n * kBlock;
  tile.q = tile.values + n * kBlock;
  tile.out = tile.q + kVectors * n;
  tile.scores = tile.out + kVectors * n;
  tile.r = tile.scores + kVectors * kBlock;
  tile.sum = tile.r + kVectors * args.d_rel;
  tile.alpha = tile.sum + kVectors;
  tile.n_groups = reinterpret_cast<std::int32_t*>(tile.alpha + kVectors);
  return tile;
}

std::size_t tile_bytes(const AttentionArgs& args) {
  const std::int64_t n = args.d_head_padded;
  const std::int64_t floats = 2 * n * kBlock + kVectors * (2 * n + kBlock + args.d_rel + 2);
  return static_cast<std::size_t>(floats) * sizeof(float) + walk_bytes(args);
}

// Starts the copy of the keys (or values) of a block, as one group; of no block, an empty group.
DUPLEX_DEVICE void fetch(float* shared, const std::byte* from, std::int64_t bytes) {
  for (std::int64_t i = thread_index() * 16; i < bytes; i += kThreads * 16)
    copy_async(reinterpret_cast<std::byte*>(shared) + i, from + i);
  commit_copies();
}

// scores[p][v] = q_v . k_p, the chain of products in ascending order.
DUPLEX_DEVICE void multiply_keys(const AttentionArgs& args, const Tile& tile) {
  const int p = thread_index() % kBlock;
  const float* q = tile.q + thread_index() / kBlock * kScoreVectors;
  const float* key = tile.keys + p;
  float sum[kScoreVectors] = {};
#pragma unroll 8
  for (std::int32_t c = 0; c < args.d_head_padded; ++c)
    for (int v = 0; v < kScoreVectors; ++v)
      sum[v] = fmaf(key[c * kBlock], q[c * kVectors + v], sum[v]);
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
  const float tau = biased ? walk.tau(v) : 1.0f;
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
    tile.scores[(i * kLanes + lane) * kVectors + v] = weight;
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
    const float* value = tile.values + c;
#pragma unroll 4
    for (std::int32_t p = 0; p < end; ++p)
      for (int v = 0; v < kHalf; ++v)
        sum[v] = fmaf(value[p * n], weights[p * kVectors + v], sum[v]);
    for (int v = 0; v < kHalf; ++v) tile.out[(v0 + v) * n + c] = sum[v];
  }
}

DUPLEX_DEVICE void begin_tile(const Walk& walk, const Tile& tile) {
  const AttentionArgs& args = walk.args;
  const std::int32_t n = args.d_head_padded;
  const auto* q = static_cast<const float*>(args.q.data);
  for (std::int32_t i = thread_index(); i < kVectors * n; i += kThreads) {
    const std::int32_t v = i / n, c = i % n;
    tile.q[c * kVectors + v] =
        v < walk.count ? q[walk.batch_row(v) * args.q.stride + walk.head(v) * n + c] : 0.0f;
    tile.out[i] = 0.0f;
  }
  for (std::int32_t i = thread_index(); i < walk.count * args.d_rel; i += kThreads) {
    const std::int32_t v = i / args.d_rel;
    tile.r[i] =
        args.r[walk.batch_row(v) * args.r_stride + walk.head(v) * args.d_rel + i % args.d_rel];
  }
}

// The blocks from `block` to `end`. Keys are fetched while the values before them are in use, and
// values while their keys are.
DUPLEX_DEVICE void walk_blocks(const Walk& walk, const Tile& tile, std::int64_t block,
                               std::int64_t end, std::int64_t newest) {
  const std::int64_t bytes = kv_panel_bytes(DType::kF32, walk.args.d_head_padded);
  Running running;
  block = walk.next(block, end);
  if (block < end) {
    fetch(tile.keys, walk.keys(block, DType::kF32), bytes);
    fetch(tile.values, walk.keys(block, DType::kF32) + bytes, bytes);
  }
  while (block < end) {
    const std::int64_t next = walk.next(block + 1, end);
    const std::int64_t visible = newest + 1 - block * kBlock;
    wait_copies<1>();
    sync_block();
    multiply_keys(walk.args, tile);
    sync_block();
    fetch(tile.keys, next < end ? walk.keys(next, DType::kF32) : nullptr, next < end ? bytes : 0);
    if (thread_index() < kWeighThreads) weigh(walk, tile, block, running);
    wait_copies<1>();
    sync_block();
    add_values(walk.args, tile, static_cast<std::int32_t>(visible < kBlock ? visible : kBlock));
    sync_block();
    fetch(tile.values, next < end ? walk.keys(next, DType::kF32) + bytes : nullptr,
          next < end ? bytes : 0);
    block = next;
  }
  if (thread_index() < kWeighThreads && thread_index() % kLanes == 0)
    tile.sum[thread_index() / kLanes] = running.sum;
}

DUPLEX_KERNEL attention_kernel(Launch launch) {
  let_next_grid_begin();
  const Tile tile = lay_out(launch.args);
  const Walk walk = walk_of(launch, tile.n_groups);
  wait_for_previous_grid();
  begin_tile(walk, tile);  // the next barrier, in the walk or behind it, is for this too
  const std::int64_t newest = walk.position(walk.count - 1);
  walk_blocks(walk, tile, walk.first_visible(0) / kBlock, newest / kBlock + 1, newest);
  sync_block();
  const std::int32_t n = launch.args.d_head_padded;
  for (std::int32_t i = thread_index(); i < walk.count * n; i += kThreads) {
    const std::int32_t v = i / n;
    store(launch.args.out, walk.batch_row(v), walk.head(v) * n + i % n, tile.out[i] / tile.sum[v]);
  }
}

}  // namespace

std::int64_t attention_reach(const Segments& segments) {
  std::int64_t most = 1;
  for (std::int32_t i = 0; i < segments.count; ++i) {
    const Segment& segment = segments.data[i];
    const std::int64_t last = segment.position + segment.n_rows - 1;
    most = std::max(most,
                    count_parts(segment.forgotten, segment.n_forgotten, 0, last / kPartPositions));
  }
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(most)));
}

AttentionPlan plan_attention(const AttentionArgs& args) {
  const bool is_cut = args.kv_dtype != DType::kF32;
  const std::int32_t group = args.shape.n_heads / args.shape.n_kv_heads;
  std::int64_t most_rows = 0;
  for (std::int32_t i = 0; i < args.segments.count; ++i)
    most_rows = std::max<std::int64_t>(most_rows, args.segments.data[i].n_rows);
  AttentionPlan plan{0, 1, 1, 0, 0};
  std::int64_t tile_bytes = 0;  // of what the parts of a tile leave
  if (is_cut) {
    plan.group_tiles = static_cast<std::int32_t>(
        std::min<std::int64_t>(kGroupTiles, div_up(most_rows * group, kVectors)));
    // A window and the rows of a group touch one part more than they fill. A window does not see
    // holes, so what attention_reach() says of those does not count for it.
    const std::int64_t rows = std::min<std::int64_t>(most_rows, plan.group_tiles * kVectors);
    plan.n_parts = args.shape.window > 0 ? div_up(args.shape.window + rows - 2, kPartPositions) + 1
                                         : attention_reach(args.segments);
    if (plan.n_parts > 1 || args.kv_dtype == DType::kInt8)
      tile_bytes = args.shape.n_kv_heads * plan.n_parts *
                   part_floats(args.kv_dtype, args.d_head_padded) * std::int64_t{sizeof(float)};
    if (tile_bytes > 0)
      plan.group_tiles = static_cast<std::int32_t>(
          std::clamp<std::int64_t>(kMaxPartialBytes / tile_bytes, 1, plan.group_tiles));
  }
  for (std::int32_t i = 0; i < args.segments.count; ++i)
    plan.n_groups += div_up(std::int64_t{args.segments.data[i].n_rows} * group,
                            std::int64_t{kVectors} * plan.group_tiles);
  plan.launch_groups = plan.n_groups;
  if (tile_bytes == 0) return plan;
  const std::int64_t bytes = plan.group_tiles * tile_bytes;
  plan.launch_groups = std::clamp<std::int64_t>(kMaxPartialBytes / bytes, 1, plan.n_groups);
  plan.partial_bytes = static_cast<std::size_t>(plan.launch_groups * bytes);
  return plan;
}

namespace {

// How many columns of the biases the vectors of a group meet in a part: one for each position, and
// one more for every further row.
std::int32_t bank_width(const AttentionArgs& args, std::int32_t group_tiles) {
  const std::int32_t group = args.shape.n_heads / args.shape.n_kv_heads;
  const std::int32_t rows = (group_tiles * kVectors - 1) / group + 2;
  return (static_cast<std::int32_t>(kPartPositions) + rows + 2 * (kFour - 1)) / kFour * kFour;
}

}  // namespace

void launch_attention(Runtime& runtime, const AttentionArgs& args, const AttentionPlan& plan,
                      float* partial) {
  Launch launch{args,
                0,
                plan.group_tiles,
                static_cast<std::int32_t>(plan.n_parts),
                bank_width(args, plan.group_tiles),
                plan.partial_bytes > 0 ? partial : nullptr};
  for (; launch.first_group < plan.n_groups; launch.first_group += plan.launch_groups) {
    const std::int64_t n = std::min(plan.launch_groups, plan.n_groups - launch.first_group);
    if (args.kv_dtype == DType::kBF16)
      launch_attention_bf16(runtime, launch, n);
    else if (args.kv_dtype == DType::kInt8)
      launch_attention_int8(runtime, launch, n);
    else
      runtime.launch_early(attention_kernel, {n, args.shape.n_kv_heads}, kThreads, tile_bytes(args),
                           launch);
  }
}

}  // namespace duplex::cuda
