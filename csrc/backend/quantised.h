// Formats of quantised weights, alike for all backends: codes in groups of columns that share a
// bfloat16 scale. What a backend does with them is its own (cpu/kernels.h, cuda/kernels/).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "backend/views.h"
#include "core/types.h"

namespace duplex {

// The nearest code of a value; vectorised by the CPU's compiler, so no call to the library.
[[gnu::always_inline]] constexpr std::int32_t nearest_code(float value, float inverse, float lowest,
                                                           float highest) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits
  const float code = std::min(std::max(value * inverse, lowest), highest);
  return static_cast<std::int32_t>((code + kMagic) - kMagic);
}
constexpr float inverse_scale(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

inline constexpr float kLowestInt8 = -127.0f, kHighestInt8 = 127.0f;
inline constexpr float kLowestInt4 = -8.0f, kHighestInt4 = 7.0f;

// The scale (bfloat16) of the values value(0) to value(n - 1) in int8: rounded up, so that the
// largest value has a code.
template <class Value>
[[gnu::always_inline]] constexpr std::uint16_t scale_of_int8(std::int64_t n, const Value& value) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::max(value(i), -value(i)));
  return static_cast<std::uint16_t>((std::bit_cast<std::uint32_t>(largest / 127.0f) + 0xffffu) >>
                                    16);
}

// In int4: the value of largest magnitude takes code -8; then the scale that fits these codes best
// (least squares).
template <class Value>
[[gnu::always_inline]] constexpr std::uint16_t scale_of_int4(std::int64_t n, const Value& value) {
  float extreme = 0.0f;
  for (std::int64_t i = 0; i < n; ++i)
    if (std::max(value(i), -value(i)) > std::max(extreme, -extreme)) extreme = value(i);
  const float inverse = inverse_scale(extreme / -8.0f);
  float product = 0.0f;
  float square = 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t code = nearest_code(value(i), inverse, kLowestInt4, kHighestInt4);
    product += value(i) * static_cast<float>(code);
    square += static_cast<float>(code * code);
  }
  return float_to_bf16(square > 0.0f ? product / square : 0.0f);
}

// MXFP8: E4M3 codes in groups of 32 columns that share a power of two. Its exponent, with bias 127:
// the least with which the largest magnitude is no more than 448, the largest code.
constexpr std::uint32_t mxfp8_exponent(float largest) {
  const auto bits = std::bit_cast<std::uint32_t>(largest);
  constexpr std::uint32_t kMantissaOf448 = 0x600000u;
  const std::uint32_t exponent = (bits >> 23) + ((bits & 0x7fffffu) > kMantissaOf448 ? 1 : 0);
  return exponent < 8 ? 0 : exponent - 8;
}
// What values are multiplied by to become codes.
constexpr float mxfp8_inverse(std::uint32_t exponent) {
  return std::bit_cast<float>((254 - exponent) << 23);
}
// The nearest code of a number up to 448 (sign, 4 bits of exponent with bias 7, 3 of mantissa).
constexpr std::uint8_t e4m3_code(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  constexpr std::uint32_t kLeastNormal = 121u << 23;  // 2^-6
  if (size < kLeastNormal)                            // multiples of 2^-9
    return static_cast<std::uint8_t>(sign | static_cast<std::uint32_t>(nearest_code(
                                                std::bit_cast<float>(size), 512.0f, 0.0f, 8.0f)));
  const std::uint32_t rounded = (size + 0x7ffffu + (size >> 20 & 1u)) >> 20;
  return static_cast<std::uint8_t>(sign | (rounded - (120u << 3)));
}

// NVFP4: E2M1 codes (a sign, 2 bits of exponent, 1 of mantissa) in groups of columns that share an
// E4M3 scale, and a float for the matrix.
inline constexpr std::int64_t kNvfp4Group = 16;
// What 3 bits of a code and 7 of a scale are worth, in float32: only the scale of the matrix
// rounds, as where such codes are read from a file (model/source_tensor.cpp).
constexpr float nvfp4_size(std::uint32_t code, std::uint32_t scale, const MatrixScale& of_matrix) {
  const float number = code < 2 ? static_cast<float>(code) * 0.5f
                                : std::bit_cast<float>((126u << 23) + (code << 22));
  const float of_group = scale < 8 ? static_cast<float>(scale) * 0x1p-9f
                                   : std::bit_cast<float>((120u << 23) + (scale << 20));
  const float exact = number * of_group;
  return of_matrix.is_divisor ? exact / of_matrix.value : exact * of_matrix.value;
}

}  // namespace duplex
