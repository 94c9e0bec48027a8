// The inner loops of the limits and of the floor program, for AVX-512 with BF16 and VNNI.
//
// A panel holds 64 outputs. One step of it is 256 bytes, four vectors of 16 outputs, each lane with
// the 2 bfloat16, 4 int8 or 8 int4 weights that follow one another along the reduction.
#pragma once

#include <cstddef>
#include <cstdint>

namespace duplex_bench {

enum class Format : std::int32_t { kBF16, kInt8, kInt4 };
inline constexpr std::int64_t kPanelOutputs = 64;
inline constexpr std::int64_t kStepBytes = 256;
inline constexpr int kMaxTileRows = 6;
inline constexpr int kMaxRows = 64;

constexpr std::int64_t step_inputs(Format format) {
  return format == Format::kBF16 ? 2 : format == Format::kInt8 ? 4 : 8;
}

struct PanelWork {
  const std::byte* panel;
  std::int64_t n_steps;
  int n_rows;
  const std::uint32_t* x;  // row groups of max_words * rows: (word of the reduction, row)
  std::int64_t max_words;
  float* y;  // (n_rows, 64)
};

bool machine_has_avx512();
// One panel times all rows, without scales: (rows, n_in) x (n_in, 64).
void multiply_panel(Format format, const PanelWork& work);
// Touches every byte.
void read_bytes(const std::byte* data, std::size_t bytes);

enum class Dot : std::int32_t { kF32, kBF16, kInt8 };
// Dot products on registers alone; returns how many multiplications and additions were done.
double spin_dots(Dot dot, std::int64_t n_loops);

}  // namespace duplex_bench
