// The holes of a sequence: ranges of positions that attention no longer sees.
//
// Plain bookkeeping of at most kMaxHoles ranges, ascending, disjoint and never touching. Which
// ranges may become holes, and what happens to their pages, is decided in sequence/sequence.cpp.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "core/types.h"

namespace duplex {

class ForgottenRanges {
 public:
  static constexpr std::size_t kMaxHoles = 8;

  std::span<const PositionRange> ranges() const { return {ranges_.data(), n_ranges_}; }
  // End of the last hole, 0 without holes.
  std::int64_t end() const { return n_ranges_ == 0 ? 0 : ranges_[n_ranges_ - 1].end; }
  // Adds a non-empty range and returns the hole it lies in now: itself merged with what it overlaps
  // or touches. Throws InvalidArgument beyond kMaxHoles, nothing changed.
  PositionRange add(PositionRange added);
  // Positions in the pages of `page_positions` that lie wholly inside one hole.
  std::int64_t positions_in_whole_pages(std::int64_t page_positions) const;

 private:
  std::array<PositionRange, kMaxHoles> ranges_{};
  std::size_t n_ranges_ = 0;
};

}  // namespace duplex
