// What the tests on a GPU let it do around the kernels they are about, so that hundreds of calls go
// one behind the other without the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/runtime.h"

namespace duplex::gpu_tests {

// Whole words of 16 bytes.
void launch_copy(cuda::Runtime& runtime, void* to, const void* from, std::size_t bytes);

// Of comparisons on the device.
struct Differences {
  std::uint32_t n_words;  // of 16 bytes, that differ
  std::uint32_t n_comparisons;
};
void launch_compare(cuda::Runtime& runtime, const void* found, const void* expected,
                    std::size_t bytes, Differences* differences);

// Does nothing for so long.
void launch_delay(cuda::Runtime& runtime, std::uint64_t ns);

// Times of a stream in ns, one behind the other.
struct Times {
  std::uint64_t* at;
  std::uint32_t* n;
};
void launch_stamp(cuda::Runtime& runtime, Times times);
// By how much the clock goes on at a time, kTicks times.
inline constexpr int kTicks = 64;
void launch_ticks(cuda::Runtime& runtime, Times ticks);

// The thread blocks of several streams, each of which makes the same meetings.
struct Meeting {
  std::uint32_t* n_came;   // all together, in all meetings
  std::uint32_t* n_left;   // blocks of this stream; so it tells which meeting it is
  std::uint32_t* n_alone;  // blocks of this stream that gave up waiting
  std::int32_t n_streams;
  std::int32_t n_blocks;  // of each
  Times times;            // of the end; null: none
};
constexpr std::uint64_t kMeetingLimitNs = 2'000'000'000;
// Every block of every stream is there at once when this ends; with as many threads as asked.
void launch_meeting(cuda::Runtime& runtime, const Meeting& meeting, int n_threads);

// One thread: stores {1, 2, 3, 4} through a multicast address, sums the words behind it, and counts
// one on the counter behind these.
void launch_multicast(cuda::Runtime& runtime, std::byte* multicast, void* sum);
constexpr std::size_t kStoredAt = 0, kSummedAt = 64, kCounterAt = 128;

}  // namespace duplex::gpu_tests
