// One case of an attention test: a model's heads and a stream's place, what a row may see there,
// and the rows and views that tests of any backend make of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "backend/op_args.h"
#include "tests/backend/memory.h"

namespace duplex::backend_tests {

inline constexpr float kAlpha = 0.4f;  // of log scaling

struct Scene {
  const char* name;
  AttentionShape shape;  // heads, kv heads, d_head, rel_extent, window
  std::int32_t d_rel;
  std::int64_t position;  // of the first row
  std::int32_t n_rows;
  std::int32_t log_scaling_floor = 0;
  std::vector<PositionRange> forgotten = {};

  bool is_local() const { return shape.window > 0; }
  std::int64_t n_positions() const { return position + n_rows; }
  std::int64_t bank_width() const {
    return round_up(shape.rel_extent + 2 * kBlockPositions, kColumnAlign);
  }
  bool is_forgotten(std::int64_t key) const {
    return std::any_of(forgotten.begin(), forgotten.end(), [key](const PositionRange& range) {
      return key >= range.begin && key < range.end;
    });
  }
  // Blocks that no row sees were dropped.
  bool is_held(std::int64_t block) const {
    const std::int64_t begin = block * kBlockPositions;
    return !is_forgotten(begin) &&
           (!is_local() || begin + kBlockPositions > position - shape.window + 1);
  }
  bool is_visible(std::int64_t row, std::int64_t key) const {
    const std::int64_t distance = position + row - key;
    return distance >= 0 && !(is_local() && distance >= shape.window) && !is_forgotten(key);
  }
  // What scales the scores of a row.
  double tau(std::int64_t row) const {
    const double ratio = static_cast<double>(position + row + 1) / std::max(log_scaling_floor, 1);
    return log_scaling_floor == 0 || ratio <= 1 ? 1 : 1 + double{kAlpha} * std::log(ratio);
  }
  Segment segment(const TapeView& tape, std::int32_t row_begin, std::int64_t first,
                  std::int32_t n) const {
    return {.row_begin = row_begin,
            .n_rows = n,
            .position = position + first,
            .global = tape,
            .local = tape,
            .conv = {},
            .forgotten = forgotten.data(),
            .n_forgotten = static_cast<std::int32_t>(forgotten.size())};
  }
};

// Rows of heads of d_head numbers of a dtype, each head padded with zeros.
inline RowBuffer random_heads(Random& random, std::int64_t n_rows, std::int32_t n_heads,
                              std::int32_t d_head, DType dtype, float size, DType stored) {
  const std::int64_t padded = round_up(d_head, kColumnAlign);
  RowBuffer rows(n_rows, n_heads * padded, n_heads * padded, stored);
  for (std::int64_t row = 0; row < n_rows; ++row)
    for (std::int64_t head = 0; head < n_heads; ++head)
      for (std::int64_t c = 0; c < d_head; ++c)
        rows.set(row, head * padded + c, rounded(size * random.normal(), dtype));
  return rows;
}

}  // namespace duplex::backend_tests
