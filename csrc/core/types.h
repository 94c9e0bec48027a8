// Element types and the small integer helpers that every layer uses.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace duplex {

// All but the first two are formats of packed matrices, kInt8 also of keys and values on a tape:
// codes in groups that share a scale. Rows and tables are float32 or bfloat16.
enum class DType : std::uint8_t { kF32, kBF16, kInt8, kInt4, kMxfp8, kNvfp4 };

// Whose products are between integers: rows are quantised to meet them.
constexpr bool is_quantised(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kInt4; }
// Whose codes become bfloat16 in registers: the bits are those of bfloat16 weights.
constexpr bool is_coded_bf16(DType dtype) {
  return dtype == DType::kMxfp8 || dtype == DType::kNvfp4;
}
// Whether a matrix can multiply rows: the integer formats take either type, others one.
constexpr bool takes_rows(DType matrix, DType rows) {
  return is_quantised(matrix) || rows == (is_coded_bf16(matrix) ? DType::kBF16 : matrix);
}
// Of one element; not for formats of codes.
constexpr std::size_t dtype_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
// Input columns of a quantised matrix that share a scale.
constexpr std::int64_t quantised_group(DType format) { return format == DType::kInt8 ? 64 : 32; }
constexpr const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "int8", "int4", "mxfp8", "nvfp4"};
  return kNames[static_cast<std::size_t>(dtype)];
}

constexpr std::int64_t div_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return div_up(a, b) * b; }
constexpr std::int64_t round_down(std::int64_t a, std::int64_t b) { return a / b * b; }

[[gnu::always_inline]] constexpr float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

// Round to nearest even; NaN stays NaN.
[[gnu::always_inline]] constexpr std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Files give no alignment: reads of their memory go through here.
template <class T>
[[gnu::always_inline]] inline T load_unaligned(const void* base, std::int64_t index) {
  T value;
  __builtin_memcpy(&value, static_cast<const std::byte*>(base) + index * std::int64_t{sizeof(T)},
                   sizeof(T));
  return value;
}
[[gnu::always_inline]] inline float load_element(const void* base, DType dtype,
                                                 std::int64_t index) {
  return dtype == DType::kF32 ? load_unaligned<float>(base, index)
                              : bf16_to_float(load_unaligned<std::uint16_t>(base, index));
}

// Memory on pages of this size is faster; the system's own are small.
inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

// A lane of execution. The background lane stands still while the interaction lane computes.
enum class LaneKind : std::uint8_t { kInteraction, kBackground };

// Half-open range of positions.
struct PositionRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  constexpr std::int64_t size() const { return end - begin; }
  constexpr bool is_empty() const { return end <= begin; }
  // The whole units inside it.
  constexpr PositionRange inward(std::int64_t unit) const {
    return {round_up(begin, unit), round_down(end, unit)};
  }
};

// Rows are padded so that vector loops need no tails: columns to kColumnAlign with zeros behind the
// true width, and matrices to panels of kPanelOutputs outputs.
inline constexpr std::int64_t kColumnAlign = 16;
inline constexpr std::int64_t kPanelOutputs = 64;
// Keys and values are stored in blocks of this many positions; attention never splits one.
inline constexpr std::int64_t kBlockPositions = 64;

}  // namespace duplex
