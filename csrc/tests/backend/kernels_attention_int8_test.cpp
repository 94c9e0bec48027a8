// Attention over an int8 tape (kernels_attention_int8.h) against the softmax of the numbers that
// its codes and scales stand for, in double precision; equal bytes however the rows are cut,
// whatever lies where no row sees it, and from both instruction sets with fused multiply-adds.
#include <algorithm>
#include <cmath>

#include "tests/backend/attention_scene.h"
#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

const std::vector<Scene> kScenes = {
    {"the first position", {1, 1, 16, 8, 0}, 3, 0, 1},
    {"from nothing over a block edge", {2, 2, 12, 100, 0}, 5, 0, 70},
    {"a window of 5 over a block edge", {6, 2, 20, 5, 5}, 3, 61, 9},
    {"a window of one block", {8, 2, 16, 64, 64}, 4, 63, 13},
    {"wide heads, several pieces", {10, 1, 128, 200, 0}, 2, 130, 40},
    {"a head of 80 channels", {14, 2, 80, 1, 0}, 1, 127, 20},
    {"two forgotten ranges", {3, 1, 64, 33, 0}, 3, 640, 5, 0, {{64, 192}, {256, 320}}},
    {"log scaling that sets in between two rows", {12, 2, 16, 20, 0}, 3, 64, 33, 90},
};
constexpr double kExpError = 2e-5;  // of exp2_of_bf16, relative

// A tape of random codes and scales, the queries that meet it, and a poison for all other bytes.
struct Int8Stream {
  Int8Stream(const Scene& of, std::uint32_t seed, std::byte poison)
      : scene(of),
        n(round_up(of.shape.d_head, kColumnAlign)),
        panel_bytes(kv_panel_bytes(DType::kInt8, n)),
        random(seed),
        q(random_heads(random, of.n_rows, of.shape.n_heads, of.shape.d_head, DType::kF32, 3,
                       DType::kF32)),
        r(random_rows(random, of.n_rows, of.shape.n_heads * of.d_rel, of.shape.n_heads * of.d_rel)),
        rel(random_rows(random, of.d_rel, of.shape.rel_extent, of.shape.rel_extent)),
        bank(of.d_rel, of.bank_width(), of.bank_width(), DType::kF32),
        tape(div_up(of.n_positions(), kBlockPositions), 2 * of.shape.n_kv_heads * panel_bytes) {
    std::fill(tape.memory.begin(), tape.memory.end(), poison);
    for (std::int64_t k = 0; k < of.d_rel; ++k)
      for (std::int64_t d = 0; d < of.shape.rel_extent; ++d)
        bank.set(k, kBlockPositions + of.shape.rel_extent - 1 - d, rel.get(k, d));
    for (std::int64_t p = 0; p < of.n_positions(); ++p)
      for (std::int64_t head = 0; head < of.shape.n_kv_heads; ++head) write(p, head);
  }

  std::byte* panel(std::int64_t p, std::int64_t head, bool is_value) const {
    return tape.view.block(p / kBlockPositions) + (2 * head + (is_value ? 1 : 0)) * panel_bytes;
  }
  std::uint16_t* scale(std::int64_t p, std::int64_t head, bool is_value) const {
    return reinterpret_cast<std::uint16_t*>(panel(p, head, is_value)) + p % kBlockPositions;
  }
  std::int64_t index(std::int64_t p, std::int64_t c, bool is_value) const {
    const std::int64_t slot = p % kBlockPositions;
    return 2 * kBlockPositions + (is_value ? (slot / 4 * n + c) * 4 + slot % 4
                                           : (c / 4 * kBlockPositions + slot) * 4 + c % 4);
  }
  // Positions that no row sees stay poison.
  void write(std::int64_t p, std::int64_t head) {
    const std::int64_t first_seen = scene.is_local() ? scene.position - scene.shape.window + 1 : 0;
    if (p < first_seen || scene.is_forgotten(p)) return;
    *scale(p, head, false) = float_to_bf16(std::exp(random.normal()) / 40);
    *scale(p, head, true) = float_to_bf16(random.normal() - 5);
    for (std::int64_t c = 0; c < n; ++c) {
      const bool is_padding = c >= scene.shape.d_head;
      const std::int32_t key = is_padding ? 0 : random.below(255) - 127;
      const std::int32_t value = is_padding ? 0 : random.below(255) - 127;
      panel(p, head, false)[index(p, c, false)] = static_cast<std::byte>(key + 128);
      panel(p, head, true)[index(p, c, true)] = static_cast<std::byte>(value);
    }
  }
  double key(std::int64_t p, std::int64_t head, std::int64_t c) const {
    const auto code = static_cast<std::int32_t>(panel(p, head, false)[index(p, c, false)]) - 128;
    return code * double{bf16_to_float(*scale(p, head, false))};
  }
  double value(std::int64_t p, std::int64_t head, std::int64_t c) const {
    const auto code = static_cast<std::int8_t>(panel(p, head, true)[index(p, c, true)]);
    return code * value_scale(p, head);
  }
  double value_scale(std::int64_t p, std::int64_t head) const {
    return std::exp2(double{bf16_to_float(*scale(p, head, true))});
  }
  // All rows, in calls of the given sizes.
  RowBuffer run(CpuBackend& backend, const std::vector<std::int32_t>& chunks) {
    RowBuffer out(scene.n_rows, 0, q.stride(), DType::kF32);
    std::int64_t first = 0;
    for (const std::int32_t n_rows : chunks) {
      const Segment rows = scene.segment(tape.view, 0, first, n_rows);
      backend.attention({.segments = {&rows, 1, n_rows},
                         .shape = scene.shape,
                         .d_head_padded = static_cast<std::int32_t>(n),
                         .d_rel = scene.d_rel,
                         .q = {q.address(first), q.stride(), DType::kF32},
                         .r = static_cast<float*>(r.address(first)),
                         .r_stride = r.stride(),
                         .rel_bank = bank.floats(),
                         .rel_stride = bank.stride(),
                         .is_local = scene.is_local(),
                         .log_scaling_floor = scene.log_scaling_floor,
                         .log_scaling_alpha = kAlpha,
                         .layer_offset_bytes = 0,
                         .kv_dtype = DType::kInt8,
                         .out = {out.address(first), out.stride(), DType::kF32}});
      first += n_rows;
    }
    REQUIRE(first == scene.n_rows);
    return out;
  }

  Scene scene;
  std::int64_t n;  // padded head width
  std::int64_t panel_bytes;
  Random random;
  RowBuffer q, r, rel;
  RowBuffer bank;  // rel as the kernels read it
  HostTape tape;
};

// A key as a query sees it: its score, how far float32 may be off, and its softmax weight.
struct Seen {
  std::int64_t position;
  double score;
  double error;
  double weight = 0;
};

// The numbers that the codes of a query stand for.
std::vector<double> quantised_query(const Int8Stream& s, std::int64_t row, std::int64_t head) {
  float largest = 0;
  for (std::int64_t c = 0; c < s.n; ++c)
    largest = std::max(largest, std::abs(s.q.get(row, head * s.n + c)));
  const float scale = largest / 127.0f;
  std::vector<double> q;
  for (std::int64_t c = 0; c < s.n; ++c)
    q.push_back(std::nearbyint(s.q.get(row, head * s.n + c) * (1.0f / scale)) * double{scale});
  return q;
}

std::vector<Seen> scores_of(const Int8Stream& s, std::int64_t row, std::int64_t head) {
  const Scene& scene = s.scene;
  const std::int64_t kv_head = head / (scene.shape.n_heads / scene.shape.n_kv_heads);
  const std::int64_t position = scene.position + row;
  const double tau = scene.tau(row);
  const std::vector<double> q = quantised_query(s, row, head);
  std::vector<Seen> seen;
  for (std::int64_t p = 0; p <= position; ++p) {
    if (!scene.is_visible(row, p)) continue;
    double dot = 0, bias = 0, bias_size = 0;
    for (std::int64_t c = 0; c < scene.shape.d_head; ++c)
      dot += q[static_cast<std::size_t>(c)] * s.key(p, kv_head, c) / scene.shape.d_head;
    for (std::int64_t k = 0; k < scene.d_rel && position - p < scene.shape.rel_extent; ++k) {
      const double term = s.r.get(row, head * scene.d_rel + k) * s.rel.get(k, position - p) * tau;
      bias += term;
      bias_size += std::abs(term);
    }
    // The integer sum is exact: its scales cost five products, the bias a chain, the logarithm of
    // the value's scale and the maximum a sum each.
    const double size = std::abs(dot) + bias_size + std::abs(std::log(s.value_scale(p, kv_head)));
    seen.push_back({p, dot + bias, (2 * scene.d_rel + 12) * kUnit * size});
  }
  double best = -INFINITY, sum = 0;
  for (const Seen& key : seen) best = std::max(best, key.score);
  for (Seen& key : seen) sum += key.weight = std::exp(key.score - best);
  for (Seen& key : seen) key.weight /= sum;
  return seen;
}

void compare_head(const Int8Stream& s, const RowBuffer& out, std::int64_t row, std::int64_t head,
                  Deviation& deviation) {
  const std::int64_t kv_head = head / (s.scene.shape.n_heads / s.scene.shape.n_kv_heads);
  const std::vector<Seen> seen = scores_of(s, row, head);
  std::vector<double> largest(
      static_cast<std::size_t>(div_up(s.scene.n_positions(), kBlockPositions)));
  double worst_error = 0;
  for (const Seen& key : seen) {
    double& block = largest[static_cast<std::size_t>(key.position / kBlockPositions)];
    block = std::max(block, key.weight * s.value_scale(key.position, kv_head));
    worst_error = std::max(worst_error, key.error);
  }
  // A weight moves with its score and with exp2: of itself, of its block, of the running maximum.
  const double part = 2 * worst_error + 4 * kExpError;
  for (std::int64_t c = 0; c < s.n; ++c) {
    double expected = 0, size = 0, half_codes = 0;
    for (const Seen& key : seen) {
      const double term = key.weight * s.value(key.position, kv_head, c);
      expected += term;
      size += std::abs(term);
      // A weight, its value's scale included, is off by half a code of its block.
      const double code = s.value(key.position, kv_head, c) / s.value_scale(key.position, kv_head);
      half_codes += std::abs(code) * 0.5 / 255 *
                    largest[static_cast<std::size_t>(key.position / kBlockPositions)];
    }
    deviation.add(out.get(row, head * s.n + c), expected,
                  1.001 * half_codes + part * (size + std::abs(expected)) + 1e-37);
  }
}

TEST_CASE("attention over int8 weighs what a row may see, however the rows are cut") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const Scene scene = GENERATE(from_range(kScenes));
  CAPTURE(isa, scene.name);
  CpuBackend backend({1, isa});
  Int8Stream stream(scene, 11, std::byte{0xff});
  const RowBuffer whole = stream.run(backend, {scene.n_rows});
  Deviation deviation;
  for (std::int64_t row = 0; row < scene.n_rows; ++row)
    for (std::int64_t head = 0; head < scene.shape.n_heads; ++head)
      compare_head(stream, whole, row, head, deviation);
  CHECK(deviation.worst <= 1);
  if (scene.n_rows > 1) CHECK(deviation.worst > 0.01);  // the bound is no barn door

  const auto n = static_cast<std::size_t>(scene.n_rows);
  CHECK(n_different(stream.run(backend, std::vector<std::int32_t>(n, 1)), whole) == 0);
  if (scene.n_rows > 4)
    CHECK(n_different(stream.run(backend, {3, scene.n_rows - 4, 1}), whole) == 0);
  // NaN, the largest and the smallest scales, zeros
  for (const int poison : {0x7f, 0x80, 0x00}) {
    Int8Stream other(scene, 11, static_cast<std::byte>(poison));
    CHECK(n_different(other.run(backend, {scene.n_rows}), whole) == 0);
  }
}

TEST_CASE("the instruction sets with fused multiply-adds give attention over int8 the same bytes") {
  const std::vector<std::string> sets = instruction_sets();
  if (sets.size() < 3) return;  // nothing beside AVX2 here
  const Scene scene = GENERATE(from_range(kScenes));
  CAPTURE(scene.name);
  Int8Stream stream(scene, 12, std::byte{0xff});
  const auto attended = [&](const std::string& isa) {
    CpuBackend backend({1, isa});
    return stream.run(backend, {scene.n_rows});
  };
  for (std::size_t i = 2; i < sets.size(); ++i) {
    CAPTURE(sets[i]);
    CHECK(n_different(attended("avx2"), attended(sets[i])) == 0);
  }
}

TEST_CASE("a value of zeros takes its share of the weights, and scores may grow without end") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  CAPTURE(isa);
  CpuBackend backend({1, isa});
  const Scene scene{"", {1, 1, 16, 1, 0}, 1, 255, 1};
  Int8Stream stream(scene, 13, std::byte{0xff});
  for (std::int64_t p = 0; p < 256; ++p) {
    // Scores from about -600 to 600 in ascending order, in steps that outgrow the maximum.
    *stream.scale(p, 0, false) = float_to_bf16(1.0f);
    for (std::int64_t c = 0; c < 16; ++c)
      stream.panel(p, 0, false)[stream.index(p, c, false)] =
          static_cast<std::byte>(std::max<std::int64_t>(p, 1));
    if (p % 2 == 0) continue;
    *stream.scale(p, 0, true) = float_to_bf16(-60.0f);  // as kv_append writes zeros
    for (std::int64_t c = 0; c < 16; ++c)
      stream.panel(p, 0, true)[stream.index(p, c, true)] = std::byte{0};
  }
  for (const float direction : {5.0f, -5.0f}) {
    for (std::int64_t c = 0; c < 16; ++c) stream.q.set(0, c, direction);
    Deviation deviation;
    compare_head(stream, stream.run(backend, {1}), 0, 0, deviation);
    CHECK(deviation.worst <= 1);
  }
}

}  // namespace
}  // namespace duplex::backend_tests
