// What the launchers of kernels between ranks share: their checks, and the kernel for as many ranks
// as there are.
#pragma once

#include <algorithm>

#include "core/error.h"
#include "device/platform.cuh"
#include "kernels/all_reduce.h"

namespace duplex::cuda {

inline constexpr int kMaxWorkers = 448;  // with another warp: each may have 136 registers

inline void check_group(const char* op, const Group& group, std::int64_t bytes) {
  check(group.n_ranks == 2 || group.n_ranks == 4 || group.n_ranks == 8, op,
        ": expected 2, 4 or 8 ranks, found ", group.n_ranks);
  check(group.rank >= 0 && group.rank < group.n_ranks, op, ": expected a rank below ",
        group.n_ranks, ", found ", group.rank);
  check(group.n_blocks > 0 && group.n_blocks <= kMaxBlocks, op, ": expected 1 to ", kMaxBlocks,
        " thread blocks, found ", group.n_blocks);
  check(group.buffer_bytes % kWordBytes == 0 && bytes <= group.buffer_bytes, op,
        ": expected buffers of ", bytes, " bytes or more, found ", group.buffer_bytes,
        "; give the group more memory or the call fewer rows");
}

inline void check_next(const char* op, const NextWeights& next) {
  check(next.bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(next.data) % 16 == 0, op,
        ": expected weights to prefetch in multiples of 16 bytes, found ", next.bytes, " at ",
        next.data);
}

inline int threads_for(std::int64_t n_words) {
  return kWarp + static_cast<int>(std::min<std::int64_t>(round_up(n_words, kWarp), kMaxWorkers));
}

// The kernel for as many ranks as there are.
// note: none of them lets the next grid begin. Its blocks would hold places while these wait for
// other ranks, whose other lane may wait for ours, and that for these places.
template <class Args>
void launch_for(Runtime& runtime, void (*two)(Args), void (*four)(Args), void (*eight)(Args),
                int n_threads, std::size_t shared_bytes, const Args& args) {
  const auto kernel = args.group.n_ranks == 2 ? two : args.group.n_ranks == 4 ? four : eight;
  runtime.launch_early(kernel, {args.group.n_blocks}, n_threads, shared_bytes, args);
}

}  // namespace duplex::cuda
