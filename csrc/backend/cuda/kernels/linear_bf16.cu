// Matrix products of a few rows with a large bfloat16 matrix, which is read once for up to 64 rows:
// tiles of 16 outputs in the fragments of the tensor cores.
#include "kernels/linear_bf16.cuh"

namespace duplex::cuda {
namespace {

struct Bf16Round {
  static constexpr int kSharedBytes = 0;
  static constexpr std::int64_t kStepBytes = 2 * kWarp * 16;
  static constexpr std::int64_t tile_bytes(std::int64_t n_steps) { return n_steps * kStepBytes; }

  Words w[kAhead][2];

  // The weights of a step lie together: two fragments for each of the 32 threads of a warp.
  DUPLEX_DEVICE void load(const Job& job, std::int32_t tile, std::int32_t step,
                          std::int32_t n_steps) {
    for (int i = 0; i < kAhead; ++i) {
      if (step + i * kWarps >= n_steps) break;
      const Words* const fragments =
          static_cast<const Words*>(job.w) +
          (std::int64_t{tile} * n_steps + step + i * kWarps) * 2 * kWarp + thread_index() % kWarp;
      w[i][0] = load_streamed(fragments);
      w[i][1] = load_streamed(fragments + kWarp);
    }
  }
  DUPLEX_DEVICE void operands(int i, Words (&a)[2]) const {
    a[0] = w[i][0];
    a[1] = w[i][1];
  }
};

template <int kTiles>
DUPLEX_KERNEL linear_bf16_kernel(LinearArgs args) {
  let_next_grid_begin();
  multiply_tile<Bf16Round, kTiles>(job_of(args), block_x(), block_y() * kTiles * kTileRows,
                                   block_y() == 0);
}

DUPLEX_KERNEL expert_bf16_kernel(ExpertLinearArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  multiply_expert<Bf16Round>(expert_job<Bf16Round>(args), block_x());
}

}  // namespace

void launch_linear_bf16(Runtime& runtime, const LinearArgs& args) {
  if (suits_linear_large(args)) {
    launch_linear_large(runtime, args);
    return;
  }
  with_tiles(args.n_rows, [&]<int kTiles>() {
    runtime.launch_early(linear_bf16_kernel<kTiles>, tile_grid<kTiles>(args), kWarps * kWarp,
                         tile_bytes<kTiles>(), args);
  });
}

void launch_expert_bf16(Runtime& runtime, const ExpertLinearArgs& args) {
  runtime.launch_early(expert_bf16_kernel, tile_grid(args), kWarps * kWarp,
                       kExpertRoomAt<Bf16Round> + expert_room_bytes(args), args);
}

}  // namespace duplex::cuda
