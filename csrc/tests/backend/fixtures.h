// What the backend tests share: every instruction set of this machine, random rows in either dtype,
// matrices packed from plain ones, a tape, and the error bound of a sum.
//
// Bounds are derived, not tuned: a chain of n float32 operations is off by at most about
// n * kUnit times the sum of the magnitudes that went into it.
#pragma once

#include <catch2/catch.hpp>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/isa.h"
#include "core/error.h"

namespace duplex::backend_tests {

inline constexpr double kUnit = 0x1.0p-24;     // half a unit in the last place of float32
inline constexpr double kBf16Unit = 0x1.0p-8;  // and of bfloat16
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The best last.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512"}) {
    try {
      choose_kernels(name);
      names.emplace_back(name);
    } catch (const BackendUnavailable&) {
    }
  }
  return names;
}

class Random {
 public:
  explicit Random(std::uint32_t seed) : engine_(seed) {}
  float normal() { return normal_(engine_); }
  std::int32_t below(std::int32_t n) {
    return std::uniform_int_distribution<std::int32_t>(0, n - 1)(engine_);
  }
  std::vector<float> normals(std::int64_t n) {
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& value : values) value = normal();
    return values;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// A value as the dtype holds it.
inline float rounded(float value, DType dtype) {
  return dtype == DType::kF32 ? value : bf16_to_float(float_to_bf16(value));
}

// Rows (n_rows, stride) in a dtype. Columns from `width` to the next kColumnAlign are zero, those
// behind them NaN: nobody may read them.
class RowBuffer {
 public:
  RowBuffer(std::int64_t n_rows, std::int64_t width, std::int64_t stride, DType dtype)
      : n_rows_(n_rows), stride_(stride), dtype_(dtype), bytes_(size(n_rows * stride)) {
    for (std::int64_t row = 0; row < n_rows; ++row)
      for (std::int64_t c = 0; c < stride; ++c)
        set(row, c, c < round_up(width, kColumnAlign) ? 0.0f : kNan);
  }
  void set(std::int64_t row, std::int64_t column, float value) {
    const std::uint16_t half = float_to_bf16(value);
    std::memcpy(
        address(row, column),
        dtype_ == DType::kF32 ? static_cast<void*>(&value) : const_cast<std::uint16_t*>(&half),
        dtype_bytes(dtype_));
  }
  float get(std::int64_t row, std::int64_t column) const {
    const std::byte* at = bytes_.data() + size(row * stride_ + column);
    if (dtype_ == DType::kBF16) {
      std::uint16_t half;
      std::memcpy(&half, at, sizeof half);
      return bf16_to_float(half);
    }
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  void* address(std::int64_t row, std::int64_t column = 0) {
    return bytes_.data() + size(row * stride_ + column);
  }
  float* floats() { return static_cast<float*>(address(0)); }
  std::int64_t n_rows() const { return n_rows_; }
  std::int64_t stride() const { return stride_; }
  Rows rows() { return {address(0), stride_, dtype_}; }
  bool same_row(std::int64_t row, const RowBuffer& other, std::int64_t other_row,
                std::int64_t width) const {
    return std::memcmp(bytes_.data() + size(row * stride_),
                       other.bytes_.data() + size(other_row * other.stride_), size(width)) == 0;
  }

 private:
  std::size_t size(std::int64_t elements) const {
    return static_cast<std::size_t>(elements) * dtype_bytes(dtype_);
  }

  std::int64_t n_rows_;
  std::int64_t stride_;
  DType dtype_;
  std::vector<std::byte> bytes_;
};

inline RowBuffer random_rows(Random& random, std::int64_t n_rows, std::int64_t width,
                             std::int64_t stride, DType dtype = DType::kF32) {
  RowBuffer rows(n_rows, width, stride, dtype);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t c = 0; c < width; ++c) rows.set(row, c, random.normal());
  return rows;
}

// Memory of a tape with two blocks a page and a gap behind them, filled with NaN in either dtype.
struct HostTape {
  HostTape(std::int64_t n_blocks, std::int64_t block_bytes)
      : memory(static_cast<std::size_t>(div_up(n_blocks, 2) * (2 * block_bytes + 192)),
               std::byte{0xff}),
        view{memory.data(), 2, 2 * block_bytes + 192, block_bytes} {}
  HostTape(const HostTape&) = delete;
  HostTape& operator=(const HostTape&) = delete;

  std::vector<std::byte> memory;
  TapeView view;
};

// Adds up how far values are from their references, as parts of their bounds.
struct Deviation {
  void add(double value, double expected, double bound) {
    const double part = std::abs(value - expected) / bound;
    if (!(part <= worst)) worst = part;  // catches NaN
  }
  double worst = 0;  // at most 1 passes
};

}  // namespace duplex::backend_tests
