// Matrix products of a few rows with a large bfloat16 matrix, which is read once for up to 64 rows:
// tiles of 16 outputs in the fragments of the tensor cores. The warps of a thread block share the
// reduction in a fixed way, and their sums are added in the order of the warps, so an output has
// the same bits whatever other rows there are.
#include "kernels/linear.cuh"

namespace duplex::cuda {
namespace {

constexpr int kStep = kBf16Step;  // reduction indices of 16 bytes of every thread's rows
constexpr int kWarps = 8;
constexpr int kAhead = 4;  // steps whose weights are in flight

// The weights of a step lie together: two fragments for each of the 32 threads of a warp.
DUPLEX_DEVICE const Words* fragments(const Job& job, std::int32_t tile, std::int32_t step) {
  const std::int64_t n_steps = (job.n_in + kStep - 1) / kStep;
  return static_cast<const Words*>(job.w) + ((tile * n_steps + step) * 2) * kWarp +
         thread_index() % kWarp;
}

template <int kTiles>
DUPLEX_DEVICE void multiply_step(const Job& job, std::int32_t first, std::int32_t step,
                                 const Words (&w)[2], float (&acc)[kTiles][4]) {
  const int lane = thread_index() % kWarp;
  const std::int32_t k = step * kStep + lane % 4 * 8;
  for (int t = 0; t < kTiles; ++t) {
    const std::int32_t place = first + t * kTileRows + lane / 4;
    Words x{};
    if (place < job.end && k < job.n_in)
      x = *reinterpret_cast<const Words*>(job.row<std::uint16_t>(place) + k);
    multiply_add(acc[t], w[0], x.v[0], x.v[1]);
    multiply_add(acc[t], w[1], x.v[2], x.v[3]);
  }
}

// Outputs of one tile for up to kTiles * 8 rows from `first` on.
template <int kTiles>
DUPLEX_DEVICE void multiply_tile(const Job& job, std::int32_t tile, std::int32_t first) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const std::int32_t n_steps = (job.n_in + kStep - 1) / kStep;
  float acc[kTiles][4] = {};
  for (std::int32_t step = warp; step < n_steps; step += kWarps * kAhead) {
    Words w[kAhead][2] = {};
    for (int i = 0; i < kAhead; ++i) {
      if (step + i * kWarps >= n_steps) break;
      w[i][0] = load_streamed(fragments(job, tile, step + i * kWarps));
      w[i][1] = load_streamed(fragments(job, tile, step + i * kWarps) + kWarp);
    }
    for (int i = 0; i < kAhead; ++i)
      if (step + i * kWarps < n_steps) multiply_step(job, first, step + i * kWarps, w[i], acc);
  }
  // (warp, tile of rows, row, output), then added up in the order of the warps.
  auto* const sums = reinterpret_cast<float*>(shared_memory());
  constexpr int kSums = kTiles * kTileRows * kTileOutputs;
  sync_block();
  for (int t = 0; t < kTiles; ++t)
    for (int i = 0; i < 4; ++i) {
      const int output = lane / 4 + i / 2 * 8, row = lane % 4 * 2 + i % 2;
      sums[warp * kSums + (t * kTileRows + row) * kTileOutputs + output] = acc[t][i];
    }
  sync_block();
  for (int i = thread_index(); i < kSums; i += n_threads()) {
    const std::int32_t place = first + i / kTileOutputs;
    if (place >= job.end) break;
    float sum = sums[i];
    for (int other = 1; other < kWarps; ++other) sum += sums[other * kSums + i];
    if (job.divisor != 1.0f) sum /= job.divisor;
    job.y[place * job.y_stride + tile * kTileOutputs + i % kTileOutputs] = sum;
  }
}

template <int kTiles>
constexpr std::size_t tile_bytes() {
  return sizeof(float) * kWarps * kTiles * kTileRows * kTileOutputs;
}

template <int kTiles>
DUPLEX_KERNEL linear_bf16_kernel(LinearArgs args) {
  multiply_tile<kTiles>(job_of(args), block_x(), block_y() * kTiles * kTileRows);
}

DUPLEX_KERNEL expert_bf16_kernel(ExpertLinearArgs args) {
  const Job job = job_of(args, block_y());
  for (std::int32_t first = job.begin; first < job.end; first += 2 * kTileRows) {
    if (job.end - first > kTileRows)
      multiply_tile<2>(job, block_x(), first);
    else
      multiply_tile<1>(job, block_x(), first);
  }
}

template <int kTiles>
void launch_bf16(Runtime& runtime, const LinearArgs& args) {
  const std::int64_t n_tiles = round_up(args.w.n_out, kPanelOutputs) / kTileOutputs;
  runtime.launch(linear_bf16_kernel<kTiles>, {n_tiles, div_up(args.n_rows, kTiles * kTileRows)},
                 kWarps * kWarp, tile_bytes<kTiles>(), args);
}

}  // namespace

void launch_linear_bf16(Runtime& runtime, const LinearArgs& args) {
  if (args.n_rows <= kTileRows)
    launch_bf16<1>(runtime, args);
  else if (args.n_rows <= 2 * kTileRows)
    launch_bf16<2>(runtime, args);
  else if (args.n_rows <= 3 * kTileRows)
    launch_bf16<3>(runtime, args);
  else if (args.n_rows <= 4 * kTileRows)
    launch_bf16<4>(runtime, args);
  else
    launch_bf16<8>(runtime, args);
}

void launch_expert_bf16(Runtime& runtime, const ExpertLinearArgs& args) {
  runtime.launch(expert_bf16_kernel,
                 {round_up(args.w.n_out, kPanelOutputs) / kTileOutputs, args.n_experts},
                 kWarps * kWarp, tile_bytes<2>(), args);
}

}  // namespace duplex::cuda
