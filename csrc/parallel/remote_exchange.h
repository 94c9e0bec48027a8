// An Exchange of ranks that share no memory: every slab is sent to all others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/exchange.h"
#include "parallel/group.h"
#include "parallel/layout.h"

namespace duplex {

// One rank's side of one channel, for one thread at a time. This rank's region has room for the
// slabs of all, twice: who still reads those of the last meeting may fill its own for the next.
class RemoteExchange final : public SlabExchange {
 public:
  // `channel`: a lane, or group.memory_channel(). The group has a transport.
  RemoteExchange(Group group, int channel);

  int rank() const override { return group_.rank(); }
  int size() const override { return group_.n_ranks(); }
  std::size_t slab_bytes() const override { return group_.slab_bytes(); }
  void* mine() override { return part_.slab(rank(), epoch_ + 1); }
  std::span<const void* const> meet(std::size_t bytes) override;

 private:
  Group group_;
  int channel_;
  GroupChannel part_;
  std::uint64_t epoch_ = 0;                   // of the last meeting
  std::vector<const void*> slabs_[2];         // by rank
  std::vector<std::span<std::byte>> filled_;  // of each of them, what travels
};

// How the ranks of this group meet: through the memory that they share, or else by its transport.
std::unique_ptr<SlabExchange> make_exchange(const Group& group, int channel);

}  // namespace duplex
