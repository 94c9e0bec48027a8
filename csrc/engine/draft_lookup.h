// Guesses at what a session says next: what followed the same words when they last occurred in it.
//
// Holds the newest kCapacity text ids in a ring, and behind each run of two or three of them the
// place of its newest occurrence. Guesses cost time when they are wrong and never change output
// (micro_turn.cpp), so a table of fixed size that forgets may serve: nothing is allocated after
// construction, and each call costs the same however long the session is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace duplex {

class DraftLookup {
 public:
  static constexpr std::int64_t kCapacity = 8192;  // ids

  DraftLookup();
  // Of `size` ids, the newest: what newest() gave.
  DraftLookup(std::int64_t size, std::span<const std::int32_t> newest);

  std::int64_t size() const { return size_; }  // ids pushed and not truncated
  std::vector<std::int32_t> newest() const;    // those that are not lost
  void push(std::int32_t id);
  // Drops ids down to `size`; what the ring has lost meanwhile stays lost.
  void truncate(std::int64_t size);
  // Fills `guesses` with what may follow the ids and `newest` behind them; returns how many: all
  // of them or none. A longer match goes before a newer one.
  std::size_t guess(std::int32_t newest, std::span<std::int32_t> guesses) const;

 private:
  static constexpr std::int64_t kShortest = 2;  // ids of a match
  static constexpr std::int64_t kLongest = 3;
  static constexpr int kSlotBits = 14;  // of each length's table, twice the ids

  std::int64_t oldest() const;
  std::int32_t id(std::int64_t place) const {
    return ids_[static_cast<std::size_t>(place % kCapacity)];
  }
  static std::uint64_t mix(std::uint64_t hash, std::int32_t id);
  static std::size_t slot(std::int64_t n_ids, std::uint64_t hash);
  void index(std::int64_t place);
  bool is_match(std::int64_t place, std::int64_t n_ids, std::int32_t newest) const;

  std::vector<std::int32_t> ids_;     // (kCapacity), a ring
  std::vector<std::int64_t> behind_;  // (lengths, slots): place behind the newest such run, or -1
  std::int64_t size_ = 0;
  std::int64_t lost_ = 0;  // places before it were overwritten by ids that truncate dropped
};

}  // namespace duplex
