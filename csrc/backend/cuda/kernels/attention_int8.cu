// Attention over the tape in int8, on the tensor cores: the CPU's bytes, whatever the type of the
// rows. The formulas are in csrc/backend/cpu/kernels_attention_int8.h.
//
// The walk is cut as in attention_parts.cuh, a word being four codes. What a block of 64 positions
// gives a vector depends on that block alone: exact sums of integers, the largest score, and
// sixteen sums of weights in the CPU's order. combine_kernel then folds the blocks of a vector in
// ascending order by the CPU's own multiply-adds, so that the cut leaves no trace.
//
// Cost of a tile: 2 * (d_head + 2) bytes a position, once for a group, and 4 * (d_head + 20) bytes
// a block for every vector, written and read once. A chain of the segment's place, the queries'
// codes, 4 products, the weights, 4 products, with three barriers; then the chain over the blocks.
#include "kernels/attention_bias.cuh"
#include "kernels/kv_int8.cuh"

namespace duplex::cuda {
namespace {

constexpr int kWordCodes = 4;
constexpr int kWindow = kWordCodes * kWindowWords;  // reduction indices of a window
constexpr int kScoreStride = kParts + kFour;        // words that lanes store together: other banks
// Bytes: codes of two vectors that are read together lie in other banks.
constexpr int kWeightStride = kParts + kWindow;
constexpr std::int32_t query_stride(std::int64_t n) {
  return static_cast<std::int32_t>(round_up(n, 2 * kWindow)) + kWindow;
}
constexpr int kBlocksAtOnce = 16;  // whose sums a thread of combine_kernel has on their way

static_assert(kWindow == kBlock && kLanePositions * kLanes == kBlock);

// Shared memory: products (2, kVectors, positions) of the halves of a head, codes of queries
// (kVectors, d_head), codes of weights (kVectors, positions).
struct Tile {
  std::int32_t* products;
  std::uint8_t* queries;
  std::uint8_t* weights;
  std::int32_t* n_groups;
  std::int32_t query_stride;
};

// Behind the bank.
DUPLEX_DEVICE Tile lay_out(const Launch& launch) {
  const AttentionArgs& args = launch.args;
  Tile tile;
  tile.query_stride = query_stride(args.d_head_padded);
  tile.products = reinterpret_cast<std::int32_t*>(shared_memory() + bank_bytes(launch));
  tile.queries = reinterpret_cast<std::uint8_t*>(tile.products + 2 * kVectors * kScoreStride);
  tile.weights = tile.queries + kVectors * tile.query_stride;
  tile.n_groups = reinterpret_cast<std::int32_t*>(tile.weights + kVectors * kWeightStride);
  return tile;
}

std::size_t tile_bytes(const Launch& launch) {
  const AttentionArgs& args = launch.args;
  return 2 * kVectors * kScoreStride * sizeof(std::int32_t) +
         kVectors * static_cast<std::size_t>(query_stride(args.d_head_padded) + kWeightStride) +
         walk_bytes(args) + bank_bytes(launch);
}

// What a warp multiplies of a part: its columns and half of the reduction.
DUPLEX_DEVICE Window keys_of(const Part& part, std::int32_t n, std::int32_t window) {
  const std::byte* const panel = part.block(quarter_of_warp() / 2);
  if (panel == nullptr) return {};
  return load_window(panel + kKvScalesBytes, kBlock, n / kWordCodes, window * kWindowWords,
                     quarter_of_warp() % 2 * kColumns);
}
DUPLEX_DEVICE Window values_of(const Part& part, std::int32_t n, std::int32_t chunk) {
  const std::byte* const panel = part.block(half_of_warp());
  if (panel == nullptr) return {};
  return load_window(panel + kv_panel_bytes(DType::kInt8, n) + kKvScalesBytes, n,
                     (part.n_seen_of(half_of_warp()) + kWordCodes - 1) / kWordCodes, 0,
                     (chunk * kQuarter + quarter_of_warp()) * kColumns);
}

// Keys and values of the first 2 * kWindow and kQuarter * kColumns columns, for all tiles.
struct Held {
  Window keys;
  Window values;
};

// The scales of a lane's positions, as they lie on the tape: those of keys, logarithms of those of
// values. Sixteen lanes have one block.
struct Scales {
  std::uint16_t key[kLanePositions];
  std::uint16_t value[kLanePositions];
};
DUPLEX_DEVICE int half_of_lane() { return thread_index() % kWarp / kLanes; }
DUPLEX_DEVICE int lane_of_block() { return thread_index() % kLanes; }

DUPLEX_DEVICE Scales scales_of(const Part& part, std::int32_t n) {
  Scales scales{};
  const std::byte* const panel = part.block(half_of_lane());
  if (panel == nullptr) return scales;
  const auto* const keys = reinterpret_cast<const std::uint16_t*>(panel);
  const auto* const values =
      reinterpret_cast<const std::uint16_t*>(panel + kv_panel_bytes(DType::kInt8, n));
  for (int i = 0; i < kLanePositions; ++i) {
    scales.key[i] = keys[i * kLanes + lane_of_block()];
    scales.value[i] = values[i * kLanes + lane_of_block()];
  }
  return scales;
}

// What a warp knows of the query of its vector.
struct Query {
  float scale;
  std::int32_t start;  // of a sum of products: keys' codes are stored plus 128
};

DUPLEX_DEVICE Query quantise_query(const Walk& walk, const Tile& tile) {
  const int v = thread_index() / kWarp, lane = thread_index() % kWarp;
  if (v >= walk.count) return {};
  const std::int32_t n = walk.args.d_head_padded;
  const float* const q = static_cast<const float*>(walk.args.q.data) +
                         walk.batch_row(v) * walk.args.q.stride + walk.head(v) * n;
  const float scale = kv_scale(q, n), inverse = 1.0f / scale;
  float sum = 0.0f;  // of integers, exact
  for (std::int32_t c = lane * kFour; c < n; c += kWarp * kFour) {
    const Four codes = nearest_codes(load_four(q + c), inverse);
    for (const float code : codes.v) sum += code;
    *reinterpret_cast<std::uint32_t*>(tile.queries + v * tile.query_stride + c) = code_word(codes);
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask, kWarp);
  return {scale, -128 * static_cast<std::int32_t>(sum)};
}

// products = codes of q . codes of k, by halves of the head's width.
DUPLEX_DEVICE void multiply_keys(const Walk& walk, const Part& part, const Tile& tile, Held& held) {
  const std::int32_t n = walk.args.d_head_padded, v = lane_of_eight();
  std::int32_t acc[2][4] = {};
  for (std::int32_t window = half_of_warp(); window * kWindow < n; window += 2) {
    const std::int32_t k = window * kWindow + lane_of_four() * 4 * kWordCodes;
    Words x{};
    if (v < walk.count && k < n)
      x = *reinterpret_cast<const Words*>(tile.queries + v * tile.query_stride + k);
    if (n > 2 * kWindow) held.keys = keys_of(part, n, window);
    multiply_window(held.keys, x, acc,
                    [](std::int32_t (&sums)[4], const Words& a, std::uint32_t b0,
                       std::uint32_t b1) { multiply_add_left_unsigned(sums, a, b0, b1); });
  }
  store_sums(
      acc, tile.products + half_of_warp() * kVectors * kScoreStride + quarter_of_warp() * kColumns,
      kScoreStride);
}

// Where a block's share of a vector goes; `part` is what the part leaves.
DUPLEX_DEVICE float* block_of(float* part, std::int32_t n, std::int32_t v, int half) {
  return part + (v * 2 + half) * block_floats(n);
}

// Products to codes of weights 2^(score - max of the block), a warp for each vector.
DUPLEX_DEVICE void weigh(const Walk& walk, const Tile& tile, const Own& own, const Scales& scales,
                         const Query& query, float* left) {
  const int v = thread_index() / kWarp, place = half_of_lane() * kBlock + lane_of_block();
  const std::int32_t* const low = tile.products + v * kScoreStride + place;
  const std::int32_t* const high = low + kVectors * kScoreStride;
  const float factor = 1.0f / static_cast<float>(walk.args.shape.d_head) * kLog2e;
  float scores[kLanePositions];
  float best = kMinusInfinity;
  for (int i = 0; i < kLanePositions; ++i) {
    const auto product = static_cast<float>(low[i * kLanes] + high[i * kLanes] + query.start);
    const float score = fmaf(product, bf16_to_float(scales.key[i]) * factor * query.scale,
                             bf16_to_float(scales.value[i]));
    scores[i] = own.score(i, score, own.tau * kLog2e);
    best = scores[i] > best ? scores[i] : best;
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(best, mask, kLanes);
    best = other > best ? other : best;
  }
  const float shift = best == kMinusInfinity ? 0.0f : best - kLog2Of255;
  float sum = 0.0f;
  for (int i = 0; i < kLanePositions; ++i) {
    const float log2 = bf16_to_float(scales.value[i]);
    const float inverse = exp2_of_bf16(0.0f - (log2 > -126.0f ? log2 : -126.0f));
    const float weight = scores[i] == kMinusInfinity ? 0.0f : exp2_of_bf16(scores[i] - shift);
    tile.weights[v * kWeightStride + place + i * kLanes] =
        static_cast<std::uint8_t>(static_cast<std::int32_t>(rintf(weight)));
    sum = fmaf(weight, inverse, sum);
  }
  if (v >= walk.count) return;
  const std::int32_t n = walk.args.d_head_padded;
  float* const behind = block_of(left, n, v, half_of_lane()) + n;
  behind[lane_of_block()] = sum;
  if (lane_of_block() == 0) behind[kLanes] = best;
}

// Codes of weights . codes of values, by blocks.
DUPLEX_DEVICE void multiply_values(const Walk& walk, const Part& part, const Tile& tile, Held& held,
                                   float* left) {
  const std::int32_t n = walk.args.d_head_padded;
  const Words x =
      *reinterpret_cast<const Words*>(tile.weights + lane_of_eight() * kWeightStride +
                                      half_of_warp() * kBlock + lane_of_four() * 4 * kWordCodes);
  for (std::int32_t chunk = 0; chunk * kQuarter * kColumns < n; ++chunk) {
    const std::int32_t column =
        (chunk * kQuarter + quarter_of_warp()) * kColumns + lane_of_eight() * 4;
    if (n > kQuarter * kColumns) held.values = values_of(part, n, chunk);
    std::int32_t acc[2][4] = {};
    multiply_window(held.values, x, acc,
                    [](std::int32_t (&sums)[4], const Words& a, std::uint32_t b0,
                       std::uint32_t b1) { multiply_add_right_unsigned(sums, a, b0, b1); });
    for (int i = 0; i < 2; ++i) {
      const std::int32_t v = lane_of_four() * 2 + i;
      if (v >= walk.count || column >= n) continue;
      store_four(block_of(left, n, v, half_of_warp()) + column,
                 {{static_cast<float>(acc[0][i]), static_cast<float>(acc[0][2 + i]),
                   static_cast<float>(acc[1][i]), static_cast<float>(acc[1][2 + i])}});
    }
  }
}

DUPLEX_KERNEL_OF(kThreads, 2) attention_int8_kernel(Launch launch) {
  let_next_grid_begin();
  const std::int32_t n = launch.args.d_head_padded;
  const Tile tile = lay_out(launch);
  const Walk all = walk_of(launch, tile.n_groups);
  const std::int64_t index = all.part(block_z());
  const bool is_empty = index < 0, is_older = is_before_segment(all, index);
  if (is_empty) wait_for_previous_grid();
  if (is_empty) return;
  const Part part = part_at<DType::kInt8>(all, index);
  const float* const bank = begin_bank(launch, all, part.begin);
  if (!is_older) wait_for_previous_grid();  // for the newest keys
  Held held{keys_of(part, n, half_of_warp()), values_of(part, n, 0)};
  const Scales scales = scales_of(part, n);
  if (is_older) wait_for_previous_grid();
  wait_copies<0>();
  sync_block();
  for (std::int32_t i = 0; i * kVectors < all.count; ++i) {
    const Walk walk = all.tile(i);
    if (index < walk.first_visible(0) / kPartPositions ||
        index > walk.position(walk.count - 1) / kPartPositions)
      continue;  // none of these vectors looks here
    const Own own = look<kLanes>(launch, walk, part, bank, half_of_lane(), lane_of_block());
    const Query query = quantise_query(walk, tile);
    float* const left = launch.sums<DType::kInt8>(i, block_z());
    sync_block();
    multiply_keys(walk, part, tile, held);
    sync_block();
    weigh(walk, tile, own, scales, query, left);
    sync_block();
    multiply_values(walk, part, tile, held, left);
  }
}

// ---- the blocks of a vector

std::size_t combine_bytes(const AttentionArgs& args) {
  return static_cast<std::size_t>(args.d_head_padded + kLanes) * sizeof(float) + walk_bytes(args);
}

// Where the parts of a run have left what the blocks of one vector are to add.
struct Blocks {
  const float* parts;  // of its tile, from the run's first on
  std::int32_t n;
  std::int64_t first_part;
  std::int32_t v;

  DUPLEX_DEVICE const float* at(std::int64_t block) const {
    return parts + (block / 2 - first_part) * part_floats(DType::kInt8, n) +
           (v * 2 + block % 2) * block_floats(n);
  }
};

// One column, of the weighted values or of the sums of weights.
struct Fold {
  float sum = 0.0f;
  float max = kMinusInfinity;

  // Over the blocks from `block` to `last`. Forgotten blocks have seen nothing.
  DUPLEX_DEVICE void add(const Blocks& blocks, std::int64_t block, std::int64_t last,
                         std::int32_t column) {
    const std::int32_t best_at = blocks.n + kLanes;
    for (; block <= last; block += kBlocksAtOnce) {
      float x[kBlocksAtOnce] = {}, best[kBlocksAtOnce];
#pragma unroll
      for (int i = 0; i < kBlocksAtOnce; ++i) {
        best[i] = kMinusInfinity;
        if (block + i > last) continue;
        const float* const of = blocks.at(block + i);
        x[i] = of[column];
        best[i] = of[best_at];
      }
#pragma unroll
      for (int i = 0; i < kBlocksAtOnce; ++i) {
        if (best[i] > max + kScoreRoom) {
          if (max != kMinusInfinity) sum *= exp2_of_bf16(max - best[i]);
          max = best[i];
        }
        if (best[i] != kMinusInfinity) sum = fmaf(x[i], exp2_of_bf16(best[i] - max), sum);
      }
    }
  }
};

DUPLEX_KERNEL combine_kernel(Launch launch) {
  let_next_grid_begin();
  const std::int32_t n = launch.args.d_head_padded;
  auto* const outs = reinterpret_cast<float*>(shared_memory());  // (n), then the sums of weights
  const Walk all = walk_of(launch, reinterpret_cast<std::int32_t*>(outs + n + kLanes));
  wait_for_previous_grid();
  const Walk walk = all.tile(block_z() / kVectors);
  const std::int32_t v = block_z() % kVectors;
  if (v >= walk.count) return;
  const std::int64_t first = walk.first_visible(v) / kBlock, last = walk.position(v) / kBlock;
  const std::int64_t first_part = first / 2;
  for (std::int32_t c = thread_index(); c < n + kLanes; c += kThreads) {
    Fold fold;
    std::int64_t at = first_part - all.first_visible(0) / kPartPositions;
    walk.for_runs(first_part, last / 2, [&](std::int64_t begin, std::int64_t end) {
      const Blocks blocks{launch.sums<DType::kInt8>(block_z() / kVectors, at), n, begin, v};
      fold.add(blocks, begin == first_part ? first : 2 * begin,
               end * 2 <= last ? 2 * end - 1 : last, c);
      at += end - begin;
    });
    outs[c] = fold.sum;
  }
  sync_block();
  float sum = outs[n + lane_of_block()];
  for (int delta = kLanes / 2; delta > 0; delta /= 2) sum += shuffle_down(sum, delta, kLanes);
  sum = shuffle_from(sum, 0, kLanes);
  for (std::int32_t c = thread_index() * kFour; c < n; c += kThreads * kFour) {
    Four out = load_four(outs + c);
    for (float& value : out.v) value /= sum;
    store_four(launch.args.out, walk.batch_row(v), walk.head(v) * n + c, out);
  }
}

}  // namespace

void launch_attention_int8(Runtime& runtime, const Launch& launch, std::int64_t n_groups) {
  const AttentionArgs& args = launch.args;
  runtime.launch_early(attention_int8_kernel, {n_groups, args.shape.n_kv_heads, launch.n_parts},
                       kThreads, tile_bytes(launch), launch);
  runtime.launch_early(
      combine_kernel,
      {n_groups, args.shape.n_kv_heads, std::int64_t{launch.group_tiles} * kVectors}, kThreads,
      combine_bytes(args), launch);
}

}  // namespace duplex::cuda
