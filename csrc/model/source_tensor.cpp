#include "model/source_tensor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace duplex {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

constexpr std::array<float, 16> kE2M1Values = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,
                                               4.0f,  6.0f,  -0.0f, -0.5f, -1.0f, -1.5f,
                                               -2.0f, -3.0f, -4.0f, -6.0f};

// 2^exponent, denormals included.
constexpr float power_of_two(int exponent) {
  return exponent >= -126 ? std::bit_cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23)
                          : std::bit_cast<float>(std::uint32_t{1} << (exponent + 149));
}

// Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, NaN where all are ones.
constexpr std::array<float, 256> kE4M3Values = [] {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15;
    const int mantissa = code & 7;
    const float size = exponent == 0
                           ? static_cast<float>(mantissa) * power_of_two(-9)
                           : static_cast<float>(8 + mantissa) * power_of_two(exponent - 10);
    values[static_cast<std::size_t>(code)] = (code & 127) == 127 ? kNaN
                                             : code >= 128       ? -size
                                                                 : size;
  }
  return values;
}();

constexpr std::array<float, 256> kE8M0Values = [] {
  std::array<float, 256> values{};
  for (int code = 0; code < 255; ++code)
    values[static_cast<std::size_t>(code)] = power_of_two(code - 127);
  values[255] = kNaN;
  return values;
}();

constexpr float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t exponent = bits >> 10 & 31u;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    const float size = static_cast<float>(mantissa) * power_of_two(-24);
    return sign != 0 ? -size : size;
  }
  const std::uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

// The elements without their scales.
void read_codes(const SourceTensor& tensor, std::int64_t begin, std::int64_t n, float* out) {
  const std::byte* const from = tensor.at(begin);
  const auto* codes = reinterpret_cast<const std::uint8_t*>(from);
  switch (tensor.type) {
    case FileType::kF32:
      std::copy_n(from, n * 4, reinterpret_cast<std::byte*>(out));
      return;
    case FileType::kBF16:
      for (std::int64_t i = 0; i < n; ++i)
        out[i] = bf16_to_float(load_unaligned<std::uint16_t>(from, i));
      return;
    case FileType::kF16:
      for (std::int64_t i = 0; i < n; ++i)
        out[i] = half_to_float(load_unaligned<std::uint16_t>(from, i));
      return;
    case FileType::kE4M3:
      for (std::int64_t i = 0; i < n; ++i) out[i] = kE4M3Values[codes[i]];
      return;
    case FileType::kE8M0:
    case FileType::kU8:
      for (std::int64_t i = 0; i < n; ++i) out[i] = kE8M0Values[codes[i]];
      return;
    case FileType::kE2M1:
      for (std::int64_t i = 0; i < n; i += 2) {
        out[i] = kE2M1Values[codes[i / 2] & 15];
        out[i + 1] = kE2M1Values[codes[i / 2] >> 4];
      }
      return;
    case FileType::kI64:
      fail<CheckpointError>("checkpoint: tensor '", tensor.name, "' holds integers, not weights");
  }
}

float scalar_at(const SourceTensor& tensor, std::int64_t element) {
  float value = 0.0f;
  read_codes(tensor, element, 1, &value);
  return value;
}

// Where the scales of an element lie, and how many elements from it on share them.
struct ScaleRun {
  std::int64_t block;
  std::int64_t global;
  std::int64_t n;
};

ScaleRun scale_run(const SourceTensor& tensor, std::int64_t element) {
  const Scales& scales = tensor.scales;
  const std::int64_t width = tensor.n_columns();
  const std::int64_t column = element % width;
  const std::int64_t row = element / width % tensor.n_rows();
  const std::int64_t matrix = element / width / tensor.n_rows();
  const std::int64_t blocks_in_row = div_up(width, scales.block_columns);
  const std::int64_t block = matrix * scales.block_stride +
                             row / scales.block_rows * blocks_in_row +
                             column / scales.block_columns;
  return {block, matrix * scales.global_stride,
          std::min(scales.block_columns - column % scales.block_columns, width - column)};
}

}  // namespace

std::int64_t SourceTensor::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t size : shape) n *= size;
  return n;
}

std::size_t SourceTensor::bytes() const {
  return static_cast<std::size_t>(elements() * file_type_bits(type) / 8);
}

bool SourceTensor::is_nvfp4() const {
  return type == FileType::kE2M1 && scales.block != nullptr &&
         scales.block->type == FileType::kE4M3;
}

const std::byte* SourceTensor::block_scale(std::int64_t element) const {
  return scales.block->at(scale_run(*this, element).block);
}

float SourceTensor::global_scale(std::int64_t element) const {
  return scalar_at(*scales.global, scale_run(*this, element).global);
}

void SourceTensor::read(std::int64_t begin, std::int64_t n, float* out) const {
  read_codes(*this, begin, n, out);
  if (scales.block == nullptr) return;
  for (std::int64_t done = 0; done < n;) {
    const ScaleRun run = scale_run(*this, begin + done);
    const std::int64_t end = std::min(done + run.n, n);
    const float scale = scalar_at(*scales.block, run.block);
    const float global = scales.global == nullptr ? 1.0f : scalar_at(*scales.global, run.global);
    if (scales.is_divisor)
      for (std::int64_t i = done; i < end; ++i) out[i] = out[i] * scale / global;
    else
      for (std::int64_t i = done; i < end; ++i) out[i] = out[i] * scale * global;
    done = end;
  }
}

const SourceTensor& SourceTensor::culprit(std::int64_t begin, std::int64_t n) const {
  if (scales.block == nullptr) return *this;
  for (std::int64_t i = begin; i < begin + n;) {
    const ScaleRun run = scale_run(*this, i);
    if (!std::isfinite(scalar_at(*scales.block, run.block))) return *scales.block;
    if (scales.global != nullptr) {
      const float global = scalar_at(*scales.global, run.global);
      if (!std::isfinite(global) || (scales.is_divisor && global == 0.0f)) return *scales.global;
    }
    i += run.n;
  }
  return *this;
}

void SourceTensor::release(std::int64_t begin, std::int64_t end) const {
  if (!is_file_mapping) return;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t first =
      (reinterpret_cast<std::uintptr_t>(at(begin)) + page - 1) / page * page;
  const std::uintptr_t last = reinterpret_cast<std::uintptr_t>(at(end)) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + ")";
}

}  // namespace duplex
