// Page memory of all ranks, as rank 0 asks for it.
#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "ranks/leader.h"

namespace duplex {

LeaderMemory::LeaderMemory(std::shared_ptr<RankLeader> leader, std::unique_ptr<PageMemory> own)
    : leader_(std::move(leader)), own_(std::move(own)) {
  const std::lock_guard lock(leader_->memory_mutex_);
  send(command(MemoryCommand::kOpen, static_cast<std::uint64_t>(page_bytes()), n_pages()));
}

void LeaderMemory::send(const ByteWriter& command) const { leader_->tell({command.bytes()}); }

// What gives memory back may be called when a rank is gone, and then nobody needs to hear of it.
void LeaderMemory::send_quietly(const ByteWriter& command) const noexcept {
  try {
    send(command);
  } catch (const Error&) {
  }
}

// This rank first: where it fails, the others have not heard of it.
void LeaderMemory::everywhere(const ByteWriter& command, const std::function<void()>& here,
                              const std::function<void()>& undo_here, const ByteWriter& undo) {
  leader_->group().check_alive();  // what else this rank may find then is no news
  here();
  try {
    const auto slabs = leader_->ask({command.bytes()}, sizeof(Status));
    for (int rank = 1; rank < n_ranks(); ++rank) {
      Status status;
      std::memcpy(&status, slabs[static_cast<std::size_t>(rank)], sizeof status);
      check<CapacityError>(status.is_failed == 0, "rank ", rank, ": ", status.message);
    }
  } catch (...) {
    undo_here();
    send_quietly(undo);
    throw;
  }
}

std::byte* LeaderMemory::reserve_range(std::size_t bytes) {
  const std::lock_guard lock(leader_->memory_mutex_);
  const std::int32_t range = leader_->next_range_++;
  std::byte* base = nullptr;
  everywhere(
      command(MemoryCommand::kReserve, range, static_cast<std::uint64_t>(bytes)),
      [&] { base = own_->reserve_range(bytes); }, [&] { own_->release_range(base, bytes); },
      command(MemoryCommand::kRelease, range));
  leader_->ranges_.add(range, base, bytes);
  return base;
}

void LeaderMemory::release_range(std::byte* base, std::size_t bytes) noexcept {
  const std::lock_guard lock(leader_->memory_mutex_);
  const std::int32_t range = leader_->ranges_.find(base).range;
  leader_->ranges_.remove(range);
  own_->release_range(base, bytes);
  send_quietly(command(MemoryCommand::kRelease, range));
}

void LeaderMemory::map(std::byte* address, PageId page) {
  const std::lock_guard lock(leader_->memory_mutex_);
  const auto [range, offset] = leader_->ranges_.find(address);
  everywhere(
      command(MemoryCommand::kMap, range, offset, page), [&] { own_->map(address, page); },
      [&] { own_->unmap(address); }, command(MemoryCommand::kUnmap, range, offset));
}

void LeaderMemory::unmap(std::byte* address) noexcept {
  const std::lock_guard lock(leader_->memory_mutex_);
  own_->unmap(address);
  const auto [range, offset] = leader_->ranges_.find(address);
  send_quietly(command(MemoryCommand::kUnmap, range, offset));
}

void LeaderMemory::copy(std::byte* destination, const std::byte* source, std::size_t bytes) {
  const std::lock_guard lock(leader_->memory_mutex_);
  const auto [range, offset] = leader_->ranges_.find(destination);
  ByteWriter copy = command(MemoryCommand::kCopy, range, offset);
  put_address(copy, leader_->ranges_.find(source));
  copy.put(static_cast<std::uint64_t>(bytes));
  send(copy);
  own_->copy(destination, source, bytes);
}

void LeaderMemory::discard(PageId page) noexcept {
  const std::lock_guard lock(leader_->memory_mutex_);
  own_->discard(page);
  send_quietly(command(MemoryCommand::kDiscard, page));
}

void LeaderMemory::read_rank(int rank, void* host, const std::byte* source, std::size_t bytes) {
  if (rank == 0) return read(host, source, bytes);
  const std::lock_guard lock(leader_->memory_mutex_);
  auto* to = static_cast<std::byte*>(host);
  const std::size_t most = leader_->group_.slab_bytes();
  while (bytes > 0) {
    const std::size_t n = std::min(bytes, most);
    const auto [range, offset] = leader_->ranges_.find(source);
    const ByteWriter read =
        command(MemoryCommand::kRead, rank, range, offset, static_cast<std::uint64_t>(n));
    std::memcpy(to, leader_->ask({read.bytes()}, n)[static_cast<std::size_t>(rank)], n);
    to += n;
    source += n;
    bytes -= n;
  }
}

void LeaderMemory::write_rank(int rank, std::byte* destination, const void* host,
                              std::size_t bytes) {
  if (rank == 0) return write(destination, host, bytes);
  const std::lock_guard lock(leader_->memory_mutex_);
  const auto* from = static_cast<const std::byte*>(host);
  const std::size_t most = leader_->group_.max_command_bytes() / 2;
  while (bytes > 0) {
    const std::size_t n = std::min(bytes, most);
    const auto [range, offset] = leader_->ranges_.find(destination);
    leader_->tell({command(MemoryCommand::kWrite, rank, range, offset).bytes(), {from, n}});
    from += n;
    destination += n;
    bytes -= n;
  }
}

}  // namespace duplex
