// Sums over the ranks of a tensor-parallel group, and what travels to or from rank 0 alone, as
// launches: every rank makes the same ones, in the same order, each in its own stream.
// host/device_group.h has them in an engine.
//
// A lane of a group has memory of its own on every rank (device/multicast.h): a pad, then
// three buffers that take turns; at first the pad is zeros, and the buffers hold kEmpty, as they do
// until numbers arrive: so a number is its own signal. While one call fills a buffer, the one of
// the call before is emptied; the third may be filled by ranks that are a call ahead, and none can
// be further, since in every call every rank waits for all others, if only through a third. Which
// buffer it is stands in the device's memory, so a recorded launch can be made again.
#pragma once

#include <cstdint>

#include "backend/op_args.h"
#include "device/runtime.h"

namespace duplex::cuda {

inline constexpr int kMaxRanks = 8;
inline constexpr int kBuffers = 3;
inline constexpr int kMaxBlocks = 64;  // two lanes of them are resident at once on every GPU
inline constexpr std::int64_t kWordBytes = 16;
// Calls that each rank has begun, then the signals; last a word that the host makes 1 when the
// group is over: who waits then goes on with zeros.
inline constexpr std::int64_t kPadBytes = 512;
inline constexpr std::int64_t kSignalsAt = 4 * kMaxRanks;
inline constexpr std::int64_t kOverAt = kPadBytes - 4;
inline constexpr std::uint64_t kPatienceNs = 100'000;  // of a wait, before it looks at that word
inline constexpr std::uint32_t kEmpty = 0xffffffffu;   // a NaN; one in the data is sent as another

// Of one rank and lane, in its own memory; zeros at first.
struct GroupState {
  std::uint32_t epoch;      // calls made
  std::uint32_t buffer;     // the next call's
  std::uint32_t n_signals;  // calls that signalled
  std::uint32_t n_done;     // thread blocks of this call
  std::uint32_t n_reports;
  std::uint32_t used_words[kBuffers];
};

enum class Phase : std::uint32_t { kParts, kSums, kSignals };

// A wait that took too long. Memory that the host can read when the context is gone.
struct alignas(16) WaitReport {
  Phase phase;
  std::int32_t rank;  // that waited
  std::int32_t peer;  // the rank that is furthest behind, or else the one waited for; -1: all
  std::int32_t block;
  std::uint32_t expected;  // calls that every rank should have begun
  std::uint32_t seen;      // that the peer has
  std::uint32_t is_there;
  std::uint32_t unused;
};
std::string describe(const WaitReport& report);

// What the kernels of one rank and lane know of the group.
struct Group {
  std::int32_t rank;
  std::int32_t n_ranks;         // 2, 4 or 8
  std::int32_t n_blocks;        // of every launch of every rank, up to kMaxBlocks
  std::byte* own;               // this lane's memory: peers[rank]
  std::byte* peers[kMaxRanks];  // that of each rank
  std::byte* multicast;         // that of all at once; null where there is none
  std::int64_t buffer_bytes;
  GroupState* state;
  WaitReport* report;
  std::uint64_t wait_limit_ns;
};

// What the kernel after this one reads first; multiples of 16 bytes.
struct NextWeights {
  const void* data = nullptr;
  std::int64_t bytes = 0;
};

// conv_add_norm of the sum of all ranks' `part` (n_rows, part_stride); op.parts is not read. The
// parts are added in float32 by ascending rank.
struct AllReduceArgs {
  Group group;
  const float* part;
  std::int64_t part_stride;
  ConvAddNormArgs op;
  NextWeights next;
};

// n_words words of 16 bytes, cut into shares of div_up(n_words, n_ranks) by rank; the last may be
// shorter, but not empty.
struct ShareArgs {
  Group group;
  const float* in;  // reduce-scatter: all words; all-gather: this rank's share
  float* out;       // the other way round
  std::int64_t n_words;
  NextWeights next;
};

// The slices of all ranks side by side in rows of rank 0.
struct GatherSlicesArgs {
  Group group;
  const float* in;  // (n_rows, stride) of this rank
  float* out;       // (n_rows, out_stride) of rank 0
  std::int32_t n_rows;
  std::int64_t stride;  // a multiple of 4, the same on every rank
  std::int64_t out_stride;
  Slice slices[kMaxRanks];  // by rank: the columns of `out` that it has, from its first on
};
// With buffers of this size, at once.
std::int32_t most_gathered_rows(int n_ranks, std::int64_t buffer_bytes, std::int64_t stride);

// kOneShot sends every part to every rank; kTwoShot to the owner of its columns, which sends the
// sum on: the same bits. kSwitch lets the switch add, in its own order: other bits, on Hopper not
// even the same ones after a restart; needs multicast.
enum class Exchanges : std::uint8_t { kOneShot, kTwoShot, kSwitch };

std::int64_t all_reduce_bytes(int n_ranks, std::int64_t n_rows, std::int64_t width, Exchanges how);
// The memory of a lane for buffers of this size.
constexpr std::int64_t lane_bytes(std::int64_t buffer_bytes) {
  return kPadBytes + kBuffers * buffer_bytes;
}

// Throw InvalidArgument, before anything is launched, for what does not fit.
void launch_all_reduce(Runtime& runtime, const AllReduceArgs& args, Exchanges how);
void launch_reduce_scatter(Runtime& runtime, const ShareArgs& args);
void launch_all_gather(Runtime& runtime, const ShareArgs& args);
// All n_words of rank 0's `in` become `out` of every other rank; takes a word of each rank more.
void launch_broadcast(Runtime& runtime, const ShareArgs& args);
void launch_gather(Runtime& runtime, const GatherSlicesArgs& args);

}  // namespace duplex::cuda
