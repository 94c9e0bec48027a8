// The rules of a sequence. Each change first takes what can fail (promises, mappings), then does
// the rest without failing.
#include "sequence/sequence.h"

#include <algorithm>
#include <array>
#include <utility>

#include "core/error.h"
#include "sequence/admission.h"

namespace duplex {

Sequence::Sequence(PagePool& pool, const SequenceLayout& layout, std::int64_t max_positions,
                   Promise promise)
    : pool_(&pool),
      layout_(&layout),
      max_positions_(max_positions),
      promise_(std::move(promise)),
      global_(pool, layout.global, layout.first_range_positions()),
      local_(pool, layout.local, 0),
      conv_(pool, layout.conv, 0) {}

Sequence Sequence::open(PagePool& pool, const SequenceLayout& layout, std::int64_t max_positions) {
  check(max_positions > 0, "max_positions: expected a positive number, found ", max_positions);
  check(pool.page_bytes() == layout.page_bytes, "open: expected a pool with pages of ",
        layout.page_bytes, " bytes, found ", pool.page_bytes());
  return Sequence(pool, layout, max_positions, admit(pool, layout, {"open", max_positions, 1, 0}));
}

Sequence Sequence::fork(std::int64_t max_positions) const {
  check(max_positions >= held_positions(), "fork: expected max_positions of at least the ",
        held_positions(), " positions it inherits, found ", max_positions);
  const std::int64_t shared_pages =
      layout_->global.is_inert() ? 0 : held_positions() / layout_->global.page_positions();
  // The pool is free again while pages are mapped, which takes milliseconds: this sequence holds
  // what the child will share.
  Sequence child(*pool_, *layout_, max_positions,
                 admit(*pool_, *layout_, {"fork", max_positions, held_positions(), shared_pages}));
  child.global_.fork_from(global_, length_, child.promise_);
  child.local_.fork_from(local_, length_, child.promise_);
  child.conv_.fork_from(conv_, length_, child.promise_);
  child.length_ = child.backed_ = length_;
  child.committed_ = committed_;
  child.forgotten_ = forgotten_;
  return child;
}

std::int64_t Sequence::mapped() const {
  std::int64_t end = conv_.held().end;
  for (const Tape* tape : {&global_, &local_})
    if (!tape->layout().is_inert()) end = std::min(end, tape->held().end);
  return end;
}

std::int64_t Sequence::held_positions() const {
  if (layout_->global.is_inert()) return 0;
  return length_ - forgotten_.positions_in_whole_pages(layout_->global.page_positions());
}

std::int64_t Sequence::lowest_truncation() const {
  std::int64_t lowest = 0;
  for (const Tape* tape : {&local_, &conv_}) {
    if (tape->layout().is_inert()) continue;
    // The row at the new end reads this far back, into rows that are held and not hidden.
    const std::int64_t reach = tape->layout().window - layout_->limits.rewind_rows;
    const std::int64_t readable = std::max(tape->held().begin, forgotten_.end());
    if (readable > 0) lowest = std::max(lowest, readable + reach);
  }
  return lowest;
}

std::int64_t Sequence::held_bytes() const {
  return global_.held_bytes() + local_.held_bytes() + conv_.held_bytes();
}

SequenceUsage Sequence::usage() const {
  const TapeUsage local = local_.usage(), conv = conv_.usage();
  const auto page_bytes = static_cast<std::int64_t>(layout_->page_bytes);
  return {global_.usage(),
          local,
          conv,
          promise_.window_pages(),
          (local.held_bytes + conv.held_bytes) / page_bytes,
          promise_.growth_pages()};
}

void Sequence::check_room(std::int64_t n_rows) const {
  check(n_rows >= 0, "reserve: expected 0 rows or more, found ", n_rows);
  check<CapacityError>(layout_->global.is_inert() || held_positions() + n_rows <= max_positions_,
                       "reserve: ", n_rows, " rows wanted, ", max_positions_ - held_positions(),
                       " left of max_positions = ", max_positions_,
                       "; open with more, forget an old range or truncate");
  check<CapacityError>(length_ + n_rows <= layout_->lifetime_positions(), "reserve: position ",
                       length_ + n_rows, " is beyond the ", layout_->lifetime_positions(),
                       " that one sequence can have in its life; continue in a new session");
}

void Sequence::reserve(std::int64_t n_rows) {
  check_room(n_rows);
  const std::int64_t pending = length_ - committed_ + n_rows;
  check<CapacityError>(pending <= layout_->limits.pending_rows, "reserve: ", pending,
                       " rows beyond the committed length, expected at most pending_rows = ",
                       layout_->limits.pending_rows, "; commit first or raise the limit");
  const std::int64_t end = std::max(backed_, length_ + n_rows);
  const std::array tapes{&global_, &local_, &conv_};
  std::size_t n_grown = 0;
  try {
    for (; n_grown < tapes.size(); ++n_grown) tapes[n_grown]->grow_to(end, promise_);
  } catch (...) {
    while (n_grown > 0) tapes[--n_grown]->ungrow(backed_, promise_);
    throw;
  }
  backed_ = end;
}

Segment Sequence::segment(std::int32_t row_begin, std::int32_t n_rows) const {
  check(n_rows >= 0 && n_rows <= backed_ - length_, "segment: ", n_rows, " rows wanted, ",
        backed_ - length_, " are backed; reserve them first");
  const auto holes = forgotten();
  return {row_begin,     n_rows,       length_,      global_.view(),
          local_.view(), conv_.view(), holes.data(), static_cast<std::int32_t>(holes.size())};
}

void Sequence::advance(std::int64_t n_rows) {
  check(n_rows >= 0 && n_rows <= backed_ - length_, "advance: ", n_rows, " rows written, ",
        backed_ - length_, " are backed; reserve them first");
  length_ += n_rows;
}

void Sequence::commit() noexcept {
  committed_ = length_;
  for (Tape* tape : {&local_, &conv_}) {
    const std::int64_t oldest = committed_ - tape->layout().window;
    if (oldest > 0) tape->release_before(oldest, promise_);
  }
}

void Sequence::truncate(std::int64_t n_rows) {
  const PagePool::Lock lock(pool_->mutex());
  const std::int64_t lowest = lowest_truncation();
  check(n_rows >= lowest && n_rows <= length_, "truncate: expected ", lowest, " to ", length_,
        " rows, found ", n_rows);
  if (n_rows == length_) return;
  // Pages that a fork keeps stay in use, and this sequence must be able to fill as many again.
  const std::int64_t twice = global_.n_shared_pages({n_rows, length_});
  promise_.extend(twice, "truncate: pages shared with a fork");
  try {
    // The next row is written into the page that holds `n_rows`. The global tape goes last: it is
    // the one that takes from the extension.
    local_.make_private(n_rows, promise_);
    conv_.make_private(n_rows, promise_);
    global_.make_private(n_rows, promise_);
  } catch (...) {
    promise_.give_up(twice);
    throw;
  }
  for (Tape* tape : {&global_, &local_, &conv_}) tape->release_from(n_rows, promise_);
  length_ = backed_ = n_rows;
  committed_ = std::min(committed_, n_rows);
}

PositionRange Sequence::forget(std::int64_t begin, std::int64_t end) {
  const PagePool::Lock lock(pool_->mutex());
  const std::int64_t limit = std::max<std::int64_t>(committed_ - layout_->longest_window(), 0);
  check(begin >= 0 && begin <= end && end <= limit, "forget: expected 0 <= begin <= end <= ", limit,
        " (the committed length without the window that stays), found ", begin, " to ", end);
  const PositionRange hidden = PositionRange{begin, end}.inward(kBlockPositions);
  if (hidden.is_empty()) return {hidden.begin, hidden.begin};
  ForgottenRanges forgotten = forgotten_;
  const PositionRange hole = forgotten.add(hidden);
  // As in truncate: pages that a fork keeps are paid for again before they count as room.
  promise_.extend(global_.n_shared_pages(hole.inward(layout_->global.page_positions())),
                  "forget: pages shared with a fork");
  global_.forget(hole, promise_);
  forgotten_ = forgotten;
  return hidden;
}

}  // namespace duplex
