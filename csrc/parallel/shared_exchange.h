// An Exchange through shared memory: for each rank two slabs and the count of meetings it came to.
//
// Meeting e uses slab e % 2 of each rank. Who has come back from meeting e + 1 knows that all have
// read the slabs of meeting e, and may fill that slab again: two are enough.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/exchange.h"
#include "parallel/group.h"
#include "parallel/layout.h"

namespace duplex {

// One rank's side of one channel, for one thread at a time. Slabs start on a multiple of 4096
// bytes. A meeting of a group of one does nothing but swap the slabs.
class SharedExchange final : public SlabExchange {
 public:
  // `channel`: a lane, or group.memory_channel(). One object for each rank and channel.
  SharedExchange(Group group, int channel);

  int rank() const override { return group_.rank(); }
  int size() const override { return group_.n_ranks(); }
  std::size_t slab_bytes() const override { return group_.slab_bytes(); }
  void* mine() override;
  // Rank 0 waits at most the group's time-out for each of the others, they wait without end. What
  // is filled lies where all can read it, so its size does not matter.
  std::span<const void* const> meet(std::size_t /*bytes*/) override { return meet(); }
  std::span<const void* const> meet();

 private:
  void announce() const;
  void await(int rank) const;

  Group group_;
  int channel_;
  GroupChannel part_;
  std::uint64_t epoch_;                // of the last meeting
  std::vector<const void*> slabs_[2];  // by rank
};

}  // namespace duplex
