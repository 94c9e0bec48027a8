// How the ranks of a group meet: for each rank two slabs and the count of meetings it came to.
//
// Meeting e uses slab e % 2 of each rank. Who has come back from meeting e + 1 knows that all have
// read the slabs of meeting e, and may fill that slab again: two are enough. Ranks that share no
// memory have room for the slabs of all in their own regions, and send theirs to all others.
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
class GroupExchange final : public SlabExchange {
 public:
  // `channel`: a lane, or group.memory_channel(). One object for each rank and channel.
  GroupExchange(Group group, int channel);

  int rank() const override { return group_.rank(); }
  int size() const override { return group_.n_ranks(); }
  std::size_t slab_bytes() const override { return group_.slab_bytes(); }
  void* mine() override { return part_.slab(rank(), epoch_ + 1); }
  // Rank 0 waits at most the group's time-out for each of the others, they wait without end.
  std::span<const void* const> meet(std::size_t bytes) override;

 private:
  void announce() const;
  void await(int rank) const;
  void send_to_all(std::size_t bytes);

  Group group_;
  int channel_;
  GroupChannel part_;
  std::uint64_t epoch_;                       // of the last meeting
  std::vector<const void*> slabs_[2];         // by rank
  std::vector<std::span<std::byte>> filled_;  // of each of them, what travels
};

}  // namespace duplex
