// How packed matrices and quantised rows lie in each format: pack.cu writes them so, the products
// (linear.cuh) read them so.
#pragma once

#include "backend/quantised.h"
#include "backend/views.h"
#include "device/platform.cuh"

namespace duplex::cuda {

// Outputs and rows of one matrix instruction: the weights are its left operand. Where gates and ups
// are paired, a tile is 8 gates and the ups of the same columns: an output and the one 8 further
// on.
inline constexpr int kTileOutputs = 16;
inline constexpr int kTileRows = 8;
inline constexpr int kTilePairs = kTileOutputs / 2;

// Tiles with outputs. Paired, there are none for the padding behind the last: activated rows have
// no room for that.
constexpr std::int64_t tiles_of(const PackedMatrix& w) {
  return (w.is_paired ? w.n_out : round_up(w.n_out, kPanelOutputs)) / kTileOutputs;
}

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
// tile are its scales, step by step, and behind these that of the matrix and whether it divides:
// once for the upper 8 outputs, once for the lower ones.
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

}  // namespace duplex::cuda
