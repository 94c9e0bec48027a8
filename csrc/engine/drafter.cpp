#include "engine/drafter.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace duplex {

Drafter::Drafter(PagePool& pool, const SequenceLayout& layout, const DrafterSizes& sizes)
    : pool_(&pool),
      layout_(&layout),
      sizes_(sizes),
      sequence_(Sequence::open(pool, layout, sizes.max_positions)),
      rows_(static_cast<std::size_t>(2 * sizes.kept_rows * sizes.d_model)) {}

Drafter::Drafter(const Drafter& other, std::optional<Sequence> sequence)
    : pool_(other.pool_),
      layout_(other.layout_),
      sizes_(other.sizes_),
      sequence_(std::move(sequence)),
      first_(other.first_),
      begin_(other.begin_),
      end_(other.end_),
      rows_(other.rows_) {}

Drafter Drafter::fork(std::int64_t max_positions, std::int64_t length) const {
  std::optional<Sequence> sequence;
  try {
    if (sequence_) sequence = sequence_->fork(max_positions);
  } catch (const Error&) {  // the child's drafts begin anew: its output is the same
  }
  const bool has_forked = sequence.has_value() || !sequence_;
  Drafter child(*this, std::move(sequence));
  child.sizes_.max_positions = max_positions;
  if (!has_forked) child.restart(length);
  return child;
}

float* Drafter::row(std::int64_t position) {
  return rows_.data() + 2 * (position % sizes_.kept_rows) * sizes_.d_model;
}

void Drafter::extend(std::int64_t length) { end_ = std::max(end_, length); }

std::int64_t Drafter::oldest_kept() const { return std::max(begin_, end_ - sizes_.kept_rows); }

bool Drafter::reserve(std::int64_t n_rows, std::int64_t length) noexcept {
  if (!sequence_) return false;
  try {
    sequence_->reserve(n_rows);
    return true;
  } catch (const Error&) {
    restart(length);
    return false;
  }
}

Segment Drafter::segment(std::int32_t row_begin, std::int32_t n_rows) const {
  return sequence_->segment(row_begin, n_rows);
}

void Drafter::commit(std::int64_t n_rows) {
  sequence_->advance(n_rows);
  sequence_->commit();
}

void Drafter::truncate(std::int64_t length) noexcept {
  const std::int64_t kept = std::max<std::int64_t>(length - sizes_.n_depths, 0);
  if (!sequence_ || kept >= next()) return;
  if (kept < first_ || kept < oldest_kept()) return restart(length);
  try {
    sequence_->truncate(kept - first_);
  } catch (const Error&) {
    restart(length);
  }
}

void Drafter::restart(std::int64_t length) noexcept {
  const std::int64_t half_room = length - sizes_.max_positions / 2;
  begin_ = first_ = std::min(std::max(oldest_kept(), half_room), length);
  if (begin_ == length) end_ = length;
  sequence_.reset();
  try {
    sequence_ = Sequence::open(*pool_, *layout_, sizes_.max_positions);
  } catch (const Error&) {  // a fork may keep the pages
  }
}

}  // namespace duplex
