// How rows are cut into tiles, and how a tile's number of rows becomes a constant. Included by
// kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"

namespace duplex::DUPLEX_ISA {

// Rows whose tiles take turns at one piece of a panel, which stays in the first-level cache with
// their sums: memory is read at an even pace, and what is asked for ahead finds room.
inline constexpr std::int32_t kBlockRows = 4 * kTileRows;
// So many that the panel is read again from the second-level cache as fast as it is multiplied.
inline constexpr std::int32_t kManyRows = 4 * kBlockRows;
inline constexpr std::int64_t kPieceBytes = 8192;
// How far behind the next piece, or behind what one tile multiplies, lines are asked for: what a
// group of int4 codes takes is less than what memory does.
inline constexpr std::int64_t kAheadBytes = 4096;

// Calls fn(begin, n) for pieces of at most `most` rows, as even as can be: five and five instead of
// six and four.
template <class Fn>
inline void for_pieces(std::int32_t n_rows, std::int32_t most, const Fn& fn) {
  const auto n_pieces = static_cast<std::int32_t>(div_up(n_rows, most));
  for (std::int32_t i = 0; i < n_pieces; ++i) {
    const std::int32_t begin = n_rows * i / n_pieces;
    fn(begin, n_rows * (i + 1) / n_pieces - begin);
  }
}
template <class Fn>
inline void for_tiles(std::int32_t n_rows, const Fn& fn) {
  for_pieces(n_rows, kTileRows, fn);
}

// Asks for kLines lines of 64 bytes.
// note: a macro, since gcc drops calls of a function that only prefetches.
#define DUPLEX_FETCH(kLines, ahead)                                                 \
  if constexpr (kLines > 0) {                                                       \
    DUPLEX_UNROLL for (int line = 0; line < kLines; ++line)                         \
        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + 64 * line, 0, 3); \
    ahead += 64 * kLines;                                                           \
  }

// Calls fn<lines>(): how many lines a tile asks for in each of its steps, so that all of them
// together ask for the next piece, four lines a step, once.
template <class Fn>
inline void with_lines(std::int32_t tile, std::int32_t n_tiles, const Fn& fn) {
  if (n_tiles == 1) return fn.template operator()<4>();
  if (n_tiles > 3 && tile < 4) return fn.template operator()<1>();
  if (n_tiles < 4 && tile < 2) return fn.template operator()<2>();
  fn.template operator()<0>();
}

// Calls fn<lines>(): of those, what a tile asks for beside the columns from `column` on. One that
// is narrower than a panel comes several times, and asks at the panel's first columns only.
template <int kLines, class Fn>
inline void with_lines_at(std::int64_t column, const Fn& fn) {
  if (column % kPanelOutputs == 0) return fn.template operator()<kLines>();
  fn.template operator()<0>();
}

// Calls fn<n_rows>(), for 1 to kTileRows rows.
template <int R = kTileRows, class Fn>
inline void with_rows(std::int32_t n_rows, const Fn& fn) {
  if constexpr (R > 1)
    if (n_rows != R) return with_rows<R - 1>(n_rows, fn);
  fn.template operator()<R>();
}

}  // namespace duplex::DUPLEX_ISA
