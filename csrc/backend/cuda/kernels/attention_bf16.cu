// Attention over the tape in bfloat16, on the tensor cores, cut as in attention_parts.cuh.
//
// A part has one maximum. Parts are added in eight strands, by their index, and those in order; so
// a row's result depends on its own position and keys alone.
//
// Cost of a tile: 2 * 2 * d_head bytes a position, once for a group. A chain of the segment's
// place, one load of the keys, 8 products, the weights, 8 products; three barriers.
#include "kernels/attention_bias.cuh"

namespace duplex::cuda {
namespace {

constexpr int kWindow = 2 * kWindowWords;     // reduction indices of a window
constexpr int kWindows = 2;                   // of a warp at once
constexpr int kScoreStride = kParts + kFour;  // words that lanes store together: other banks
constexpr int kWeightStride = kParts + kWindow;

// Shared memory: scores (2, kVectors, positions) of the halves of a head, weights
// (kVectors, positions) in bfloat16, results (2, kVectors, d_head) of the halves of the positions.
struct Tile {
  float* scores;
  std::uint16_t* weights;
  float* out;
  float* max;  // (kVectors), then the sums of weights
  std::int32_t* n_groups;
  std::int32_t out_stride;
};

// Behind the bank.
DUPLEX_DEVICE Tile lay_out(const Launch& launch) {
  const AttentionArgs& args = launch.args;
  Tile tile;
  tile.out_stride = args.d_head_padded + kFour;
  tile.scores = reinterpret_cast<float*>(shared_memory() + bank_bytes(launch));
  tile.weights = reinterpret_cast<std::uint16_t*>(tile.scores + 2 * kVectors * kScoreStride);
  tile.out = reinterpret_cast<float*>(tile.weights + kVectors * kWeightStride);
  tile.max = tile.out + 2 * kVectors * tile.out_stride;
  tile.n_groups = reinterpret_cast<std::int32_t*>(tile.max + 2 * kVectors);
  return tile;
}

std::size_t tile_bytes(const Launch& launch) {
  const AttentionArgs& args = launch.args;
  const std::int64_t floats = 2 * kVectors * (kScoreStride + args.d_head_padded + kFour + 1);
  return static_cast<std::size_t>(floats) * sizeof(float) +
         kVectors * kWeightStride * sizeof(std::uint16_t) + walk_bytes(args) + bank_bytes(launch);
}

// What a warp multiplies of a part: its columns and half of the reduction.
DUPLEX_DEVICE Window keys_of(const Part& part, std::int32_t n, std::int32_t chunk, int i) {
  const std::byte* const panel = part.block(quarter_of_warp() / 2);
  const std::int32_t window = (chunk * kWindows + i) * 2 + half_of_warp();
  return load_window(panel, kBlock, panel == nullptr ? 0 : n / 2, window * kWindowWords,
                     quarter_of_warp() % 2 * kColumns);
}
DUPLEX_DEVICE Window values_of(const Part& part, std::int32_t n, std::int32_t chunk, int i) {
  const std::byte* const panel = part.block(half_of_warp());
  if (panel == nullptr) return {};
  return load_window(panel + kv_panel_bytes(DType::kBF16, n), n,
                     (part.n_seen_of(half_of_warp()) + 1) / 2, i * kWindowWords,
                     (chunk * kQuarter + quarter_of_warp()) * kColumns);
}

DUPLEX_DEVICE void multiply_window(const Window& window, const Words& x, float (&acc)[2][4]) {
  multiply_window(window, x, acc,
                  [](float (&sums)[4], const Words& a, std::uint32_t b0, std::uint32_t b1) {
                    multiply_add(sums, a, b0, b1);
                  });
}

// Keys and values of the first kQuarter * kColumns columns, for all tiles.
struct Held {
  Window keys[kWindows];
  Window values[kWindows];
};

// scores = q . k, by halves of the head's width.
DUPLEX_DEVICE void multiply_keys(const Walk& walk, const Part& part, const Tile& tile, Held& held) {
  const std::int32_t n = walk.args.d_head_padded, v = lane_of_eight();
  const auto* const q =
      static_cast<const std::uint16_t*>(walk.args.q.data) +
      (v < walk.count ? walk.batch_row(v) * walk.args.q.stride + walk.head(v) * n : 0);
  float acc[2][4] = {};
  for (std::int32_t chunk = 0; chunk * kWindows * 2 * kWindow < n; ++chunk)
    for (int i = 0; i < kWindows; ++i) {
      const std::int32_t k =
          ((chunk * kWindows + i) * 2 + half_of_warp()) * kWindow + lane_of_four() * 8;
      Words x{};
      if (v < walk.count && k < n) x = *reinterpret_cast<const Words*>(q + k);
      if (n > kWindows * 2 * kWindow) held.keys[i] = keys_of(part, n, chunk, i);
      multiply_window(held.keys[i], x, acc);
    }
  store_sums(acc,
             tile.scores + half_of_warp() * kVectors * kScoreStride + quarter_of_warp() * kColumns,
             kScoreStride);
}

// Scores to weights exp(score - max), a warp for each vector.
DUPLEX_DEVICE void weigh(const AttentionArgs& args, const Tile& tile, const Own& own) {
  const int v = thread_index() / kWarp, lane = thread_index() % kWarp;
  const float scale = 1.0f / static_cast<float>(args.shape.d_head);
  const float* const low = tile.scores + v * kScoreStride + lane;
  const float* const high = low + kVectors * kScoreStride;
  float scores[kLanePositions];
  float best = kMinusInfinity;
  for (int i = 0; i < kLanePositions; ++i) {
    const float product = (low[i * kWarp] + high[i * kWarp]) * scale;
    scores[i] = own.score(i, product, own.tau);
    best = scores[i] > best ? scores[i] : best;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(best, mask, kWarp);
    best = other > best ? other : best;
  }
  float sum = 0.0f;
  for (int i = 0; i < kLanePositions; ++i) {
    const float weight = scores[i] == kMinusInfinity ? 0.0f : exp_nonpositive(scores[i] - best);
    sum += weight;
    tile.weights[v * kWeightStride + i * kWarp + lane] = float_to_bf16(weight);
  }
  for (int delta = kWarp / 2; delta > 0; delta /= 2) sum += shuffle_down(sum, delta, kWarp);
  if (lane == 0) {
    tile.max[v] = best;
    tile.max[kVectors + v] = sum;
  }
}

// out = weights . values, by halves of the positions.
DUPLEX_DEVICE void multiply_values(const AttentionArgs& args, const Part& part, const Tile& tile,
                                   Held& held) {
  const std::int32_t n = args.d_head_padded;
  const std::uint16_t* const weights =
      tile.weights + lane_of_eight() * kWeightStride + half_of_warp() * kBlock + lane_of_four() * 8;
  for (std::int32_t chunk = 0; chunk * kQuarter * kColumns < n; ++chunk) {
    const std::int32_t column = (chunk * kQuarter + quarter_of_warp()) * kColumns;
    float acc[2][4] = {};
    for (int i = 0; i < kWindows; ++i) {
      if (n > kQuarter * kColumns) held.values[i] = values_of(part, n, chunk, i);
      multiply_window(held.values[i], *reinterpret_cast<const Words*>(weights + i * kWindow), acc);
    }
    if (column + lane_of_eight() * 4 < n)
      store_sums(acc, tile.out + half_of_warp() * kVectors * tile.out_stride + column,
                 tile.out_stride);
  }
}

// The sums of a tile: to `sums` of its part, or divided to where they belong.
DUPLEX_DEVICE void leave(const Walk& walk, const Tile& tile, float* sums) {
  const std::int32_t n = walk.args.d_head_padded;
  const float* const behind = tile.out + kVectors * tile.out_stride;
  for (std::int32_t i = thread_index() * kFour; i < kVectors * n; i += kThreads * kFour) {
    const std::int32_t v = i / n, c = i % n;
    Four y = load_four(tile.out + v * tile.out_stride + c);
    const Four other = load_four(behind + v * tile.out_stride + c);
    for (int j = 0; j < kFour; ++j) y.v[j] += other.v[j];
    if (sums != nullptr) {
      store_four(sums + i, y);
    } else if (v < walk.count) {
      for (float& value : y.v) value /= tile.max[kVectors + v];
      store_four(walk.args.out, walk.batch_row(v), walk.head(v) * n + c, y);
    }
  }
  if (sums != nullptr && thread_index() < 2 * kVectors)
    sums[kVectors * n + thread_index()] = tile.max[thread_index()];
}

DUPLEX_KERNEL_OF(kThreads, 2) attention_bf16_kernel(Launch launch) {
  let_next_grid_begin();
  const std::int32_t n = launch.args.d_head_padded;
  const Tile tile = lay_out(launch);
  const Walk all = walk_of(launch, tile.n_groups);
  const std::int64_t index = all.part(block_z());
  const bool is_empty = index < 0, is_older = is_before_segment(all, index);
  if (is_empty) wait_for_previous_grid();
  if (is_empty) return;
  const Part part = part_at<DType::kBF16>(all, index);
  const float* const bank = begin_bank(launch, all, part.begin);
  if (!is_older) wait_for_previous_grid();  // for the newest keys
  Held held;
  for (int i = 0; i < kWindows; ++i) held.keys[i] = keys_of(part, n, 0, i);
  for (int i = 0; i < kWindows; ++i) held.values[i] = values_of(part, n, 0, i);
  if (is_older) wait_for_previous_grid();
  wait_copies<0>();
  sync_block();
  for (std::int32_t i = 0; i * kVectors < all.count; ++i) {
    const Walk walk = all.tile(i);
    if (index < walk.first_visible(0) / kPartPositions ||
        index > walk.position(walk.count - 1) / kPartPositions)
      continue;  // none of these vectors looks here
    const Own own = look<kWarp>(launch, walk, part, bank, 0, thread_index() % kWarp);
    multiply_keys(walk, part, tile, held);
    sync_block();
    weigh(launch.args, tile, own);
    sync_block();
    multiply_values(launch.args, part, tile, held);
    sync_block();
    leave(walk, tile,
          launch.partial == nullptr ? nullptr : launch.sums<DType::kBF16>(i, block_z()));
  }
}

// ---- the parts of a vector

constexpr int kStrands = kWarps;
constexpr std::int64_t kManyVectors = 512;  // which fill a GPU, however few threads have each
constexpr std::int64_t kManyVectorParts = 64;

std::size_t combine_bytes(const AttentionArgs& args) {
  const std::int64_t floats = kStrands * (args.d_head_padded + kFour);
  return static_cast<std::size_t>(floats) * sizeof(float) + walk_bytes(args);
}

// What the parts of one vector have left. A part whose blocks are all forgotten is not among them:
// it would add nothing.
struct Left {
  const Walk& walk;
  std::int64_t first;  // part, and the last
  std::int64_t last;
  std::int64_t stride;
  const float* sums;
  const float* max;  // kVectors behind it the sum of weights

  DUPLEX_DEVICE std::int64_t count() const {
    return count_parts(walk.segment.forgotten, walk.n_holes(), first, last);
  }

  // The larger of `largest` and the maxima of parts at `index`, index + step, ...
  DUPLEX_DEVICE float largest(std::int64_t index, int step) const {
    float found = kMinusInfinity;
    for (const std::int64_t n = count(); index < n; index += step)
      found = max[index * stride] > found ? max[index * stride] : found;
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const float other = shuffle_xor(found, mask, kWarp);
      found = other > found ? other : found;
    }
    return found;
  }

  // Adds every eighth part, by the part's own index, wherever its run begins: columns c to c + 3,
  // where there are such, and the sums of weights.
  DUPLEX_DEVICE void add_strand(int strand, float largest, std::int32_t c, Four& out,
                                float& sum) const {
    const bool has_columns = c < walk.args.d_head_padded;
    std::int64_t before = 0;  // parts of earlier runs
    walk.for_runs(first, last, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t skipped = (strand + kStrands - begin % kStrands) % kStrands;
#pragma unroll 4
      for (std::int64_t z = before + skipped; z < before + end - begin; z += kStrands) {
        const float at = max[z * stride];
        const float weight = at == kMinusInfinity ? 0.0f : exp_nonpositive(at - largest);
        const Four x = has_columns ? load_four(sums + z * stride + c) : Four{};
        for (int i = 0; i < kFour; ++i) out.v[i] = fmaf(x.v[i], weight, out.v[i]);
        sum = fmaf(max[z * stride + kVectors], weight, sum);
      }
      before += end - begin;
    });
  }
};

DUPLEX_DEVICE Left parts_of(const Launch& launch, const Walk& all, const Walk& walk,
                            std::int32_t tile, std::int32_t v) {
  const std::int32_t n = launch.args.d_head_padded;
  const std::int64_t first = walk.first_visible(v) / kPartPositions;
  const float* const sums =
      launch.sums<DType::kBF16>(tile, first - all.first_visible(0) / kPartPositions);
  return {walk,
          first,
          walk.position(v) / kPartPositions,
          part_floats(DType::kBF16, n),
          sums + std::int64_t{v} * n,
          sums + std::int64_t{kVectors} * n + v};
}

DUPLEX_DEVICE void store_result(const Walk& walk, std::int32_t v, std::int32_t c, Four out,
                                float sum) {
  for (float& value : out.v) value /= sum;
  store_four(walk.args.out, walk.batch_row(v), walk.head(v) * walk.args.d_head_padded + c, out);
}

// Adds the parts of one vector: a warp has a strand, those are added in order.
DUPLEX_KERNEL combine_kernel(Launch launch) {
  let_next_grid_begin();
  const std::int32_t n = launch.args.d_head_padded;
  auto* const outs = reinterpret_cast<float*>(shared_memory());  // (kStrands, d_head)
  float* const sums = outs + kStrands * n;
  float* const slots = sums + kStrands;
  const Walk all = walk_of(launch, reinterpret_cast<std::int32_t*>(outs + kStrands * (n + kFour)));
  wait_for_previous_grid();
  const std::int32_t tile = block_z() / kVectors, v = block_z() % kVectors;
  const Walk walk = all.tile(tile);
  if (v >= walk.count) return;
  const Left left = parts_of(launch, all, walk, tile, v);
  const int strand = thread_index() / kWarp, lane = thread_index() % kWarp;
  float largest = left.largest(thread_index(), kThreads);
  if (lane == 0) slots[strand] = largest;
  sync_block();
  for (int i = 0; i < kStrands; ++i) largest = slots[i] > largest ? slots[i] : largest;
  for (std::int32_t c = lane * kFour; c < round_up(n, kWarp * kFour); c += kWarp * kFour) {
    Four out{};
    float sum = 0.0f;
    left.add_strand(strand, largest, c, out, sum);
    if (c < n) store_four(outs + strand * n + c, out);
    if (c == 0) sums[strand] = sum;
  }
  sync_block();
  for (std::int32_t c = thread_index() * kFour; c < n; c += kThreads * kFour) {
    Four out{};
    float sum = 0.0f;
    for (int i = 0; i < kStrands; ++i) {
      const Four x = load_four(outs + i * n + c);
      for (int j = 0; j < kFour; ++j) out.v[j] += x.v[j];
      sum += sums[i];
    }
    store_result(walk, v, c, out, sum);
  }
}

// The same sums for many vectors: a warp has a vector, and its strands one after the other.
DUPLEX_KERNEL combine_many_kernel(Launch launch) {
  let_next_grid_begin();
  const Walk all = walk_of(launch, reinterpret_cast<std::int32_t*>(shared_memory()));
  wait_for_previous_grid();
  const std::int32_t tile = block_z(), v = thread_index() / kWarp;
  const Walk walk = all.tile(tile);
  if (v >= walk.count) return;
  const Left left = parts_of(launch, all, walk, tile, v);
  const int lane = thread_index() % kWarp;
  const float largest = left.largest(lane, kWarp);
  for (std::int32_t c = lane * kFour; c < launch.args.d_head_padded; c += kWarp * kFour) {
    Four out{};
    float sum = 0.0f;
    for (int i = 0; i < kStrands; ++i) {
      Four x{};
      float of_strand = 0.0f;
      left.add_strand(i, largest, c, x, of_strand);
      for (int j = 0; j < kFour; ++j) out.v[j] += x.v[j];
      sum += of_strand;
    }
    store_result(walk, v, c, out, sum);
  }
}

}  // namespace

void launch_attention_bf16(Runtime& runtime, const Launch& launch, std::int64_t n_groups) {
  const AttentionArgs& args = launch.args;
  runtime.launch_early(attention_bf16_kernel, {n_groups, args.shape.n_kv_heads, launch.n_parts},
                       kThreads, tile_bytes(launch), launch);
  if (launch.n_parts == 1) return;
  const std::int64_t n_tiles = n_groups * args.shape.n_kv_heads * launch.group_tiles;
  if (n_tiles * kVectors >= kManyVectors && launch.n_parts <= kManyVectorParts)
    runtime.launch_early(combine_many_kernel, {n_groups, args.shape.n_kv_heads, launch.group_tiles},
                         kThreads, walk_bytes(args), launch);
  else
    runtime.launch_early(
        combine_kernel,
        {n_groups, args.shape.n_kv_heads, std::int64_t{launch.group_tiles} * kVectors}, kThreads,
        combine_bytes(args), launch);
}

}  // namespace duplex::cuda
