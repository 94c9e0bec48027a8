// Sessions that do not end: when one is full, the oldest middle of its past is forgotten.
//
// The head of the sequence stays (a system prompt, an introduction), and so do the newest
// positions; what lies between becomes one growing hole. This happens before a call that would not
// fit, in whole blocks, and depends on the calls of the session alone: neither on the size of pages
// nor on what shares its passes. For that, a sequence is opened with room for the parts of pages
// that a hole leaves at its edges.
#pragma once

#include <cstdint>
#include <optional>

#include "core/types.h"
#include "sequence/sequence.h"

namespace duplex {

struct Endless {
  std::int64_t head = 0;           // positions that stay from the beginning
  std::int64_t recent = 0;         // newest positions that stay
  std::int64_t max_positions = 0;  // seen at once, at most
  bool is_automatic = false;       // head and recent: an eighth and a half of max_positions

  // Throws InvalidArgument where a sequence of this layout cannot forget so.
  void validate(const SequenceLayout& layout) const;
  // The same policy for another limit. Throws as validate does; one that is automatic is none
  // where the windows leave no room for it.
  std::optional<Endless> with_limit(std::int64_t limit, const SequenceLayout& layout) const;
  // What a sequence is opened with.
  std::int64_t held_positions(const SequenceLayout& layout) const;
  // What goes before `n_rows` rows more; empty where they fit. Throws CapacityError where nothing
  // that may be forgotten makes room for them.
  PositionRange to_forget(const Sequence& sequence, std::int64_t n_rows) const;
  // How many rows can be had so.
  std::int64_t room(const Sequence& sequence) const;
  // Throws InvalidArgument where [begin, end) would take the hole that this policy needs.
  void check_forget(const Sequence& sequence, std::int64_t begin, std::int64_t end) const;
};

}  // namespace duplex
