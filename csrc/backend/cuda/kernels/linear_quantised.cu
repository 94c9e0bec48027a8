// Matrix products of a few rows with a large matrix of int8 or int4 codes, which is read once for
// up to 64 rows. The arithmetic is the CPU's (csrc/backend/cpu/kernels_quantised.h), so are the
// bits: rows are quantised to int8 by the same groups as the matrix, a group's sum of products is
// an exact integer, and the groups of an output are one chain of float32 additions in ascending
// order.
//
// Bytes of a matrix per weight: 1 + 1/32 in int8, 1/2 + 1/16 in int4.
#include "kernels/experts.cuh"

namespace duplex::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTilesAtOnce = 2;  // of rows, whose group sums are in shared memory: one a thread
constexpr int kBatches = 4;
constexpr int kTileSums = kTileOutputs * kTileRows;
constexpr int kBatchRows = kTilesAtOnce * kTileRows;
constexpr int kMaxRows = kBatches * kBatchRows;
static_assert(kTilesAtOnce * kTileSums == kThreads);

// Chunks of columns that the warps of a thread block take in one round: one each.
template <int kBits>
constexpr int kRoundGroups = kWarps * kChunkGroups<kBits>;
template <int kBits>
constexpr std::size_t shared_bytes() {
  return sizeof(float) * kRoundGroups<kBits> * kThreads;
}

// What a lane holds of the weights of 16 outputs.
template <int kBits>
struct Chunk {
  Words codes[kChunkWords<kBits>];
  ScalePairs<kBits> scales;
};

template <int kBits>
DUPLEX_DEVICE void load_chunk(const Job& job, std::int32_t tile, std::int32_t chunk,
                              Chunk<kBits>& to) {
  const int lane = thread_index() % kWarp;
  const auto* at = static_cast<const std::byte*>(job.w) + chunk_at<kBits>(job.n_in, tile, chunk);
#pragma unroll
  for (int i = 0; i < kChunkWords<kBits>; ++i)
    to.codes[i] = load_streamed(at + (i * kWarp + lane) * 16);
  to.scales = *reinterpret_cast<const ScalePairs<kBits>*>(at + chunk_scales_at<kBits>(lane / 4));
}

// Of a pair of bfloat16 scales, the one of the upper or the lower 8 outputs.
DUPLEX_DEVICE float scale_of(std::uint32_t pair, int half) {
  return bf16_to_float(static_cast<std::uint16_t>(half == 0 ? pair : pair >> 16));
}

struct alignas(8) TwoRows {
  float v[2];
};

// Sums of one group, times the scales of the outputs, to (output, row) of shared memory. The codes
// of int4 were multiplied as their values times 16.
template <int kBits>
DUPLEX_DEVICE void store_sums(const std::int32_t (&acc)[4], std::uint32_t scales, float* to) {
  const int lane = thread_index() % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = scale_of(scales, half);
    TwoRows rows;
    for (int i = 0; i < 2; ++i)
      rows.v[i] = static_cast<float>(acc[2 * half + i] >> (8 - kBits)) * scale;
    *reinterpret_cast<TwoRows*>(to + (lane / 4 + 8 * half) * kTileRows + lane % 4 * 2) = rows;
  }
}

// The group sums of a chunk for one tile of rows; `row` is the lane's, or null.
template <int kBits>
DUPLEX_DEVICE void multiply_chunk(const Chunk<kBits>& w, const std::byte* row, float* sums) {
  constexpr std::uint32_t kHigh = 0xf0f0f0f0u;
#pragma unroll
  for (int block = 0; block < kChunk / kBlock; ++block) {
    Words x{};
    if (row != nullptr)
      x = *reinterpret_cast<const Words*>(row + block * kBlock + thread_index() % 4 * 16);
    if constexpr (kBits == 8) {
      const Words* const codes = w.codes + 2 * block;
      std::int32_t acc[4] = {};
      multiply_add(acc, codes[0], x.v[0], x.v[1]);
      multiply_add(acc, codes[1], x.v[2], x.v[3]);
      store_sums<kBits>(acc, w.scales.v[block], sums + block * kThreads);
    } else {
      Words low, high;
      for (int i = 0; i < 4; ++i) {
        low.v[i] = w.codes[block].v[i] << 4 & kHigh;
        high.v[i] = w.codes[block].v[i] & kHigh;
      }
      std::int32_t first[4] = {}, second[4] = {};
      multiply_add(first, low, x.v[0], x.v[1]);
      multiply_add(second, high, x.v[2], x.v[3]);
      store_sums<kBits>(first, w.scales.v[2 * block], sums + 2 * block * kThreads);
      store_sums<kBits>(second, w.scales.v[2 * block + 1], sums + (2 * block + 1) * kThreads);
    }
  }
}

// The row of a thread's sum in a batch; its output is thread_index() % kTileSums / kTileRows.
DUPLEX_DEVICE std::int32_t place_of(std::int32_t first, int batch) {
  return first + batch * kBatchRows + thread_index() / kTileSums * kTileRows +
         thread_index() % kTileRows;
}

// Adds the groups of a round to the thread's sum, in their order.
template <int kBits>
DUPLEX_DEVICE float add_groups(const Job& job, std::int32_t place, std::int32_t round,
                               const float* parts, float sum) {
  constexpr int kGroup = kChunk / kChunkGroups<kBits>;
  const std::int32_t begin = round * kChunkGroups<kBits>;
  std::int32_t n = (job.n_in + kGroup - 1) / kGroup - begin;
  if (n > kRoundGroups<kBits>) n = kRoundGroups<kBits>;
  const auto* scales =
      reinterpret_cast<const float*>(job.row<std::byte>(place) + row_codes_bytes(job.n_in)) + begin;
#pragma unroll 8
  for (std::int32_t i = 0; i < n; ++i)
    sum = fmaf(parts[i * kThreads + thread_index()], scales[i], sum);
  return sum;
}

// Outputs of one tile for up to kMaxRows rows from `first` on. Rows are those of the grid before,
// weights are nobody's: the first of them are on their way while it ends.
template <int kBits>
DUPLEX_DEVICE void multiply_tile(const Job& job, std::int32_t tile, std::int32_t first) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  auto* const parts = reinterpret_cast<float*>(shared_memory());  // (group, tile, output, row)
  const auto n_chunks = static_cast<std::int32_t>(chunks_of(job.n_in));
  float sums[kBatches] = {};
  Chunk<kBits> w{}, next{};
  if (warp < n_chunks) load_chunk<kBits>(job, tile, warp, w);
  wait_for_previous_grid();
  for (std::int32_t round = 0; round < n_chunks; round += kWarps) {
    const std::int32_t chunk = round + warp;
    if (chunk + kWarps < n_chunks) load_chunk<kBits>(job, tile, chunk + kWarps, next);
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
      if (first + batch * kBatchRows >= job.end) break;
      for (int t = 0; t < kTilesAtOnce && chunk < n_chunks; ++t) {
        const std::int32_t place = first + batch * kBatchRows + t * kTileRows;
        if (place >= job.end) break;
        const bool has_row = place + lane / 4 < job.end;
        multiply_chunk<kBits>(
            w, has_row ? job.row<std::byte>(place + lane / 4) + chunk * kChunk : nullptr,
            parts + warp * kChunkGroups<kBits> * kThreads + t * kTileSums);
      }
      sync_block();
      const std::int32_t place = place_of(first, batch);
      if (place < job.end) sums[batch] = add_groups<kBits>(job, place, round, parts, sums[batch]);
      sync_block();
    }
    w = next;
  }
  const int output = thread_index() % kTileSums / kTileRows;
  if (job.activated.data != nullptr) {  // the up of a gate is another warp's
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch)
      parts[batch * kThreads + thread_index()] = sums[batch];
    sync_block();
    if (output >= kTilePairs) return;
#pragma unroll 1
    for (int batch = 0; batch < kBatches; ++batch) {
      const std::int32_t place = place_of(first, batch);
      if (place >= job.end) break;
      const float* const gate = parts + batch * kThreads + thread_index();
      store_activated(job.activated, job.out_row(place), tile * kTilePairs + output, gate[0],
                      gate[kTilePairs * kTileRows]);
    }
    return;
  }
#pragma unroll
  for (int batch = 0; batch < kBatches; ++batch) {
    const std::int32_t place = place_of(first, batch);
    if (place < job.end)
      job.out(place)[tile * kTileOutputs + output] =
          job.divisor == 1.0f ? sums[batch] : sums[batch] / job.divisor;
  }
}

template <int kBits>
DUPLEX_KERNEL linear_quantised_kernel(LinearArgs args) {
  let_next_grid_begin();
  Job job = job_of(args);
  const std::int32_t first = block_y() * kMaxRows;  // the rows of this thread block
  if (job.end > first + kMaxRows) job.end = first + kMaxRows;
  multiply_tile<kBits>(job, block_x(), first);
}

template <int kBits>
DUPLEX_KERNEL expert_quantised_kernel(ExpertLinearArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  const Job job = job_of(args, shared_memory() + shared_bytes<kBits>());
  for (std::int32_t first = job.begin; first < job.end; first += kMaxRows) {
    if (first > job.begin) sync_block();  // ups may be read yet
    multiply_tile<kBits>(job, block_x(), first);
  }
}

template <int kBits>
void launch_linear_of(Runtime& runtime, const LinearArgs& args) {
  runtime.launch_early(linear_quantised_kernel<kBits>,
                       {tiles_of(args.w), div_up(args.n_rows, kMaxRows)}, kThreads,
                       shared_bytes<kBits>(), args);
}

template <int kBits>
void launch_expert_of(Runtime& runtime, const ExpertLinearArgs& args) {
  runtime.launch_early(expert_quantised_kernel<kBits>, tile_grid(args), kThreads,
                       shared_bytes<kBits>() + expert_room_bytes(args), args);
}

// ---- rows

struct QuantiseRowsArgs {
  Rows x;
  std::int32_t n_in;
  std::byte* out;
  std::int64_t out_stride;
};

// One warp a block of 64 columns, two columns a lane: round(x * 127 / max |x|) of their group.
template <int kBits>
DUPLEX_KERNEL quantise_rows_kernel(QuantiseRowsArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  constexpr int kGroupLanes = kBits == 8 ? 32 : 16;
  const int lane = thread_index() % kWarp;
  const std::int64_t block = std::int64_t{block_y()} * kWarps + thread_index() / kWarp;
  if (block * kBlock >= row_codes_bytes(args.n_in)) return;
  const std::int64_t column = block * kBlock + 2 * lane;
  float x[2] = {};
  if (column < args.n_in)
    for (int i = 0; i < 2; ++i)
      x[i] = load(args.x.data, args.x.dtype, block_x() * args.x.stride + column + i);
  float largest = fmaxf(fabsf(x[0]), fabsf(x[1]));
  for (int mask = kGroupLanes / 2; mask > 0; mask /= 2)
    largest = fmaxf(largest, shuffle_xor(largest, mask, kGroupLanes));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  std::uint32_t codes = 0;
  for (int i = 0; i < 2; ++i) {
    // The bounds are for rows that are not numbers.
    const float code = fminf(fmaxf(rintf(x[i] * inverse), -127.0f), 127.0f);
    codes |= (static_cast<std::uint32_t>(static_cast<std::int32_t>(code)) & 0xffu) << 8 * i;
  }
  std::byte* const row = args.out + block_x() * args.out_stride;
  const int in_step = 2 * lane % 32;
  const int at = in_step / 8 * 16 + lane / 16 * 8 + in_step % 8;
  *reinterpret_cast<std::uint16_t*>(row + block * kBlock + at) = static_cast<std::uint16_t>(codes);
  if (lane % kGroupLanes == 0)
    reinterpret_cast<float*>(
        row + row_codes_bytes(args.n_in))[block * (kWarp / kGroupLanes) + lane / kGroupLanes] =
        largest / 127.0f;
}

template <int kBits>
Rows launch_quantise(Runtime& runtime, const Rows& x, std::int32_t n_rows, const PackedMatrix& w,
                     void* out) {
  const std::int64_t stride = row_bytes<kBits>(w.n_in);
  runtime.launch_early(quantise_rows_kernel<kBits>,
                       {n_rows, div_up(row_codes_bytes(w.n_in), kWarps * kBlock)}, kThreads, 0,
                       QuantiseRowsArgs{x, w.n_in, static_cast<std::byte*>(out), stride});
  return {out, stride, w.dtype};
}

}  // namespace

std::size_t quantised_rows_bytes(std::int64_t n_rows, const PackedMatrix& w) {
  if (!is_quantised(w.dtype)) return 0;
  return static_cast<std::size_t>(
      n_rows * (w.dtype == DType::kInt8 ? row_bytes<8>(w.n_in) : row_bytes<4>(w.n_in)));
}

Rows launch_quantise_rows(Runtime& runtime, const Rows& x, std::int32_t n_rows,
                          const PackedMatrix& w, void* out) {
  if (!is_quantised(w.dtype)) return x;
  return w.dtype == DType::kInt8 ? launch_quantise<8>(runtime, x, n_rows, w, out)
                                 : launch_quantise<4>(runtime, x, n_rows, w, out);
}

void launch_linear_quantised(Runtime& runtime, const LinearArgs& args) {
  if (args.w.dtype == DType::kInt8)
    launch_linear_of<8>(runtime, args);
  else
    launch_linear_of<4>(runtime, args);
}

void launch_expert_quantised(Runtime& runtime, const ExpertLinearArgs& args) {
  if (args.w.dtype == DType::kInt8)
    launch_expert_of<8>(runtime, args);
  else
    launch_expert_of<4>(runtime, args);
}

}  // namespace duplex::cuda
