// How rows are cut into tiles, and how a tile's number of rows becomes a constant. Included by
// kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"

namespace duplex::DUPLEX_ISA {

// Calls fn(begin, n) for tiles of at most kTileRows, as even as can be: five and five rows instead
// of six and four.
template <class Fn>
inline void for_tiles(std::int32_t n_rows, const Fn& fn) {
  const auto n_tiles = static_cast<std::int32_t>(div_up(n_rows, kTileRows));
  for (std::int32_t t = 0; t < n_tiles; ++t) {
    const std::int32_t begin = n_rows * t / n_tiles;
    fn(begin, n_rows * (t + 1) / n_tiles - begin);
  }
}

// Calls fn<n_rows>(), for 1 to kTileRows rows.
template <int R = kTileRows, class Fn>
inline void with_rows(std::int32_t n_rows, const Fn& fn) {
  if constexpr (R > 1)
    if (n_rows != R) return with_rows<R - 1>(n_rows, fn);
  fn.template operator()<R>();
}

}  // namespace duplex::DUPLEX_ISA
