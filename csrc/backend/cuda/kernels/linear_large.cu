// Matrix products of many rows, in bfloat16: a prefill, a session that catches up, a long prompt.
//
// A thread block has a square of outputs by rows. Weights (as they are packed: pack.cu) and rows
// come through a ring of stages in shared memory. The order of sums is that of few rows: steps of
// 32 reduction indices, eight parts with every eighth step, the parts added in order; an output is
// one chain of the same mma.sync in either kernel, so a row has the same bits in any company.
//
// Cost of a step of a square: 64 bytes for each output and each row from the second-level cache,
// side * side / 128 products.
#include "kernels/linear.cuh"

namespace duplex::cuda {
namespace {

constexpr int kStep = kBf16Step;
constexpr int kParts = 8;  // the warps of linear_bf16.cuh
constexpr int kStages = 4;
constexpr int kWarpRows = 4;  // tiles of rows of a warp
constexpr int kStepBytes = kStep * 2;
constexpr std::int32_t kFewRows = 64;
constexpr int kManyBlocks = 132;  // multiprocessors that larger squares would leave idle

// The work of one thread block; kSide is 64 or 128.
template <int kSide>
struct Square {
  static constexpr int kThreads = kSide * 2;
  static constexpr int kWarpTiles = kSide / 2 / kTileOutputs;  // of outputs, of a warp
  static constexpr int kHalfBytes = kSide * kStepBytes;        // of a stage: weights, then rows
  static constexpr int kPieces = kHalfBytes / 16 / kThreads;   // of either, of a thread
  static constexpr int kRingBytes = kStages * 2 * kHalfBytes;
  static constexpr std::size_t kBytes = kRingBytes + sizeof(float) * kSide * kSide;

  const LinearArgs& args;
  std::int32_t first_output;
  std::int32_t first_row;
  std::int32_t n_outputs;  // of the matrix, of whole tiles
  std::int32_t n_steps;

  // Where a thread's pieces of 16 bytes come from: of step 0.
  struct Sources {
    const std::byte* weights[kPieces];
    const std::uint16_t* rows[kPieces];
    bool has_weights[kPieces];
  };
  DUPLEX_DEVICE Sources sources() const {
    constexpr int kTileBytes = kTileOutputs * kStepBytes;
    Sources from;
    for (int p = 0; p < kPieces; ++p) {
      const int at = (thread_index() + p * kThreads) * 16;
      const std::int32_t tile = first_output / kTileOutputs + at / kTileBytes;
      from.has_weights[p] = tile * kTileOutputs < n_outputs;
      from.weights[p] = static_cast<const std::byte*>(args.w.data) +
                        std::int64_t{tile} * n_steps * kTileBytes + at % kTileBytes;
      // Rows behind the last are the last once more.
      std::int32_t row = first_row + at / kStepBytes;
      if (row >= args.n_rows) row = args.n_rows - 1;
      from.rows[p] = static_cast<const std::uint16_t*>(args.x.data) + row * args.x.stride +
                     at % kStepBytes / 2;
    }
    return from;
  }

  // Starts the copies of a step to a stage, as one group; of step -1, an empty group.
  DUPLEX_DEVICE void fetch(const Sources& from, std::byte* stage, std::int32_t step) const {
    if (step >= 0) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int at = (thread_index() + p * kThreads) * 16;
        if (from.has_weights[p])
          copy_async(stage + at, from.weights[p] + step * (kTileOutputs * kStepBytes));
        // Columns behind the last are zeros.
        if (step * kStep + at % kStepBytes / 2 < args.w.n_in)
          copy_async(stage + kHalfBytes + at, from.rows[p] + step * kStep);
        else
          *reinterpret_cast<Words*>(stage + kHalfBytes + at) = Words{};
      }
    }
    commit_copies();
  }

  DUPLEX_DEVICE void multiply(const std::byte* stage,
                              float (&acc)[kWarpTiles][kWarpRows][4]) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    const auto* const weights =
        reinterpret_cast<const Words*>(stage) + warp % 2 * kWarpTiles * 2 * kWarp + lane;
    const auto* const rows =
        reinterpret_cast<const Words*>(stage + kHalfBytes) + warp / 2 * kWarpRows * kWarp + lane;
    Words x[kWarpRows];
    for (int r = 0; r < kWarpRows; ++r) x[r] = rows[r * kWarp];
    for (int t = 0; t < kWarpTiles; ++t) {
      Words w = weights[t * 2 * kWarp];
      for (int r = 0; r < kWarpRows; ++r) multiply_add(acc[t][r], w, x[r].v[0], x[r].v[1]);
      w = weights[(t * 2 + 1) * kWarp];
      for (int r = 0; r < kWarpRows; ++r) multiply_add(acc[t][r], w, x[r].v[2], x[r].v[3]);
    }
  }

  // Adds a part to the sums of the parts before it, or stores the sums of them all. A thread's own
  // sums lie n_threads() apart in shared memory: there is no room for them beside those of a part.
  DUPLEX_DEVICE void add(float* sums, std::int32_t part,
                         float (&acc)[kWarpTiles][kWarpRows][4]) const {
    float* at = sums + thread_index();
    for (int t = 0; t < kWarpTiles; ++t)
      for (int r = 0; r < kWarpRows; ++r)
        for (int i = 0; i < 4; ++i, at += kThreads) {
          *at = part == 0 ? acc[t][r][i] : *at + acc[t][r][i];
          acc[t][r][i] = 0.0f;
        }
  }

  DUPLEX_DEVICE void store(const float* sums) const {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    for (int t = 0; t < kWarpTiles; ++t) {
      const std::int32_t tile = first_output / kTileOutputs + warp % 2 * kWarpTiles + t;
      if (tile * kTileOutputs >= n_outputs) break;
      for (int r = 0; r < kWarpRows; ++r)
        for (int i = 0; i < 2; ++i) {
          const std::int32_t row =
              first_row + (warp / 2 * kWarpRows + r) * kTileRows + lane % 4 * 2 + i;
          if (row >= args.n_rows) continue;
          const float* const at = sums + ((t * kWarpRows + r) * 4 + i) * kThreads + thread_index();
          const float value = at[0], other = at[2 * kThreads];  // of 8 outputs further on
          if (args.activated.data != nullptr) {
            store_activated(args.activated, row, tile * kTilePairs + lane / 4, value, other);
            continue;
          }
          float* const y = args.y + row * args.y_stride + tile * kTileOutputs + lane / 4;
          y[0] = args.divisor == 1.0f ? value : value / args.divisor;
          y[kTilePairs] = args.divisor == 1.0f ? other : other / args.divisor;
        }
    }
  }
};

// Which step comes when: those of a part one after the other.
struct Cursor {
  std::int32_t part = 0;
  std::int32_t step = 0;

  template <int kSide>
  DUPLEX_DEVICE void advance(const Square<kSide>& square) {
    step += kParts;
    if (step >= square.n_steps) step = ++part;
  }
};

template <int kSide>
DUPLEX_KERNEL_OF(kSide * 2, 1)
linear_large_kernel(LinearArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  using S = Square<kSide>;
  const S square{args, block_x() * kSide, block_y() * kSide,
                 static_cast<std::int32_t>(tiles_of(args.w) * kTileOutputs),
                 (args.w.n_in + kStep - 1) / kStep};
  std::byte* const ring = shared_memory();
  const auto stage = [&](std::int32_t i) { return ring + i % kStages * 2 * S::kHalfBytes; };
  Cursor next, now;
  std::int32_t fetched = 0;
  const auto from = square.sources();
  const auto fetch = [&] {
    square.fetch(from, stage(fetched), fetched < square.n_steps ? next.step : -1);
    ++fetched;
    next.advance(square);
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();
  auto* const sums = reinterpret_cast<float*>(ring + S::kRingBytes);
  float acc[S::kWarpTiles][kWarpRows][4] = {};
  for (std::int32_t i = 0; i < square.n_steps; ++i) {
    wait_copies<2>();
    sync_block();
    fetch();  // to the stage that all have done with
    square.multiply(stage(i), acc);
    const std::int32_t part = now.part;
    now.advance(square);
    if (now.part != part) square.add(sums, part, acc);
  }
  square.store(sums);
}

template <int kSide>
void launch(Runtime& runtime, const LinearArgs& args) {
  runtime.launch_early(linear_large_kernel<kSide>,
                       {div_up(args.w.n_out, kSide), div_up(args.n_rows, kSide)},
                       Square<kSide>::kThreads, Square<kSide>::kBytes, args);
}

}  // namespace

// Below that the kernel of few rows has more thread blocks, and reads the weights again for it.
bool suits_linear_large(const LinearArgs& args) {
  return args.n_rows > kFewRows &&
         div_up(args.w.n_out, 64) * div_up(args.n_rows, 64) >= 2 * kManyBlocks;
}

void launch_linear_large(Runtime& runtime, const LinearArgs& args) {
  if (div_up(args.w.n_out, 128) * div_up(args.n_rows, 128) >= kManyBlocks)
    launch<128>(runtime, args);
  else
    launch<64>(runtime, args);
}

}  // namespace duplex::cuda
