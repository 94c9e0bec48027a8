// A sequence outside its pool: its numbers, and the bytes of the blocks that it holds.
//
// Both follow from what was appended and forgotten, not from where pages lie, so a sequence of
// another pool with the same layout can go on from them, in this process or in another. Blocks that
// were forgotten and windows that were left behind are not part of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/byte_stream.h"
#include "core/types.h"

namespace duplex {

class Sequence;

struct SequenceState {
  std::int64_t max_positions = 0;
  std::int64_t length = 0;
  std::int64_t committed = 0;
  std::int64_t local_begin = 0;  // first position that the tape holds; 0 for one without layers
  std::int64_t conv_begin = 0;
  std::vector<PositionRange> forgotten;

  void write(ByteWriter& to) const;
  // Throws CheckpointError where the numbers cannot be those of a sequence.
  static SequenceState read(ByteReader& from);
};

// Blocks that lie one behind the other in memory.
struct BlockRun {
  std::byte* data = nullptr;  // nullptr: the sequence no longer holds them
  std::size_t bytes = 0;
};

// The blocks that `state` speaks of, in a fixed order, where they lie in `sequence`: the sequence
// that the state is of, or one restored from it.
std::vector<BlockRun> held_blocks(const Sequence& sequence, const SequenceState& state);

}  // namespace duplex
