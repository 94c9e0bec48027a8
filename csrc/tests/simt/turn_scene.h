// What the tests of turns put into them: rows of some sequences.
#pragma once

#include <vector>

#include "backend/op_args.h"

namespace duplex::simt_tests {

inline constexpr std::int32_t kWidth = 48, kMels = 4;

// A sequence on the device, and what is known of it.
struct Sequence {
  TapeView tape{};
  SamplingParams sampling{};
  std::int64_t position = 0;
  std::vector<std::int32_t> said;
  std::vector<std::byte> head_row = std::vector<std::byte>(kWidth * sizeof(float));
};

// Rows of one sequence in a pass: text, then sound.
struct Input {
  Sequence* sequence;
  std::vector<std::int32_t> ids;
  std::vector<std::uint8_t> bins;
  std::int32_t limit;  // of tokens behind it

  std::int32_t n_rows() const {
    return static_cast<std::int32_t>(ids.size() + bins.size() / kMels);
  }
};

// The inputs of all sequences as one pass.
struct Pass {
  explicit Pass(const std::vector<Input>& inputs) {
    std::int32_t row = 0;
    for (const Input& input : inputs) {
      const Sequence& sequence = *input.sequence;
      segments.push_back({.row_begin = row,
                          .n_rows = input.n_rows(),
                          .position = sequence.position,
                          .global = {},
                          .local = {},
                          .conv = sequence.tape});
      sampling.push_back({sequence.sampling, sequence.position + input.n_rows()});
      limits.push_back(input.limit);
      for (const std::int32_t id : input.ids) {
        ids.push_back(id);
        text_rows.push_back(row++);
      }
      bins.insert(bins.end(), input.bins.begin(), input.bins.end());
      for (std::size_t i = 0; i < input.bins.size() / kMels; ++i) sound_rows.push_back(row++);
      last_rows.push_back(row - 1);
    }
    n_rows = row;
  }
  Segments all() const {
    return {segments.data(), static_cast<std::int32_t>(segments.size()), n_rows};
  }
  std::vector<Segment> segments;
  std::vector<SampleRow> sampling;
  std::vector<std::int32_t> limits, ids, text_rows, sound_rows, last_rows;
  std::vector<std::uint8_t> bins;
  std::int32_t n_rows = 0;
};

}  // namespace duplex::simt_tests
