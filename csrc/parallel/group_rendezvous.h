// A Rendezvous of processes: words go through the slabs of the page-memory channel, descriptors
// over sockets, by way of rank 0.
//
// Descriptors are sent with SCM_RIGHTS: to take them out of another process (pidfd_getfd) is often
// allowed to its parents alone.
#pragma once

#include <string>
#include <vector>

#include "backend/exchange.h"
#include "parallel/group.h"

namespace duplex {

// Pairs of connected sockets, one pair for each rank but 0.
class RankSockets {
 public:
  explicit RankSockets(int n_ranks);  // throws CapacityError
  ~RankSockets();
  RankSockets(const RankSockets&) = delete;
  RankSockets& operator=(const RankSockets&) = delete;

  // The end of rank 0, and the other one, which a worker inherits.
  int leader(int rank) const { return pairs_[static_cast<std::size_t>(rank - 1)].leader; }
  int worker(int rank) const { return pairs_[static_cast<std::size_t>(rank - 1)].worker; }

 private:
  struct Pair {
    int leader, worker;
  };
  std::vector<Pair> pairs_;
};

class GroupRendezvous final : public Rendezvous {
 public:
  // `sockets`: of rank 0 its ends, by rank, from 1 on; of another its one end. They stay the
  // caller's. `words`: of the page-memory channel, in which nothing else may be said meanwhile; it
  // is used in meetings alone.
  GroupRendezvous(Group group, SlabExchange& words, std::vector<int> sockets);

  int rank() const override { return group_.rank(); }
  int size() const override { return group_.n_ranks(); }
  std::vector<std::string> all_gather(const std::string& mine) override;
  int share_descriptor(int from, int descriptor) override;
  void check_alive() const override { group_.check_alive(); }
  void fail(int rank, const std::string& reason) noexcept override { group_.fail(rank, reason); }

 private:
  int socket_of(int rank) const;
  void send(int to, int descriptor) const;
  int receive(int from) const;

  Group group_;
  SlabExchange& words_;
  std::vector<int> sockets_;
};

}  // namespace duplex
