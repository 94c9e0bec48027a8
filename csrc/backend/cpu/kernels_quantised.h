// Panels of int8 and int4 codes against rows quantised to int8 by the same groups.
//
// Inside a group every product and sum is an exact integer; the groups of an output are one chain
// of float32 additions in ascending order. So a row gets the same bits whatever rows are beside it,
// and the same from every instruction set with fused multiply-adds. The layouts are in kernels.h.
// Included by kernels_<isa>.cpp; see kernels_gemm.h.
#pragma once

#include "backend/cpu/kernels.h"
#include "backend/cpu/kernels_tiles.h"

namespace duplex::DUPLEX_ISA {

// What one step of a panel holds for 16 outputs: a vector of int8 codes is one quad of reduction
// indices, a vector of int4 codes a pair of quads.
struct Int8Codes {
  static constexpr std::int64_t kGroup = quantised_group(DType::kInt8);
  static constexpr int kQuads = 1;
  static I16 start(std::int32_t correction) { return start_bytes(correction); }
  template <int kQuad>
  static Bytes load(const std::uint8_t* w) {
    return load_bytes(w);
  }
  static I16 dot(I16 acc, const Bytes& w, const std::int8_t* x) { return dot_bytes(acc, w, x); }
};
struct Int4Codes {
  static constexpr std::int64_t kGroup = quantised_group(DType::kInt4);
  static constexpr int kQuads = 2;
  static I16 start(std::int32_t correction) { return splat(correction); }
  template <int kQuad>
  static Bytes load(const std::uint8_t* w) {
    return load_nibbles<kQuad>(w);
  }
  static I16 dot(I16 acc, const Bytes& w, const std::int8_t* x) { return dot_nibbles(acc, w, x); }
};

// acc += one quad of each vector.
template <class Codes, int kQuad, int R, int C>
inline void add_quads(I16 (&acc)[C][R], const std::uint8_t* w, const std::int8_t* const (&x)[R],
                      std::int64_t k) {
  DUPLEX_UNROLL for (int c = 0; c < C; ++c) {
    const Bytes codes = Codes::template load<kQuad>(w + c * 64);
    DUPLEX_UNROLL for (int r = 0; r < R; ++r) {
      acc[c][r] = Codes::dot(acc[c][r], codes, x[r] + k + 4 * kQuad);
    }
  }
}

// sums += the products of one group: R rows by C vectors of 16 outputs. A function of its own, so
// that the integer sums have the registers to themselves.
template <class Codes, int R, int C, int kLines>
[[gnu::noinline]] void add_group(const std::byte* const* groups, const std::byte* panel,
                                 std::int64_t n, std::int64_t first, float* sums,
                                 const std::byte* ahead) {
  constexpr std::int64_t kStepBytes = kPanelOutputs * 4;
  const std::int8_t* x[R];
  I16 acc[C][R];
  DUPLEX_UNROLL for (int r = 0; r < R; ++r) {
    x[r] = reinterpret_cast<const std::int8_t*>(groups[r] + sizeof(RowGroup));
    const I16 start = Codes::start(load_unaligned<RowGroup>(groups[r], 0).correction);
    DUPLEX_UNROLL for (int c = 0; c < C; ++c) acc[c][r] = start;
  }
  const auto* w = reinterpret_cast<const std::uint8_t*>(panel + kScalesBytes) + first * 4;
  for (std::int64_t k = 0; k < n; k += 4 * Codes::kQuads, w += kStepBytes) {
    DUPLEX_FETCH(kLines, ahead)
    add_quads<Codes, 0>(acc, w, x, k);
    if constexpr (Codes::kQuads == 2) add_quads<Codes, 1>(acc, w, x, k);
  }
  const auto* scales = reinterpret_cast<const std::uint16_t*>(panel) + first;
  DUPLEX_UNROLL for (int c = 0; c < C; ++c) {
    const F16 scale = load_bf16(scales + c * 16);
    DUPLEX_UNROLL for (int r = 0; r < R; ++r) {
      float* sum = sums + (c * R + r) * 16;
      const F16 x_scale = set1(load_unaligned<RowGroup>(groups[r], 0).scale);
      store(sum, fma(mul(to_float(acc[c][r]), scale), x_scale, load(sum)));
    }
  }
}

// sums of a tile: (64 / 16, R, 16)
template <class Codes, int R, int kLines>
inline void add_group_of_rows(const std::byte* const* groups, const std::byte* panel,
                              std::int64_t n, float* sums, const std::byte* ahead) {
  constexpr int kColumns = tile_columns(R);
  for (std::int64_t c = 0; c < kPanelOutputs; c += kColumns * 16)
    with_lines_at<kLines>(c, [&]<int kTileLines>() {
      add_group<Codes, R, kColumns, kTileLines>(groups, panel, n, c, sums + c * R, ahead);
    });
}

template <int R>
inline void store_tile(const float* sums, float* const* y) {
  for (std::int64_t c = 0; c < kPanelOutputs; c += 16)
    for (int r = 0; r < R; ++r) store(y[r] + c, load(sums + c * R + r * 16));
}

template <class Codes>
inline void quantised_panel(const PanelArgs& args) {
  constexpr std::int64_t kRowGroupBytes = sizeof(RowGroup) + Codes::kGroup;
  for_pieces(args.n_rows, kBlockRows, [&](std::int32_t first, std::int32_t n_rows) {
    alignas(64) float sums[kBlockRows * kPanelOutputs];
    for (std::int64_t i = 0; i < n_rows * kPanelOutputs; i += 16) store(sums + i, zero());
    const std::byte* groups[kBlockRows];
    for (std::int32_t r = 0; r < n_rows; ++r)
      groups[r] = static_cast<const std::byte*>(args.rows[first + r]);
    const auto n_tiles = static_cast<std::int32_t>(div_up(n_rows, kTileRows));
    const auto* panel = static_cast<const std::byte*>(args.panel);
    for (std::int64_t left = args.n_in; left > 0; left -= Codes::kGroup) {
      const std::int64_t n = left < Codes::kGroup ? left : Codes::kGroup;
      const std::int64_t bytes = kScalesBytes + n / (4 * Codes::kQuads) * kPanelOutputs * 4;
      const std::byte* ahead = panel + bytes + kAheadBytes;
      std::int32_t tile = 0;
      for_tiles(n_rows, [&](std::int32_t begin, std::int32_t count) {
        with_lines(tile++, n_tiles, [&]<int kLines>() {
          with_rows(count, [&]<int R>() {
            add_group_of_rows<Codes, R, kLines>(groups + begin, panel, n,
                                                sums + begin * kPanelOutputs, ahead);
          });
          ahead += n / (4 * Codes::kQuads) * 64 * kLines;
        });
      });
      panel += bytes;
      for (std::int32_t r = 0; r < n_rows; ++r) groups[r] += kRowGroupBytes;
    }
    for_tiles(n_rows, [&](std::int32_t begin, std::int32_t count) {
      with_rows(count, [&]<int R>() {
        store_tile<R>(sums + begin * kPanelOutputs, args.y + first + begin);
      });
    });
  });
}

}  // namespace duplex::DUPLEX_ISA
