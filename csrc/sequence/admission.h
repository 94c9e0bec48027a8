// Who may open a sequence: one that finds every page it will ever need.
#pragma once

#include <cstdint>

#include "sequence/layout.h"
#include "sequence/page_pool.h"

namespace duplex {

// What a new sequence asks for. A fork inherits positions, and does not pay for pages it shares.
struct Admission {
  const char* what;  // "open", "fork" or "restore"
  std::int64_t max_positions;
  std::int64_t least_positions;  // fewer make no sense
  std::int64_t shared_pages;     // of the global tape
};

// Takes the promise of a new sequence. Throws CapacityError with what would fit.
Promise admit(PagePool& pool, const SequenceLayout& layout, const Admission& wish);

}  // namespace duplex
