// What the matrix products of all formats share: the product of one thread block, and the launchers
// of each format (linear.cu picks one).
#pragma once

#include "backend/quantised.h"
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {

// Outputs and rows of one matrix instruction: the weights are its left operand.
inline constexpr int kTileOutputs = 16;
inline constexpr int kTileRows = 8;

inline constexpr int kBf16Step = 32;  // columns: 16 bytes of a row for each of four threads

// Quantised matrices and rows lie in chunks of 128 columns, two blocks of 64 each. In a block, the
// thread t of four has columns 8 t to 8 t + 7 and 32 + 8 t to 32 + 8 t + 7: of a row as 16 bytes of
// int8 codes; of 16 outputs as words of four columns, one word for each register of two matrix
// instructions, int8 in twice 16 bytes, int4 (two's complement) in 16, the first instruction's
// codes in the low nibbles. Behind the codes of a chunk are its scales, in pairs: of an output, and
// of the one 8 further on.
inline constexpr int kChunk = 128;
inline constexpr int kBlock = 64;
template <int kBits>
inline constexpr int kChunkGroups =
    kChunk / quantised_group(kBits == 8 ? DType::kInt8 : DType::kInt4);
template <int kBits>
inline constexpr int kChunkWords = kBits / 2;  // of 16 bytes, for each lane

template <int kBits>
struct alignas(4 * kChunkGroups<kBits>) ScalePairs {
  std::uint32_t v[kChunkGroups<kBits>];
};

// Where a chunk of a tile of outputs begins, and in it the scales of an output.
constexpr std::int64_t chunks_of(std::int64_t n_in) { return div_up(n_in, kChunk); }
template <int kBits>
constexpr std::int64_t chunk_scales_at(std::int64_t output) {
  return kChunkWords<kBits> * kWarp * 16 + output * std::int64_t{sizeof(ScalePairs<kBits>)};
}
template <int kBits>
constexpr std::int64_t chunk_at(std::int64_t n_in, std::int64_t tile, std::int64_t chunk) {
  return (tile * chunks_of(n_in) + chunk) * chunk_scales_at<kBits>(8);
}

// MXFP8: the codes of a tile of outputs step by step (of kBf16Step columns), 16 bytes for each
// lane; word 2 f + h of a lane has the columns that fragment f of the products in bfloat16 takes,
// of the upper or the lower 8 outputs, pairs in bytes 0 and 2, 1 and 3. Behind the codes of a tile
// are the exponents, those together that a warp needs for four steps, 8 apart.
struct alignas(8) Mxfp8Scales {
  std::uint8_t v[4][2];  // of an output, and of the one 8 further on
};
constexpr std::int64_t mxfp8_codes_at(std::int64_t step, std::int64_t lane) {
  return (step * kWarp + lane) * 16;
}
constexpr std::int64_t mxfp8_scales_at(std::int64_t n_steps, std::int64_t step,
                                       std::int64_t output) {
  return mxfp8_codes_at(n_steps, 0) +
         ((step / 32 * 8 + step % 8) * 8 + output) * std::int64_t{sizeof(Mxfp8Scales)};
}
constexpr std::int64_t mxfp8_tile_bytes(std::int64_t n_steps) {
  return mxfp8_scales_at(n_steps, round_up(n_steps, 32), 0);
}

// NVFP4: the codes of a tile of outputs step by step (of kBf16Step columns), 8 bytes for each lane:
// as a file has them, eight columns of an output and of the one 8 further on. Behind the codes of a
// tile are its scales, step by step, and behind these that of the matrix and whether it divides.
struct alignas(8) Nvfp4Codes {
  std::uint32_t v[2];
};
struct Nvfp4Scales {
  std::uint8_t v[2];  // of an output, and of the one 8 further on
};
constexpr std::int64_t nvfp4_codes_at(std::int64_t step, std::int64_t lane) {
  return (step * kWarp + lane) * std::int64_t{sizeof(Nvfp4Codes)};
}
constexpr std::int64_t nvfp4_scales_at(std::int64_t n_steps, std::int64_t step, std::int64_t output,
                                       std::int64_t group) {
  return nvfp4_codes_at(n_steps, 0) +
         ((step * 8 + output) * 2 + group) * std::int64_t{sizeof(Nvfp4Scales)};
}
constexpr std::int64_t nvfp4_matrix_scale_at(std::int64_t n_steps) {
  return nvfp4_scales_at(n_steps, n_steps, 0, 0);
}
constexpr std::int64_t nvfp4_tile_bytes(std::int64_t n_steps) {
  return nvfp4_matrix_scale_at(n_steps) + 32;  // whole sectors of the memory
}

// A quantised row: the codes, then the scales of its groups; in bytes, a multiple of 16.
constexpr std::int64_t row_codes_bytes(std::int64_t n_in) { return chunks_of(n_in) * kChunk; }
template <int kBits>
constexpr std::int64_t row_bytes(std::int64_t n_in) {
  return row_codes_bytes(n_in) + round_up(chunks_of(n_in) * kChunkGroups<kBits> * 4, 16);
}

// What lies at a place of a product: which row of x, and of y.
struct Place {
  std::int32_t x;
  std::int32_t y;
};

// The product of one thread block: places `begin` to `end` of a matrix with given outputs.
struct Job {
  const void* w;
  std::int32_t n_out;
  std::int32_t n_in;
  Rows x;
  bool has_places;      // known when compiled; else place p is row p of both
  const Place* places;  // in shared memory
  std::int32_t begin;
  std::int32_t end;
  float* y;
  std::int64_t y_stride;
  float divisor;

  template <class Element>
  DUPLEX_DEVICE const Element* row(std::int32_t place) const {
    const std::int64_t at = has_places ? places[place].x : place;
    return static_cast<const Element*>(x.data) + at * x.stride;
  }
  DUPLEX_DEVICE float* out(std::int32_t place) const {
    const std::int64_t at = has_places ? places[place].y : place;
    return y + at * y_stride;
  }
};

DUPLEX_DEVICE Job job_of(const LinearArgs& args) {
  return {args.w.data, args.w.n_out, args.w.n_in, args.x,        false,       nullptr,
          0,           args.n_rows,  args.y,      args.y_stride, args.divisor};
}

void launch_linear_bf16(Runtime& runtime, const LinearArgs& args);
// More than one thread block of linear_bf16.cuh takes, and enough work for blocks with more of
// them.
bool suits_linear_large(const LinearArgs& args);
void launch_linear_large(Runtime& runtime, const LinearArgs& args);  // the same bits
void launch_linear_mxfp8(Runtime& runtime, const LinearArgs& args);
void launch_linear_nvfp4(Runtime& runtime, const LinearArgs& args);
void launch_linear_quantised(Runtime& runtime, const LinearArgs& args);
void launch_expert_bf16(Runtime& runtime, const ExpertLinearArgs& args);
void launch_expert_mxfp8(Runtime& runtime, const ExpertLinearArgs& args);
void launch_expert_nvfp4(Runtime& runtime, const ExpertLinearArgs& args);
void launch_expert_quantised(Runtime& runtime, const ExpertLinearArgs& args);

}  // namespace duplex::cuda
