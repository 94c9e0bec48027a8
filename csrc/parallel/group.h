// The ranks of a tensor-parallel group: processes, or threads of one, around one shared region.
//
// The region holds, for each lane of execution and once more for page memory, what the ranks meet
// through (group_exchange.h) and the commands of rank 0 (commands.h). These are the group's
// channels: lane i is channel i, page memory the last one. Once a rank has failed, every wait in
// every rank ends at once with RankFailed, and so does every later one: the group is over.
//
// Ranks that share no memory have a region each, and a Transport between them: a rank's region then
// holds what its own threads wait for, and the slabs and commands that came.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "parallel/shared_region.h"
#include "parallel/transport.h"

namespace duplex {

struct GroupHeader;   // layout.h
struct GroupChannel;  // layout.h

struct GroupOptions {
  int n_ranks = 2;                    // 1 to kMaxRanks
  int n_lanes = 2;                    // 1 to kMaxLanes
  std::size_t slab_bytes = 0;         // what a rank hands to the others in one meeting, at most
  std::size_t max_command_bytes = 0;  // of one command, at most
  // The longest wait for another rank; in meetings that of rank 0 alone. A worker waits for its
  // next command without end.
  std::chrono::milliseconds time_out{10'000};
  // How long a wait spins before it sleeps; negative: picked by the number of cores.
  std::chrono::microseconds spin{-1};
};

// A handle of one rank; copies share the region.
class Group {
 public:
  static constexpr int kMaxRanks = 64;
  static constexpr int kMaxLanes = 6;

  // A new group; the handle is of rank 0. Throws InvalidArgument, CapacityError.
  static Group create(const GroupOptions& options);
  // In the process of a worker: the group behind Group::fd() of rank 0, of which it takes over this
  // descriptor. Throws InvalidArgument when there is no group of this build behind it.
  static Group join(int fd, int rank);
  // A rank that shares no memory with the others. All make their group with the same options.
  static Group apart(const GroupOptions& options, int rank, std::shared_ptr<Transport> transport);
  // Another rank in the same process, for a thread.
  Group as(int rank) const;

  int rank() const { return rank_; }
  int n_ranks() const;
  int n_lanes() const;
  int n_channels() const { return n_lanes() + 1; }
  int memory_channel() const { return n_lanes(); }
  std::size_t slab_bytes() const;
  std::size_t max_command_bytes() const;
  std::chrono::milliseconds time_out() const;
  std::chrono::microseconds spin() const;
  Transport* transport() const { return transport_.get(); }  // nullptr: memory is shared
  int fd() const { return region_->fd(); }
  std::size_t region_bytes() const { return region_->bytes(); }

  // Says that a rank has failed, and why; the first to say so is the one who is heard. Any thread
  // of any rank, also one that watches a rank's process.
  void fail(int rank, std::string_view reason) const noexcept;
  // The same, and throws RankFailed with the reason of the first.
  [[noreturn]] void fail_and_throw(int rank, std::string_view reason) const;
  // The same for a rank that the transport cannot reach. Who watches the ranks' processes may know
  // more of it, and has a moment to say so first.
  [[noreturn]] void lose_and_throw(const Transport::Lost& lost, const char* during,
                                   int channel) const;
  int failed_rank() const noexcept;  // -1: none
  std::string failure() const;       // in words; empty: none
  // Throws RankFailed once a rank has failed.
  void check_alive() const;

  std::string channel_name(int i) const;  // "lane 0", "page memory"
  // For this layer: where channel `i` lies.
  GroupChannel channel(int i) const;

 private:
  Group(std::shared_ptr<const SharedRegion> region, int rank,
        std::shared_ptr<Transport> transport = nullptr);
  GroupHeader& header() const;
  [[noreturn]] void throw_failure() const;

  std::shared_ptr<const SharedRegion> region_;
  int rank_;
  std::shared_ptr<Transport> transport_;
};

}  // namespace duplex
