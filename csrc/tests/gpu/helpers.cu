#include <algorithm>

#include "device/system.cuh"
#include "tests/gpu/helpers.h"

namespace duplex::gpu_tests {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 16;  // leaves room for what waits on the GPU

struct CopyArgs {
  Words* to;
  const Words* from;
  std::int64_t n_words, n_blocks;
};

DUPLEX_KERNEL copy_kernel(CopyArgs args) {
  const std::int64_t step = args.n_blocks * n_threads();
  for (std::int64_t i = block_x() * n_threads() + thread_index(); i < args.n_words; i += step)
    args.to[i] = args.from[i];
}

struct CompareArgs {
  const Words* found;
  const Words* expected;
  std::int64_t n_words, n_blocks;
  Differences* differences;
};

DUPLEX_KERNEL compare_kernel(CompareArgs args) {
  const std::int64_t step = args.n_blocks * n_threads();
  for (std::int64_t i = block_x() * n_threads() + thread_index(); i < args.n_words; i += step) {
    bool is_same = true;
    for (int c = 0; c < 4; ++c) is_same &= args.found[i].v[c] == args.expected[i].v[c];
    if (!is_same) count_up(&args.differences->n_words);
  }
  if (block_x() == 0 && thread_index() == 0) count_up(&args.differences->n_comparisons);
}

struct DelayArgs {
  std::uint64_t ns;
};

DUPLEX_KERNEL delay_kernel(DelayArgs args) {
  const std::uint64_t begin = clock_ns();
  while (clock_ns() - begin < args.ns) {
  }
}

DUPLEX_KERNEL stamp_kernel(Times times) { times.at[(*times.n)++] = clock_ns(); }

DUPLEX_KERNEL ticks_kernel(Times ticks) {
  for (int i = 0; i < kTicks; ++i) {
    const std::uint64_t before = clock_ns();
    std::uint64_t now = before;
    while (now == before) now = clock_ns();
    ticks.at[(*ticks.n)++] = now - before;
  }
}

DUPLEX_KERNEL meeting_kernel(Meeting meeting) {
  if (thread_index() == 0) {
    const auto n_blocks = static_cast<std::uint32_t>(meeting.n_blocks);
    const std::uint32_t n_before = load_word_system(meeting.n_left) / n_blocks;
    const std::uint32_t all =
        (n_before + 1) * n_blocks * static_cast<std::uint32_t>(meeting.n_streams);
    fence_system();  // none leaves before all have come, so all of a stream read the same above
    count_up(meeting.n_came);
    const std::uint64_t begin = clock_ns();
    bool is_late = load_word_system(meeting.n_alone) != 0;
    while (load_word_system(meeting.n_came) < all && !is_late)
      is_late = clock_ns() - begin > kMeetingLimitNs;
    if (is_late) count_up(meeting.n_alone);
    count_up(meeting.n_left);
    if (block_x() == 0 && meeting.times.at != nullptr)
      meeting.times.at[(*meeting.times.n)++] = clock_ns();
  }
  sync_block();
}

struct MulticastArgs {
  std::byte* multicast;
  Words* sum;
};

DUPLEX_KERNEL multicast_kernel(MulticastArgs args) {
  multicast_store(args.multicast + kStoredAt,
                  {{0x3f800000u, 0x40000000u, 0x40400000u, 0x40800000u}});
  *args.sum = multicast_sum(args.multicast + kSummedAt);
  multicast_count_release(reinterpret_cast<std::uint32_t*>(args.multicast + kCounterAt));
}

std::int64_t blocks_for(std::int64_t n_words) {
  return std::clamp<std::int64_t>(n_words / kThreads, 1, kMostBlocks);
}

}  // namespace

void launch_copy(Runtime& runtime, void* to, const void* from, std::size_t bytes) {
  const auto n_words = static_cast<std::int64_t>(bytes / sizeof(Words));
  const std::int64_t n_blocks = blocks_for(n_words);
  runtime.launch(
      copy_kernel, {n_blocks}, kThreads, 0,
      CopyArgs{static_cast<Words*>(to), static_cast<const Words*>(from), n_words, n_blocks});
}

void launch_compare(Runtime& runtime, const void* found, const void* expected, std::size_t bytes,
                    Differences* differences) {
  const auto n_words = static_cast<std::int64_t>(bytes / sizeof(Words));
  const std::int64_t n_blocks = blocks_for(n_words);
  runtime.launch(compare_kernel, {n_blocks}, kThreads, 0,
                 CompareArgs{static_cast<const Words*>(found), static_cast<const Words*>(expected),
                             n_words, n_blocks, differences});
}

void launch_delay(Runtime& runtime, std::uint64_t ns) {
  runtime.launch(delay_kernel, {}, 1, 0, DelayArgs{ns});
}

void launch_stamp(Runtime& runtime, Times times) { runtime.launch(stamp_kernel, {}, 1, 0, times); }

void launch_ticks(Runtime& runtime, Times ticks) { runtime.launch(ticks_kernel, {}, 1, 0, ticks); }

void launch_meeting(Runtime& runtime, const Meeting& meeting, int n_threads) {
  runtime.launch(meeting_kernel, {meeting.n_blocks}, n_threads, 0, meeting);
}

void launch_multicast(Runtime& runtime, std::byte* multicast, void* sum) {
  runtime.launch(multicast_kernel, {}, 1, 0, MulticastArgs{multicast, static_cast<Words*>(sum)});
}

}  // namespace duplex::gpu_tests
