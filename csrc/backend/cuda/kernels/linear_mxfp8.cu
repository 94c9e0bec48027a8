// Matrix products of a few bfloat16 rows with a large matrix in MXFP8, which is read once for up to
// 64 rows. A weight is an E4M3 code times a power of two, which bfloat16 holds exactly, so codes
// become bfloat16 in registers, and the bits are those of a bfloat16 matrix of the same values.
//
// Bytes of a matrix per weight: 1 + 1/32.
#include "kernels/linear_bf16.cuh"

namespace duplex::cuda {
namespace {

// A pair of E4M3 codes in the upper bytes of the two halves of a word, as bfloat16 times 2^-120:
// exponents have 4 bits with bias 7 where bfloat16 has 8 with bias 127. Numbers below the normal
// ones are so in both.
DUPLEX_DEVICE std::uint32_t widen(std::uint32_t codes) {
  return (codes & 0x80008000u) | (codes >> 4 & 0x07f007f0u);
}

// 2^(code - 127) in bfloat16, twice.
DUPLEX_DEVICE std::uint32_t power_pair(std::uint32_t code) {
  const std::uint32_t bits = code == 0 ? 0x40u : code << 7;
  return bits | bits << 16;
}

static_assert(kWarps == 8 && kAhead == 4, "exponents lie as Mxfp8Scales says");

struct Mxfp8Round {
  static constexpr int kSharedBytes = 0;
  static constexpr std::int64_t kStepBytes = mxfp8_codes_at(1, 0);
  static constexpr std::int64_t tile_bytes(std::int64_t n_steps) {
    return mxfp8_tile_bytes(n_steps);
  }
  static constexpr std::uint32_t kTwoTo120 = 0x7b807b80u;  // a pair in bfloat16

  Words codes[kAhead];
  Mxfp8Scales scales;

  DUPLEX_DEVICE void load(const Job& job, std::int32_t tile, std::int32_t step,
                          std::int32_t n_steps) {
    const int lane = thread_index() % kWarp;
    const auto* at =
        static_cast<const std::byte*>(job.w) + tile * mxfp8_tile_bytes(std::int64_t{n_steps});
    for (int i = 0; i < kAhead; ++i) {
      if (step + i * kWarps >= n_steps) break;
      codes[i] = load_streamed(at + mxfp8_codes_at(step + i * kWarps, lane));
    }
    scales = *reinterpret_cast<const Mxfp8Scales*>(at + mxfp8_scales_at(n_steps, step, lane / 4));
  }
  // Words 0 and 1 hold the codes of the first instruction, of the upper and the lower 8 outputs.
  DUPLEX_DEVICE void operands(int i, Words (&a)[2]) const {
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t power = power_pair(scales.v[i][half]);
      for (int f = 0; f < 2; ++f) {
        const std::uint32_t word = codes[i].v[2 * f + half];
        a[f].v[half] = multiply_pairs(multiply_pairs(widen(word << 8), kTwoTo120), power);
        a[f].v[half + 2] = multiply_pairs(multiply_pairs(widen(word), kTwoTo120), power);
      }
    }
  }
};

template <int kTiles>
DUPLEX_KERNEL linear_mxfp8_kernel(LinearArgs args) {
  let_next_grid_begin();
  multiply_tile<Mxfp8Round, kTiles>(job_of(args), block_x(), block_y() * kTiles * kTileRows,
                                    block_y() == 0);
}

DUPLEX_KERNEL expert_mxfp8_kernel(ExpertLinearArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  multiply_expert<Mxfp8Round>(expert_job<Mxfp8Round>(args), block_x());
}

}  // namespace

void launch_linear_mxfp8(Runtime& runtime, const LinearArgs& args) {
  with_tiles(args.n_rows, [&]<int kTiles>() {
    runtime.launch_early(linear_mxfp8_kernel<kTiles>, tile_grid<kTiles>(args), kWarps * kWarp,
                         tile_bytes<kTiles>(), args);
  });
}

void launch_expert_mxfp8(Runtime& runtime, const ExpertLinearArgs& args) {
  runtime.launch_early(expert_mxfp8_kernel, tile_grid(args), kWarps * kWarp,
                       kExpertRoomAt<Mxfp8Round> + expert_room_bytes(args), args);
}

}  // namespace duplex::cuda
