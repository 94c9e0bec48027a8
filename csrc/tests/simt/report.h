// What a launch is called in errors, and why one cannot go on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tests/simt/grid.h"

namespace duplex::simt {

// Throws std::logic_error for what no GPU would take.
void check_shape(const LaunchShape& shape);

std::string describe(const LaunchShape& shape);
std::string describe(const LaunchShape& shape, std::int64_t block);
// `waits` is what each thread of the block waits for.
std::string describe_deadlock(const LaunchShape& shape, std::int64_t block,
                              const std::vector<Wait>& waits);

}  // namespace duplex::simt
