// Gates and ups that the CUDA backend activates as it multiplies: where they lie in pairs, every
// format of weights has the bytes of the plain product and silu_mul behind it, which are two
// launches more; int8 and int4 have the CPU backend's besides.
#include <algorithm>
#include <array>
#include <memory>

#include "model/weights.h"
#include "tests/model/shards.h"
#include "tests/simt/coded.h"
#include "tests/simt/coded_experts.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

constexpr float kBehind = 7.0f;  // what lies behind the columns, and stays there

RowBuffer slice(RowBuffer& x, std::int64_t begin, std::int64_t n_rows) {
  RowBuffer rows(n_rows, 0, x.stride(), x.rows().dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < x.stride(); ++c) rows.set(row, c, x.get(begin + row, c));
  return rows;
}

// So many gates, and as many ups behind them; in NVFP4 with a scale each.
struct Gated {
  Gated(std::int32_t inputs, std::int32_t outputs, DType type, DType of_rows)
      : n_in(inputs),
        n_out(outputs),
        padded(static_cast<std::int32_t>(round_up(outputs, kColumnAlign))),
        format(type),
        random(61),
        plain{random_rows(random, outputs, inputs, inputs + 3),
              random_rows(random, outputs, inputs, inputs + 3)},
        x(random_rows(random, 70, inputs, round_up(inputs, kColumnAlign) + 16, of_rows)) {
    if (type != DType::kNvfp4) return;
    coded[0] = std::make_unique<CodedTensor>(random, outputs, inputs, MatrixScale{1.7e-3f, false});
    coded[1] = std::make_unique<CodedTensor>(random, outputs, inputs, MatrixScale{-611.3f, true});
  }

  // The activated rows of n rows of x from `begin` on; `launches` says how many these took.
  RowBuffer run(Backend& backend, std::int64_t begin, std::int32_t n_rows, bool is_paired) {
    Memory memory(backend);
    const auto n_in_padded = static_cast<std::int32_t>(round_up(n_in, kColumnAlign));
    const PackShape shape{n_in, n_in, n_in_padded, format, is_paired ? padded : 0};
    void* const packed = memory.zeros(backend.packed_bytes(2 * padded, n_in_padded, format));
    for (const std::size_t i : {0, 1}) {
      const PackSource source = coded[i] != nullptr ? coded[i]->rows(0, n_out)
                                                    : PackSource{plain[i].address(0), DType::kF32,
                                                                 n_out, plain[i].stride()};
      REQUIRE(backend.pack(source, shape, static_cast<std::int32_t>(i) * padded, packed) == -1);
    }
    RowBuffer out(n_rows, 0, padded + 16, x.rows().dtype);
    for (std::int32_t row = 0; row < n_rows; ++row)
      for (std::int64_t c = padded; c < out.stride(); ++c) out.set(row, c, kBehind);
    RowBuffer y(n_rows, 0, round_up(2 * padded, kPanelOutputs), DType::kF32);
    RowBuffer rows = slice(x, begin, n_rows);
    const Rows there = memory.put(out);
    const LinearArgs args{.w = {packed, 2 * padded, n_in_padded, format, is_paired},
                          .x = memory.put(rows),
                          .n_rows = n_rows,
                          .y = memory.put_floats(y),
                          .y_stride = y.stride(),
                          .activated = there};
    const std::int64_t before = backend.calls().launches;
    backend.linear(args);
    launches = backend.calls().launches - before;
    memory.get(out, there.data);
    return out;
  }

  std::int32_t n_in, n_out, padded;
  DType format;
  Random random;
  std::array<RowBuffer, 2> plain;
  std::array<std::unique_ptr<CodedTensor>, 2> coded;
  RowBuffer x;
  std::int64_t launches = 0;
};

TEST_CASE("cuda: activated rows have the bytes of a product and silu_mul, in any company",
          "[simt]") {
  const DType format =
      GENERATE(DType::kBF16, DType::kMxfp8, DType::kNvfp4, DType::kInt8, DType::kInt4);
  // Half a tile of padding, almost two; part of a chunk, several rounds of the warps.
  const auto [n_out, n_in] =
      GENERATE(table<std::int32_t, std::int32_t>({{52, 336}, {33, 40}, {16, 16}, {64, 1104}}));
  CAPTURE(dtype_name(format), n_out, n_in);
  Gated given(n_in, n_out, format, DType::kBF16);
  in_every_order([&](Backend& backend) {
    const RowBuffer expected = given.run(backend, 0, 70, false);
    const std::int64_t launches = given.launches;
    CHECK(expected.get(69, given.padded) == kBehind);
    for (const std::int32_t n_rows : {1, 9, 20, 28, 70}) {
      CAPTURE(n_rows);
      const RowBuffer activated = given.run(backend, 70 - n_rows, n_rows, true);
      CHECK(n_different(activated, expected, 70 - n_rows) == 0);
      CHECK(given.launches == launches - 1);
    }
  });
}

TEST_CASE("cuda: activated rows have the CPU's bytes where the product has", "[simt][races]") {
  const auto [format, of_rows] = GENERATE(table<DType, DType>({{DType::kF32, DType::kF32},
                                                               {DType::kInt8, DType::kF32},
                                                               {DType::kInt8, DType::kBF16},
                                                               {DType::kInt4, DType::kF32}}));
  CAPTURE(dtype_name(format), dtype_name(of_rows));
  Gated given(144, 52, format, of_rows);
  check_same_bytes(
      [&](Backend& backend) { return given.run(backend, 0, 70, backend.pairs_gate_up(format)); });
}

TEST_CASE("cuda: gates and ups in pairs are for activated rows alone, float32 has none", "[simt]") {
  cuda::CudaBackend backend({});
  std::vector<float> data(64);
  const Rows rows{data.data(), 64, DType::kBF16};
  CHECK_THROWS_WITH(
      backend.linear({{data.data(), 32, 16, DType::kBF16, true}, rows, 1, data.data(), 64}),
      Catch::StartsWith("linear: gates and ups that lie in pairs, for no activated rows"));
  CHECK_FALSE(backend.pairs_gate_up(DType::kF32));
}

TEST_CASE("the CPU activates as silu_mul does, and wants no pairs") {
  CpuBackend cpu({1, ""});
  CHECK_FALSE(cpu.pairs_gate_up(DType::kBF16));
  CHECK_THROWS_WITH(cpu.pack({}, {16, 16, 16, DType::kF32, 16}, 0, nullptr),
                    Catch::Contains("gates and ups in pairs"));
  Gated given(40, 33, DType::kF32, DType::kF32);
  const RowBuffer activated = given.run(cpu, 0, 9, false);
  Memory memory(cpu);
  RowBuffer both(9, 0, 2 * given.padded + 32, DType::kF32), expected(9, 0, 64, DType::kF32);
  for (const std::size_t i : {0, 1}) {
    RowBuffer rows = slice(given.x, 0, 9);
    cpu.linear({memory.pack(given.plain[i], {40, 40, 48, DType::kF32}, 33), memory.put(rows), 9,
                static_cast<float*>(both.address(0, static_cast<std::int64_t>(i) * 64)),
                both.stride()});
  }
  cpu.silu_mul(
      {static_cast<const float*>(both.address(0)), both.stride(), 48, 64, 9, expected.rows()});
  for (std::int64_t row = 0; row < 9; ++row)
    CHECK(activated.same_row(row, expected, row, given.padded));
}

// In squares of 64, and of 128 where there are many. Half a square without outputs.
TEST_CASE("cuda: activated rows of many rows have the bytes of few", "[simt][races]") {
  const auto [n_out, n_rows] =
      GENERATE(table<std::int32_t, std::int32_t>({{4196, 70}, {4220, 257}}));
  CAPTURE(n_out, n_rows);
  Gated given(48, n_out, DType::kBF16, DType::kBF16);
  given.x = random_rows(given.random, n_rows, 48, 64, DType::kBF16);
  cuda::CudaBackend backend({});
  const RowBuffer together = given.run(backend, 0, n_rows, true);
  CHECK(n_different(given.run(backend, 0, n_rows, false), together) == 0);
  for (const std::int32_t first : {0, 63, n_rows - 2})
    CHECK(n_different(given.run(backend, first, 2, true), together, first) == 0);
}

// ---- experts

RowBuffer rows_for(Experts& experts, std::int64_t n_rows, DType of_rows) {
  return random_rows(experts.random, n_rows, Experts::kModel, Experts::kModelPadded, of_rows);
}

// Few pairs have a thread block each, of many all of an expert: these may be more than one takes.
TEST_CASE("cuda: experts have the same bytes with gates and ups in pairs", "[simt]") {
  const DType format = GENERATE(DType::kBF16, DType::kMxfp8, DType::kInt8, DType::kInt4);
  const std::int64_t n_rows = GENERATE(1, 20, 70);
  CAPTURE(dtype_name(format), n_rows);
  Experts paired({4, 1, 2, 52, 1.0f}, format);
  paired.bias[0] = 4.0f;  // an expert of all rows
  paired.router = random_rows(paired.random, 5, Experts::kModel, Experts::kModel);
  RowBuffer x = rows_for(paired, n_rows, DType::kBF16);
  Experts plain = paired;
  plain.may_pair = false;
  in_every_order([&](Backend& backend) {
    const RowBuffer expected = plain.run(backend, x);
    CHECK(n_different(paired.run(backend, x), expected) == 0);
    if (n_rows > 1 && format == DType::kBF16)
      CHECK(n_different(paired.run(backend, x, 4), plain.run(backend, x, 4)) == 0);
  });
}

TEST_CASE("cuda: experts in NVFP4 have the same bytes with gates and ups in pairs", "[simt]") {
  const std::int64_t n_rows = GENERATE(1, 20);
  CodedExperts experts(40, {1.7e-3f, false}, {-611.3f, true});
  RowBuffer x = rows_for(experts.plain, n_rows, DType::kBF16);
  Experts unpaired = experts.coded;
  unpaired.may_pair = false;
  in_every_order([&](Backend& backend) {
    CHECK(n_different(experts.coded.run(backend, x), unpaired.run(backend, x)) == 0);
  });
}

// ---- weights

// Parts are cut between tiles: their tiles are those of as many ranks, one behind the other.
TEST_CASE("cuda: paired gates and ups of several parts are those of as many ranks", "[simt]") {
  const DType matrices = GENERATE(DType::kBF16, DType::kMxfp8, DType::kInt8, DType::kInt4);
  constexpr std::int32_t kParts = 4;
  CAPTURE(dtype_name(matrices));
  ModelConfig config = model_tests::quantised_config();
  config.vision.reset();
  const std::vector<model_tests::OwnTensor> tensors =
      model_tests::RandomCheckpoint(config, 5).tensors();
  cuda::CudaBackend backend({});
  const auto load = [&](const Shard& of) {
    return load_weights(config, model_tests::views(tensors), {DType::kBF16, matrices}, backend, {},
                        of);
  };
  const auto tiles_of = [&](const PackedMatrix& w) {
    std::vector<std::byte> bytes(backend.packed_bytes(kPanelOutputs, w.n_in, w.dtype) *
                                 static_cast<std::size_t>(w.n_out) / kPanelOutputs);
    backend.read(bytes.data(), w.data, bytes.size());
    return bytes;
  };
  const Weights several = load({0, 1, kParts});
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    const bool is_moe = config.layers[i].is_moe;
    const auto gate_up = [&](const Weights& of) {
      return is_moe ? of.layers[i].moe.gate_up : of.layers[i].dense.gate_up;
    };
    REQUIRE(gate_up(several).is_paired);
    std::vector<std::byte> expected;
    for (std::int32_t p = 0; p < kParts; ++p) {
      const Weights one = load({p, kParts, 1});
      const std::vector<std::byte> tiles = tiles_of(gate_up(one));
      expected.insert(expected.end(), tiles.begin(), tiles.end());
    }
    CAPTURE(i, is_moe);
    CHECK(tiles_of(gate_up(several)) == expected);
  }
}

}  // namespace
}  // namespace duplex::simt_tests
