#include "parallel/group_exchange.h"

#include <utility>

#include "core/error.h"
#include "parallel/transport.h"
#include "parallel/waiting.h"

namespace duplex {
namespace {

// What a sleeper says in its bell.
std::uint32_t arrival_of(int rank) { return static_cast<std::uint32_t>(rank) + 1; }

}  // namespace

GroupExchange::GroupExchange(Group group, int channel)
    : group_(std::move(group)),
      channel_(channel),
      part_(group_.channel(channel)),
      epoch_(part_.arrivals[rank()].count.load()) {
  for (std::uint64_t parity : {0, 1})
    for (int i = 0; i < size(); ++i) slabs_[parity].push_back(part_.slab(i, parity));
}

std::span<const void* const> GroupExchange::meet(std::size_t bytes) {
  check(bytes <= slab_bytes(), "meeting: expected at most ", slab_bytes(), " bytes, found ", bytes);
  ++epoch_;
  if (group_.transport() != nullptr) {
    send_to_all(bytes);
  } else {  // what is filled lies where all can read it
    announce();
    for (int i = 0; i < size(); ++i)
      if (i != rank()) await(i);
  }
  return slabs_[epoch_ % 2];
}

void GroupExchange::send_to_all(std::size_t bytes) {
  group_.check_alive();
  filled_.clear();
  for (int i = 0; i < size(); ++i) filled_.emplace_back(part_.slab(i, epoch_), bytes);
  const auto time_out = rank() == 0 ? group_.time_out() : Transport::kForever;  // as in await
  if (const auto lost = group_.transport()->exchange(channel_, filled_, time_out))
    group_.lose_and_throw(*lost, "meeting", channel_);
}

void GroupExchange::announce() const {
  part_.arrivals[rank()].count.store(epoch_);
  for (int i = 0; i < size(); ++i)
    if (i != rank()) ring_if_awaited(part_.arrivals[i].bell, arrival_of(rank()));
}

void GroupExchange::await(int rank) const {
  const Flag& theirs = part_.arrivals[rank];
  const auto is_ready = [&] { return theirs.count.load() >= epoch_; };
  if (is_ready()) return;
  // Rank 0 alone gives up: its background lane stands still for as long as a call of its
  // interaction lane takes, its user may stop it, and its process is watched.
  const auto deadline = this->rank() == 0 ? WaitClock::now() + group_.time_out() : kNoDeadline;
  if (wait_until(group_, part_.arrivals[this->rank()].bell, arrival_of(rank), deadline, is_ready))
    return;
  group_.fail_and_throw(
      rank, text_of("it did not come to a meeting of ", group_.channel_name(channel_), " in ",
                    group_.time_out().count(), " ms (waiting: rank ", this->rank(),
                    "; meeting expected ", epoch_, ", seen ", theirs.count.load(), ")"));
}

}  // namespace duplex
