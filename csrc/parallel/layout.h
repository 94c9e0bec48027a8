// What lies in the region of a group: a header, then one part for each channel. Zeros are its
// start.
//
// Every count goes up only, and has 64 bits, so that none ever wraps. Positions in a ring are bytes
// since the start; modulo the ring's size they say where.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/types.h"
#include "parallel/group.h"

namespace duplex {

// Of this layout; another build must not join.
inline constexpr std::uint64_t kGroupMagic = 0x6475706c65780001;
inline constexpr std::uint64_t kLineBytes = 64;
inline constexpr std::int64_t kSlabAlign = 4096;

// Where one thread sleeps (waiting.h).
struct Bell {
  std::atomic<std::uint32_t> rung;    // the futex
  std::atomic<std::uint32_t> awaits;  // 0: awake; else what it waits for
};

// A count with one writer, and where that thread sleeps: one line, as both change hands together.
struct alignas(kLineBytes) Flag {
  std::atomic<std::uint64_t> count;
  Bell bell;
};
static_assert(sizeof(Flag) == kLineBytes);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

struct GroupSizes {
  std::int64_t n_ranks;
  std::int64_t n_lanes;
  std::int64_t slab_bytes;
  std::int64_t max_command_bytes;
};

struct GroupHeader {
  std::uint64_t magic;
  GroupSizes sizes;
  std::int64_t time_out_ms;
  std::int64_t spin_us;
  // Written once, by the first to say that a rank has failed; `failed` comes last.
  alignas(kLineBytes) std::atomic<std::uint32_t> failed;  // the rank + 1; 0: none
  std::atomic<std::uint32_t> is_claimed;
  std::atomic<std::uint32_t> has_reason;
  char reason[512];
};

// In front of a command in a ring. A size of kSkip: the rest of the ring is empty.
struct alignas(kLineBytes) CommandHead {
  static constexpr std::uint64_t kSkip = ~std::uint64_t{0};
  std::uint64_t n_bytes;
  std::uint64_t after[Group::kMaxLanes + 1];  // by channel: how far its ring must be done
};
static_assert(sizeof(CommandHead) == kLineBytes);

constexpr std::uint64_t command_stride(std::uint64_t n_bytes) {
  return sizeof(CommandHead) + (n_bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
}

// One channel of the region.
struct GroupChannel {
  Flag* arrivals;   // by rank: meetings it came to
  Flag* sender;     // rank 0: end of what was sent
  Flag* receivers;  // by rank: end of what is done
  std::byte* ring;
  std::int64_t ring_bytes;
  std::byte* slabs;  // (n_ranks, 2, slab_stride)
  std::int64_t slab_stride;

  std::byte* slab(int rank, std::uint64_t epoch) const {
    return slabs + (2 * rank + static_cast<std::int64_t>(epoch % 2)) * slab_stride;
  }
};

}  // namespace duplex
