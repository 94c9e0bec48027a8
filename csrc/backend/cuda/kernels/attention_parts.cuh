// Attention over the tape in parts, on the tensor cores: what bfloat16 and int8 share.
//
// A thread block takes one key/value head of one segment, kPartPositions positions of the tape at
// multiples of that, and one group of tiles of eight query vectors. Its eight warps have all keys
// and values of the part in registers, each a quarter of the positions (columns) by half of the
// head's width, loaded at once and for all tiles: the panels of the tape are the left operand of
// mma.sync as they lie, in words of two or four keys' columns or values' positions.
#pragma once

#include "kernels/attention_walk.cuh"

namespace duplex::cuda {

inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kQuarter = 4;                     // warps side by side, kColumns each
inline constexpr int kColumns = 32;                    // of a window
inline constexpr int kWindowWords = 16;                // along the reduction
inline constexpr int kParts = kPartPositions;          // positions
inline constexpr int kLanePositions = kParts / kWarp;  // positions that a lane weighs

static_assert(kWarps == 2 * kQuarter && kWarps == kVectors && kParts == kQuarter * kColumns);

DUPLEX_DEVICE int lane_of_eight() { return thread_index() % kWarp / 4; }
DUPLEX_DEVICE int lane_of_four() { return thread_index() % 4; }
DUPLEX_DEVICE int quarter_of_warp() { return thread_index() / kWarp % kQuarter; }
DUPLEX_DEVICE int half_of_warp() { return thread_index() / kWarp / kQuarter; }

// 32 columns of 16 rows of a panel, whose words lie along the reduction. With g = lane / 4 and
// t = lane % 4, row[i] is of row 4 t + i, columns 4 g to 4 g + 3.
struct Window {
  Words row[4];
};

DUPLEX_DEVICE Window load_window(const std::byte* panel, std::int32_t n_columns,
                                 std::int32_t n_rows, std::int32_t first_row,
                                 std::int32_t first_column) {
  const std::int32_t column = first_column + lane_of_eight() * 4;
  Window window{};
  for (int i = 0; i < 4; ++i) {
    const std::int32_t row = first_row + lane_of_four() * 4 + i;
    if (row < n_rows && column < n_columns)
      window.row[i] = load_written(panel + (std::int64_t{row} * n_columns + column) * 4);
  }
  return window;
}

// sums[..] += panel^T x, where x holds words 4 t to 4 t + 3 of the reduction for vector g: two for
// each of two products, multiply(acc, a, b0, b1). The first of them takes words 4 t and 4 t + 1 for
// its columns of lane t, and columns 4 g and 4 g + 1 of the panel for its rows g and g + 8.
template <class Sum, class Multiply>
DUPLEX_DEVICE void multiply_window(const Window& window, const Words& x, Sum (&acc)[2][4],
                                   const Multiply& multiply) {
  for (int step = 0; step < 2; ++step) {
    const std::uint32_t b0 = x.v[2 * step], b1 = x.v[2 * step + 1];
    const Words &low = window.row[2 * step], &high = window.row[2 * step + 1];
    for (int i = 0; i < 2; ++i) {
      const Words a{{low.v[2 * i], low.v[2 * i + 1], high.v[2 * i], high.v[2 * i + 1]}};
      multiply(acc[i], a, b0, b1);
    }
  }
}

template <class Sum>
struct alignas(16) FourSums {
  Sum v[4];
};

// What a lane has after it: columns 4 g to 4 g + 3 for vectors 2 t and 2 t + 1.
template <class Sum>
DUPLEX_DEVICE void store_sums(const Sum (&acc)[2][4], Sum* at, std::int32_t stride) {
  Sum* const to = at + lane_of_four() * 2 * stride + lane_of_eight() * 4;
  for (int i = 0; i < 2; ++i)
    *reinterpret_cast<FourSums<Sum>*>(to + i * stride) = {
        {acc[0][i], acc[0][2 + i], acc[1][i], acc[1][2 + i]}};
}

// What a thread block sees of the tape: two blocks, null where there is nothing to be read.
struct Part {
  std::int64_t begin;   // position
  std::int32_t n_seen;  // positions, by the last of all vectors
  const std::byte* blocks[2];

  DUPLEX_DEVICE const std::byte* block(int half) const { return half == 0 ? blocks[0] : blocks[1]; }
  // Of a block, how many positions are seen; less than nothing where none is.
  DUPLEX_DEVICE std::int32_t n_seen_of(int half) const {
    const std::int32_t seen = n_seen - half * kBlock;
    return seen < kBlock ? seen : kBlock;
  }
};

template <DType kDType>
DUPLEX_DEVICE Part part_at(const Walk& walk, std::int64_t index) {
  const std::int64_t begin = index * kPartPositions;
  const std::int64_t seen = walk.position(walk.count - 1) + 1 - begin;
  Part part{begin, static_cast<std::int32_t>(seen < kParts ? seen : kParts), {nullptr, nullptr}};
  for (int i = 0; i < 2; ++i) {
    const std::int64_t block = index * 2 + i;
    const bool is_held = block * kBlock < begin + seen &&
                         (block + 1) * kBlock > walk.first_visible(0) && !walk.is_forgotten(block);
    if (is_held) part.blocks[i] = walk.keys(block, kDType);
  }
  return part;
}

}  // namespace duplex::cuda
