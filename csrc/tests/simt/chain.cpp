// Launches one behind the other, of which the next may begin before the last has ended.
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "tests/simt/block.h"
#include "tests/simt/grid.h"
#include "tests/simt/machine.h"
#include "tests/simt/report.h"

namespace duplex::simt {
namespace {

constexpr std::size_t kEarlyBlocks = 3;  // of a launch

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
  early.indices = order_of_blocks(launch.shape, seed);
  early.indices.resize(std::min(early.indices.size(), kEarlyBlocks));
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

}  // namespace

void run_chain(const std::vector<Launch>& launches) {
  Early early, next;
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const auto& [shape, call, context] = launches[i];
    if (has_runner()) {
      run_grid(shape, call, context.get());
      continue;
    }
    next = {};
    if (shape.is_early && i + 1 < launches.size() && launches[i + 1].shape.is_early)
      next = begin_early(launches[i + 1], current_schedule().seed + static_cast<std::uint32_t>(i));
    end(early);
    machine().run(shape, call, context.get(), early.indices);
    early = std::move(next);
  }
}

}  // namespace duplex::simt
