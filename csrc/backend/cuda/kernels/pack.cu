// Packs rows of a weight matrix to where the matrix products read them (linear.cuh).
#include "kernels/linear.cuh"

namespace duplex::cuda {
namespace {

constexpr int kThreads = 128;

// Of a source row. Gates and ups that are paired lie in runs of kTilePairs, by turns.
DUPLEX_DEVICE std::int64_t output_of(const PackArgs& args) {
  const std::int64_t output = args.first_out + block_x(), width = args.shape.pair_width;
  if (width == 0) return output;
  const bool is_up = output >= width;
  const std::int64_t column = is_up ? output - width : output;
  return (column / kTilePairs * 2 + is_up) * kTilePairs + column % kTilePairs;
}

// One thread an element.
DUPLEX_KERNEL pack_kernel(PackArgs args) {
  constexpr std::int64_t kPanel = kPanelOutputs, kStep = kBf16Step;
  const std::int64_t column = std::int64_t{block_y()} * n_threads() + thread_index();
  if (column >= args.shape.n_in) return;
  const std::int64_t output = output_of(args);
  const std::int64_t k =
      column / args.shape.in_group * args.shape.in_group_padded + column % args.shape.in_group;
  const float value = load(args.source, args.source_dtype, block_x() * args.row_stride + column);
  if (args.shape.dtype == DType::kF32) {
    const std::int64_t panel = output / kPanel * args.n_in_padded * kPanel;
    static_cast<float*>(args.destination)[panel + k * kPanel + output % kPanel] = value;
    return;
  }
  // Inside a step, the thread t of four has columns 8 t to 8 t + 7: two pairs in each fragment.
  const std::int64_t n_steps = div_up(args.n_in_padded, kStep);
  const std::int64_t lane = output % 8 * 4 + k % kStep / 8;
  const std::int64_t fragment = k % 8 / 4;
  const std::int64_t word = output % kTileOutputs / 8 + k % 4 / 2 * 2;
  const std::int64_t at =
      ((output / kTileOutputs * n_steps + k / kStep) * 2 + fragment) * kWarp + lane;
  static_cast<std::uint16_t*>(args.destination)[(at * 4 + word) * 2 + k % 2] = float_to_bf16(value);
}

// ---- quantised

// The values of one output in a block of 64 columns, zero where there is none.
struct BlockValues {
  const PackArgs& args;
  std::int64_t begin;  // column, padding included

  DUPLEX_DEVICE float operator()(std::int64_t i) const {
    const PackShape& shape = args.shape;
    const std::int64_t k = begin + i;
    const std::int64_t in_group = k % shape.in_group_padded;
    const std::int64_t column = k / shape.in_group_padded * shape.in_group + in_group;
    if (in_group >= shape.in_group || column >= shape.n_in) return 0.0f;
    return load(args.source, args.source_dtype, block_x() * args.row_stride + column);
  }
};

// Codes as the CPU finds them, so the values are the same on both.
template <int kBits>
DUPLEX_DEVICE std::uint32_t code_at(const BlockValues& values, std::int64_t i, float inverse) {
  constexpr float kLowest = kBits == 8 ? kLowestInt8 : kLowestInt4;
  constexpr float kHighest = kBits == 8 ? kHighestInt8 : kHighestInt4;
  return static_cast<std::uint32_t>(nearest_code(values(i), inverse, kLowest, kHighest)) &
         ((1u << kBits) - 1);
}

template <int kBits>
DUPLEX_DEVICE std::uint16_t scale_at(const BlockValues& values, std::int64_t n) {
  if constexpr (kBits == 8)
    return scale_of_int8(n, values);
  else
    return scale_of_int4(n, values);
}

// One thread a block of 64 columns of an output.
template <int kBits>
DUPLEX_KERNEL pack_quantised_kernel(PackArgs args) {
  constexpr int kGroups = kChunkGroups<kBits> / 2;  // of a block
  constexpr std::int64_t kGroup = kBlock / kGroups;
  const std::int64_t block = std::int64_t{block_y()} * n_threads() + thread_index();
  const std::int64_t begin = block * kBlock, n_in = args.n_in_padded;
  if (begin >= n_in) return;
  const std::int64_t output = output_of(args), g = output % 8;
  const std::int64_t half = output % kTileOutputs / 8;
  const std::int64_t tile = output / kTileOutputs, chunk = begin / kChunk, pair = block % 2;
  std::byte* const at =
      static_cast<std::byte*>(args.destination) + chunk_at<kBits>(n_in, tile, chunk);
  auto* const scales = reinterpret_cast<std::uint16_t*>(at + chunk_scales_at<kBits>(g));
  float inverse[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const std::int64_t left = n_in - begin - i * kGroup;
    const std::uint16_t scale = left <= 0 ? std::uint16_t{0}
                                          : scale_at<kBits>(BlockValues{args, begin + i * kGroup},
                                                            left < kGroup ? left : kGroup);
    scales[(pair * kGroups + i) * 2 + half] = scale;
    inverse[i] = inverse_scale(bf16_to_float(scale));
  }
  const BlockValues values{args, begin};
  for (std::int64_t i = 0; i < kBlock / 2; i += 4) {  // four columns of either instruction
    std::uint32_t words[2] = {};
    for (int j = 0; j < 4; ++j) {
      words[0] |= code_at<kBits>(values, i + j, inverse[0]) << 8 * j;
      words[1] |= code_at<kBits>(values, 32 + i + j, inverse[kGroups - 1]) << 8 * j;
    }
    // Of the lane that has these columns, in each 16 bytes that it has of the block.
    auto* const to = reinterpret_cast<std::uint32_t*>(at + (g * 4 + i / 8) * 16) + half +
                     i % 8 / 4 * 2 + pair * (kBits / 4) * kWarp * 4;
    if constexpr (kBits == 8) {
      to[0] = words[0];
      to[kWarp * 4] = words[1];
    } else {
      to[0] = words[0] | words[1] << 4;
    }
  }
}

// ---- MXFP8

// One thread a group of 32 columns of an output.
DUPLEX_KERNEL pack_mxfp8_kernel(PackArgs args) {
  const std::int64_t step = std::int64_t{block_y()} * n_threads() + thread_index();
  if (step * kBf16Step >= args.n_in_padded) return;
  const std::int64_t output = output_of(args), g = output % 8;
  const std::int64_t half = output % kTileOutputs / 8;
  const std::int64_t n_steps = div_up(args.n_in_padded, kBf16Step);
  std::byte* const tile =
      static_cast<std::byte*>(args.destination) + output / kTileOutputs * mxfp8_tile_bytes(n_steps);
  const BlockValues values{args, step * kBf16Step};
  float largest = 0.0f;
  for (std::int64_t i = 0; i < kBf16Step; ++i) {
    const float size = fabsf(values(i));
    if (size > largest) largest = size;
  }
  const std::uint32_t exponent = mxfp8_exponent(largest);
  auto* const scales = reinterpret_cast<std::uint8_t*>(tile + mxfp8_scales_at(n_steps, step, g));
  scales[step % 32 / 8 * 2 + half] = static_cast<std::uint8_t>(exponent);
  for (std::int64_t i = 0; i < kBf16Step; ++i) {
    const std::int64_t word = i % 8 / 4 * 2 + half, byte = i % 4 / 2 + i % 2 * 2;
    auto* const lane = reinterpret_cast<std::uint8_t*>(tile + mxfp8_codes_at(step, g * 4 + i / 8));
    lane[word * 4 + byte] = e4m3_code(values(i) * mxfp8_inverse(exponent));
  }
}

// ---- NVFP4

// One thread a group of 16 columns of an output, codes and scale as they are; only the sign of a
// scale goes over to its codes.
DUPLEX_KERNEL pack_nvfp4_kernel(PackArgs args) {
  const std::int64_t group = std::int64_t{block_y()} * n_threads() + thread_index();
  if (group * kNvfp4Group >= args.n_in_padded) return;
  const std::int64_t output = output_of(args), g = output % 8;
  const std::int64_t half = output % kTileOutputs / 8, step = group / 2;
  const std::int64_t n_steps = div_up(args.n_in_padded, kBf16Step);
  std::byte* const tile =
      static_cast<std::byte*>(args.destination) + output / kTileOutputs * nvfp4_tile_bytes(n_steps);
  if (group == 0 && g == 0) {
    auto* const of_matrix =
        reinterpret_cast<float*>(tile + nvfp4_matrix_scale_at(n_steps)) + 2 * half;
    of_matrix[0] = args.matrix_scale.value;
    of_matrix[1] = args.matrix_scale.is_divisor ? 1.0f : 0.0f;
  }
  const std::uint32_t scale = args.scales[block_x() * args.scale_row_stride + group];
  reinterpret_cast<Nvfp4Scales*>(tile + nvfp4_scales_at(n_steps, step, g, group % 2))->v[half] =
      static_cast<std::uint8_t>(scale & 0x7fu);
  const std::uint32_t signs = scale >= 0x80u ? 0x88u : 0u;
  const auto* const codes =
      static_cast<const std::uint8_t*>(args.source) + block_x() * args.row_stride / 2;
  for (std::int64_t i = 0; i < 2; ++i) {  // the lanes that have these columns
    const std::int64_t begin = group * kNvfp4Group + i * 8;
    std::uint32_t word = 0;
    for (int byte = 0; byte < 4; ++byte)
      if (begin + 2 * byte < args.shape.n_in) word |= (codes[begin / 2 + byte] ^ signs) << 8 * byte;
    const std::int64_t lane = g * 4 + group % 2 * 2 + i;
    reinterpret_cast<Nvfp4Codes*>(tile + nvfp4_codes_at(step, lane))->v[half] = word;
  }
}

}  // namespace

std::size_t packed_matrix_bytes(std::int64_t n_out, std::int64_t n_in_padded, DType dtype) {
  const std::int64_t n_tiles = round_up(n_out, kPanelOutputs) / kTileOutputs;
  if (dtype == DType::kInt8) return static_cast<std::size_t>(chunk_at<8>(n_in_padded, n_tiles, 0));
  if (dtype == DType::kInt4) return static_cast<std::size_t>(chunk_at<4>(n_in_padded, n_tiles, 0));
  if (dtype == DType::kMxfp8)
    return static_cast<std::size_t>(n_tiles * mxfp8_tile_bytes(div_up(n_in_padded, kBf16Step)));
  if (dtype == DType::kNvfp4)
    return static_cast<std::size_t>(n_tiles * nvfp4_tile_bytes(div_up(n_in_padded, kBf16Step)));
  const std::int64_t n_in = dtype == DType::kF32 ? n_in_padded : round_up(n_in_padded, kBf16Step);
  return static_cast<std::size_t>(round_up(n_out, kPanelOutputs) * n_in) * dtype_bytes(dtype);
}

PackedMatrix part_of(const PackedMatrix& w, std::int32_t n_parts, std::int32_t part) {
  if (w.data == nullptr) return w;
  PackedMatrix found = w;
  found.n_in = w.n_in / n_parts;
  found.data = static_cast<const std::byte*>(w.data) +
               static_cast<std::size_t>(part) * packed_matrix_bytes(w.n_out, found.n_in, w.dtype);
  return found;
}

Rows columns_from(const Rows& x, std::int64_t column) {
  const std::int64_t bytes = column * static_cast<std::int64_t>(dtype_bytes(x.dtype));
  return {static_cast<std::byte*>(x.data) + bytes, x.stride, x.dtype};
}

void launch_pack(Runtime& runtime, const PackArgs& args) {
  const Grid grid{args.n_rows, div_up(args.n_in_padded, kThreads)};
  const Grid blocks{args.n_rows, div_up(args.n_in_padded, kThreads * kBlock)};
  if (args.shape.dtype == DType::kInt8)
    runtime.launch(pack_quantised_kernel<8>, blocks, kThreads, 0, args);
  else if (args.shape.dtype == DType::kInt4)
    runtime.launch(pack_quantised_kernel<4>, blocks, kThreads, 0, args);
  else if (args.shape.dtype == DType::kMxfp8)
    runtime.launch(pack_mxfp8_kernel, {args.n_rows, div_up(args.n_in_padded, kThreads * kBf16Step)},
                   kThreads, 0, args);
  else if (args.shape.dtype == DType::kNvfp4)
    runtime.launch(pack_nvfp4_kernel,
                   {args.n_rows, div_up(args.n_in_padded, kThreads * kNvfp4Group)}, kThreads, 0,
                   args);
  else
    runtime.launch(pack_kernel, grid, kThreads, 0, args);
}

}  // namespace duplex::cuda
