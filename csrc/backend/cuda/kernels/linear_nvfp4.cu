// Matrix products of a few bfloat16 rows with a large matrix in NVFP4, which is read once for up to
// 64 rows. Under one scale a weight is one of eight sizes, with a sign. So a thread block first
// makes a table of what these are in bfloat16 for each scale there is, as they are where such a
// file is loaded in bfloat16; a code then picks its two bytes. The bits are those of a bfloat16
// matrix of the same values.
//
// Bytes of a matrix per weight: 1/2 + 1/16; of each 16 outputs, 32 more. Sizes made: 1024 for each
// thread block, four a thread; of gates and ups with different scales, twice as many.
#include "kernels/linear_bf16.cuh"

namespace duplex::cuda {
namespace {

constexpr int kThreads = kWarps * kWarp;
constexpr int kScales = 128;  // an E4M3 scale without its sign

// The sizes of the eight codes under one scale: their upper bytes, their lower bytes.
struct alignas(16) Sizes {
  std::uint32_t upper[2];
  std::uint32_t lower[2];
};

DUPLEX_DEVICE const std::byte* tile_of(const Job& job, std::int32_t tile, std::int64_t n_steps) {
  return static_cast<const std::byte*>(job.w) + tile * nvfp4_tile_bytes(n_steps);
}

// The tables of a thread block, which multiplies one tile: of its upper and of its lower 8 outputs,
// which are of different matrices where gates and ups are paired.
DUPLEX_DEVICE void make_sizes(const Job& job, std::int32_t tile) {
  const std::int64_t n_steps = (job.n_in + kBf16Step - 1) / kBf16Step;
  const auto* const at =
      reinterpret_cast<const float*>(tile_of(job, tile, n_steps) + nvfp4_matrix_scale_at(n_steps));
  auto* const sizes = reinterpret_cast<Sizes*>(shared_memory());
  const bool is_one = at[0] == at[2] && at[1] == at[3];
  for (int i = thread_index(); i < 2 * kScales; i += n_threads()) {
    const int scale = i / 2, half = i % 2;
    std::uint32_t upper = 0, lower = 0;
    for (int table = 0; table < 2; ++table) {
      if (table == 0 || !is_one) {
        const MatrixScale of_matrix{at[2 * table], at[2 * table + 1] != 0.0f};
        upper = lower = 0;
        for (int code = 0; code < 4; ++code) {
          const std::uint32_t size =
              float_to_bf16(nvfp4_size(static_cast<std::uint32_t>(half * 4 + code),
                                       static_cast<std::uint32_t>(scale), of_matrix));
          upper |= (size >> 8) << 8 * code;
          lower |= (size & 0xffu) << 8 * code;
        }
      }
      sizes[table * kScales + scale].upper[half] = upper;
      sizes[table * kScales + scale].lower[half] = lower;
    }
  }
  sync_block();
}

struct Nvfp4Round {
  static constexpr int kSharedBytes = 2 * kScales * sizeof(Sizes);
  static constexpr std::int64_t kStepBytes = nvfp4_codes_at(1, 0);
  static constexpr std::int64_t tile_bytes(std::int64_t n_steps) {
    return nvfp4_tile_bytes(n_steps);
  }

  Nvfp4Codes codes[kAhead];
  Nvfp4Scales scales[kAhead];

  DUPLEX_DEVICE void load(const Job& job, std::int32_t tile, std::int32_t step,
                          std::int32_t n_steps) {
    const int lane = thread_index() % kWarp;
    const std::byte* const at = tile_of(job, tile, n_steps);
    for (int i = 0; i < kAhead; ++i) {
      const std::int32_t of = step + i * kWarps;
      if (of >= n_steps) break;
      load_streamed(at + nvfp4_codes_at(of, lane), codes[i].v);
      scales[i] = *reinterpret_cast<const Nvfp4Scales*>(
          at + nvfp4_scales_at(n_steps, of, lane / 4, lane % 4 / 2));
    }
  }
  // A word has the codes of both instructions, of the upper or the lower 8 outputs.
  DUPLEX_DEVICE void operands(int i, Words (&a)[2]) const {
    for (int half = 0; half < 2; ++half) {
      const Sizes sizes =
          reinterpret_cast<const Sizes*>(shared_memory())[half * kScales + scales[i].v[half]];
      for (int f = 0; f < 2; ++f) {
        const std::uint32_t four = codes[i].v[half] >> 16 * f, sizes_of = four & 0x7777u;
        // The sign of each code in the highest bit of a byte.
        const std::uint32_t signs = permute_bytes(four << 4, four, 0x5140u) & 0x80808080u;
        const std::uint32_t upper = permute_bytes(sizes.upper[0], sizes.upper[1], sizes_of) ^ signs;
        const std::uint32_t lower = permute_bytes(sizes.lower[0], sizes.lower[1], sizes_of);
        a[f].v[half] = permute_bytes(lower, upper, 0x5140u);
        a[f].v[half + 2] = permute_bytes(lower, upper, 0x7362u);
      }
    }
  }
};

template <int kTiles>
DUPLEX_KERNEL linear_nvfp4_kernel(LinearArgs args) {
  let_next_grid_begin();
  const Job job = job_of(args);
  make_sizes(job, block_x());
  multiply_tile<Nvfp4Round, kTiles>(job, block_x(), block_y() * kTiles * kTileRows, block_y() == 0);
}

// Three on a multiprocessor, as in the other formats.
DUPLEX_KERNEL_OF(kThreads, 3) expert_nvfp4_kernel(ExpertLinearArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  const Job job = expert_job<Nvfp4Round>(args);
  if (job.end == 0) return;
  make_sizes(job, block_x());
  multiply_expert<Nvfp4Round>(job, block_x());
}

}  // namespace

void launch_linear_nvfp4(Runtime& runtime, const LinearArgs& args) {
  with_tiles(args.n_rows, [&]<int kTiles>() {
    runtime.launch_early(linear_nvfp4_kernel<kTiles>, tile_grid<kTiles>(args), kThreads,
                         Nvfp4Round::kSharedBytes + tile_bytes<kTiles>(), args);
  });
}

void launch_expert_nvfp4(Runtime& runtime, const ExpertLinearArgs& args) {
  runtime.launch_early(expert_nvfp4_kernel, tile_grid(args), kThreads,
                       kExpertRoomAt<Nvfp4Round> + expert_room_bytes(args), args);
}

}  // namespace duplex::cuda
