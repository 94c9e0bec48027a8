#include "parallel/commands.h"

#include <cstring>
#include <new>
#include <utility>

#include "core/error.h"
#include "parallel/layout.h"
#include "parallel/transport.h"
#include "parallel/waiting.h"

namespace duplex {
namespace {

// What a sleeper waits for.
constexpr std::uint32_t kCommand = 1;
constexpr std::uint32_t kRoom = 2;
constexpr std::uint32_t kOtherChannel = 3;

CommandHead& head_at(const GroupChannel& part, std::uint64_t position) {
  const std::uint64_t offset = position % static_cast<std::uint64_t>(part.ring_bytes);
  return *std::launder(reinterpret_cast<CommandHead*>(part.ring + offset));
}

std::uint64_t left_at(const GroupChannel& part, std::uint64_t position) {
  const auto ring_bytes = static_cast<std::uint64_t>(part.ring_bytes);
  return ring_bytes - position % ring_bytes;
}

// The rank has not done in time what it should have done up to `expected`.
[[noreturn]] void fail_late(const Group& group, int rank, const char* phase, int channel,
                            std::uint64_t expected, std::uint64_t seen) {
  group.fail_and_throw(
      rank, text_of(phase, group.channel_name(channel), " in ", group.time_out().count(),
                    " ms (waiting: rank ", group.rank(), "; commands done up to byte: expected ",
                    expected, ", seen ", seen, ")"));
}

// Waits until every worker's ring can take all up to `end`.
void await_room(const Group& group, int channel, const GroupChannel& part, std::uint64_t end) {
  const auto ring_bytes = static_cast<std::uint64_t>(part.ring_bytes);
  for (int i = 1; i < group.n_ranks(); ++i) {
    const std::atomic<std::uint64_t>& done = part.receivers[i].count;
    const auto is_ready = [&] { return end - done.load() <= ring_bytes; };
    if (is_ready()) continue;
    if (!wait_until(group, part.sender->bell, kRoom, WaitClock::now() + group.time_out(),
                    is_ready)) {
      fail_late(group, i, "it took no commands of ", channel, end - ring_bytes, done.load());
    }
  }
}

}  // namespace

CommandSender::CommandSender(Group group) : group_(std::move(group)) {
  check(group_.rank() == 0, "commands: expected rank 0 to send, found rank ", group_.rank());
  for (int i = 0; i < group_.n_lanes(); ++i)
    ended_[i].store(group_.channel(i).sender->count.load());
}

void CommandSender::send_memory(CommandParts parts) {
  CommandHead order{};
  for (int i = 0; i < group_.n_lanes(); ++i) order.after[i] = ended_[i].load();
  send(group_.memory_channel(), parts, order);
}

void CommandSender::send_pass(int lane, CommandParts parts) {
  check_lane(lane);
  CommandHead order{};
  const int memory = group_.memory_channel();
  order.after[memory] = group_.channel(memory).sender->count.load();
  send(lane, parts, order);
}

void CommandSender::end_pass(int lane) {
  check_lane(lane);
  ended_[lane].store(group_.channel(lane).sender->count.load());
}

void CommandSender::check_lane(int lane) const {
  check(lane >= 0 && lane < group_.n_lanes(), "lane: expected 0 to ", group_.n_lanes() - 1,
        ", found ", lane);
}

void CommandSender::send(int channel, CommandParts parts, const CommandHead& order) {
  owner_.check_here();
  std::size_t n_bytes = 0;
  for (const auto& bytes : parts) n_bytes += bytes.size();
  check(n_bytes <= group_.max_command_bytes(), "command: expected at most ",
        group_.max_command_bytes(), " bytes, found ", n_bytes);
  group_.check_alive();
  const GroupChannel part = group_.channel(channel);
  const std::uint64_t stride = command_stride(n_bytes);

  const std::lock_guard lock(mutexes_[channel]);
  std::uint64_t position = part.sender->count.load();
  CommandHead& head = make_room(channel, part, stride, position);
  head = order;
  head.n_bytes = n_bytes;
  auto* to = reinterpret_cast<std::byte*>(&head + 1);
  for (const auto& bytes : parts) {
    if (!bytes.empty()) std::memcpy(to, bytes.data(), bytes.size());
    to += bytes.size();
  }
  part.sender->count.store(position + stride);
  if (group_.transport() == nullptr) {
    for (int i = 1; i < group_.n_ranks(); ++i) ring_if_awaited(part.receivers[i].bell, kCommand);
  } else if (const auto lost =
                 group_.transport()->send(channel, {part.ring, stride}, group_.time_out())) {
    group_.lose_and_throw(*lost, "commands", channel);
  }
}

CommandHead& CommandSender::make_room(int channel, const GroupChannel& part, std::uint64_t stride,
                                      std::uint64_t& position) const {
  if (group_.transport() != nullptr) return head_at(part, 0);  // copied when it was sent
  const std::uint64_t left = left_at(part, position);
  const std::uint64_t skip = left < stride ? left : 0;
  await_room(group_, channel, part, position + skip + stride);
  if (skip > 0) head_at(part, position).n_bytes = CommandHead::kSkip;
  position += skip;
  return head_at(part, position);
}

CommandReceiver::CommandReceiver(Group group, int channel)
    : group_(std::move(group)),
      channel_(channel),
      part_(group_.channel(channel)),
      end_(part_.receivers[group_.rank()].count.load()) {
  check(group_.rank() > 0, "commands: expected a worker to receive, found rank 0");
}

std::span<const std::byte> CommandReceiver::receive() {
  const std::uint64_t done = part_.receivers[group_.rank()].count.load();
  check(done == end_, "commands: expected done() before the next receive() of ",
        group_.channel_name(channel_));
  std::uint64_t position = end_;
  const CommandHead& head = next(position);
  await_others(head);
  end_ = position + command_stride(head.n_bytes);
  return {reinterpret_cast<const std::byte*>(&head + 1), static_cast<std::size_t>(head.n_bytes)};
}

const CommandHead& CommandReceiver::next(std::uint64_t& position) const {
  if (group_.transport() != nullptr) {
    const std::span ring(part_.ring, static_cast<std::size_t>(part_.ring_bytes));
    if (const auto lost = group_.transport()->receive(channel_, ring))
      group_.lose_and_throw(*lost, "commands", channel_);
    return head_at(part_, 0);
  }
  Bell& bell = part_.receivers[group_.rank()].bell;
  wait_until(group_, bell, kCommand, kNoDeadline,
             [&] { return part_.sender->count.load() > end_; });
  if (head_at(part_, position).n_bytes == CommandHead::kSkip) position += left_at(part_, position);
  return head_at(part_, position);
}

void CommandReceiver::await_others(const CommandHead& head) const {
  const int rank = group_.rank();
  Bell& bell = part_.receivers[rank].bell;
  for (int i = 0; i < group_.n_channels(); ++i) {
    const std::atomic<std::uint64_t>& done = group_.channel(i).receivers[rank].count;
    const auto is_ready = [&] { return done.load() >= head.after[i]; };
    if (is_ready()) continue;
    if (!wait_until(group_, bell, kOtherChannel, WaitClock::now() + group_.time_out(), is_ready)) {
      fail_late(group_, rank, "it did not carry out the commands of ", i, head.after[i],
                done.load());
    }
  }
}

void CommandReceiver::done() {
  const int rank = group_.rank();
  part_.receivers[rank].count.store(end_);
  ring_if_awaited(part_.sender->bell, kRoom);
  for (int i = 0; i < group_.n_channels(); ++i)
    if (i != channel_) ring_if_awaited(group_.channel(i).receivers[rank].bell, kOtherChannel);
}

}  // namespace duplex
