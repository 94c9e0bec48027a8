// The CUDA backend's attention against the CPU backend: the same bytes in float32 and over int8
// keys and values, derived bounds in bfloat16, and each row's bytes whatever rows and streams are
// beside it. Whatever a row may not see is NaN on the tape.
#include <algorithm>
#include <cmath>

#include "backend/kv_int8.h"
#include "kernels/launchers.h"
#include "tests/backend/attention_scene.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

using backend_tests::kAlpha;
using backend_tests::random_heads;
using backend_tests::Scene;

const std::vector<Scene> kScenes = {
    {"the first position", {1, 1, 16, 8, 0}, 3, 0, 1},
    {"from nothing over a block edge", {2, 2, 12, 100, 0}, 5, 0, 70},
    {"a window of 5 over a block edge", {6, 2, 20, 5, 5}, 3, 61, 9},
    {"a window of one block", {8, 2, 16, 64, 64}, 4, 63, 13},
    {"an extent beyond the start", {5, 1, 16, 200, 0}, 2, 130, 20},
    {"an extent of one", {14, 2, 12, 1, 0}, 1, 127, 9},
    {"a window, long after the start", {8, 1, 40, 70, 70}, 3, 300, 12},
    {"forgotten ranges, several parts", {3, 1, 16, 33, 0}, 3, 640, 5, 0, {{64, 192}, {256, 512}}},
    {"a forgotten range inside the extent", {4, 1, 12, 400, 0}, 3, 200, 8, 16, {{64, 128}}},
    {"log scaling that sets in between two rows", {12, 2, 16, 20, 0}, 3, 64, 33, 90},
    {"more parts than strands", {2, 1, 12, 300, 0}, 2, 1276, 6},
    {"a head in two chunks", {4, 2, 144, 90, 0}, 2, 125, 5},
    {"more parts than strands, most forgotten",
     {3, 1, 16, 33, 0},
     2,
     1724,
     7,
     0,
     {{64, 960}, {1088, 1216}, {1280, 1664}}},
    {"many vectors", {16, 8, 12, 40, 0}, 2, 150, 35},
    {"a bias of more terms than a warp has lanes", {4, 2, 16, 150, 0}, 37, 200, 6},
};

// Puts n numbers at a position of an int8 panel, as a key or as a value.
void put_codes(std::byte* panel, std::int64_t slot, const std::vector<float>& numbers,
               bool is_value) {
  float largest = 0;
  for (const float x : numbers) largest = std::max(largest, std::abs(x));
  const float exact = kv_scale_of(largest);
  const std::uint16_t scale = bf16_from_above(is_value ? std::log2(exact) : exact);
  std::memcpy(panel + slot * 2, &scale, sizeof scale);
  const float unit = is_value ? std::exp2(bf16_to_float(scale)) : bf16_to_float(scale);
  const auto n = static_cast<std::int64_t>(numbers.size());
  for (std::int64_t c = 0; c < n; ++c) {
    const auto code = static_cast<int>(std::lround(numbers[static_cast<std::size_t>(c)] / unit));
    const std::int64_t at = is_value ? (slot / kQuad * n + c) * kQuad + slot % kQuad
                                     : (c / kQuad * kBlockPositions + slot) * kQuad + c % kQuad;
    panel[kKvScalesBytes + at] = static_cast<std::byte>(code + (is_value ? 0 : 128));
  }
}

// One stream: all its keys and values are on the tape.
struct Stream {
  static constexpr std::int64_t kLayerOffset = 128;

  // The numbers are those of `dtype`; they can be put down in any.
  Stream(const Scene& of, DType dtype, std::uint32_t seed, float query_size = 3)
      : scene(of),
        n(round_up(of.shape.d_head, kColumnAlign)),
        n_positions(of.position + of.n_rows),
        random(seed),
        keys(random_heads(random, n_positions, of.shape.n_kv_heads, of.shape.d_head, dtype, 1,
                          DType::kF32)),
        values(random_heads(random, n_positions, of.shape.n_kv_heads, of.shape.d_head, dtype, 1,
                            DType::kF32)),
        q(random_heads(random, of.n_rows, of.shape.n_heads, of.shape.d_head, dtype, query_size,
                       DType::kF32)),
        r(random_rows(random, of.n_rows, of.shape.n_heads * of.d_rel, of.shape.n_heads * of.d_rel)),
        bank(of.d_rel, of.bank_width(), of.bank_width(), DType::kF32) {
    for (std::int64_t k = 0; k < of.d_rel; ++k)
      for (std::int64_t d = 0; d < of.shape.rel_extent; ++d)
        bank.set(k, kBlockPositions + d, random.normal());
  }
  // The tape that kv_append would leave.
  std::unique_ptr<HostTape> tape(DType dtype) const {
    const std::int64_t panel = kv_panel_bytes(dtype, n);
    auto made = std::make_unique<HostTape>(div_up(n_positions, kBlockPositions),
                                           kLayerOffset + 2 * scene.shape.n_kv_heads * panel);
    if (dtype == DType::kInt8)
      put_all_codes(*made, panel);
    else
      put_all_numbers(*made, panel, dtype);
    return made;
  }
  void put_all_codes(HostTape& tape, std::int64_t panel) const {
    for (std::int64_t p = 0; p < n_positions; ++p)
      for (std::int64_t head = 0;
           head < scene.shape.n_kv_heads && scene.is_held(p / kBlockPositions); ++head) {
        std::byte* const start =
            tape.view.block(p / kBlockPositions) + kLayerOffset + 2 * head * panel;
        for (const RowBuffer* rows : {&keys, &values}) {
          std::vector<float> numbers;
          for (std::int64_t c = 0; c < n; ++c) numbers.push_back(rows->get(p, head * n + c));
          const bool is_value = rows == &values;
          put_codes(start + (is_value ? panel : 0), p % kBlockPositions, numbers, is_value);
        }
      }
  }
  void put_all_numbers(HostTape& tape, std::int64_t panel, DType dtype) const {
    const auto element = static_cast<std::int64_t>(dtype_bytes(dtype));
    const bool is_bf16 = dtype == DType::kBF16;
    const auto put = [&](std::byte* start, std::int64_t index, float value) {
      const std::uint16_t half = float_to_bf16(value);
      if (is_bf16)
        std::memcpy(start + index * element, &half, 2);
      else
        std::memcpy(start + index * element, &value, 4);
    };
    for (std::int64_t p = 0; p < n_positions; ++p) {
      const std::int64_t slot = p % kBlockPositions;
      for (std::int64_t i = 0; i < keys.stride() && scene.is_held(p / kBlockPositions); ++i) {
        const std::int64_t c = i % n;
        std::byte* const start =
            tape.view.block(p / kBlockPositions) + kLayerOffset + 2 * (i / n) * panel;
        put(start,
            is_bf16 ? (c / 2 * kBlockPositions + slot) * 2 + c % 2 : c * kBlockPositions + slot,
            keys.get(p, i));
        put(start + panel, is_bf16 ? (slot / 2 * n + c) * 2 + slot % 2 : slot * n + c,
            values.get(p, i));
        if (is_bf16 && p + 1 == n_positions && slot % 2 == 0)
          put(start + panel, (slot / 2 * n + c) * 2 + 1, 0.0f);
      }
    }
  }
  Scene scene;
  std::int64_t n;  // padded head width
  std::int64_t n_positions;
  Random random;
  RowBuffer keys, values, q, r, bank;
};

struct Piece {
  Stream* stream;
  std::int32_t first;
  std::int32_t n_rows;
};

// The given rows of streams of one model in one call, on tapes of a dtype; results in `result`.
RowBuffer attend(Backend& backend, const std::vector<Piece>& pieces, DType dtype, DType result) {
  Memory memory(backend);
  Stream& model = *pieces.front().stream;
  std::int32_t n_rows = 0;
  for (const Piece& piece : pieces) n_rows += piece.n_rows;
  RowBuffer q(n_rows, 0, model.q.stride() + 8, query_dtype(dtype));
  RowBuffer out(n_rows, 0, model.q.stride(), result);
  RowBuffer r(n_rows, 0, model.r.stride(), DType::kF32);
  std::vector<Segment> segments;
  std::int32_t row = 0;
  for (const Piece& piece : pieces) {
    const TapeView view = memory.put(*piece.stream->tape(dtype));
    segments.push_back(piece.stream->scene.segment(view, row, piece.first, piece.n_rows));
    for (std::int32_t i = piece.first; i < piece.first + piece.n_rows; ++i, ++row) {
      for (std::int64_t c = 0; c < model.q.stride(); ++c) q.set(row, c, piece.stream->q.get(i, c));
      for (std::int64_t c = 0; c < r.stride(); ++c) r.set(row, c, piece.stream->r.get(i, c));
    }
  }
  const Rows there = memory.put(out);
  backend.attention(
      {.segments = {segments.data(), static_cast<std::int32_t>(segments.size()), n_rows},
       .shape = model.scene.shape,
       .d_head_padded = static_cast<std::int32_t>(model.n),
       .d_rel = model.scene.d_rel,
       .q = memory.put(q),
       .r = memory.put_floats(r),
       .r_stride = r.stride(),
       .rel_bank = memory.put_floats(model.bank),
       .rel_stride = model.bank.stride(),
       .is_local = model.scene.is_local(),
       .log_scaling_floor = model.scene.log_scaling_floor,
       .log_scaling_alpha = kAlpha,
       .layer_offset_bytes = Stream::kLayerOffset,
       .kv_dtype = dtype,
       .out = there});
  memory.get(out, there.data);
  return out;
}

RowBuffer attend(Backend& backend, const std::vector<Piece>& pieces, DType dtype) {
  return attend(backend, pieces, dtype, query_dtype(dtype));
}

double largest_norm(const RowBuffer& rows, std::int64_t group) {
  double largest = 0;
  for (std::int64_t row = 0; row < rows.n_rows(); ++row)
    for (std::int64_t begin = 0; begin < rows.stride(); begin += group) {
      double squares = 0;
      for (std::int64_t c = begin; c < begin + group; ++c)
        squares += double{rows.get(row, c)} * rows.get(row, c);
      largest = std::max(largest, squares);
    }
  return std::sqrt(largest);
}

double largest_value(const RowBuffer& rows) {
  double largest = 0;
  for (std::int64_t row = 0; row < rows.n_rows(); ++row)
    for (std::int64_t c = 0; c < rows.stride(); ++c)
      largest = std::max(largest, std::abs(double{rows.get(row, c)}));
  return largest;
}

// How far a weight may be off, as part of it. A score is no larger than the norms of query and key
// allow, plus its bias; every step of it and of exp is off by a unit; a bfloat16 weight is rounded.
double weight_error(const Stream& s) {
  const double dot = largest_norm(s.q, s.n) * largest_norm(s.keys, s.n) / s.scene.shape.d_head;
  const double tau = 1 + kAlpha * std::log(static_cast<double>(s.n_positions));
  const double bias = tau * s.scene.d_rel * largest_value(s.r) * largest_value(s.bank);
  const double score_error =
      static_cast<double>(2 * s.n + 2 * s.scene.d_rel + 6) * kUnit * (dot + bias);
  const double exp_error = (4 * (dot + bias) + 3 * static_cast<double>(s.n_positions) + 16) * kUnit;
  return 2 * score_error + exp_error + kBf16Unit;
}

// In bfloat16, against float32 on the CPU with the same numbers.
double worst_deviation(Stream& stream, const RowBuffer& out) {
  CpuBackend cpu({1, ""});
  const std::vector<Piece> all = {{&stream, 0, stream.scene.n_rows}};
  const RowBuffer expected = attend(cpu, all, DType::kF32);
  Stream absolute = stream;  // the sum of the magnitudes
  for (std::int64_t row = 0; row < stream.n_positions; ++row)
    for (std::int64_t c = 0; c < stream.values.stride(); ++c)
      absolute.values.set(row, c, std::abs(stream.values.get(row, c)));
  const RowBuffer size = attend(cpu, {{&absolute, 0, stream.scene.n_rows}}, DType::kF32);
  const double error = weight_error(stream);
  Deviation deviation;
  for (std::int64_t row = 0; row < out.n_rows(); ++row)
    for (std::int64_t c = 0; c < out.stride(); ++c)
      deviation.add(out.get(row, c), expected.get(row, c),
                    error * size.get(row, c) + kBf16Unit * std::abs(expected.get(row, c)) + 1e-37);
  return deviation.worst;
}

TEST_CASE("cuda: attention, however the rows are cut", "[simt]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16, DType::kInt8);
  const Scene scene = GENERATE(from_range(kScenes));
  CAPTURE(dtype_name(dtype), scene.name);
  Stream stream(scene, dtype, 11);
  CpuBackend cpu({1, ""});
  const RowBuffer on_cpu = attend(cpu, {{&stream, 0, scene.n_rows}}, dtype);
  in_every_order([&](Backend& backend) {
    const RowBuffer whole = attend(backend, {{&stream, 0, scene.n_rows}}, dtype);
    if (dtype != DType::kBF16 && has_fused_cpu()) CHECK(n_different(whole, on_cpu) == 0);
    if (dtype == DType::kBF16) CHECK(worst_deviation(stream, whole) <= 1);
    for (std::int32_t row = 0; row < scene.n_rows; row += 1 + scene.n_rows / 4)
      CHECK(n_different(attend(backend, {{&stream, row, 1}}, dtype), whole, row) == 0);
    if (scene.n_rows > 4)
      CHECK(n_different(attend(backend, {{&stream, 3, scene.n_rows - 4}}, dtype), whole, 3) == 0);
  });
}

TEST_CASE("cuda: scores over int8 keys that outgrow the maximum, results in either type",
          "[simt][races]") {
  const DType result = GENERATE(DType::kF32, DType::kBF16);
  const std::size_t which = GENERATE(7u, 10u);
  CAPTURE(dtype_name(result), which);
  Stream stream(kScenes[which], DType::kInt8, 14, 300);
  check_same_bytes([&](Backend& backend) {
    return attend(backend, {{&stream, 0, stream.scene.n_rows}}, DType::kInt8, result);
  });
}

// A session without an end forgets most of what it heard: that takes no thread blocks and no
// memory.
TEST_CASE("cuda: attention is cut by what is left of a sequence", "[simt]") {
  const DType dtype = GENERATE(DType::kBF16, DType::kInt8);
  const auto plan = [&](std::int64_t position, std::vector<PositionRange> forgotten,
                        std::int32_t window = 0) {
    Segment segment;
    segment.position = position;
    segment.n_rows = 20;
    segment.forgotten = forgotten.data();
    segment.n_forgotten = static_cast<std::int32_t>(forgotten.size());
    AttentionArgs args{};
    args.segments = {&segment, 1, segment.n_rows};
    args.shape = {.n_heads = 32, .n_kv_heads = 8, .d_head = 128, .rel_extent = 8, .window = window};
    args.d_head_padded = 128;
    args.kv_dtype = dtype;
    return cuda::plan_attention(args);
  };
  const std::int64_t late = std::int64_t{1} << 40;
  CHECK(plan(8000, {}).n_parts == 64);
  CHECK(plan(late + 8000, {{0, late}}).n_parts == 64);
  CHECK(plan(late + 8000, {{640, late - 640}}).n_parts == 128);  // 5 + 5 + 63
  CHECK(plan(late + 128, {{64, late}}).n_parts == 4);            // half a part is left of the first
  CHECK(plan(late, {{512, late - 512}}, 512).n_parts == 6);      // a window sees no holes
  CHECK(plan(100, {}, 512).n_parts == 6);
  for (const std::int64_t position : {100, 70'000, 262'144, 1'000'000}) {
    const auto [n_groups, group_tiles, n_parts, launch_groups, bytes] = plan(position, {});
    CAPTURE(position, group_tiles, launch_groups);
    CHECK(n_groups * group_tiles >= 10);  // 80 vectors a key/value head
    CHECK((group_tiles == 1 || bytes <= std::size_t{256} << 20));
  }
}

TEST_CASE("cuda: streams in one call of attention do not see each other", "[simt]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16, DType::kInt8);
  const std::size_t which = GENERATE(5u, 7u);
  CAPTURE(dtype_name(dtype), which);
  Stream first(kScenes[which], dtype, 12);
  Scene other = kScenes[which];
  other.position = 3;
  other.n_rows = 6;
  other.forgotten = {};
  Stream second(other, dtype, 13);
  second.bank = first.bank;  // one model
  in_every_order([&](Backend& backend) {
    const std::int32_t n = first.scene.n_rows;
    const RowBuffer together = attend(backend, {{&first, 0, n}, {&second, 0, 6}}, dtype);
    const RowBuffer swapped = attend(backend, {{&second, 0, 6}, {&first, 0, n}}, dtype);
    const RowBuffer first_alone = attend(backend, {{&first, 0, n}}, dtype);
    const RowBuffer second_alone = attend(backend, {{&second, 0, 6}}, dtype);
    CHECK(n_different(first_alone, together) == 0);
    CHECK(n_different(second_alone, together, n) == 0);
    CHECK(n_different(second_alone, swapped) == 0);
    CHECK(n_different(first_alone, swapped, 6) == 0);
  });
}

}  // namespace
}  // namespace duplex::simt_tests
