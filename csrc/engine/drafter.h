// What the multi-token-prediction layers remember of one session: tapes of their own, and the rows
// that wait for them.
//
// Row i needs the rows up to i + n_depths, so the tapes lag behind the session. The newest rows, as
// they were embedded and as the model's layers left them, are kept in a ring: those that wait, and
// those that a rewind makes wait again. What is not to be had any more (after `forget`, at a limit
// of memory, too far back) is left out: the tapes start afresh with the rows of the ring, or not at
// all. Guesses are worse then; output never depends on them. Next: draft.h.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "sequence/sequence.h"

namespace duplex {

struct DrafterSizes {
  std::int64_t max_positions = 0;
  std::int64_t n_depths = 0;
  std::int64_t d_model = 0;
  std::int64_t kept_rows = 0;  // of the ring
};

// Rows wait until so many share a pass, or a guess is wanted.
inline constexpr std::int32_t kWaitingRows = 16;

class Drafter {
 public:
  // Throws as Sequence::open does. Pool and layout outlive it.
  Drafter(PagePool& pool, const SequenceLayout& layout, const DrafterSizes& sizes);
  // For a session of `length` positions. Without memory for it the child's drafts begin anew.
  Drafter fork(std::int64_t max_positions, std::int64_t length) const;

  // Where row `position` of the session goes, d_model floats each: written in order.
  float* embedded(std::int64_t position) { return row(position); }
  float* hidden(std::int64_t position) { return row(position) + sizes_.d_model; }
  // The rows below `length` are written.
  void extend(std::int64_t length);

  // The session's row that is to be run next.
  std::int64_t next() const { return first_ + (sequence_ ? sequence_->length() : 0); }
  // Of `length` rows, those that later rows change no more and that were not run.
  std::int64_t n_waiting(std::int64_t length) const { return length - sizes_.n_depths - next(); }
  // Backs `n_rows` rows. False where there is no room: then the tapes have started afresh.
  bool reserve(std::int64_t n_rows, std::int64_t length) noexcept;
  Segment segment(std::int32_t row_begin, std::int32_t n_rows) const;
  // The first `n_rows` of the rows that were run need not be run again.
  void commit(std::int64_t n_rows);

  void truncate(std::int64_t length) noexcept;
  // Starts afresh, in a session of `length` rows.
  void restart(std::int64_t length) noexcept;
  // For a new drafter of a session that has `length` rows, none of which it saw.
  void start_at(std::int64_t length) { begin_ = first_ = end_ = length; }

  std::int64_t held_bytes() const { return sequence_ ? sequence_->held_bytes() : 0; }

 private:
  Drafter(const Drafter& other, std::optional<Sequence> sequence);
  float* row(std::int64_t position);
  std::int64_t oldest_kept() const;

  PagePool* pool_;
  const SequenceLayout* layout_;
  DrafterSizes sizes_;
  std::optional<Sequence> sequence_;  // empty where there was no memory for it
  std::int64_t first_ = 0;            // the session's row that is row 0 of the tapes
  std::int64_t begin_ = 0;            // the ring's rows: from here, or as many as it holds,
  std::int64_t end_ = 0;              // to here
  std::vector<float> rows_;           // (kept_rows, 2, d_model)
};

}  // namespace duplex
