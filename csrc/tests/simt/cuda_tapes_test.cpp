// The CUDA backend's operations on tapes (convolutions, keys and values, attention) against the CPU
// backend: the same bytes in float32 and int8, derived bounds in bfloat16, equal bytes however the
// rows are cut into calls. Whatever a row may not see is NaN on the tape.
#include <algorithm>
#include <cmath>

#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

using Chunks = std::vector<std::int32_t>;
constexpr float kEps = 1e-6f;
constexpr float kAlpha = 0.4f;

// Two streams in one batch: rows of the second follow those of the first.
struct Pair {
  std::int64_t position[2];
  std::int32_t n_rows[2];
  std::int32_t total() const { return n_rows[0] + n_rows[1]; }
};
constexpr Pair kPairs[] = {
    {{0, 0}, {1, 4}}, {{60, 3}, {7, 2}}, {{127, 64}, {1, 1}}, {{61, 190}, {5, 6}}};

// ---- conv_add_norm

struct Conv {
  static constexpr std::int64_t kOffset = 64;  // of the slot in a block of the tape

  Conv(const Pair& of, std::int32_t kernel, DType type, std::int32_t columns = 270, int n_parts = 1)
      : width(columns),
        padded(round_up(columns, kColumnAlign)),
        pair(of),
        dtype(type),
        random(8),
        parts(static_cast<std::size_t>(n_parts), random_rows(random, of.total(), width, padded)),
        weight(random_rows(random, kernel, width, padded)),
        norm(random_rows(random, 1, width, padded)),
        hidden(random_rows(random, of.total(), width, padded)) {
    for (std::size_t p = 1; p < parts.size(); ++p)
      parts[p] = random_rows(random, of.total(), width, padded);
    for (int s = 0; s < 2; ++s)
      tapes.push_back(
          std::make_unique<HostTape>(of.position[s] + of.n_rows[s], kOffset + 4 * padded));
    // What earlier calls left.
    for (std::size_t s = 0; s < 2; ++s)
      for (std::int64_t p = std::max<std::int64_t>(of.position[s] - 8, 0); p < of.position[s]; ++p)
        for (std::int64_t c = 0; c < padded; ++c) {
          const float value = c < width ? random.normal() : 0.0f;
          std::memcpy(tapes[s]->view.block(p) + kOffset + 4 * c, &value, 4);
        }
  }
  // The new hidden rows, then the normalised ones, then the tapes' rows.
  RowBuffer run(Backend& backend) const {
    Conv in = *this;
    Memory memory(backend);
    RowBuffer out(pair.total(), 0, padded + 16, dtype);
    const Rows out_there = memory.put(out);
    float* const hidden_there = memory.put_floats(in.hidden);
    const TapeView views[] = {memory.put(*tapes[0]), memory.put(*tapes[1])};
    const Segment segments[] = {segment(0, views[0]), segment(1, views[1])};
    ConvAddNormArgs args{
        .segments = {segments, 2, pair.total()},
        .parts = {},
        .n_parts = static_cast<std::int32_t>(parts.size()),
        .x_stride = padded,
        .scale = 0.7f,
        .conv = {memory.put_floats(in.weight), kOffset, static_cast<std::int32_t>(padded)},
        .kernel = static_cast<std::int32_t>(weight.n_rows()),
        .hidden = hidden_there,
        .hidden_stride = padded,
        .norm = memory.put_floats(in.norm),
        .eps = kEps,
        .width = width,
        .out = out_there};
    for (std::size_t p = 0; p < parts.size(); ++p) args.parts[p] = memory.put_floats(in.parts[p]);
    backend.conv_add_norm(args);
    memory.get(in.hidden, hidden_there);
    memory.get(out, out_there.data);
    return joined(in, out, memory, views);
  }
  RowBuffer joined(const Conv& in, const RowBuffer& out, Memory& memory,
                   const TapeView (&views)[2]) const {
    RowBuffer all(3 * pair.total(), 0, padded, DType::kF32);
    std::int64_t row = 0;
    for (int s = 0; s < 2; ++s) {
      HostTape tape(pair.position[s] + pair.n_rows[s], kOffset + 4 * padded);
      memory.get(tape, views[s]);
      for (std::int64_t i = 0; i < pair.n_rows[s]; ++i, ++row) {
        for (std::int64_t c = 0; c < padded; ++c) {
          all.set(row, c, in.hidden.get(row, c));
          all.set(pair.total() + row, c, out.get(row, c));
        }
        std::memcpy(all.address(2 * pair.total() + row),
                    tape.view.block(pair.position[s] + i) + kOffset, 4 * padded);
      }
    }
    return all;
  }
  Segment segment(int s, const TapeView& view) const {
    return {.row_begin = s == 0 ? 0 : pair.n_rows[0],
            .n_rows = pair.n_rows[s],
            .position = pair.position[s],
            .global = view,
            .local = {},
            .conv = view};
  }

  std::int32_t width;
  std::int64_t padded;
  Pair pair;
  DType dtype;
  Random random;
  std::vector<RowBuffer> parts;
  RowBuffer weight, norm, hidden;
  std::vector<std::shared_ptr<HostTape>> tapes;
};

TEST_CASE("cuda: conv_add_norm", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t kernel = GENERATE(1, 4, 8);
  const Pair pair = GENERATE(from_range(std::begin(kPairs), std::end(kPairs)));
  CAPTURE(dtype_name(dtype), kernel, pair.position[0]);
  const Conv conv(pair, kernel, dtype);
  check_same_bytes([&](Backend& backend) { return conv.run(backend); });
}

TEST_CASE("cuda: conv_add_norm of several parts", "[simt][races]") {
  const int n_parts = GENERATE(2, 3, 8);
  const std::int32_t kernel = GENERATE(4, 7);
  const Pair pair = GENERATE(from_range(std::begin(kPairs), std::end(kPairs)));
  CAPTURE(n_parts, kernel, pair.position[0]);
  const Conv conv(pair, kernel, DType::kF32, 40, n_parts);
  check_same_bytes([&](Backend& backend) { return conv.run(backend); });
}

TEST_CASE("cuda: conv_add_norm of more columns than a thread block has at once", "[simt][races]") {
  const Conv conv(kPairs[2], 4, DType::kBF16, 4200);
  check_same_bytes([&](Backend& backend) { return conv.run(backend); });
}

// ---- kv_append

struct Append {
  static constexpr std::int32_t kHeads = 6, kKvHeads = 2, kKernel = 3, kRows = 7;
  static constexpr std::int64_t kLayerOffset = 256, kConvOffset = 64;

  Append(std::int64_t at, DType type, bool local, std::int32_t d_head = 12)
      : position(at),
        dtype(type),
        is_local(local),
        head(d_head),
        random(9),
        qkvr(random_rows(random, kRows, columns, stride)),
        k_weight(random_rows(random, kKernel, channels, channels)),
        v_weight(random_rows(random, kKernel, channels, channels)),
        q_norm(random_rows(random, 1, head, padded)),
        k_norm(random_rows(random, 1, head, padded)) {
    for (std::int64_t c = 0; c < columns; ++c)
      for (std::int64_t row = 0; row < kRows && c % padded >= head; ++row) qkvr.set(row, c, 0.0f);
    for (std::int64_t i = 0; i < (kKernel - 1) * 2 * channels; ++i)
      before.push_back(i % padded < head ? random.normal() : 0.0f);
  }
  std::int64_t block_bytes() const {
    return kLayerOffset + 2 * kKvHeads * kv_panel_bytes(dtype, padded);
  }
  // Queries as rows of bytes, then both tapes as one row each.
  std::vector<std::byte> run(Backend& backend, const Chunks& chunks) const {
    Append in = *this;
    Memory memory(backend);
    HostTape kv(div_up(position + kRows, kBlockPositions), block_bytes());
    HostTape conv(position + kRows, kConvOffset + 2 * 4 * channels);
    for (std::int64_t back = 1; back < kKernel && back <= position; ++back)
      std::memcpy(conv.view.block(position - back) + kConvOffset,
                  before.data() + (back - 1) * 2 * channels, 2 * 4 * channels);
    const DType rows_dtype = query_dtype(dtype);
    RowBuffer q(kRows, 0, kHeads * padded + 8, rows_dtype);
    const Rows q_there = memory.put(q);
    const TapeView kv_there = memory.put(kv), conv_there = memory.put(conv);
    KvAppendArgs args{
        .segments = {},
        .shape = {kHeads, kKvHeads, head, 8, is_local ? 32 : 0},
        .d_head_padded = padded,
        .qkvr = memory.put_floats(in.qkvr),
        .stride = stride,
        .k_conv = {memory.put_floats(in.k_weight), kConvOffset, channels},
        .v_conv = {memory.put_floats(in.v_weight), kConvOffset + 4 * channels, channels},
        .kernel = kKernel,
        .q_norm = memory.put_floats(in.q_norm),
        .k_norm = memory.put_floats(in.k_norm),
        .eps = kEps,
        .is_local = is_local,
        .log_scaling_floor = 16,
        .log_scaling_alpha = kAlpha,
        .layer_offset_bytes = kLayerOffset,
        .kv_dtype = dtype,
        .q = q_there};
    std::int64_t done = 0;
    for (const std::int32_t n : chunks) {
      const Segment rows{.row_begin = 0,
                         .n_rows = n,
                         .position = position + done,
                         .global = kv_there,
                         .local = kv_there,
                         .conv = conv_there};
      args.segments = {&rows, 1, n};
      backend.kv_append(args);
      args.qkvr += n * stride;
      args.q.data = static_cast<std::byte*>(args.q.data) +
                    n * q.stride() * static_cast<std::int64_t>(dtype_bytes(rows_dtype));
      done += n;
    }
    REQUIRE(done == kRows);
    memory.get(q, q_there.data);
    memory.get(kv, kv_there);
    memory.get(conv, conv_there);
    const auto* const begin = static_cast<const std::byte*>(q.address(0));
    std::vector<std::byte> bytes(begin, begin + bytes_of(q, rows_dtype));
    for (const auto* tape : {&kv, &conv})
      bytes.insert(bytes.end(), tape->memory.begin(), tape->memory.end());
    return bytes;
  }

  std::int64_t position;
  DType dtype;
  bool is_local;
  std::int32_t head, padded = static_cast<std::int32_t>(round_up(head, kColumnAlign));
  std::int32_t channels = kKvHeads * padded, columns = (kHeads + 2 * kKvHeads) * padded;
  std::int64_t stride = columns + 32;
  Random random;
  RowBuffer qkvr, k_weight, v_weight, q_norm, k_norm;
  std::vector<float> before;  // (kernel - 1, 2 channels): the inputs before, newest first
};

TEST_CASE("cuda: kv_append, however the rows are cut", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16, DType::kInt8);
  const bool is_local = GENERATE(false, true);
  const std::int64_t position = GENERATE(0, 60, 61, 127);  // over block edges, odd and even ends
  CAPTURE(dtype_name(dtype), is_local, position);
  if (!has_fused_cpu()) return;
  const Append append(position, dtype, is_local);
  CpuBackend cpu({1, ""});
  const std::vector<std::byte> expected = append.run(cpu, {Append::kRows});
  in_every_order([&](Backend& backend) {
    for (const Chunks& chunks : {Chunks{7}, Chunks(7, 1), Chunks{2, 5}, Chunks{4, 3}})
      CHECK((append.run(backend, chunks) == expected));
  });
}

TEST_CASE("cuda: kv_append in int8 of a head that several warps share", "[simt][races]") {
  if (!has_fused_cpu()) return;
  const Append append(61, DType::kInt8, false, 140);
  CpuBackend cpu({1, ""});
  const std::vector<std::byte> expected = append.run(cpu, {Append::kRows});
  in_every_order(
      [&](Backend& backend) { CHECK((append.run(backend, {Append::kRows}) == expected)); });
}

}  // namespace
}  // namespace duplex::simt_tests
