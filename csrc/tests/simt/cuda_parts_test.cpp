// Several partial sums on one GPU, each over a part of the columns: those of as many matrices of
// their own, and the CPU backend's bytes where one part has them. Their sum is conv_add_norm's
// (cuda_tapes_test.cpp), over ranks with several parts each the exchanges'.
#include <vector>

#include "model/weights.h"
#include "tests/model/shards.h"
#include "tests/simt/coded.h"
#include "tests/simt/coded_experts.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

constexpr std::int32_t kOut = 70;  // a panel and a part of one

RowBuffer columns(const RowBuffer& x, std::int64_t first, std::int64_t n, DType dtype) {
  RowBuffer found(x.n_rows(), n, n, dtype);
  for (std::int64_t row = 0; row < x.n_rows(); ++row)
    for (std::int64_t c = 0; c < n; ++c) found.set(row, c, x.get(row, first + c));
  return found;
}

// Parts one behind the other, a row between them.
RowBuffer product(Backend& backend, Memory& memory, const PackedMatrix& w, RowBuffer& x,
                  std::int32_t n_parts) {
  const auto n_rows = static_cast<std::int32_t>(x.n_rows());
  RowBuffer y(n_parts * (n_rows + 1), 0, round_up(kOut, kPanelOutputs) + 16, DType::kF32);
  float* const there = memory.put_floats(y);
  backend.linear({.w = w,
                  .x = memory.put(x),
                  .n_rows = n_rows,
                  .y = there,
                  .y_stride = y.stride(),
                  .divisor = 3.5f,
                  .n_parts = n_parts,
                  .y_part_stride = (n_rows + 1) * y.stride()});
  memory.get(y, there);
  return y;
}

// Columns of a matrix in groups of a part, which are padded.
struct Case {
  Case(DType type, DType of_rows, std::int32_t parts, std::int32_t width, std::int32_t rows)
      : format(type),
        n_parts(parts),
        n_in(width),
        padded(static_cast<std::int32_t>(round_up(width, kColumnAlign))),
        random(41),
        w(random_rows(random, kOut, n_parts * n_in, n_parts * n_in + 3)),
        x(random_rows(random, rows, n_parts * padded, n_parts * padded + 16, of_rows)) {}

  PackedMatrix pack(Memory& memory, RowBuffer& of, std::int32_t parts) const {
    return memory.pack(of, {parts * n_in, n_in, padded, format}, kOut, parts);
  }
  RowBuffer run(Backend& backend) {
    Memory memory(backend);
    return product(backend, memory, pack(memory, w, n_parts), x, n_parts);
  }
  // One part, whose matrix and rows are there alone.
  RowBuffer run_alone(Backend& backend, std::int32_t part) {
    Memory memory(backend);
    RowBuffer own = columns(w, part * n_in, n_in, DType::kF32);
    RowBuffer rows = columns(x, part * padded, padded, x.rows().dtype);
    return product(backend, memory, pack(memory, own, 1), rows, 1);
  }

  DType format;
  std::int32_t n_parts, n_in, padded;
  Random random;
  RowBuffer w, x;
};

// More rows than one kernel takes; widths that are no whole steps of a kernel.
TEST_CASE("cuda: linear of several parts has the bytes of as many matrices", "[simt][races]") {
  const auto [format, of_rows, n_in, n_rows] = GENERATE(
      table<DType, DType, std::int32_t, std::int32_t>({{DType::kF32, DType::kF32, 40, 9},
                                                       {DType::kBF16, DType::kBF16, 40, 9},
                                                       {DType::kBF16, DType::kBF16, 48, 70},
                                                       {DType::kMxfp8, DType::kBF16, 48, 9},
                                                       {DType::kInt8, DType::kBF16, 64, 9},
                                                       {DType::kInt4, DType::kF32, 32, 9}}));
  const std::int32_t n_parts = GENERATE(2, 8);
  CAPTURE(dtype_name(format), n_in, n_rows, n_parts);
  Case given(format, of_rows, n_parts, n_in, n_rows);
  in_every_order([&](Backend& backend) {
    const RowBuffer together = given.run(backend);
    for (std::int32_t p = 0; p < n_parts; ++p)
      CHECK(n_different(given.run_alone(backend, p), together, p * (n_rows + 1)) == 0);
  });
  if (format == DType::kF32 || is_quantised(format))
    check_same_bytes([&](Backend& backend) { return given.run(backend); });
}

// ---- experts

// What one part of the width of all experts is, by itself.
Experts part_of(Experts& whole, std::int32_t n_parts, std::int32_t part) {
  MoeConfig config = whole.config;
  config.d_expert /= n_parts;
  const std::int64_t n = config.d_expert;
  Experts found(config, whole.format);
  found.router = whole.router;
  found.bias = whole.bias;
  for (std::int64_t row = 0; row < found.up.n_rows(); ++row)
    for (std::int64_t c = 0; c < Experts::kModel; ++c)
      found.up.set(row, c, whole.up.get((row / n * n_parts + part) * n + row % n, c));
  found.down = columns(whole.down, part * n, n, DType::kF32);
  return found;
}

TEST_CASE("cuda: experts of several parts have the bytes of as many ranks' experts", "[simt]") {
  const DType format =
      GENERATE(DType::kF32, DType::kBF16, DType::kMxfp8, DType::kInt8, DType::kInt4);
  const DType of_rows = format == DType::kF32 ? DType::kF32 : DType::kBF16;
  const std::int32_t n_parts = GENERATE(2, 4);
  CAPTURE(dtype_name(format), n_parts);
  // One expert a row, so that no logit weighs: the C library's exp may differ by a unit.
  Experts experts({5, 0, 1, n_parts * 64, 2.5f}, format);
  experts.router = random_rows(experts.random, 5, Experts::kModel, Experts::kModel);
  RowBuffer x = random_rows(experts.random, 20, Experts::kModel, Experts::kModelPadded, of_rows);
  in_every_order([&](Backend& backend) {
    const RowBuffer together = experts.run(backend, x, n_parts);
    for (std::int32_t p = 0; p < n_parts; ++p) {
      Experts own = part_of(experts, n_parts, p);
      CHECK(n_different(own.run(backend, x), together, p * x.n_rows()) == 0);
    }
  });
  if (format == DType::kF32 || is_quantised(format))
    check_same_bytes([&](Backend& backend) { return experts.run(backend, x, n_parts); });
}

// Shared experts are of another format, so each part has them apart as well.
TEST_CASE("cuda: experts in NVFP4 of several parts have the bytes of those in bfloat16", "[simt]") {
  constexpr std::int32_t kExpert = 96, kParts = 2;
  CodedExperts experts(kExpert, {-611.3f, true}, {1.7e-3f, false});
  RowBuffer x =
      random_rows(experts.plain.random, 20, Experts::kModel, Experts::kModelPadded, DType::kBF16);
  in_every_order([&](Backend& backend) {
    CHECK(n_different(experts.coded.run(backend, x, kParts),
                      experts.plain.run(backend, x, kParts)) == 0);
  });
}

// ---- weights

struct Matrix {
  PackedMatrix w;
  std::size_t bytes;
};

// The matrices whose columns are cut.
std::vector<Matrix> cut_matrices(Backend& backend, const ModelConfig& config, const Weights& of,
                                 std::int32_t n_parts) {
  std::vector<Matrix> found;
  const auto add = [&](PackedMatrix w, std::int64_t offset) {
    w.data = static_cast<const std::byte*>(w.data) + offset;
    found.push_back({w, backend.packed_bytes(w.n_out, w.n_in / n_parts, w.dtype)});
  };
  for (std::size_t i = 0; i < of.layers.size(); ++i) {
    const LayerWeights& layer = of.layers[i];
    add(layer.out, 0);
    if (config.layers[i].is_moe)
      add(layer.moe.down,
          (config.moe.n_experts + config.moe.n_shared - 1) * layer.moe.down_stride_bytes);
    else
      add(layer.dense.down, 0);
  }
  return found;
}

TEST_CASE("cuda: weights of several parts are those of as many ranks, one behind the other",
          "[simt]") {
  const DType matrices =
      GENERATE(DType::kF32, DType::kBF16, DType::kMxfp8, DType::kInt8, DType::kInt4);
  const Shard shard = GENERATE(Shard{0, 1, 4}, Shard{1, 2, 2});
  CAPTURE(dtype_name(matrices), shard.size);
  ModelConfig config = model_tests::quantised_config();
  config.d_model = 72;  // two panels
  config.vision.reset();
  const std::vector<model_tests::OwnTensor> tensors =
      model_tests::RandomCheckpoint(config, 5).tensors();
  const DType rows = matrices == DType::kF32 ? DType::kF32 : DType::kBF16;
  cuda::CudaBackend backend({});
  const auto load = [&](const Shard& of) {
    return load_weights(config, model_tests::views(tensors), {rows, matrices}, backend, {}, of);
  };
  const auto bytes_at = [&](const void* data, std::size_t n) {
    std::vector<std::byte> bytes(n);
    backend.read(bytes.data(), data, n);
    return bytes;
  };
  const Weights several = load(shard);
  const std::vector<Matrix> found = cut_matrices(backend, config, several, shard.n_parts);
  for (std::int32_t p = 0; p < shard.n_parts; ++p) {
    const Weights one = load({shard.rank * shard.n_parts + p, shard.total_parts(), 1});
    const std::vector<Matrix> expected = cut_matrices(backend, config, one, 1);
    REQUIRE(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      CAPTURE(p, i);
      CHECK(found[i].w.n_in == shard.n_parts * expected[i].w.n_in);
      REQUIRE(found[i].bytes == expected[i].bytes);
      const auto* const at = static_cast<const std::byte*>(found[i].w.data) +
                             static_cast<std::size_t>(p) * found[i].bytes;
      CHECK(bytes_at(at, found[i].bytes) == bytes_at(expected[i].w.data, expected[i].bytes));
    }
  }
}

}  // namespace
}  // namespace duplex::simt_tests
