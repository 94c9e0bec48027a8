// Mapping, sharing and copying the pages of one tape.
#include "sequence/tape.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace duplex {

Tape::Tape(PagePool& pool, const TapeLayout& layout, std::int64_t range_positions)
    : pool_(&pool), layout_(layout) {
  if (layout_.is_inert()) return;
  range_pages_ = div_up(range_positions, layout_.page_positions());
  base_ = pool.memory().reserve_range(
      static_cast<std::size_t>((range_pages_ + 1) * layout_.page_bytes));
}

Tape::Tape(Tape&& other) noexcept { swap(other); }

Tape& Tape::operator=(Tape&& other) noexcept {
  Tape taken(std::move(other));
  swap(taken);
  return *this;
}

Tape::~Tape() {
  if (base_ == nullptr) return;
  // The range goes first: a page that becomes free must not be mapped here any more.
  pool_->memory().release_range(base_,
                                static_cast<std::size_t>((range_pages_ + 1) * layout_.page_bytes));
  for (const PageId page : pages_)
    if (page != kNoPage) pool_->release(page);
}

void Tape::swap(Tape& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(layout_, other.layout_);
  std::swap(base_, other.base_);
  std::swap(range_pages_, other.range_pages_);
  std::swap(first_page_, other.first_page_);
  std::swap(pages_, other.pages_);
}

TapeView Tape::view() const {
  return {base_, layout_.blocks_per_page, layout_.page_bytes, layout_.block_bytes};
}

PositionRange Tape::held() const {
  return {first_page_ * layout_.page_positions(), end_page() * layout_.page_positions()};
}

TapeUsage Tape::usage() const {
  TapeUsage usage;
  for (const PageId page : pages_) {
    if (page == kNoPage) continue;
    usage.held_bytes += layout_.page_bytes;
    if (!pool_->is_shared(page)) usage.private_bytes += layout_.page_bytes;
  }
  return usage;
}

std::int64_t Tape::n_pages() const {
  return std::count_if(pages_.begin(), pages_.end(), [](PageId page) { return page != kNoPage; });
}

std::int64_t Tape::n_shared_pages(PositionRange range) const {
  const std::int64_t begin = std::max(range.begin / layout_.page_positions(), first_page_);
  const std::int64_t end = std::min(div_up(range.end, layout_.page_positions()), end_page());
  std::int64_t n_shared = 0;
  for (std::int64_t index = begin; index < end; ++index) {
    const PageId page = pages_[static_cast<std::size_t>(index - first_page_)];
    if (page != kNoPage && pool_->is_shared(page)) ++n_shared;
  }
  return n_shared;
}

void Tape::append(PageId page) {
  check<CapacityError>(end_page() < range_pages_, "tape: its addresses end at position ",
                       range_pages_ * layout_.page_positions());
  pages_.push_back(page);
  if (page == kNoPage) return;
  try {
    pool_->memory().map(address(end_page() - 1), page);
  } catch (...) {
    pages_.pop_back();
    throw;
  }
}

void Tape::drop(std::int64_t page_index, Promise& promise) noexcept {
  PageId& held = page(page_index);
  if (held == kNoPage) return;
  pool_->memory().unmap(address(page_index));
  promise.give_back(std::exchange(held, kNoPage));
}

void Tape::grow_to(std::int64_t end, Promise& promise) {
  if (layout_.is_inert()) return;
  const std::int64_t old_end = held().end;
  while (held().end < end) {
    PageId page = kNoPage;
    try {
      page = promise.take(use());
      append(page);
    } catch (...) {
      if (page != kNoPage) promise.give_back(page);
      release_from(old_end, promise);
      throw;
    }
  }
}

void Tape::release_before(std::int64_t position, Promise& promise) noexcept {
  const std::int64_t keep = std::min(position / layout_.page_positions(), end_page());
  for (; first_page_ < keep; ++first_page_) {
    drop(first_page_, promise);
    pages_.pop_front();
  }
}

void Tape::release_from(std::int64_t position, Promise& promise) noexcept {
  const std::int64_t keep = std::max(div_up(position, layout_.page_positions()), first_page_);
  while (end_page() > keep) {
    drop(end_page() - 1, promise);
    pages_.pop_back();
  }
}

void Tape::forget(PositionRange range, Promise& promise) noexcept {
  const std::int64_t begin = std::max(div_up(range.begin, layout_.page_positions()), first_page_);
  const std::int64_t end = std::min(range.end / layout_.page_positions(), end_page());
  for (std::int64_t index = begin; index < end; ++index) drop(index, promise);
}

void Tape::make_private(std::int64_t position, Promise& promise) {
  const bool starts_page = position % layout_.page_positions() == 0;
  if (starts_page || n_shared_pages({position, position + 1}) == 0) return;
  const std::int64_t index = position / layout_.page_positions();
  PageMemory& memory = pool_->memory();
  const PageId copy = promise.take(use());
  std::byte* const aside = address(range_pages_);
  try {
    memory.map(aside, copy);
    // All of it: the caller may fail after this call, and then the rows from `position` on stay.
    memory.copy(aside, address(index), memory.page_bytes());
    memory.map(address(index), copy);  // backed already: this takes no memory
  } catch (...) {
    memory.unmap(aside);
    promise.give_back(copy);
    throw;
  }
  memory.unmap(aside);
  promise.give_back(std::exchange(page(index), copy));
}

void Tape::fork_from(const Tape& source, std::int64_t length, Promise& promise) {
  if (layout_.is_inert()) return;
  const std::int64_t n_full = length / layout_.page_positions();
  first_page_ = source.first_page_;
  for (std::int64_t index = first_page_; index < n_full; ++index) {
    const PageId shared = source.pages_[static_cast<std::size_t>(index - first_page_)];
    append(shared);
    if (shared != kNoPage) pool_->add_ref(shared);
  }
  const std::int64_t n_blocks = div_up(length % layout_.page_positions(), layout_.block_positions);
  if (n_blocks == 0) return;
  grow_to(length, promise);
  pool_->memory().copy(address(n_full), source.address(n_full),
                       static_cast<std::size_t>(n_blocks * layout_.block_bytes));
}

void Tape::resume(PositionRange range, std::span<const PositionRange> holes, Promise& promise) {
  if (layout_.is_inert()) return;
  const std::int64_t page = layout_.page_positions();
  first_page_ = range.begin / page;
  for (const PositionRange& hole : holes) {
    grow_to(std::min(round_up(hole.begin, page), range.end), promise);
    while (held().end + page <= hole.end) append(kNoPage);
  }
  grow_to(range.end, promise);
}

}  // namespace duplex
