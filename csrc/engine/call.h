// One session's part in the call that its lane is at: rows on their way in, tokens on their way
// out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "engine/input.h"
#include "engine/session.h"
#include "engine/turn.h"

namespace duplex {

struct Call {
  Session* session = nullptr;
  Turn* turn = nullptr;    // takes the tokens
  std::int32_t limit = 0;  // of them
  InputRows input;
  std::int32_t n_wanted = 0;  // guesses that DraftRunner adds to the input
  // ---- of the pass that was run last
  std::vector<std::byte> draft_head_rows;  // (n_drafts, head_row_bytes), as Moment::head_row
  std::size_t sampled_row = 0;             // of the rows that were sampled: the sequence's last
  std::int32_t n_ahead = 0;                // tokens behind that one that were sampled already

  // The next one; what it fills is kept for its capacity.
  void begin(Session& of, Turn* filled = nullptr, std::int32_t n_tokens = 0) {
    session = &of;
    turn = filled;
    limit = n_tokens;
    input.clear();
    n_ahead = 0;
  }
  std::int32_t n_left() const {
    return limit - static_cast<std::int32_t>(std::ssize(turn->token_ids));
  }
};

}  // namespace duplex
