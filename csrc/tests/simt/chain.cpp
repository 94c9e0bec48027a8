// Launches one behind the other, of which the next ones may begin before the first has ended.
#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "tests/simt/block.h"
#include "tests/simt/grid.h"
#include "tests/simt/machine.h"
#include "tests/simt/order.h"
#include "tests/simt/report.h"

namespace duplex::simt {
namespace {

// Blocks that begin early, of a launch, at most, spread over it. ThreadSanitizer has no place for
// more threads.
#if defined(__SANITIZE_THREAD__)
constexpr std::size_t kEarlyBlocks = 1;
#else
constexpr std::size_t kEarlyBlocks = 8;
#endif
constexpr std::uint32_t kMostAhead = 3;  // launches that begin before one does

// Blocks of one launch that wait for the launch before.
struct Early {
  std::vector<std::int64_t> indices;
  std::vector<std::unique_ptr<Block>> blocks;
};

// Blocks that have ended, whose fibres can be used again.
thread_local std::vector<std::unique_ptr<Block>> idle;

Early begin_early(const Launch& launch, std::uint32_t seed) {
  check_shape(launch.shape);
  Early early;
  const std::vector<std::int64_t> all = order_of_blocks(launch.shape, seed);
  const std::size_t n = std::min(all.size(), kEarlyBlocks);
  for (std::size_t i = 0; i < n; ++i) early.indices.push_back(all[i * all.size() / n]);
  for (const std::int64_t index : early.indices) {
    if (idle.empty()) idle.push_back(std::make_unique<Block>());
    early.blocks.push_back(std::move(idle.back()));
    idle.pop_back();
    early.blocks.back()->begin_early(launch.shape, index, launch.call, launch.context.get(),
                                     seed + static_cast<std::uint32_t>(index));
  }
  return early;
}

void end(Early& early) {
  for (auto& block : early.blocks) {
    block->end();
    idle.push_back(std::move(block));
  }
}

// Reads that are too early show when launches begin long before, writes when they begin just
// before: forward the one, reverse the other, at random either.
std::size_t launches_ahead(std::uint32_t seed) {
  const Order order = current_schedule().order;
  if (order == Order::kRandom) return 1 + std::mt19937(seed)() % kMostAhead;
  return order == Order::kForward ? kMostAhead : 1;
}

}  // namespace

void run_chain(const std::vector<Launch>& launches) {
  if (has_runner()) {
    for (const auto& [shape, call, context] : launches) run_grid(shape, call, context.get());
    return;
  }
  const Unseen unseen;
  std::deque<Early> ahead;  // of the launches from the next on
  std::size_t n_begun = 0;
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const auto& [shape, call, context] = launches[i];
    launch_order().begin_launch();
    Early own;
    if (n_begun > i) {
      own = std::move(ahead.front());
      ahead.pop_front();
    }
    n_begun = std::max(n_begun, i + 1);
    const std::uint32_t seed = current_schedule().seed + static_cast<std::uint32_t>(i);
    const std::size_t end_of_ahead = std::min(launches.size(), i + 1 + launches_ahead(seed));
    for (; n_begun < end_of_ahead; ++n_begun) {
      if (!launches[n_begun - 1].shape.is_early || !launches[n_begun].shape.is_early) break;
      ahead.push_back(begin_early(launches[n_begun], seed));
    }
    end(own);
    machine().run(shape, call, context.get(), own.indices);
  }
  launch_order().wait_for_all();
}

}  // namespace duplex::simt
