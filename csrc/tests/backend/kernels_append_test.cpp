// The operations of kernels_append.h that leave something on a tape: short convolutions and the
// append of keys and values. Values against double precision, and equal bytes however the rows of
// a stream are cut into calls.
#include <cmath>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

using Chunks = std::vector<std::int32_t>;
constexpr float kEps = 1e-6f;

// x[position] of a stream whose first rows were written to the tape by earlier calls.
double tap(const RowBuffer& x, std::int64_t position, std::int64_t column) {
  return position < 0 ? 0.0 : double{x.get(position, column)};
}

struct Sum {
  double value = 0;
  double magnitude = 0;
  void add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

// The convolution of column c at `position` plus its input; weight (kernel, channels).
Sum convolved(const RowBuffer& x, std::int64_t position, std::int64_t c, const RowBuffer& weight,
              std::int64_t weight_column, double scale) {
  Sum sum;
  const std::int64_t kernel = weight.n_rows();
  for (std::int64_t j = 0; j < kernel; ++j)
    sum.add(tap(x, position - (kernel - 1) + j, c) * scale * weight.get(j, weight_column));
  sum.add(tap(x, position, c) * scale);
  return sum;
}

// One stream of rows through conv_add_norm.
struct ConvStream {
  static constexpr std::int32_t kRows = 12, kWidth = 24, kPadded = 32;
  static constexpr std::int64_t kOffset = 64;  // of the slot in a block of the tape

  ConvStream(std::int32_t kernel, std::uint32_t seed)
      : random(seed),
        x(random_rows(random, kRows, kWidth, kPadded)),
        weight(random_rows(random, kernel, kWidth, kPadded)),
        norm(random_rows(random, 1, kWidth, kPadded)),
        before(random_rows(random, kRows, kWidth, kPadded)),
        hidden(before),
        out(kRows, kWidth, kPadded, DType::kF32),
        tape(kRows, kOffset + 4 * kPadded) {}

  Segment segment(std::int32_t row_begin, std::int32_t n_rows, std::int64_t position) const {
    return {.row_begin = row_begin,
            .n_rows = n_rows,
            .position = position,
            .global = tape.view,
            .local = {},
            .conv = tape.view};
  }
  void run(CpuBackend& backend, const Chunks& chunks) {
    std::int64_t at = 0;
    for (const std::int32_t n : chunks) {
      const Segment rows = segment(0, n, at);
      backend.conv_add_norm({.segments = {&rows, 1, n},
                             .parts = {static_cast<float*>(x.address(at))},
                             .n_parts = 1,
                             .x_stride = kPadded,
                             .scale = kScale,
                             .conv = {weight.floats(), kOffset, kPadded},
                             .kernel = static_cast<std::int32_t>(weight.n_rows()),
                             .hidden = static_cast<float*>(hidden.address(at)),
                             .hidden_stride = kPadded,
                             .norm = norm.floats(),
                             .eps = kEps,
                             .width = kWidth,
                             .out = {out.address(at), kPadded, DType::kF32}});
      at += n;
    }
    REQUIRE(at == kRows);
  }
  bool same(const ConvStream& other) const {
    for (std::int64_t row = 0; row < kRows; ++row)
      if (!hidden.same_row(row, other.hidden, row, kPadded) ||
          !out.same_row(row, other.out, row, kPadded))
        return false;
    return tape.memory == other.tape.memory;
  }

  static constexpr float kScale = 0.7f;
  Random random;
  RowBuffer x, weight, norm, before, hidden, out;
  HostTape tape;
};

TEST_CASE("conv_add_norm adds the convolution of the stream, however the stream is cut") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const std::int32_t kernel = GENERATE(1, 2, 3, 4, 8);
  CAPTURE(isa, kernel);
  CpuBackend backend({1, isa});
  ConvStream whole(kernel, 8);
  whole.run(backend, {ConvStream::kRows});

  Deviation deviation;
  for (std::int64_t row = 0; row < ConvStream::kRows; ++row) {
    double squares = 0;
    for (std::int64_t c = 0; c < ConvStream::kWidth; ++c) {
      Sum sum = convolved(whole.x, row, c, whole.weight, c, ConvStream::kScale);
      sum.add(whole.before.get(row, c));
      deviation.add(whole.hidden.get(row, c), sum.value, (2 * kernel + 4) * kUnit * sum.magnitude);
      squares += double{whole.hidden.get(row, c)} * whole.hidden.get(row, c);
    }
    const double scale = 1 / std::sqrt(squares / ConvStream::kWidth + double{kEps});
    for (std::int64_t c = 0; c < ConvStream::kWidth; ++c) {
      const double y = whole.hidden.get(row, c) * scale * whole.norm.get(0, c);
      deviation.add(whole.out.get(row, c), y, (ConvStream::kWidth / 2 + 7) * kUnit * std::abs(y));
    }
  }
  CHECK(deviation.worst <= 1);

  for (const Chunks& chunks : {Chunks(ConvStream::kRows, 1), Chunks{5, 7}, Chunks{1, 2, 9}}) {
    ConvStream cut(kernel, 8);
    cut.run(backend, chunks);
    CHECK(cut.same(whole));
  }
}

// One stream of rows through kv_append, from `position` on.
struct KvStream {
  static constexpr std::int32_t kHeads = 4, kKvHeads = 2, kHead = 12, kPadded = 16, kRel = 3;
  static constexpr std::int32_t kColumns = (kHeads + 2 * kKvHeads) * kPadded + kHeads * kRel;
  static constexpr std::int32_t kStride = 160, kChannels = kKvHeads * kPadded, kKernel = 3;
  static constexpr std::int32_t kFloor = 16;
  static constexpr float kAlpha = 0.3f;
  static constexpr std::int64_t kLayerOffset = 256, kConvOffset = 64;

  KvStream(std::int64_t first_position, std::int32_t n_rows, DType kv_dtype, bool local)
      : dtype(kv_dtype),
        is_local(local),
        position(first_position),
        random(9),
        qkvr(random_rows(random, position + n_rows, kColumns, kStride)),
        k_weight(random_rows(random, kKernel, kChannels, kChannels)),
        v_weight(random_rows(random, kKernel, kChannels, kChannels)),
        q_norm(random_rows(random, 1, kHead, kPadded)),
        k_norm(random_rows(random, 1, kHead, kPadded)),
        q(n_rows, kHeads * kPadded, kHeads * kPadded, query_dtype(kv_dtype)),
        kv(div_up(position + n_rows, kBlockPositions), kLayerOffset + 2 * kKvHeads * panel_bytes()),
        conv(position + n_rows, kConvOffset + 2 * 4 * kChannels) {
    clear_padding();
    // What earlier calls left: the last inputs of both convolutions.
    for (std::int64_t p = std::max<std::int64_t>(position - kKernel + 1, 0); p < position; ++p)
      std::memcpy(conv.view.block(p) + kConvOffset, qkvr.address(p, kHeads * kPadded),
                  2 * 4 * kChannels);
  }
  // Heads are padded one by one, in the rows and in the weights.
  void clear_padding() {
    for (std::int64_t head = 0; head < kHeads + 2 * kKvHeads; ++head)
      for (std::int64_t c = kHead; c < kPadded; ++c) {
        for (std::int64_t row = 0; row < qkvr.n_rows(); ++row)
          qkvr.set(row, head * kPadded + c, 0.0f);
        for (std::int64_t j = 0; j < kKernel && head < kKvHeads; ++j) {
          k_weight.set(j, head * kPadded + c, 0.0f);
          v_weight.set(j, head * kPadded + c, 0.0f);
        }
      }
  }
  std::int64_t panel_bytes() const { return kv_panel_bytes(dtype, kPadded); }
  void run(CpuBackend& backend, const Chunks& chunks) {
    std::int64_t at = 0;
    for (const std::int32_t n : chunks) {
      const Segment rows{.row_begin = 0,
                         .n_rows = n,
                         .position = position + at,
                         .global = kv.view,
                         .local = kv.view,
                         .conv = conv.view};
      backend.kv_append({.segments = {&rows, 1, n},
                         .shape = {kHeads, kKvHeads, kHead, 8, is_local ? 32 : 0},
                         .d_head_padded = kPadded,
                         .qkvr = static_cast<float*>(qkvr.address(position + at)),
                         .stride = kStride,
                         .k_conv = {k_weight.floats(), kConvOffset, kChannels},
                         .v_conv = {v_weight.floats(), kConvOffset + 4 * kChannels, kChannels},
                         .kernel = kKernel,
                         .q_norm = q_norm.floats(),
                         .k_norm = k_norm.floats(),
                         .eps = kEps,
                         .is_local = is_local,
                         .log_scaling_floor = kFloor,
                         .log_scaling_alpha = kAlpha,
                         .layer_offset_bytes = kLayerOffset,
                         .kv_dtype = dtype,
                         .q = {q.address(at), q.stride(), query_dtype(dtype)}});
      at += n;
    }
    REQUIRE(at == q.n_rows());
  }
  std::byte* panel(std::int64_t p, std::int64_t head, bool is_value) const {
    return kv.view.block(p / kBlockPositions) + kLayerOffset +
           (2 * head + (is_value ? 1 : 0)) * panel_bytes();
  }
  // Index of channel c of a position in its panel.
  std::int64_t key_index(std::int64_t p, std::int64_t c) const {
    const std::int64_t slot = p % kBlockPositions;
    if (dtype == DType::kInt8) return (c / 4 * kBlockPositions + slot) * 4 + c % 4;
    return dtype == DType::kF32 ? c * kBlockPositions + slot
                                : (c / 2 * kBlockPositions + slot) * 2 + c % 2;
  }
  std::int64_t value_index(std::int64_t p, std::int64_t c) const {
    const std::int64_t slot = p % kBlockPositions;
    if (dtype == DType::kInt8) return (slot / 4 * kPadded + c) * 4 + slot % 4;
    return dtype == DType::kF32 ? slot * kPadded + c : (slot / 2 * kPadded + c) * 2 + slot % 2;
  }
  // Of an int8 panel: the scale of a position, and a code of it. Both are wiped, as below.
  double take_scale(std::byte* start, std::int64_t p, bool is_value) const {
    std::byte* at = start + 2 * (p % kBlockPositions);
    const float stored = bf16_to_float(load_unaligned<std::uint16_t>(at, 0));
    std::memset(at, 0xff, 2);
    return is_value ? std::exp2(double{stored}) : double{stored};
  }
  std::int32_t take_code(std::byte* start, std::int64_t index, bool is_value) const {
    std::byte& at = start[2 * kBlockPositions + index];
    const std::byte code = std::exchange(at, std::byte{0xff});
    return is_value ? std::int32_t{static_cast<std::int8_t>(code)}
                    : static_cast<std::int32_t>(code) - 128;
  }
  // Reads one element of a panel and wipes it, so that what is left was never written.
  float take(std::byte* start, std::int64_t index) const {
    std::byte* at = start + index * static_cast<std::int64_t>(dtype_bytes(dtype));
    float value = 0;
    std::uint16_t half = 0;
    if (dtype == DType::kF32)
      std::memcpy(&value, at, 4);
    else
      std::memcpy(&half, at, 2);
    std::memset(at, 0xff, dtype_bytes(dtype));
    return dtype == DType::kF32 ? value : bf16_to_float(half);
  }

  DType dtype;
  bool is_local;
  std::int64_t position;
  Random random;
  RowBuffer qkvr, k_weight, v_weight, q_norm, k_norm, q;
  HostTape kv, conv;
};

double unit_of(DType dtype) { return dtype == DType::kBF16 ? kBf16Unit : kUnit; }

// Takes one position of an int8 panel and compares it with n numbers, each off by its error.
void compare_codes(KvStream& s, std::int64_t p, std::int64_t head, bool is_value,
                   const std::vector<double>& expected, const std::vector<double>& errors,
                   Deviation& deviation) {
  std::byte* panel = s.panel(p, head, is_value);
  const double scale = s.take_scale(panel, p, is_value);
  double largest = 0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  // From above to bfloat16: a scale in 2^-7 of itself, a logarithm of less than 8 in 2^-5.
  const double coarse = is_value ? std::exp2(0x1p-5) : 1 + 0x1p-7;
  CHECK(scale >= largest / 127 * 0.99999);
  CHECK(scale <= largest / 127 * coarse * 1.00001);
  for (std::int64_t c = 0; c < KvStream::kPadded; ++c) {
    const std::int64_t index = is_value ? s.value_index(p, c) : s.key_index(p, c);
    const std::int32_t code = s.take_code(panel, index, is_value);
    CHECK(std::abs(code) <= 127);
    const bool is_padding = c >= KvStream::kHead;
    const auto at = static_cast<std::size_t>(c);
    deviation.add(code * scale, is_padding ? 0 : expected[at],
                  is_padding ? 1e-38 : 0.5001 * scale + errors[at]);
  }
}

// Takes the keys and values of one head at one position from the tape and compares them.
void compare_head(KvStream& s, std::int64_t p, std::int64_t head, Deviation& deviation) {
  const std::int64_t k_column = (KvStream::kHeads + head) * KvStream::kPadded;
  const std::int64_t v_column = k_column + KvStream::kChannels;
  std::vector<Sum> keys;
  double squares = 0;
  for (std::int64_t c = 0; c < KvStream::kHead; ++c) {
    keys.push_back(convolved(s.qkvr, p, k_column + c, s.k_weight, head * KvStream::kPadded + c, 1));
    squares += keys.back().value * keys.back().value;
  }
  const double scale = 1 / std::sqrt(squares / KvStream::kHead + double{kEps});
  // The sums are off by their own error, which also shifts the scale.
  double sum_error = 0;
  for (const Sum& key : keys) sum_error += (2 * KvStream::kKernel + 2) * kUnit * key.magnitude;
  if (s.dtype == DType::kInt8) {
    std::vector<double> key, key_errors, value, value_errors;
    for (std::int64_t c = 0; c < KvStream::kHead; ++c) {
      const double weight = scale * s.k_norm.get(0, c);
      key.push_back(keys[static_cast<std::size_t>(c)].value * weight);
      key_errors.push_back(2 * std::abs(weight) * sum_error + 14 * kUnit * std::abs(key.back()));
      const Sum sum =
          convolved(s.qkvr, p, v_column + c, s.v_weight, head * KvStream::kPadded + c, 1);
      value.push_back(sum.value);
      value_errors.push_back((2 * KvStream::kKernel + 2) * kUnit * sum.magnitude);
    }
    compare_codes(s, p, head, false, key, key_errors, deviation);
    compare_codes(s, p, head, true, value, value_errors, deviation);
    return;
  }
  for (std::int64_t c = 0; c < KvStream::kPadded; ++c) {
    const float key = s.take(s.panel(p, head, false), s.key_index(p, c));
    const float value = s.take(s.panel(p, head, true), s.value_index(p, c));
    if (c >= KvStream::kHead) {
      deviation.add(key, 0, 1e-38);
      deviation.add(value, 0, 1e-38);
      continue;
    }
    const double norm = std::abs(scale * s.k_norm.get(0, c));
    const double expected = keys[static_cast<std::size_t>(c)].value * scale * s.k_norm.get(0, c);
    deviation.add(key, expected,
                  2 * norm * sum_error + std::abs(expected) * (14 * kUnit + unit_of(s.dtype)));
    const Sum sum = convolved(s.qkvr, p, v_column + c, s.v_weight, head * KvStream::kPadded + c, 1);
    deviation.add(value, sum.value,
                  (2 * KvStream::kKernel + 2) * kUnit * sum.magnitude +
                      std::abs(sum.value) * unit_of(s.dtype));
  }
}

void compare_queries(KvStream& s, Deviation& deviation) {
  for (std::int64_t row = 0; row < s.q.n_rows(); ++row) {
    const std::int64_t p = s.position + row;
    const double n = static_cast<double>(p + 1) / KvStream::kFloor;
    const double tau = s.is_local || n <= 1 ? 1.0 : 1 + double{KvStream::kAlpha} * std::log(n);
    for (std::int64_t head = 0; head < KvStream::kHeads; ++head) {
      double squares = 0;
      for (std::int64_t c = 0; c < KvStream::kHead; ++c)
        squares += std::pow(double{s.qkvr.get(p, head * KvStream::kPadded + c)}, 2);
      const double scale = tau / std::sqrt(squares / KvStream::kHead + double{kEps});
      for (std::int64_t c = 0; c < KvStream::kPadded; ++c) {
        const std::int64_t column = head * KvStream::kPadded + c;
        const double expected = s.qkvr.get(p, column) * scale * s.q_norm.get(0, c);
        deviation.add(s.q.get(row, column), expected,
                      std::abs(expected) * (18 * kUnit + unit_of(s.q.rows().dtype)) + 1e-38);
      }
    }
  }
}

TEST_CASE("kv_append writes the keys and values of its rows and nothing else") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  const DType dtype = GENERATE(DType::kF32, DType::kBF16, DType::kInt8);
  const bool is_local = GENERATE(false, true);
  const std::int64_t position = GENERATE(0, 60, 61, 127);  // over block edges, odd and even ends
  CAPTURE(isa, dtype_name(dtype), is_local, position);
  constexpr std::int32_t kRows = 7;
  CpuBackend backend({1, isa});
  KvStream whole(position, kRows, dtype, is_local);
  whole.run(backend, {kRows});
  for (const Chunks& chunks : {Chunks(kRows, 1), Chunks{2, 5}, Chunks{4, 3}}) {
    KvStream cut(position, kRows, dtype, is_local);
    cut.run(backend, chunks);
    CHECK((cut.kv.memory == whole.kv.memory));
    CHECK((cut.conv.memory == whole.conv.memory));
    for (std::int64_t row = 0; row < kRows; ++row)
      CHECK(cut.q.same_row(row, whole.q, row, whole.q.stride()));
  }

  Deviation deviation;
  compare_queries(whole, deviation);
  for (std::int64_t p = position; p < position + kRows; ++p)
    for (std::int64_t head = 0; head < KvStream::kKvHeads; ++head)
      compare_head(whole, p, head, deviation);
  // In bfloat16 a reduction step takes two positions, so the partner of the newest is zero.
  const std::int64_t newest = position + kRows - 1;
  if (dtype == DType::kBF16 && newest % 2 == 0)
    for (std::int64_t head = 0; head < KvStream::kKvHeads; ++head)
      for (std::int64_t c = 0; c < KvStream::kPadded; ++c)
        deviation.add(whole.take(whole.panel(newest, head, true), whole.value_index(newest + 1, c)),
                      0, 1e-38);
  CHECK(deviation.worst <= 1);
  const bool is_untouched = std::all_of(whole.kv.memory.begin(), whole.kv.memory.end(),
                                        [](std::byte b) { return b == std::byte{0xff}; });
  CHECK(is_untouched);
}

}  // namespace
}  // namespace duplex::backend_tests
