// Attention over the tape (kernels_attention.h) against double precision, for shapes, windows,
// bias extents, log scaling and forgotten ranges; and equal bytes however the rows are cut into
// calls. Whatever a row may not see is NaN on the tape.
#include <algorithm>
#include <cmath>

#include "tests/backend/attention_scene.h"
#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

// Groups of 1 to 8 query heads; shape: heads, kv heads, d_head, rel_extent, window.
const std::vector<Scene> kScenes = {
    {"the first position", {1, 1, 16, 8, 0}, 3, 0, 1},
    {"from nothing over a block edge", {2, 2, 12, 100, 0}, 5, 0, 70},
    {"a window of 5 over a block edge", {6, 2, 20, 5, 5}, 3, 61, 9},
    {"a window of one block", {8, 2, 16, 64, 64}, 4, 63, 13},
    {"an extent beyond the start, several pieces", {5, 1, 16, 200, 0}, 2, 130, 40},
    {"an extent of one", {14, 2, 12, 1, 0}, 1, 127, 20},
    {"a window, long after the start", {8, 1, 40, 70, 70}, 3, 300, 30},
    {"two forgotten ranges", {3, 1, 16, 33, 0}, 3, 640, 5, 0, {{64, 192}, {256, 320}}},
    {"a forgotten range inside the extent", {4, 1, 12, 400, 0}, 3, 200, 8, 16, {{64, 128}}},
    {"log scaling that sets in between two rows", {12, 2, 16, 20, 0}, 3, 64, 33, 90},
};
// The queries, keys and values of one stream, and the tape that its keys and values fill.
struct Stream {
  static constexpr std::int64_t kLayerOffset = 128;

  Stream(const Scene& of, DType type, std::uint32_t seed)
      : scene(of),
        dtype(type),
        n(round_up(of.shape.d_head, kColumnAlign)),
        random(seed),
        keys(random_heads(random, of.n_positions(), of.shape.n_kv_heads, of.shape.d_head, type, 1,
                          type)),
        values(random_heads(random, of.n_positions(), of.shape.n_kv_heads, of.shape.d_head, type, 1,
                            type)),
        q(random_heads(random, of.n_rows, of.shape.n_heads, of.shape.d_head, type, 3, type)),
        r(random_rows(random, of.n_rows, of.shape.n_heads * of.d_rel, of.shape.n_heads * of.d_rel)),
        rel(random_rows(random, of.d_rel, of.shape.rel_extent, of.shape.rel_extent)),
        bank(of.d_rel, of.bank_width(), of.bank_width(), DType::kF32),
        tape(div_up(of.n_positions(), kBlockPositions),
             kLayerOffset + 2 * of.shape.n_kv_heads * panel_bytes()) {
    for (std::int64_t k = 0; k < scene.d_rel; ++k)
      for (std::int64_t d = 0; d < scene.shape.rel_extent; ++d)
        bank.set(k, kBlockPositions + scene.shape.rel_extent - 1 - d, rel.get(k, d));
  }

  std::int64_t panel_bytes() const {
    return n * kBlockPositions * static_cast<std::int64_t>(dtype_bytes(dtype));
  }
  void put(std::int64_t position, std::int64_t head, bool is_value, std::int64_t index,
           float value) {
    std::byte* at = tape.view.block(position / kBlockPositions) + kLayerOffset +
                    (2 * head + (is_value ? 1 : 0)) * panel_bytes() +
                    index * static_cast<std::int64_t>(dtype_bytes(dtype));
    const std::uint16_t half = float_to_bf16(value);
    if (dtype == DType::kF32)
      std::memcpy(at, &value, 4);
    else
      std::memcpy(at, &half, 2);
  }
  void put_value(std::int64_t position, std::int64_t head, std::int64_t c, float value) {
    const std::int64_t slot = position % kBlockPositions;
    put(position, head, true,
        dtype == DType::kF32 ? slot * n + c : (slot / 2 * n + c) * 2 + slot % 2, value);
  }
  void put_key(std::int64_t position, std::int64_t head, std::int64_t c, float value) {
    const std::int64_t slot = position % kBlockPositions;
    put(position, head, false,
        dtype == DType::kF32 ? c * kBlockPositions + slot
                             : (c / 2 * kBlockPositions + slot) * 2 + c % 2,
        value);
  }
  // Fills the tape up to position `end` as kv_append does: in bfloat16 the newest value clears its
  // partner.
  void grow(std::int64_t end) {
    for (; n_written < end; ++n_written)
      for (std::int64_t head = 0; head < scene.shape.n_kv_heads; ++head)
        for (std::int64_t c = 0; c < n && scene.is_held(n_written / kBlockPositions); ++c) {
          put_key(n_written, head, c, keys.get(n_written, head * n + c));
          put_value(n_written, head, c, values.get(n_written, head * n + c));
          if (dtype == DType::kBF16 && n_written + 1 == end && end % 2 == 1)
            put_value(end, head, c, 0.0f);
        }
  }
  AttentionArgs args(const Segments& segments, RowBuffer& queries, RowBuffer& biases,
                     RowBuffer& out, std::int64_t first) {
    return {.segments = segments,
            .shape = scene.shape,
            .d_head_padded = static_cast<std::int32_t>(n),
            .d_rel = scene.d_rel,
            .q = {queries.address(first), queries.stride(), dtype},
            .r = static_cast<float*>(biases.address(first)),
            .r_stride = biases.stride(),
            .rel_bank = bank.floats(),
            .rel_stride = bank.stride(),
            .is_local = scene.is_local(),
            .log_scaling_floor = scene.log_scaling_floor,
            .log_scaling_alpha = kAlpha,
            .layer_offset_bytes = kLayerOffset,
            .kv_dtype = dtype,
            .out = {out.address(first), out.stride(), dtype}};
  }
  // All rows, in calls of the given sizes.
  RowBuffer run(CpuBackend& backend, const std::vector<std::int32_t>& chunks) {
    RowBuffer out(scene.n_rows, 0, q.stride(), dtype);
    std::int64_t first = 0;
    for (const std::int32_t n_rows : chunks) {
      grow(scene.position + first + n_rows);
      const Segment rows = scene.segment(tape.view, 0, first, n_rows);
      backend.attention(args({&rows, 1, n_rows}, q, r, out, first));
      first += n_rows;
    }
    REQUIRE(first == scene.n_rows);
    return out;
  }

  Scene scene;
  DType dtype;
  std::int64_t n;  // padded head width
  Random random;
  RowBuffer keys, values, q, r, rel;
  RowBuffer bank;  // rel as the kernels read it
  HostTape tape;
  std::int64_t n_written = 0;
};

// One key as a query sees it: the score, and how far float32 may be off.
struct Score {
  std::int64_t position;
  double value;
  double error;
};

std::vector<Score> scores_of(const Stream& s, std::int64_t row, std::int64_t head) {
  const Scene& scene = s.scene;
  const std::int64_t n = s.n;
  const std::int64_t kv_head = head / (scene.shape.n_heads / scene.shape.n_kv_heads);
  const std::int64_t position = scene.position + row;
  const double tau = scene.tau(row);
  std::vector<Score> scores;
  for (std::int64_t key = 0; key <= position; ++key) {
    if (!scene.is_visible(row, key)) continue;
    double dot = 0, bias = 0, dot_size = 0, bias_size = 0;
    for (std::int64_t c = 0; c < scene.shape.d_head; ++c) {
      const double term = double{s.q.get(row, head * n + c)} * s.keys.get(key, kv_head * n + c);
      dot += term;
      dot_size += std::abs(term);
    }
    for (std::int64_t k = 0; k < scene.d_rel && position - key < scene.shape.rel_extent; ++k) {
      const double term =
          double{s.r.get(row, head * scene.d_rel + k)} * s.rel.get(k, position - key);
      bias += term;
      bias_size += std::abs(term);
    }
    const double d_head = scene.shape.d_head;
    const double size = dot_size / d_head + bias_size * tau;
    scores.push_back({key, dot / d_head + bias * tau,
                      static_cast<double>(2 * n + 2 * scene.d_rel + 6) * kUnit * size});
  }
  return scores;
}

void compare_head(const Stream& s, const RowBuffer& out, std::int64_t row, std::int64_t head,
                  Deviation& deviation) {
  const std::vector<Score> scores = scores_of(s, row, head);
  double best = -INFINITY, worst_error = 0, largest = 0, sum = 0;
  for (const Score& score : scores) {
    best = std::max(best, score.value);
    worst_error = std::max(worst_error, score.error);
    largest = std::max(largest, std::abs(score.value));
  }
  for (const Score& score : scores) sum += std::exp(score.value - best);
  // A weight moves with the error of its score and of the best one, with exp (as in silu), and with
  // the sums over the keys, which are rescaled at every block.
  const bool is_bf16 = s.dtype == DType::kBF16;
  const double part = 2 * worst_error +
                      (4 * largest + 3 * static_cast<double>(scores.size()) + 16) * kUnit +
                      (is_bf16 ? kBf16Unit : 0);  // the weights are rounded
  const std::int64_t kv_head = head / (s.scene.shape.n_heads / s.scene.shape.n_kv_heads);
  for (std::int64_t c = 0; c < s.n; ++c) {
    double expected = 0, size = 0;
    for (const Score& score : scores) {
      const double term =
          std::exp(score.value - best) / sum * s.values.get(score.position, kv_head * s.n + c);
      expected += term;
      size += std::abs(term);
    }
    deviation.add(out.get(row, head * s.n + c), expected,
                  size * part + std::abs(expected) * (is_bf16 ? kBf16Unit : kUnit) + 1e-37);
  }
}

TEST_CASE("attention weighs what a row may see, however the rows are cut") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const Scene scene = GENERATE(from_range(kScenes));
  CAPTURE(isa, dtype_name(dtype), scene.name);
  CpuBackend backend({1, isa});
  Stream stream(scene, dtype, 11);
  const RowBuffer whole = stream.run(backend, {scene.n_rows});
  Deviation deviation;
  for (std::int64_t row = 0; row < scene.n_rows; ++row)
    for (std::int64_t head = 0; head < scene.shape.n_heads; ++head)
      compare_head(stream, whole, row, head, deviation);
  CHECK(deviation.worst <= 1);

  const auto n = static_cast<std::size_t>(scene.n_rows);
  CHECK(n_different(Stream(scene, dtype, 11).run(backend, std::vector<std::int32_t>(n, 1)),
                    whole) == 0);
  if (scene.n_rows > 4)
    CHECK(n_different(Stream(scene, dtype, 11).run(backend, {3, scene.n_rows - 4, 1}), whole) == 0);
}

TEST_CASE("two streams in one call of attention do not see each other") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  CAPTURE(isa, dtype_name(dtype));
  CpuBackend backend({1, isa});
  Scene other = kScenes[5];
  other.position = 3;
  other.n_rows = 6;
  Stream first(kScenes[5], dtype, 12);
  Stream second(other, dtype, 12);
  second.bank = first.bank;  // one model
  const RowBuffer first_alone = first.run(backend, {first.scene.n_rows});
  const RowBuffer second_alone = second.run(backend, {second.scene.n_rows});

  const std::int32_t n_rows = first.scene.n_rows + second.scene.n_rows;
  RowBuffer q(n_rows, 0, first.q.stride(), dtype);
  RowBuffer r(n_rows, 0, first.r.stride(), DType::kF32);
  for (std::int64_t row = 0; row < n_rows; ++row) {
    const bool is_first = row < first.scene.n_rows;
    Stream& s = is_first ? first : second;
    const std::int64_t from = is_first ? row : row - first.scene.n_rows;
    for (std::int64_t c = 0; c < q.stride(); ++c) q.set(row, c, s.q.get(from, c));
    for (std::int64_t c = 0; c < r.stride(); ++c) r.set(row, c, s.r.get(from, c));
  }
  RowBuffer out(n_rows, 0, q.stride(), dtype);
  const Segment segments[] = {
      first.scene.segment(first.tape.view, 0, 0, first.scene.n_rows),
      second.scene.segment(second.tape.view, first.scene.n_rows, 0, second.scene.n_rows)};
  backend.attention(first.args({segments, 2, n_rows}, q, r, out, 0));
  CHECK(n_different(first_alone, out) == 0);
  CHECK(n_different(second_alone, out, first.scene.n_rows) == 0);
}

}  // namespace
}  // namespace duplex::backend_tests
