// The words that ranks send each other, and the waits for them (all_reduce.h says where they lie).
// The last warp of a block sends nothing: it prefetches, and empties the buffer of the call before.
#pragma once

#include "kernels/all_reduce.h"
#include "kernels/words.cuh"

namespace duplex::cuda {

template <int kRanks>
struct Call {
  const Group& group;
  std::uint32_t epoch;
  std::int64_t here;  // where the buffer lies that this call fills
  std::int32_t n_workers;

  DUPLEX_DEVICE bool is_worker() const { return thread_index() < n_workers; }
  DUPLEX_DEVICE std::int32_t first() const { return block_x() * n_workers + thread_index(); }
  DUPLEX_DEVICE std::int32_t step() const { return group.n_blocks * n_workers; }  // of all blocks
  DUPLEX_DEVICE std::int64_t at(std::int64_t word) const { return here + word * kWordBytes; }
  DUPLEX_DEVICE const std::uint32_t* own_word(std::int64_t at) const {  // of the pad
    return reinterpret_cast<const std::uint32_t*>(group.own + at);
  }

  DUPLEX_DEVICE void broadcast(std::int64_t word, const Four& numbers) const {
    const Words words = to_send(numbers);
    if (group.multicast != nullptr) return multicast_store(group.multicast + at(word), words);
#pragma unroll
    for (int peer = 0; peer < kRanks; ++peer) store_system(group.peers[peer] + at(word), words);
  }

  // What the ranks have put at the words at(0), at(1), ... : the ranks' parts, or sums of `owner`.
  template <int kCount, class At>
  DUPLEX_DEVICE void wait(Words (&words)[kCount], const At& word_at, Phase phase, int owner) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = load_system(group.own + at(word_at(i)));
    for (std::uint64_t begin = 0; begin != kIsOver;) {
      int missing = -1;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (has_arrived(words[i])) continue;
        missing = i;
        words[i] = load_system(group.own + at(word_at(i)));
      }
      if (missing < 0) return;
      begin = keep_waiting(begin, phase, owner + (phase == Phase::kParts ? missing : 0));
    }
    for (Words& word : words) word = {};
  }
  // The parts of one word, added by ascending rank.
  DUPLEX_DEVICE Four sum(std::int64_t first, std::int64_t step) const {
    Words words[kRanks];
    wait(words, [&](int peer) { return first + peer * step; }, Phase::kParts, 0);
    Four sum = received(words[0]);
#pragma unroll
    for (int peer = 1; peer < kRanks; ++peer) {
      const Four part = received(words[peer]);
      for (int i = 0; i < 4; ++i) sum.v[i] += part.v[i];
    }
    return sum;
  }
  template <int kCount, class At>
  DUPLEX_DEVICE void sums(Four (&to)[kCount], const At& word_at, int owner) const {
    Words words[kCount];
    wait(words, word_at, Phase::kSums, owner);
    for (int i = 0; i < kCount; ++i) to[i] = received(words[i]);
  }

  // Every rank's block of this number has come here, with all that it stored.
  DUPLEX_DEVICE void meet() const {
    const std::int64_t pad = kSignalsAt + 4 * block_x();
    fence_addresses();
    sync_block();
    if (thread_index() == 0) {
      multicast_count_release(reinterpret_cast<std::uint32_t*>(group.multicast + pad));
      const std::uint32_t expected = (group.state->n_signals + 1) * kRanks;
      const auto lacks = [&] { return load_word_acquire(own_word(pad)) - expected; };
      for (std::uint64_t begin = 0; begin != kIsOver && static_cast<std::int32_t>(lacks()) < 0;)
        begin = keep_waiting(begin, Phase::kSignals, -1);
    }
    sync_block();
    fence_addresses();
  }

  // `begin` is 0 at first; kIsOver: wait no more. Who waits too long says for whom, and ends the
  // kernel; others leave the saying to it. A rank that is a call behind is to blame first.
  static constexpr std::uint64_t kIsOver = ~std::uint64_t{0};
  DUPLEX_DEVICE std::uint64_t keep_waiting(std::uint64_t begin, Phase phase, int peer) const {
    const std::uint64_t now = clock_ns();
    if (begin == 0) return now;
    if (now - begin < kPatienceNs) return begin;
    if (load_word_system(own_word(kOverAt)) != 0) return kIsOver;
    if (now - begin < group.wait_limit_ns || count_up(&group.state->n_reports) != 0) return begin;
    std::uint32_t seen = epoch + 1;
    for (int other = 0; other < kRanks; ++other) {
      const std::uint32_t calls = load_word_system(own_word(4 * other));
      if (static_cast<std::int32_t>(calls - seen) >= 0) continue;
      seen = calls;
      peer = other;
    }
    const auto word = [](auto value) { return static_cast<std::uint32_t>(value); };
    auto* const to = reinterpret_cast<Words*>(group.report);
    store_system(to, {{word(phase), word(group.rank), word(peer), word(block_x())}});
    store_system(to + 1, {{epoch + 1, seen, 1, 0}});
    fence_system();
    stop();
    return begin;
  }
};

template <int kRanks>
DUPLEX_DEVICE Call<kRanks> begin_call(const Group& group, const NextWeights& next) {
  const GroupState& state = *group.state;
  const std::uint32_t epoch = state.epoch, buffer = state.buffer;
  for (int peer = 0; peer < kRanks; ++peer)
    if (block_x() == 0 && thread_index() == peer)
      store_word_system(reinterpret_cast<std::uint32_t*>(group.peers[peer]) + group.rank,
                        epoch + 1);
  const Call<kRanks> call{group, epoch, kPadBytes + buffer * group.buffer_bytes,
                          n_threads() - kWarp};
  if (call.is_worker()) return call;
  constexpr std::int64_t kPiece = 4096;
  const std::int64_t index = block_x() * kWarp + thread_index() % kWarp;
  const std::int64_t count = group.n_blocks * kWarp;
  for (std::int64_t i = index * kPiece; i < next.bytes; i += count * kPiece)
    prefetch(static_cast<const std::byte*>(next.data) + i,
             static_cast<std::uint32_t>(next.bytes - i < kPiece ? next.bytes - i : kPiece));
  const std::uint32_t old = buffer == 0 ? kBuffers - 1 : buffer - 1;
  std::byte* const words = group.own + kPadBytes + old * group.buffer_bytes;
  for (std::int64_t i = index; i < state.used_words[old]; i += count)
    store_system(words + i * kWordBytes, {{kEmpty, kEmpty, kEmpty, kEmpty}});
  fence_system();  // before the next call says to anyone that this one is over
  return call;
}

// The last block to come here makes the next call's epoch.
template <int kRanks>
DUPLEX_DEVICE void end_call(const Call<kRanks>& call, std::int64_t used_words, bool has_met) {
  sync_block();
  if (thread_index() != 0) return;
  GroupState& state = *call.group.state;
  if (count_up(&state.n_done) != static_cast<std::uint32_t>(call.group.n_blocks) - 1) return;
  state.n_done = 0;
  state.used_words[state.buffer] = static_cast<std::uint32_t>(used_words);
  state.buffer = state.buffer + 1 == kBuffers ? 0 : state.buffer + 1;
  state.n_signals += has_met ? 1 : 0;
  state.epoch = call.epoch + 1;
}

}  // namespace duplex::cuda
