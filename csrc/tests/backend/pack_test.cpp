// The weight layout of pack.cpp: where each number of a matrix lands, that padding stays zero, and
// what is said about numbers that are not finite.
#include <cmath>
#include <cstring>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

// Where output `out` and reduction index k lie among the elements of a packed matrix.
std::int64_t packed_index(std::int64_t out, std::int64_t k, std::int64_t n_in, DType dtype) {
  const std::int64_t panel = out / kPanelOutputs * n_in * kPanelOutputs;
  const std::int64_t lane = out % kPanelOutputs;
  return dtype == DType::kF32 ? panel + k * kPanelOutputs + lane
                              : panel + (k / 2 * kPanelOutputs + lane) * 2 + k % 2;
}

// A packed matrix as flat elements; all zero at first.
struct Packed {
  Packed(CpuBackend& backend, std::int64_t n_out, std::int64_t n_in_padded, DType type)
      : n_in(n_in_padded),
        dtype(type),
        bytes(backend.packed_bytes(n_out, n_in_padded, type), std::byte{0}) {}
  float at(std::int64_t index) const {
    return load_at(bytes.data() + index * static_cast<std::int64_t>(dtype_bytes(dtype)));
  }
  float at(std::int64_t out, std::int64_t k) const { return at(packed_index(out, k, n_in, dtype)); }
  std::int64_t n_elements() const {
    return static_cast<std::int64_t>(bytes.size() / dtype_bytes(dtype));
  }
  std::int64_t n_nonzero() const {
    std::int64_t n = 0;
    for (std::int64_t i = 0; i < n_elements(); ++i) n += at(i) != 0 ? 1 : 0;
    return n;
  }

  std::int64_t n_in;
  DType dtype;
  std::vector<std::byte> bytes;

 private:
  float load_at(const std::byte* from) const {
    float value = 0;
    std::uint16_t half = 0;
    if (dtype == DType::kF32)
      std::memcpy(&value, from, sizeof value);
    else
      std::memcpy(&half, from, sizeof half);
    return dtype == DType::kF32 ? value : bf16_to_float(half);
  }
};

TEST_CASE("packed matrices are whole panels") {
  CpuBackend backend({1, "portable"});
  CHECK(backend.packed_bytes(1, 16, DType::kF32) == 64 * 16 * 4);
  CHECK(backend.packed_bytes(64, 16, DType::kF32) == 64 * 16 * 4);
  CHECK(backend.packed_bytes(65, 48, DType::kBF16) == 128 * 48 * 2);
}

TEST_CASE("pack puts every number of its rows in place and leaves the rest zero") {
  const DType from = GENERATE(DType::kF32, DType::kBF16);
  const DType to = GENERATE(DType::kF32, DType::kBF16);
  const std::int64_t first_out = GENERATE(0, 10, 60);  // the last crosses a panel
  const std::int32_t n_threads = GENERATE(1, 3);
  CAPTURE(dtype_name(from), dtype_name(to), first_out, n_threads);
  // Columns in groups of 5 that land at multiples of 16, rows 40 numbers apart.
  constexpr std::int64_t kRows = 9, kColumns = 15, kGroup = 5, kGroupPadded = 16, kStride = 40;
  CpuBackend backend({n_threads, "portable"});
  Random random(13);
  RowBuffer source = random_rows(random, kRows, kStride, kStride, from);
  Packed packed(backend, first_out + kRows, 48, to);
  const std::int64_t bad =
      backend.pack({source.address(0), from, kRows, kStride}, {kColumns, kGroup, kGroupPadded, to},
                   first_out, packed.bytes.data());
  CHECK(bad == -1);
  bool is_right = true;
  for (std::int64_t row = 0; row < kRows; ++row)
    for (std::int64_t c = 0; c < kColumns; ++c)
      is_right &= packed.at(first_out + row, c / kGroup * kGroupPadded + c % kGroup) ==
                  rounded(source.get(row, c), to);
  CHECK(is_right);
  CHECK(packed.n_nonzero() == kRows * kColumns);
}

TEST_CASE("source rows may lie at any address") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  CpuBackend backend({1, "portable"});
  Random random(14);
  RowBuffer source = random_rows(random, 3, 16, 16, dtype);
  const std::size_t n_bytes = 3 * 16 * dtype_bytes(dtype);
  std::vector<std::byte> shifted(n_bytes + 1);
  std::memcpy(shifted.data() + 1, source.address(0), n_bytes);
  Packed packed(backend, 3, 16, DType::kF32);
  CHECK(backend.pack({shifted.data() + 1, dtype, 3, 16}, {16, 16, 16, DType::kF32}, 0,
                     packed.bytes.data()) == -1);
  for (std::int64_t row = 0; row < 3; ++row)
    for (std::int64_t c = 0; c < 16; ++c) CHECK(packed.at(row, c) == source.get(row, c));
}

TEST_CASE("pack names the first row that holds a NaN or an infinity") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t n_threads = GENERATE(1, 3);
  CpuBackend backend({n_threads, "portable"});
  Random random(15);
  constexpr std::int64_t kRows = 200;
  RowBuffer source = random_rows(random, kRows, 16, 16, dtype);
  Packed packed(backend, kRows, 16, dtype);
  const auto pack = [&] {
    return backend.pack({source.address(0), dtype, kRows, 16}, {16, 16, 16, dtype}, 0,
                        packed.bytes.data());
  };
  source.set(190, 3, kNan);
  CHECK(pack() == 190);
  source.set(70, 15, INFINITY);
  CHECK(pack() == 70);
  source.set(69, 0, -INFINITY);
  CHECK(pack() == 69);
}

TEST_CASE("linear multiplies with what pack packed") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  CAPTURE(isa, dtype_name(dtype));
  constexpr std::int32_t kOut = 150, kIn = 40, kPadded = 48, kRows = 300;
  CpuBackend backend({2, isa});
  Random random(16);
  RowBuffer weights = random_rows(random, kOut, kIn, kIn, dtype);
  RowBuffer x = random_rows(random, kRows, kIn, kPadded, dtype);
  Packed packed(backend, kOut, kPadded, dtype);
  backend.pack({weights.address(0), dtype, kOut, kIn}, {kIn, kIn, kPadded, dtype}, 0,
               packed.bytes.data());
  RowBuffer y(kRows, 192, 192, DType::kF32);
  backend.linear({.w = {packed.bytes.data(), kOut, kPadded, dtype},
                  .x = x.rows(),
                  .n_rows = kRows,
                  .y = y.floats(),
                  .y_stride = 192,
                  .divisor = 3.0f});
  Deviation deviation;
  for (std::int64_t row = 0; row < kRows; ++row)
    for (std::int64_t out = 0; out < kOut; ++out) {
      double sum = 0, size = 0;
      for (std::int64_t k = 0; k < kIn; ++k) {
        const double term = double{x.get(row, k)} * weights.get(out, k) / 3;
        sum += term;
        size += std::abs(term);
      }
      deviation.add(y.get(row, out), sum, (2 * kIn + 1) * kUnit * size);
    }
  CHECK(deviation.worst <= 1);
}

}  // namespace
}  // namespace duplex::backend_tests
