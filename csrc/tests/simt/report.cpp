#include "tests/simt/report.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace duplex::simt {
namespace {

// The limits of every GPU since Hopper.
constexpr int kMaxThreads = 1024;
constexpr std::size_t kMaxSharedBytes = std::size_t{227} << 10;
constexpr std::int64_t kMaxGrid[3] = {2147483647, 65535, 65535};

std::string type_name(const std::type_info& type) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(type.name(), nullptr, nullptr, &status), &std::free);
  return status == 0 ? name.get() : type.name();
}

const char* operation(Wait wait) {
  switch (wait) {
    case Wait::kShuffleDown:
      return "shuffle_down";
    case Wait::kShuffleXor:
      return "shuffle_xor";
    case Wait::kShuffleFrom:
      return "shuffle_from";
    case Wait::kProduct:
    case Wait::kIntegerProduct:
      return "multiply_add";
    default:
      return "";
  }
}

bool is_of_warp(Wait wait) { return *operation(wait) != '\0'; }

std::string state(Wait wait) {
  if (is_of_warp(wait)) return std::string("waits in ") + operation(wait);
  if (wait == Wait::kTurn) return "waits for its turn";
  if (wait == Wait::kGrid) return "waits for the grid before";
  return wait == Wait::kBarrier ? "waits at a barrier" : "has returned";
}

// The first lane that keeps its warp waiting, or nothing.
std::string blame(const std::vector<Wait>& waits) {
  const auto n = static_cast<int>(waits.size());
  for (int first = 0; first < n; first += kWarpLanes) {
    const auto begin = waits.begin() + first;
    const auto end = waits.begin() + std::min(first + kWarpLanes, n);
    const auto waiting = std::find_if(begin, end, is_of_warp);
    if (waiting == end) continue;
    const auto missing = std::find_if(begin, end, [&](Wait wait) { return wait != *waiting; });
    std::ostringstream text;
    text << operation(*waiting) << ": lane " << missing - begin << " of warp " << first / kWarpLanes
         << ' ' << (missing == end ? "does not exist" : state(*missing));
    return text.str();
  }
  return "no thread can go on";
}

}  // namespace

void check_shape(const LaunchShape& shape) {
  bool is_good = shape.n_threads >= 1 && shape.n_threads <= kMaxThreads &&
                 shape.shared_bytes <= kMaxSharedBytes;
  for (int i = 0; i < 3; ++i) is_good &= shape.grid[i] >= 1 && shape.grid[i] <= kMaxGrid[i];
  if (!is_good)
    throw std::logic_error(describe(shape) + ": no GPU takes it (grid up to " +
                           std::to_string(kMaxGrid[0]) + " x 65535 x 65535, 1024 threads, " +
                           std::to_string(kMaxSharedBytes) + " bytes)");
}

std::string describe(const LaunchShape& shape) {
  std::ostringstream text;
  text << "the kernel of " << type_name(*shape.args) << " (grid " << shape.grid[0] << " x "
       << shape.grid[1] << " x " << shape.grid[2] << ", " << shape.n_threads << " threads, "
       << shape.shared_bytes << " bytes of shared memory)";
  return text.str();
}

std::string describe(const LaunchShape& shape, std::int64_t block) {
  std::ostringstream text;
  text << describe(shape) << ", block (" << block % shape.grid[0] << ", "
       << block / shape.grid[0] % shape.grid[1] << ", " << block / shape.grid[0] / shape.grid[1]
       << ')';
  return text.str();
}

std::string describe_deadlock(const LaunchShape& shape, std::int64_t block,
                              const std::vector<Wait>& waits) {
  std::ostringstream text;
  text << describe(shape, block) << ": deadlock: " << blame(waits) << " [threads";
  for (std::size_t begin = 0, end = 0; begin < waits.size(); begin = end) {
    while (end < waits.size() && waits[end] == waits[begin]) ++end;
    text << (begin == 0 ? " " : "; ") << begin;
    if (end > begin + 1) text << '-' << end - 1;
    text << ": " << state(waits[begin]);
  }
  text << ']';
  return text.str();
}

}  // namespace duplex::simt
