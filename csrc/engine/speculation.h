// How one session guesses ahead: how many tokens, and from what. Next: draft_lookup.h, drafter.h.
#pragma once

#include <cstdint>
#include <optional>

#include "engine/draft_lookup.h"
#include "engine/drafter.h"

namespace duplex {

inline constexpr std::int32_t kMaxDrafts = 64;  // of one session in a pass

struct Speculation {
  std::int32_t max_drafts;              // of one pass
  std::int32_t n_drafts = max_drafts;   // of the next one: fewer where guesses failed
  DraftLookup lookup = {};              // the session's text
  std::optional<Drafter> drafter = {};  // where layers for it are loaded: asked if that has none

  // For a session of `length` positions.
  Speculation fork(std::int64_t max_positions, std::int64_t length) const {
    return {
        .max_drafts = max_drafts,
        .lookup = lookup,
        .drafter = drafter ? std::optional(drafter->fork(max_positions, length)) : std::nullopt};
  }
};

}  // namespace duplex
