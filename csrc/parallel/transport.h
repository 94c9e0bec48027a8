// How bytes travel between ranks that share no memory: what a library of messages offers, and no
// more. Sums, page memory and the order of commands are above it, as they are with shared memory.
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace duplex {

// One rank's side. Channels are those of the group (group.h) and do not wait for each other; in a
// channel all messages arrive whole and in the order in which they were sent. One call at a time of
// each kind in a channel; give_up at any time, from any thread.
class Transport {
 public:
  // For waits without end.
  static constexpr std::chrono::milliseconds kForever = std::chrono::hours(24 * 365);
  // A rank that cannot be reached, and how that was noticed.
  struct Lost {
    int rank;
    std::string reason;
  };

  virtual ~Transport() = default;
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  virtual std::string name() const = 0;
  // Rank 0: a command to every worker. The bytes are copied before it returns. It waits only while
  // a worker has not taken many earlier ones, at most `time_out`.
  virtual std::optional<Lost> send(int channel, std::span<const std::byte> command,
                                   std::chrono::milliseconds time_out) = 0;
  // A worker: the next command of rank 0 into `command`, which is at least as long. Waits without
  // end.
  virtual std::optional<Lost> receive(int channel, std::span<std::byte> command) = 0;
  // Every rank: its own slab to all others, theirs into the other places of `slabs`, which are by
  // rank and of one size. Waits at most `time_out` for each of the others.
  virtual std::optional<Lost> exchange(int channel, std::span<const std::span<std::byte>> slabs,
                                       std::chrono::milliseconds time_out) = 0;
  // The group is over for `reason`. Whoever waits for this rank, in any process, is to wait no
  // longer; calls of this rank in progress end as those ranks go.
  virtual void give_up(int rank, std::string_view reason) noexcept = 0;
};

}  // namespace duplex
