#include "parallel/group.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <thread>
#include <utility>

#include "core/error.h"
#include "core/processors.h"
#include "parallel/layout.h"
#include "parallel/waiting.h"

namespace duplex {
namespace {

// A few times what falling asleep and being woken cost: longer would only delay a partner that the
// system has put on the same core. With fewer cores than ranks the one who is waited for may need
// this very core.
constexpr std::chrono::microseconds kSpin{50};
constexpr std::chrono::microseconds kSpinOfTooFewCores{5};
// For the news of how a process has ended, which comes on another way than the end of its messages.
constexpr std::chrono::milliseconds kNewsPatience{500};
constexpr std::int64_t kHeaderBytes = 4096;
constexpr std::int64_t kMinRingBytes = 64 << 10;
static_assert(sizeof(GroupHeader) <= kHeaderBytes);

std::int64_t ring_bytes(const GroupSizes& sizes) {
  // Twice the longest command always has room for one, wherever in the ring it must start.
  const std::uint64_t longest = command_stride(static_cast<std::uint64_t>(sizes.max_command_bytes));
  return std::max(static_cast<std::int64_t>(2 * longest), kMinRingBytes);
}

std::int64_t slab_stride(const GroupSizes& sizes) { return round_up(sizes.slab_bytes, kSlabAlign); }

std::int64_t channel_bytes(const GroupSizes& sizes) {
  const std::int64_t flags = (2 * sizes.n_ranks + 1) * std::int64_t{sizeof(Flag)};
  return round_up(flags + ring_bytes(sizes), kSlabAlign) + 2 * sizes.n_ranks * slab_stride(sizes);
}

std::int64_t group_bytes(const GroupSizes& sizes) {
  return kHeaderBytes + (sizes.n_lanes + 1) * channel_bytes(sizes);
}

void check_options(const GroupOptions& options) {
  constexpr std::size_t kMost = std::size_t{1} << 40;
  check(options.n_ranks >= 1 && options.n_ranks <= Group::kMaxRanks, "n_ranks: expected 1 to ",
        Group::kMaxRanks, ", found ", options.n_ranks);
  check(options.n_lanes >= 1 && options.n_lanes <= Group::kMaxLanes, "n_lanes: expected 1 to ",
        Group::kMaxLanes, ", found ", options.n_lanes);
  check(options.slab_bytes >= 1 && options.slab_bytes <= kMost, "slab_bytes: expected 1 to ", kMost,
        ", found ", options.slab_bytes);
  check(options.max_command_bytes >= 1 && options.max_command_bytes <= kMost,
        "max_command_bytes: expected 1 to ", kMost, ", found ", options.max_command_bytes);
  check(options.time_out.count() > 0, "time_out: expected at least 1 ms, found ",
        options.time_out.count());
}

}  // namespace

Group Group::create(const GroupOptions& options) {
  check_options(options);
  auto spin = options.spin;
  if (spin.count() < 0)
    spin = std::max(available_processors(), 1) >= options.n_ranks ? kSpin : kSpinOfTooFewCores;
  const GroupSizes sizes{options.n_ranks, options.n_lanes,
                         static_cast<std::int64_t>(options.slab_bytes),
                         static_cast<std::int64_t>(options.max_command_bytes)};
  auto region = std::make_shared<const SharedRegion>(
      SharedRegion::create(static_cast<std::size_t>(group_bytes(sizes))));
  Group group(std::move(region), 0);
  GroupHeader& header = group.header();
  header.sizes = sizes;
  header.time_out_ms = options.time_out.count();
  header.spin_us = spin.count();
  header.magic = kGroupMagic;
  return group;
}

Group Group::apart(const GroupOptions& options, int rank, std::shared_ptr<Transport> transport) {
  const Group group = create(options).as(rank);
  return Group(group.region_, rank, std::move(transport));
}

Group Group::join(int fd, int rank) {
  auto region = std::make_shared<const SharedRegion>(SharedRegion::attach(fd));
  const auto bytes = static_cast<std::int64_t>(region->bytes());
  Group group(std::move(region), rank);
  check(bytes >= kHeaderBytes && group.header().magic == kGroupMagic &&
            bytes >= group_bytes(group.header().sizes),
        "tensor-parallel group: expected the memory of a group made by this build behind "
        "descriptor ",
        fd, ", found something else");
  return group.as(rank);
}

Group Group::as(int rank) const {
  check(rank >= 0 && rank < n_ranks(), "rank: expected 0 to ", n_ranks() - 1, ", found ", rank);
  return Group(region_, rank, transport_);
}

Group::Group(std::shared_ptr<const SharedRegion> region, int rank,
             std::shared_ptr<Transport> transport)
    : region_(std::move(region)), rank_(rank), transport_(std::move(transport)) {}

GroupHeader& Group::header() const {
  return *std::launder(reinterpret_cast<GroupHeader*>(region_->data()));
}

int Group::n_ranks() const { return static_cast<int>(header().sizes.n_ranks); }
int Group::n_lanes() const { return static_cast<int>(header().sizes.n_lanes); }
std::size_t Group::slab_bytes() const {
  return static_cast<std::size_t>(header().sizes.slab_bytes);
}
std::size_t Group::max_command_bytes() const {
  return static_cast<std::size_t>(header().sizes.max_command_bytes);
}
std::chrono::milliseconds Group::time_out() const {
  return std::chrono::milliseconds(header().time_out_ms);
}
std::chrono::microseconds Group::spin() const {
  return std::chrono::microseconds(header().spin_us);
}

void Group::fail(int rank, std::string_view reason) const noexcept {
  GroupHeader& header = this->header();
  const auto failed = static_cast<std::uint32_t>(rank + 1);
  const bool is_first = header.is_claimed.exchange(1) == 0;
  if (is_first) {
    const std::size_t length = std::min(reason.size(), sizeof(header.reason) - 1);
    std::memcpy(header.reason, reason.data(), length);
    header.has_reason.store(1);
    header.failed.store(failed);
  } else {
    // Another was first. Should it die before it has finished, this rank's word stands.
    const auto patience = WaitClock::now() + std::chrono::milliseconds(10);
    while (header.failed.load() == 0 && WaitClock::now() < patience) std::this_thread::yield();
    std::uint32_t none = 0;
    header.failed.compare_exchange_strong(none, failed);
  }
  for (int i = 0; i < n_channels(); ++i) {
    const GroupChannel part = channel(i);
    duplex::ring(part.sender->bell);
    for (int other = 0; other < n_ranks(); ++other) {
      duplex::ring(part.arrivals[other].bell);
      duplex::ring(part.receivers[other].bell);
    }
  }
  if (is_first && transport_ != nullptr) transport_->give_up(rank, reason);
}

int Group::failed_rank() const noexcept { return static_cast<int>(header().failed.load()) - 1; }

std::string Group::failure() const {
  const GroupHeader& header = this->header();
  if (header.failed.load() == 0) return {};
  return header.has_reason.load() != 0 ? header.reason : "its process is gone";
}

void Group::check_alive() const {
  if (failed_rank() >= 0) throw_failure();
}

void Group::fail_and_throw(int rank, std::string_view reason) const {
  fail(rank, reason);
  throw_failure();
}

void Group::lose_and_throw(const Transport::Lost& lost, const char* during, int channel) const {
  const auto patience = WaitClock::now() + kNewsPatience;
  while (failed_rank() < 0 && WaitClock::now() < patience)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  fail_and_throw(lost.rank, text_of(during, " of ", channel_name(channel), ": ", lost.reason));
}

void Group::throw_failure() const {
  duplex::fail<RankFailed>("rank ", failed_rank(), " of ", n_ranks(), " has failed: ", failure(),
                           "; the group is over: load the model again and restore its sessions "
                           "from snapshots");
}

std::string Group::channel_name(int i) const {
  return i == memory_channel() ? "page memory" : "lane " + std::to_string(i);
}

GroupChannel Group::channel(int i) const {
  check(i >= 0 && i < n_channels(), "channel: expected 0 to ", n_channels() - 1, ", found ", i);
  const GroupSizes& sizes = header().sizes;
  std::byte* const begin = region_->data() + kHeaderBytes + i * channel_bytes(sizes);
  auto* const flags = std::launder(reinterpret_cast<Flag*>(begin));
  GroupChannel part{};
  part.arrivals = flags;
  part.receivers = flags + sizes.n_ranks;
  part.sender = flags + 2 * sizes.n_ranks;
  part.ring = begin + (2 * sizes.n_ranks + 1) * std::int64_t{sizeof(Flag)};
  part.ring_bytes = ring_bytes(sizes);
  part.slab_stride = slab_stride(sizes);
  part.slabs = begin + channel_bytes(sizes) - 2 * sizes.n_ranks * part.slab_stride;
  return part;
}

}  // namespace duplex
