// One case of an attention test: a model's heads and a stream's place, for tests of any backend.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/op_args.h"

namespace duplex::backend_tests {

struct Scene {
  const char* name;
  AttentionShape shape;  // heads, kv heads, d_head, rel_extent, window
  std::int32_t d_rel;
  std::int64_t position;  // of the first row
  std::int32_t n_rows;
  std::int32_t log_scaling_floor = 0;
  std::vector<PositionRange> forgotten = {};

  bool is_local() const { return shape.window > 0; }
};

}  // namespace duplex::backend_tests
