// The weight layout: panels of 64 outputs, reduction index outermost, so that one pass over a
// matrix reads memory in one direction. bfloat16 panels interleave pairs of reduction indices.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "backend/cpu/cpu_backend.h"

namespace duplex {
namespace {

// Consecutive source rows that fall into one panel.
struct RowRun {
  const PackSource* source;
  std::int64_t first_row;
  std::int64_t n_rows;
  std::int64_t first_out;
};

// Column by column, so that the writes of a step lie together. Returns the first row of the run
// that holds a NaN or infinity, or n_rows.
template <DType kDType>
std::int64_t pack_run(const RowRun& run, const PackShape& shape, std::int64_t n_in_padded,
                      void* destination) {
  const PackSource& source = *run.source;
  const std::int64_t lane = run.first_out % kPanelOutputs;
  const std::int64_t panel = run.first_out / kPanelOutputs * n_in_padded * kPanelOutputs;
  std::int64_t first_bad = run.n_rows;
  for (std::int64_t column = 0; column < shape.n_in; ++column) {
    const std::int64_t k =
        column / shape.in_group * shape.in_group_padded + column % shape.in_group;
    for (std::int64_t row = 0; row < run.n_rows; ++row) {
      const float value = load_element(source.data, source.dtype,
                                       (run.first_row + row) * source.row_stride + column);
      if (!std::isfinite(value)) [[unlikely]]
        first_bad = std::min(first_bad, row);
      if constexpr (kDType == DType::kF32)
        static_cast<float*>(destination)[panel + k * kPanelOutputs + lane + row] = value;
      else
        static_cast<std::uint16_t*>(
            destination)[panel + (k / 2 * kPanelOutputs + lane + row) * 2 + k % 2] =
            float_to_bf16(value);
    }
  }
  return first_bad;
}

}  // namespace

std::size_t CpuBackend::packed_bytes(std::int64_t n_out, std::int64_t n_in_padded,
                                     DType dtype) const {
  return static_cast<std::size_t>(round_up(n_out, kPanelOutputs) * n_in_padded) *
         dtype_bytes(dtype);
}

// note: `destination` is zeroed memory, so padding needs no writes.
std::int64_t CpuBackend::pack(const PackSource& source, const PackShape& shape,
                              std::int64_t first_out, void* destination) {
  const std::int64_t n_in_padded =
      round_up(div_up(shape.n_in, shape.in_group) * shape.in_group_padded, kColumnAlign);
  const std::int64_t first_panel = first_out / kPanelOutputs;
  const std::int64_t n_panels = div_up(first_out + source.n_rows, kPanelOutputs) - first_panel;
  std::atomic<std::int64_t> first_bad{std::numeric_limits<std::int64_t>::max()};
  pool_.parallel_for(n_panels, [&](std::int64_t panel, int) {
    const std::int64_t begin = std::max(first_out, (first_panel + panel) * kPanelOutputs);
    const std::int64_t end =
        std::min(first_out + source.n_rows, (first_panel + panel + 1) * kPanelOutputs);
    const RowRun run{&source, begin - first_out, end - begin, begin};
    const std::int64_t bad = shape.dtype == DType::kF32
                                 ? pack_run<DType::kF32>(run, shape, n_in_padded, destination)
                                 : pack_run<DType::kBF16>(run, shape, n_in_padded, destination);
    if (bad == run.n_rows) return;
    std::int64_t seen = first_bad.load();
    while (run.first_row + bad < seen &&
           !first_bad.compare_exchange_weak(seen, run.first_row + bad)) {
    }
  });
  return first_bad.load() == std::numeric_limits<std::int64_t>::max() ? -1 : first_bad.load();
}

}  // namespace duplex
