// Partial sums of the ranks of a tensor-parallel group (conv_add_norm): they are added in ascending
// order, in float32, and another order is another result.
#include <algorithm>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

constexpr std::int32_t kRows = 7, kWidth = 40, kPadded = 48, kKernel = 4;

struct Result {
  RowBuffer hidden, out;
  std::vector<std::byte> tape;

  bool same(const Result& other) const {
    for (std::int64_t row = 0; row < kRows; ++row)
      if (!hidden.same_row(row, other.hidden, row, kPadded) ||
          !out.same_row(row, other.out, row, kPadded))
        return false;
    return tape == other.tape;
  }
};

// All rows at once, behind none.
Result run(CpuBackend& backend, std::vector<RowBuffer>& parts) {
  Random random(3);
  RowBuffer weight = random_rows(random, kKernel, kWidth, kPadded);
  RowBuffer norm = random_rows(random, 1, kWidth, kPadded);
  Result result{random_rows(random, kRows, kWidth, kPadded),
                RowBuffer(kRows, kWidth, kPadded, DType::kF32),
                {}};
  HostTape tape(kRows, 4 * kPadded);
  const Segment segment{.row_begin = 0,
                        .n_rows = kRows,
                        .position = 0,
                        .global = tape.view,
                        .local = {},
                        .conv = tape.view};
  ConvAddNormArgs args{.segments = {&segment, 1, kRows},
                       .parts = {},
                       .n_parts = static_cast<std::int32_t>(parts.size()),
                       .x_stride = kPadded,
                       .scale = 0.7f,
                       .conv = {weight.floats(), 0, kPadded},
                       .kernel = kKernel,
                       .hidden = result.hidden.floats(),
                       .hidden_stride = kPadded,
                       .norm = norm.floats(),
                       .eps = 1e-6f,
                       .width = kWidth,
                       .out = result.out.rows()};
  for (std::size_t p = 0; p < parts.size(); ++p) args.parts[p] = parts[p].floats();
  backend.conv_add_norm(args);
  result.tape = tape.memory;
  return result;
}

TEST_CASE("conv_add_norm adds its parts in ascending order") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const int n_parts = GENERATE(1, 2, 3, 8);
  CAPTURE(isa, n_parts);
  CpuBackend backend({1, isa});
  Random random(4);
  std::vector<RowBuffer> parts;
  for (int p = 0; p < n_parts; ++p) parts.push_back(random_rows(random, kRows, kWidth, kPadded));
  std::vector<RowBuffer> sum(1, parts.front());
  for (std::size_t p = 1; p < parts.size(); ++p)
    for (std::int64_t row = 0; row < kRows; ++row)
      for (std::int64_t c = 0; c < kWidth; ++c)
        sum[0].set(row, c, sum[0].get(row, c) + parts[p].get(row, c));
  const Result expected = run(backend, sum);
  CHECK(run(backend, parts).same(expected));
  // Two numbers have one sum; more of them have several.
  std::reverse(parts.begin(), parts.end());
  CHECK(run(backend, parts).same(expected) == (n_parts <= 2));
}

TEST_CASE("conv_add_norm takes one part to kMaxParts") {
  CpuBackend backend({1, "portable"});
  std::vector<RowBuffer> parts;
  CHECK_THROWS_WITH(run(backend, parts), "conv_add_norm: expected 1 to 8 parts, found 0");
  const RowBuffer part(kRows, kWidth, kPadded, DType::kF32);
  parts.assign(kMaxParts, part);
  CHECK_NOTHROW(run(backend, parts));
}

}  // namespace
}  // namespace duplex::backend_tests
