// A tensor of NVFP4 codes as a file holds it, and the values that loading it gives.
#pragma once

#include <vector>

#include "backend/quantised.h"
#include "model/source_tensor.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {

// Random codes; a group in five has zero for its scale, others any E4M3 number of either sign.
class CodedTensor {
 public:
  CodedTensor(Random& random, std::int64_t n_rows, std::int64_t width, const MatrixScale& of_matrix)
      : of_matrix_(of_matrix),
        codes_(static_cast<std::size_t>(n_rows * width / 2)),
        scales_(static_cast<std::size_t>(n_rows * div_up(width, kNvfp4Group))) {
    for (std::uint8_t& pair : codes_) pair = static_cast<std::uint8_t>(random.below(256));
    for (std::uint8_t& scale : scales_)
      scale = static_cast<std::uint8_t>(
          random.below(5) == 0 ? 0 : random.below(127) + 128 * random.below(2));
    tensor_ = {"w", FileType::kE2M1, {n_rows, width}, bytes(codes_), false, {}};
    block_ = {"w.scale",      FileType::kE4M3, {n_rows, div_up(width, kNvfp4Group)},
              bytes(scales_), false,           {}};
    global_ = {"w.scale2", FileType::kF32,
               {1},        reinterpret_cast<const std::byte*>(&of_matrix_.value),
               false,      {}};
    tensor_.scales = {&block_, &global_, of_matrix.is_divisor, 1, kNvfp4Group, 0, 0};
  }
  CodedTensor(const CodedTensor&) = delete;
  CodedTensor& operator=(const CodedTensor&) = delete;

  std::vector<std::uint8_t>& codes() { return codes_; }
  std::vector<std::uint8_t>& scales() { return scales_; }

  // As the loader decodes them.
  RowBuffer values() const {
    const std::int64_t n_rows = tensor_.n_rows(), width = tensor_.n_columns();
    RowBuffer values(n_rows, width, width, DType::kF32);
    std::vector<float> row(static_cast<std::size_t>(width));
    for (std::int64_t r = 0; r < n_rows; ++r) {
      tensor_.read(r * width, width, row.data());
      for (std::int64_t c = 0; c < width; ++c) values.set(r, c, row[static_cast<std::size_t>(c)]);
    }
    return values;
  }
  PackSource rows(std::int64_t begin, std::int64_t n_rows) const {
    const std::int64_t width = tensor_.n_columns();
    return {tensor_.at(begin * width),          DType::kNvfp4,      n_rows,    width,
            tensor_.block_scale(begin * width), block_.n_columns(), of_matrix_};
  }

 private:
  static const std::byte* bytes(const std::vector<std::uint8_t>& of) {
    return reinterpret_cast<const std::byte*>(of.data());
  }

  MatrixScale of_matrix_;
  std::vector<std::uint8_t> codes_, scales_;
  SourceTensor tensor_, block_, global_;
};

}  // namespace duplex::simt_tests
