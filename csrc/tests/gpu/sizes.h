// The sizes of an all-reduce that tables of others have, as rows of a model.
#pragma once

#include "tests/gpu/device_ranks.h"

namespace duplex::gpu_tests {

struct Size {
  const char* name;  // of the rows in bfloat16, as others count; parts travel in float32
  std::int32_t n_rows[2];
};
inline constexpr Size kSizes[] = {
    {"8 KB", {1, 0}}, {"64 KB", {5, 3}}, {"320 KB", {36, 4}}, {"1 MB", {60, 68}}};
inline constexpr std::int32_t kWidth = 4096;

inline Scene scene_of(int n_ranks, const Size& size, DType dtype) {
  return {n_ranks, kWidth, 4, {size.n_rows[0], size.n_rows[1]}, {100, 2}, dtype};
}
inline std::vector<Scene> sized_scenes(int n_ranks, DType dtype) {
  std::vector<Scene> scenes;
  for (const Size& size : kSizes) scenes.push_back(scene_of(n_ranks, size, dtype));
  return scenes;
}

}  // namespace duplex::gpu_tests
