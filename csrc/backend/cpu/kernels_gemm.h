// Matrix tiles: R rows by C vectors of 16 outputs, accumulated over the whole reduction.
//
// Included by kernels_<isa>.cpp after its simd header, with DUPLEX_ISA naming the namespace. The
// weights of a step lie together (64 outputs), so a panel is read as one linear run; the attention
// reuses the tile with keys as panels and with values as panels.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_quantised.h"
#include "backend/cpu/kernels_rows.h"
#include "backend/cpu/kernels_tiles.h"

namespace duplex::DUPLEX_ISA {

// Element traits: how many reduction indices one step consumes.
struct F32Tile {
  using Element = float;
  static constexpr int kPerStep = 1;
  static F16 step(F16 acc, const float* w, const float* x) { return fma(load(w), set1(*x), acc); }
};
struct Bf16Tile {
  using Element = std::uint16_t;
  static constexpr int kPerStep = 2;
  static F16 step(F16 acc, const std::uint16_t* w, const std::uint16_t* x) {
    return dot_pairs(acc, w, x);
  }
};

// acc[r][c] continues the chain found in y when `continued`, else starts at zero.
template <class Tile, int R, int C, int kLines = 0>
inline void run_tile(const typename Tile::Element* const* x, const typename Tile::Element* w,
                     std::int64_t w_step, std::int64_t n_steps, bool continued, float* const* y,
                     std::int64_t y_offset, const std::byte* ahead = nullptr) {
  F16 acc[R][C];
  DUPLEX_UNROLL for (int r = 0; r < R; ++r) DUPLEX_UNROLL for (int c = 0; c < C; ++c) acc[r][c] =
      continued ? load(y[r] + y_offset + c * 16) : zero();
  const typename Tile::Element* row[R];
  DUPLEX_UNROLL for (int r = 0; r < R; ++r) row[r] = x[r];
  for (std::int64_t k = 0; k < n_steps; ++k, w += w_step) {
    DUPLEX_FETCH(kLines, ahead)
    DUPLEX_UNROLL for (int c = 0; c < C; ++c) DUPLEX_UNROLL for (int r = 0; r < R; ++r) acc[r][c] =
        Tile::step(acc[r][c], w + c * 16 * Tile::kPerStep, row[r] + k * Tile::kPerStep);
  }
  DUPLEX_UNROLL for (int r = 0; r < R; ++r) DUPLEX_UNROLL for (int c = 0; c < C; ++c)
      store(y[r] + y_offset + c * 16, acc[r][c]);
}

// `columns` outputs (a multiple of 16) for R rows.
template <class Tile, int R, int kLines = 0>
inline void run_rows(const typename Tile::Element* const* x, const typename Tile::Element* w,
                     std::int64_t w_step, std::int64_t n_steps, std::int32_t columns,
                     bool continued, float* const* y, const std::byte* ahead = nullptr) {
  constexpr int kColumns = tile_columns(R);
  std::int32_t c = 0;
  for (; c + kColumns * 16 <= columns; c += kColumns * 16)
    with_lines_at<kLines>(c, [&]<int kTileLines>() {
      run_tile<Tile, R, kColumns, kTileLines>(x, w + c * Tile::kPerStep, w_step, n_steps, continued,
                                              y, c, ahead + c * n_steps * kTileLines);
    });
  // Heads are often narrower than a panel.
  const std::int32_t rest = (columns - c) / 16;
  if constexpr (kColumns > 3)
    if (rest == 3)
      return run_tile<Tile, R, 3>(x, w + c * Tile::kPerStep, w_step, n_steps, continued, y, c);
  if constexpr (kColumns > 2)
    if (rest == 2)
      return run_tile<Tile, R, 2>(x, w + c * Tile::kPerStep, w_step, n_steps, continued, y, c);
  for (; c < columns; c += 16)
    run_tile<Tile, R, 1>(x, w + c * Tile::kPerStep, w_step, n_steps, continued, y, c);
}

template <class Tile, int kLines = 0>
inline void run_row_group(int n_rows, const typename Tile::Element* const* x,
                          const typename Tile::Element* w, std::int64_t w_step,
                          std::int64_t n_steps, std::int32_t columns, bool continued,
                          float* const* y, const std::byte* ahead = nullptr) {
  with_rows(n_rows, [&]<int R>() {
    run_rows<Tile, R, kLines>(x, w, w_step, n_steps, columns, continued, y, ahead);
  });
}

template <class Tile>
inline void linear_panel_typed(const PanelArgs& args) {
  using Element = typename Tile::Element;
  constexpr std::int64_t kStep = kPanelOutputs * Tile::kPerStep;
  constexpr std::int64_t kPieceSteps = kPieceBytes / (kStep * sizeof(Element));
  const auto* const* rows = reinterpret_cast<const Element* const*>(args.rows);
  const std::int64_t n_steps = args.n_in / Tile::kPerStep;
  const std::int32_t most = args.n_rows > kManyRows ? kTileRows : kBlockRows;
  for_pieces(args.n_rows, most, [&](std::int32_t first, std::int32_t n_rows) {
    const auto* panel = static_cast<const Element*>(args.panel);
    if (n_rows <= kTileRows)
      return run_row_group<Tile, 4>(n_rows, rows + first, panel, kStep, n_steps, kPanelOutputs,
                                    false, args.y + first,
                                    reinterpret_cast<const std::byte*>(panel) + kAheadBytes);
    const auto n_tiles = static_cast<std::int32_t>(div_up(n_rows, kTileRows));
    alignas(64) float sums[kBlockRows * kPanelOutputs];
    float* y[kBlockRows];
    for (std::int32_t r = 0; r < n_rows; ++r) y[r] = sums + r * kPanelOutputs;
    for (std::int64_t k = 0; k < n_steps; k += kPieceSteps, panel += kPieceSteps * kStep) {
      const std::int64_t n = n_steps - k < kPieceSteps ? n_steps - k : kPieceSteps;
      const auto* ahead =
          reinterpret_cast<const std::byte*>(panel + kPieceSteps * kStep) + kAheadBytes;
      std::int32_t tile = 0;
      for_tiles(n_rows, [&](std::int32_t begin, std::int32_t count) {
        const Element* x[kTileRows] = {};
        for (std::int32_t r = 0; r < count; ++r)
          x[r] = rows[first + begin + r] + k * Tile::kPerStep;
        with_lines(tile++, n_tiles, [&]<int kLines>() {
          run_row_group<Tile, kLines>(count, x, panel, kStep, n, kPanelOutputs, k > 0, y + begin,
                                      ahead);
          ahead += n * 64 * kLines;
        });
      });
    }
    for (std::int32_t r = 0; r < n_rows; ++r)
      for (int c = 0; c < kPanelOutputs; c += 16) store(args.y[first + r] + c, load(y[r] + c));
  });
}

inline void linear_panel(const PanelArgs& args) {
  switch (args.dtype) {
    case DType::kF32:
      linear_panel_typed<F32Tile>(args);
      break;
    case DType::kBF16:
      linear_panel_typed<Bf16Tile>(args);
      break;
    case DType::kInt8:
      quantised_panel<Int8Codes>(args);
      break;
    case DType::kInt4:
      quantised_panel<Int4Codes>(args);
      break;
    case DType::kMxfp8:
    case DType::kNvfp4:
      break;  // packed_bytes() has refused it
  }
  if (args.divisor == 1.0f) return;
  const F16 divisor = set1(args.divisor);
  for (std::int32_t r = 0; r < args.n_rows; ++r)
    for (int c = 0; c < kPanelOutputs; c += 16)
      store(args.y[r] + c, div(load(args.y[r] + c), divisor));
}

}  // namespace duplex::DUPLEX_ISA
