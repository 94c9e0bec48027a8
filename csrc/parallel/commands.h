// Commands of rank 0 to all other ranks, the workers: bytes, in order, through rings in the group's
// region. All workers get the same commands.
//
// Each lane has a ring for its passes, and page memory has one; a worker serves each with a thread
// of its own. Where no memory is shared, commands come by the group's transport instead, and a ring
// is where the latest one lies. Two rules order the channels among each other, and both are kept
// here:
//   - a pass is handed to a worker only when the worker has done every page-memory command that
//     was sent before the pass;
//   - a page-memory command is handed over only when the worker has done every pass that had ended
//     on rank 0 (end_pass) before the command was sent: no page goes while a worker's pass, behind
//     its last meeting, still writes to it. Passes that rank 0 is still running hold up nothing.
// A command waits only for commands sent before it, so these waits cannot form a circle.
//
// Results come back through the channel's GroupExchange: both sides of a command that has a result
// (a read of page memory, logits) meet there.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <span>

#include "core/owner_process.h"
#include "parallel/group.h"
#include "parallel/layout.h"

namespace duplex {

using CommandParts = std::initializer_list<std::span<const std::byte>>;

// Rank 0's side. A command is the bytes of its parts, one behind the other, copied before send
// returns. Throws InvalidArgument for a command of more than max_command_bytes; waits while a
// worker's ring is full, at most the group's time-out, then RankFailed.
class CommandSender {
 public:
  explicit CommandSender(Group group);

  // Any thread.
  void send_memory(CommandParts parts);
  // One pass at a time in a lane: end_pass when rank 0 has computed its own part of it.
  void send_pass(int lane, CommandParts parts);
  void end_pass(int lane);

 private:
  void check_lane(int lane) const;
  // `order` says what must be done before the command.
  void send(int channel, CommandParts parts, const CommandHead& order);
  // Where the command of that length goes in the ring: there is room, and what is skipped for it is
  // marked. `position`: of the ring's end, moved on to the command's beginning.
  CommandHead& make_room(int channel, const GroupChannel& part, std::uint64_t stride,
                         std::uint64_t& position) const;

  Group group_;
  const OwnerProcess owner_;                  // a fork of it has the rings, not the workers
  std::mutex mutexes_[Group::kMaxLanes + 1];  // one writer at a time in a ring
  // By lane, the end of the last pass that has ended, as a position in the ring.
  std::atomic<std::uint64_t> ended_[Group::kMaxLanes] = {};
};

// A worker's side of one channel, for one thread.
class CommandReceiver {
 public:
  // `channel`: a lane, or group.memory_channel(). One object for each rank and channel.
  CommandReceiver(Group group, int channel);

  // Waits for the next command, without end, spinning first for as long as the group spins; then
  // for what must be done before it, at most the group's time-out. The bytes start on a multiple of
  // 64 and are good until done(). Throws RankFailed.
  std::span<const std::byte> receive();
  // The command is carried out: others may go on, and its bytes are overwritten. Every command that
  // was received must be done before the next receive().
  void done();

 private:
  // Waits for the command behind `position`, moved on to the command's beginning.
  const CommandHead& next(std::uint64_t& position) const;
  void await_others(const CommandHead& head) const;

  Group group_;
  int channel_;
  GroupChannel part_;
  std::uint64_t end_;  // in the ring, of the last command that was received
};

}  // namespace duplex
