// The weight layout: panels of 64 outputs, reduction index outermost, so that one pass over a
// matrix reads memory in one direction. bfloat16 panels interleave pairs of reduction indices; the
// quantised layouts are in kernels.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"

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

// ---- quantised weights

constexpr std::int64_t kMaxGroup = 64;

struct QuantisedGroup {
  std::uint16_t scale;            // bfloat16
  std::int32_t codes[kMaxGroup];  // signed
};

void quantise(const float* values, std::int64_t n, DType format, QuantisedGroup& out) {
  const auto value = [values](std::int64_t i) { return values[i]; };
  const bool is_int8 = format == DType::kInt8;
  out.scale = is_int8 ? scale_of_int8(n, value) : scale_of_int4(n, value);
  const float inverse = inverse_scale(bf16_to_float(out.scale));
  const float lowest = is_int8 ? kLowestInt8 : kLowestInt4;
  const float highest = is_int8 ? kHighestInt8 : kHighestInt4;
  for (std::int64_t i = 0; i < n; ++i)
    out.codes[i] = nearest_code(values[i], inverse, lowest, highest);
}

// One output (lane) of the group that begins at `group` bytes.
void write_group(const QuantisedGroup& from, std::int64_t n, DType format, std::int64_t lane,
                 std::byte* group) {
  reinterpret_cast<std::uint16_t*>(group)[lane] = from.scale;
  auto* codes = reinterpret_cast<std::uint8_t*>(group + kScalesBytes) + lane * 4;
  for (std::int64_t k = 0; k < n; ++k) {
    const std::int64_t quad = k / 4;
    if (format == DType::kInt8) {
      codes[quad * kPanelOutputs * 4 + k % 4] = static_cast<std::uint8_t>(from.codes[k] + 128);
      continue;
    }
    std::uint8_t& both = codes[quad / 2 * kPanelOutputs * 4 + k % 4];
    const auto nibble = static_cast<unsigned>(from.codes[k] + 8);
    both = static_cast<std::uint8_t>(quad % 2 == 0 ? nibble : both | nibble << 4);
  }
}

std::int64_t pack_quantised_run(const RowRun& run, const PackShape& shape, std::int64_t n_in_padded,
                                std::int64_t panel_bytes, void* destination) {
  const PackSource& source = *run.source;
  const std::int64_t group = quantised_group(shape.dtype);
  const std::int64_t code_bytes = shape.dtype == DType::kInt8 ? kPanelOutputs : kPanelOutputs / 2;
  std::byte* const panel =
      static_cast<std::byte*>(destination) + run.first_out / kPanelOutputs * panel_bytes;
  std::vector<float> values(static_cast<std::size_t>(n_in_padded));
  std::int64_t first_bad = run.n_rows;
  for (std::int64_t row = 0; row < run.n_rows; ++row) {
    const std::int64_t element = (run.first_row + row) * source.row_stride;
    for (std::int64_t column = 0; column < shape.n_in; ++column) {
      const float value = load_element(source.data, source.dtype, element + column);
      if (!std::isfinite(value)) [[unlikely]]
        first_bad = std::min(first_bad, row);
      const std::int64_t k =
          column / shape.in_group * shape.in_group_padded + column % shape.in_group;
      values[static_cast<std::size_t>(k)] = value;
    }
    if (first_bad != run.n_rows) break;
    std::byte* at = panel;
    for (std::int64_t begin = 0; begin < n_in_padded; begin += group) {
      const std::int64_t n = std::min(group, n_in_padded - begin);
      QuantisedGroup quantised;
      quantise(values.data() + begin, n, shape.dtype, quantised);
      write_group(quantised, n, shape.dtype, run.first_out % kPanelOutputs + row, at);
      at += kScalesBytes + n * code_bytes;
    }
  }
  return first_bad;
}

}  // namespace

std::size_t CpuBackend::packed_bytes(std::int64_t n_out, std::int64_t n_in_padded,
                                     DType dtype) const {
  check(!is_coded_bf16(dtype),
        "weights: device 'cpu' takes float32, bfloat16, int8 or int4, found ", dtype_name(dtype),
        "; load them in bfloat16");
  const std::int64_t n_panels = div_up(n_out, kPanelOutputs);
  if (!is_quantised(dtype))
    return static_cast<std::size_t>(n_panels * kPanelOutputs * n_in_padded) * dtype_bytes(dtype);
  const std::int64_t codes = kPanelOutputs * n_in_padded / (dtype == DType::kInt8 ? 1 : 2);
  const std::int64_t n_groups = div_up(n_in_padded, quantised_group(dtype));
  return static_cast<std::size_t>(n_panels * (codes + n_groups * kScalesBytes));
}

// note: `destination` is zeroed memory, so padding needs no writes.
std::int64_t CpuBackend::pack(const PackSource& source, const PackShape& shape,
                              std::int64_t first_out, void* destination) {
  check(shape.pair_width == 0, "weights: the CPU packs no gates and ups in pairs");
  const std::int64_t n_in_padded =
      round_up(div_up(shape.n_in, shape.in_group) * shape.in_group_padded, kColumnAlign);
  const auto panel_bytes = static_cast<std::int64_t>(packed_bytes(1, n_in_padded, shape.dtype));
  const std::int64_t first_panel = first_out / kPanelOutputs;
  const std::int64_t n_panels = div_up(first_out + source.n_rows, kPanelOutputs) - first_panel;
  std::atomic<std::int64_t> first_bad{std::numeric_limits<std::int64_t>::max()};
  pool_->parallel_for(lane_, n_panels, [&](std::int64_t panel, int) {
    const std::int64_t begin = std::max(first_out, (first_panel + panel) * kPanelOutputs);
    const std::int64_t end =
        std::min(first_out + source.n_rows, (first_panel + panel + 1) * kPanelOutputs);
    const RowRun run{&source, begin - first_out, end - begin, begin};
    const std::int64_t bad =
        is_quantised(shape.dtype)
            ? pack_quantised_run(run, shape, n_in_padded, panel_bytes, destination)
        : shape.dtype == DType::kF32 ? pack_run<DType::kF32>(run, shape, n_in_padded, destination)
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
