// One tensor of a checkpoint as its file holds it: plain values, or codes with their scales.
//
// A code's value is code * block scale, then times or over the scale of its matrix. Code and block
// scale have so few bits that their product is exact in float32; the matrix's scale rounds once.
// docs/CHECKPOINT.md lists formats and spellings. Next: tensor_source.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/types.h"

namespace duplex {

// How elements lie in a file. kU8 are bytes whose meaning follows from their use: pairs of kE2M1
// codes, the low nibble first, or kE8M0 exponents. kI64 is what notes beside the weights are made
// of.
enum class FileType : std::uint8_t { kF32, kBF16, kF16, kE4M3, kE8M0, kU8, kE2M1, kI64 };

constexpr std::int64_t file_type_bits(FileType type) {
  constexpr std::int64_t kBits[] = {32, 16, 16, 8, 8, 8, 4, 64};
  return kBits[static_cast<std::size_t>(type)];
}
constexpr const char* file_type_name(FileType type) {
  constexpr const char* kNames[] = {"F32",     "BF16", "F16",  "F8_E4M3",
                                    "F8_E8M0", "U8",   "E2M1", "I64"};
  return kNames[static_cast<std::size_t>(type)];
}

struct SourceTensor;

// The scales of a tensor of codes, seen as matrices of `shape[-2]` rows.
struct Scales {
  const SourceTensor* block = nullptr;   // null: the tensor holds plain values
  const SourceTensor* global = nullptr;  // null: there is none
  bool is_divisor = false;               // of the global scale
  std::int64_t block_rows = 1;           // rows and columns that share a block scale
  std::int64_t block_columns = 1;
  std::int64_t block_stride = 0;   // block scales of a matrix; 0: all share the first
  std::int64_t global_stride = 0;  // global scales of a matrix; 0 or 1
};

struct SourceTensor {
  std::string name;
  FileType type = FileType::kF32;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  bool is_file_mapping = false;  // pages that were read may be given back to the system
  Scales scales;

  std::int64_t elements() const;
  std::size_t bytes() const;
  // Of kE2M1, every second element has an address.
  const std::byte* at(std::int64_t element) const {
    return data + element * file_type_bits(type) / 8;
  }
  std::int64_t n_rows() const { return shape.size() < 2 ? 1 : shape[shape.size() - 2]; }
  std::int64_t n_columns() const { return shape.empty() ? 1 : shape.back(); }
  // NVFP4: E2M1 codes with E4M3 scales and one more of the matrix.
  bool is_nvfp4() const;
  // What an element is decoded with: where its block scale lies, and the scale of its matrix.
  const std::byte* block_scale(std::int64_t element) const;
  float global_scale(std::int64_t element) const;
  // Elements [begin, begin + n) as float32; of kE2M1, begin and n are even.
  void read(std::int64_t begin, std::int64_t n, float* out) const;
  // What makes one of the elements [begin, begin + n) a NaN or infinity: this tensor or a scale's.
  const SourceTensor& culprit(std::int64_t begin, std::int64_t n) const;
  // Tells the system that the elements [begin, end) will not be read again soon.
  void release(std::int64_t begin, std::int64_t end) const;
};

std::string shape_text(const std::vector<std::int64_t>& shape);

}  // namespace duplex
