// Takes ranges of the weight arena and fills them from source tensors.
//
// Used twice with the same calls: while measuring there is no memory, nothing is read and every
// pointer is null; then each call packs its tensor, refuses NaN and infinity by name, and gives the
// file pages it has read back to the system. Where the arena was read from a file, the second round
// only places: it takes the same ranges and reads no tensor.
#pragma once

#include <functional>
#include <vector>

#include "backend/backend.h"
#include "core/shard.h"
#include "model/tensor_source.h"

namespace duplex {

// Rows of a source tensor that become outputs: `n_rows` rows from element `first`, `row_stride`
// elements apart; their columns begin there. tensor == nullptr stands for padding rows.
struct OutputRows {
  const SourceTensor* tensor = nullptr;
  std::int64_t n_rows = 0;
  std::int64_t first = 0;
  std::int64_t row_stride = 0;
};

struct WeightDTypes {
  DType rows = DType::kF32;  // of tables, of the vision tower and of all rows
  // Of the layers' matrices and the head: as `rows`, or quantised. NVFP4 is for those alone that
  // the file has in it, the others are as `rows`.
  DType matrices = DType::kF32;
};

// Called with (bytes packed, bytes in all) now and then.
using LoadProgress = std::function<void(std::size_t, std::size_t)>;

class WeightBuilder {
 public:
  WeightBuilder(Backend& backend, const WeightDTypes& dtypes, const LoadProgress& progress)
      : backend_(backend), dtypes_(dtypes), progress_(progress) {}

  void start_filling(std::byte* base, std::size_t bytes);
  void start_placing(std::byte* base);
  std::size_t bytes() const { return offset_; }

  // All values as float32, padded.
  const float* vector(const SourceTensor& tensor);
  // Some of (channels, 1, kernel) to (kernel, channels), channels in groups that are padded each.
  const float* convolution(const SourceTensor& tensor, const Slice& channels, std::int64_t group);
  // (d_rel, extent) to the bank of AttentionArgs: distances descending between blocks of zeros.
  const float* rel_bank(const SourceTensor& tensor, std::int64_t& stride);
  // A table of padded rows.
  const void* table(const SourceTensor& tensor);
  // That a matrix of so many parts becomes.
  std::int32_t n_matrices(std::int32_t n_parts) const {
    return backend_.packs_parts_apart() ? n_parts : 1;
  }
  // A matrix whose outputs are the given rows in order; input columns come in padded groups, whole
  // ones in each of n_parts equal runs, where the backend may want these apart.
  PackedMatrix matrix(const std::vector<OutputRows>& outputs, std::int64_t n_in, std::int64_t group,
                      DType wanted, std::int32_t n_parts = 1, bool is_gate_up = false);
  PackedMatrix matrix(const std::vector<OutputRows>& outputs, std::int64_t n_in) {
    return matrix(outputs, n_in, n_in, dtypes_.matrices);
  }
  // As many gates as ups behind them, which the backend may want in pairs.
  PackedMatrix gate_up(const std::vector<OutputRows>& outputs, std::int64_t n_in) {
    return matrix(outputs, n_in, n_in, dtypes_.matrices, 1, true);
  }
  // A single value, kept in the arena like all others; 1 while measuring.
  float scalar(const SourceTensor& tensor);

 private:
  template <class T>
  T* take(std::int64_t count);
  // Runs of columns as matrices of this shape, one behind the other.
  struct Runs {
    PackShape shape;
    std::int64_t n;
    std::size_t bytes;  // of each
  };
  void pack_stripes(const OutputRows& rows, const Runs& runs, std::int64_t first_out,
                    std::byte* out);
  // `n_rows` rows from `element` on.
  void pack_rows(const OutputRows& rows, std::int64_t element, std::int64_t n_rows,
                 const PackShape& shape, std::int64_t first_out, std::byte* out);
  // The elements of a tensor, refused if one is a NaN or infinity.
  void read(const SourceTensor& tensor, std::int64_t begin, std::int64_t n, float* out);
  const float* write_floats(float* out);  // floats_, to the arena
  void report();

  Backend& backend_;
  WeightDTypes dtypes_;
  const LoadProgress& progress_;
  bool is_filling_ = false;
  std::byte* base_ = nullptr;
  std::size_t offset_ = 0;
  std::size_t total_ = 0;
  std::vector<float> floats_;   // of the tensor at hand
  std::vector<float> decoded_;  // rows of codes
};

}  // namespace duplex
