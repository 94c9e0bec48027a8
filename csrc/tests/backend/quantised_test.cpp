// int8 and int4 weights: what pack.cpp writes is near the numbers it was given, and the panels of
// kernels_quantised.h multiply exactly what is written.
#include <algorithm>
#include <cmath>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

constexpr std::int64_t kOut = 70;  // two panels, the second nearly empty

// A matrix packed by the CPU backend, and the numbers that its codes stand for.
struct Quantised {
  Quantised(Random& random, std::int32_t inputs, DType dtype)
      : n_in(inputs), format(dtype), source(random_rows(random, kOut, n_in, n_in)) {
    for (std::int64_t k = 0; k < n_in; ++k) source.set(3, k, 0.0f);  // a group of zeros
    CpuBackend backend({2, "portable"});
    panel_bytes = static_cast<std::int64_t>(backend.packed_bytes(1, n_in, format));
    packed.resize(backend.packed_bytes(kOut, n_in, format));
    bad = backend.pack({source.address(0), DType::kF32, kOut, n_in}, {n_in, n_in, n_in, format}, 0,
                       packed.data());
  }

  const std::byte* group_at(std::int64_t out, std::int64_t k) const {
    const std::int64_t group = quantised_group(format);
    const std::int64_t full = kScalesBytes + group * (format == DType::kInt8 ? 64 : 32);
    return packed.data() + out / kPanelOutputs * panel_bytes + k / group * full;
  }
  float scale(std::int64_t out, std::int64_t k) const {
    return bf16_to_float(load_unaligned<std::uint16_t>(group_at(out, k), out % kPanelOutputs));
  }
  std::int32_t code(std::int64_t out, std::int64_t k) const {
    const auto* codes = reinterpret_cast<const std::uint8_t*>(group_at(out, k) + kScalesBytes);
    const std::int64_t in_group = k % quantised_group(format);
    const std::int64_t lane = out % kPanelOutputs * 4 + k % 4;
    const std::int64_t quad = in_group / 4;
    if (format == DType::kInt8) return codes[quad * 256 + lane] - 128;
    const std::int32_t both = codes[quad / 2 * 256 + lane];
    return (quad % 2 == 0 ? both & 15 : both >> 4) - 8;
  }

  std::int32_t n_in;
  DType format;
  RowBuffer source;
  std::vector<std::byte> packed;
  std::int64_t panel_bytes = 0;
  std::int64_t bad = 0;
};

struct QuantisedRow {
  QuantisedRow(const CpuKernels& kernels, RowBuffer& x, std::int64_t row, std::int32_t n_in,
               DType dtype)
      : format(dtype), bytes(static_cast<std::size_t>(quantised_row_bytes(n_in, dtype))) {
    kernels.quantise_row(x.address(row), x.rows().dtype, n_in, format, bytes.data());
  }
  const std::byte* group_at(std::int64_t k) const {
    const std::int64_t group = quantised_group(format);
    return bytes.data() + k / group * (std::int64_t{sizeof(RowGroup)} + group);
  }
  RowGroup head(std::int64_t k) const { return load_unaligned<RowGroup>(group_at(k), 0); }
  std::int32_t code(std::int64_t k) const {
    return load_unaligned<std::int8_t>(group_at(k) + sizeof(RowGroup), k % quantised_group(format));
  }

  DType format;
  std::vector<std::byte> bytes;
};

RowBuffer multiply(const CpuKernels& kernels, const Quantised& w,
                   const std::vector<QuantisedRow>& x, std::int64_t panel, std::size_t begin,
                   std::int32_t n_rows) {
  RowBuffer y(n_rows, 0, kPanelOutputs, DType::kF32);
  std::vector<const void*> rows;
  std::vector<float*> outs;
  for (std::int32_t i = 0; i < n_rows; ++i) {
    rows.push_back(x[begin + static_cast<std::size_t>(i)].bytes.data());
    outs.push_back(static_cast<float*>(y.address(i)));
  }
  kernels.linear_panel({rows.data(), n_rows, w.packed.data() + panel * w.panel_bytes, w.n_in,
                        w.format, outs.data(), 1.0f});
  return y;
}

std::vector<QuantisedRow> quantise(const CpuKernels& kernels, RowBuffer& x, std::int32_t n_in,
                                   DType format) {
  std::vector<QuantisedRow> rows;
  for (std::int64_t row = 0; row < x.n_rows(); ++row)
    rows.emplace_back(kernels, x, row, n_in, format);
  return rows;
}

TEST_CASE("quantised weights are within half a step of the numbers") {
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  const std::int32_t n_in = GENERATE(16, 48, 64, 208);
  CAPTURE(dtype_name(format), n_in);
  Random random(3);
  const Quantised w(random, n_in, format);
  CHECK(w.bad == -1);
  const std::int32_t highest = format == DType::kInt8 ? 127 : 8;
  double worst = 0;
  double error = 0;
  double total = 0;
  for (std::int64_t out = 0; out < kOut; ++out)
    for (std::int64_t k = 0; k < n_in; ++k) {
      const double value = w.source.get(out, k);
      const double step = std::abs(w.scale(out, k));
      const double off = std::abs(value - w.code(out, k) * double{w.scale(out, k)});
      CHECK(std::abs(w.code(out, k)) <= highest);
      if (step > 0) worst = std::max(worst, off / step);
      error += off * off;
      total += value * value;
    }
  // int4 gives up the ends of a group where that makes the whole group better.
  CHECK(worst <= (format == DType::kInt8 ? 0.5001 : 1.5));
  CHECK(std::sqrt(error / total) < (format == DType::kInt8 ? 0.007 : 0.095));
}

TEST_CASE("a quantised panel multiplies what is written, with the same bytes in any company") {
  constexpr std::int32_t kRows = 26;
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t n_in = GENERATE(16, 48, 416);
  CAPTURE(isa, dtype_name(format), dtype_name(dtype), n_in);
  const CpuKernels& kernels = choose_kernels(isa);
  Random random(5);
  const Quantised w(random, n_in, format);
  RowBuffer x = random_rows(random, kRows, n_in, n_in + 16, dtype);
  const std::vector<QuantisedRow> rows = quantise(kernels, x, n_in, format);
  Deviation deviation;
  std::int64_t n_different = 0;
  for (std::int64_t panel = 0; panel < 2; ++panel) {
    const RowBuffer together = multiply(kernels, w, rows, panel, 0, kRows);
    for (std::size_t row = 0; row < kRows; ++row)
      for (std::int64_t out = panel * kPanelOutputs; out < std::min(kOut, (panel + 1) * 64);
           ++out) {
        double sum = 0;
        double magnitude = 0;
        for (std::int64_t k = 0; k < n_in; ++k) {
          const double term = double{rows[row].head(k).scale} * rows[row].code(k) * w.code(out, k) *
                              double{w.scale(out, k)};
          sum += term;
          magnitude += std::abs(term);
        }
        // Inside a group the sum is exact; a group costs two products and a sum.
        const double n_groups = static_cast<double>(div_up(n_in, quantised_group(format)));
        deviation.add(together.get(static_cast<std::int64_t>(row), out % 64), sum,
                      3 * n_groups * kUnit * magnitude);
      }
    for (std::int32_t n = 1; n <= 7; ++n)
      for (std::int32_t begin = 0; begin + n <= kRows; begin += n) {
        const RowBuffer y = multiply(kernels, w, rows, panel, static_cast<std::size_t>(begin), n);
        for (std::int32_t i = 0; i < n; ++i)
          n_different += y.same_row(i, together, begin + i, kPanelOutputs) ? 0 : 1;
      }
  }
  CHECK(deviation.worst <= 1);
  CHECK(n_different == 0);
}

TEST_CASE("a quantised row is the nearest codes of its groups") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  constexpr std::int32_t kIn = 112;  // a whole group of either kind and a partial one
  CAPTURE(isa, dtype_name(format));
  const CpuKernels& kernels = choose_kernels(isa);
  Random random(6);
  RowBuffer x = random_rows(random, 2, kIn, kIn);
  for (std::int64_t k = 64; k < kIn; ++k) x.set(1, k, 0.0f);
  for (std::int64_t row = 0; row < 2; ++row) {
    const QuantisedRow quantised(kernels, x, row, kIn, format);
    double worst = 0;
    for (std::int64_t k = 0; k < kIn; ++k) {
      const double scale = quantised.head(k).scale;
      const double off = std::abs(x.get(row, k) - quantised.code(k) * scale);
      worst = std::max(worst, scale > 0 ? off / scale : off);
    }
    CHECK(worst <= 0.5001);
    std::int32_t sum = 0;
    for (std::int64_t k = 0; k < quantised_group(format); ++k) sum += quantised.code(k);
    CHECK(quantised.head(0).correction == (format == DType::kInt8 ? -128 : -8) * sum);
  }
}

TEST_CASE("the instruction sets with fused multiply-adds give quantised rows the same bytes") {
  const std::vector<std::string> sets = instruction_sets();
  if (sets.size() < 3) return;  // nothing beside AVX2 here
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  Random random(7);
  const Quantised w(random, 208, format);
  RowBuffer x = random_rows(random, 9, 208, 208);
  const auto product = [&](const std::string& isa) {
    const CpuKernels& kernels = choose_kernels(isa);
    return multiply(kernels, w, quantise(kernels, x, 208, format), 0, 0, 9);
  };
  const RowBuffer a = product("avx2");
  for (std::size_t i = 2; i < sets.size(); ++i) {
    CAPTURE(sets[i]);
    const RowBuffer b = product(sets[i]);
    for (std::int64_t row = 0; row < 9; ++row) CHECK(a.same_row(row, b, row, kPanelOutputs));
  }
}

TEST_CASE("a number that is not finite is found before it is quantised") {
  const DType format = GENERATE(DType::kInt8, DType::kInt4);
  CpuBackend backend({1, "portable"});
  Random random(8);
  RowBuffer source = random_rows(random, 5, 32, 32);
  source.set(3, 7, kNan);
  std::vector<std::byte> packed(backend.packed_bytes(5, 32, format));
  CHECK(backend.pack({source.address(0), DType::kF32, 5, 32}, {32, 32, 32, format}, 0,
                     packed.data()) == 3);
}

}  // namespace
}  // namespace duplex::backend_tests
