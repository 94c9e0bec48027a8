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
  for (const HeldPage& held : pages_) pool_->release(held.page);
}

void Tape::swap(Tape& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(layout_, other.layout_);
  std::swap(base_, other.base_);
  std::swap(range_pages_, other.range_pages_);
  std::swap(origin_page_, other.origin_page_);
  std::swap(first_page_, other.first_page_);
  std::swap(end_page_, other.end_page_);
  std::swap(pages_, other.pages_);
}

TapeView Tape::view() const {
  // Of position 0, which a window has long left: as a number, since nothing lies there.
  const auto offset = static_cast<std::uintptr_t>(origin_page_ * layout_.page_bytes);
  auto* const base = reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(base_) - offset);
  return {base, layout_.blocks_per_page, layout_.page_bytes, layout_.block_bytes};
}

PositionRange Tape::held() const {
  return {first_page_ * layout_.page_positions(), end_page_ * layout_.page_positions()};
}

Tape::Pages::const_iterator Tape::from(std::int64_t page_index) const {
  return std::lower_bound(
      pages_.begin(), pages_.end(), page_index,
      [](const HeldPage& held, std::int64_t index) { return held.index < index; });
}

TapeUsage Tape::usage() const {
  TapeUsage usage;
  usage.held_bytes = n_pages() * layout_.page_bytes;
  for (const HeldPage& held : pages_)
    if (!pool_->is_shared(held.page)) usage.private_bytes += layout_.page_bytes;
  return usage;
}

std::int64_t Tape::n_pages() const { return std::ssize(pages_); }

std::int64_t Tape::n_shared_pages(PositionRange range) const {
  if (range.end <= range.begin) return 0;
  const auto end = from(div_up(range.end, layout_.page_positions()));
  return std::count_if(from(range.begin / layout_.page_positions()), end,
                       [this](const HeldPage& held) { return pool_->is_shared(held.page); });
}

void Tape::append(PageId page, bool is_shared) {
  if (end_page_ - origin_page_ == range_pages_)
    layout_.window > 0 ? rebase() : widen(2 * range_pages_);
  pages_.push_back({end_page_, page});
  PageMemory& memory = pool_->memory();
  try {
    is_shared ? memory.share(address(end_page_), page) : memory.map(address(end_page_), page);
  } catch (...) {
    pages_.pop_back();
    throw;
  }
  ++end_page_;
}

// The pages before `page_index` that are not held yet are forgotten ones.
void Tape::skip_to(std::int64_t page_index) {
  std::int64_t n_pages = range_pages_;
  while (page_index - origin_page_ > n_pages) n_pages *= 2;
  if (n_pages > range_pages_) widen(n_pages);
  end_page_ = std::max(end_page_, page_index);
}

// The old places are given up when the new ones stand.
void Tape::rebase() {
  const std::int64_t n_held = std::ssize(pages_);
  check<CapacityError>(2 * n_held <= range_pages_, "tape: its addresses end at position ",
                       end_page_ * layout_.page_positions());
  PageMemory& memory = pool_->memory();
  const auto place = [this](std::int64_t i) { return base_ + i * layout_.page_bytes; };
  std::int64_t n_mapped = 0;
  try {
    for (; n_mapped < n_held; ++n_mapped)
      memory.map(place(n_mapped), pages_[static_cast<std::size_t>(n_mapped)].page);
  } catch (...) {
    while (n_mapped > 0) memory.unmap(place(--n_mapped));
    throw;
  }
  for (const HeldPage& held : pages_) memory.unmap(address(held.index));
  origin_page_ = first_page_;
}

void Tape::widen(std::int64_t n_pages) {
  PageMemory& memory = pool_->memory();
  const auto range_bytes = [this](std::int64_t n) {
    return static_cast<std::size_t>((n + 1) * layout_.page_bytes);
  };
  std::byte* const base = memory.reserve_range(range_bytes(n_pages));
  try {
    for (const HeldPage& held : pages_)
      memory.map(base + (held.index - origin_page_) * layout_.page_bytes, held.page);
  } catch (...) {
    memory.release_range(base, range_bytes(n_pages));
    throw;
  }
  memory.release_range(base_, range_bytes(range_pages_));
  base_ = base;
  range_pages_ = n_pages;
}

void Tape::drop(std::int64_t begin, std::int64_t end, Promise& promise) noexcept {
  const auto first = from(begin), last = from(end);
  for (auto held = first; held != last; ++held) {
    pool_->memory().unmap(address(held->index));
    promise.give_back(held->page);
  }
  pages_.erase(first, last);
}

void Tape::grow_to(std::int64_t end, Promise& promise) {
  if (layout_.is_inert()) return;
  const std::int64_t old_end = held().end;
  while (held().end < end) {
    PageId page = kNoPage;
    try {
      page = promise.take(use());
      append(page, false);
    } catch (...) {
      if (page != kNoPage) promise.give_back(page);
      release_from(old_end, promise);
      throw;
    }
  }
}

void Tape::release_before(std::int64_t position, Promise& promise) noexcept {
  const std::int64_t keep = std::min(position / layout_.page_positions(), end_page_);
  if (keep <= first_page_) return;
  drop(first_page_, keep, promise);
  first_page_ = keep;
}

void Tape::release_from(std::int64_t position, Promise& promise) noexcept {
  const std::int64_t keep = std::max(div_up(position, layout_.page_positions()), first_page_);
  if (keep >= end_page_) return;
  drop(keep, end_page_, promise);
  end_page_ = keep;
}

void Tape::forget(PositionRange range, Promise& promise) noexcept {
  const std::int64_t begin = div_up(range.begin, layout_.page_positions());
  const std::int64_t end = std::min(range.end / layout_.page_positions(), end_page_);
  if (begin < end) drop(begin, end, promise);
}

void Tape::make_private(std::int64_t position, Promise& promise) {
  const bool starts_page = position % layout_.page_positions() == 0;
  if (starts_page || n_shared_pages({position, position + 1}) == 0) return;
  const std::int64_t index = position / layout_.page_positions();
  PageMemory& memory = pool_->memory();
  const PageId copy = promise.take(use());
  std::byte* const aside = base_ + range_pages_ * layout_.page_bytes;
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
  const auto held = pages_.begin() + (from(index) - pages_.cbegin());
  promise.give_back(std::exchange(held->page, copy));
}

void Tape::fork_from(const Tape& source, std::int64_t length, Promise& promise) {
  if (layout_.is_inert()) return;
  const std::int64_t n_full = length / layout_.page_positions();
  origin_page_ = first_page_ = end_page_ = source.first_page_;
  const auto end = source.from(n_full);
  for (auto shared = source.pages_.begin(); shared != end; ++shared) {
    skip_to(shared->index);
    append(shared->page, true);
    pool_->add_ref(shared->page);
  }
  skip_to(std::max(n_full, first_page_));
  const std::int64_t n_blocks = div_up(length % layout_.page_positions(), layout_.block_positions);
  if (n_blocks == 0) return;
  grow_to(length, promise);
  pool_->memory().copy(address(n_full), source.address(n_full),
                       static_cast<std::size_t>(n_blocks * layout_.block_bytes));
}

void Tape::resume(PositionRange range, std::span<const PositionRange> holes, Promise& promise) {
  if (layout_.is_inert()) return;
  const std::int64_t page = layout_.page_positions();
  origin_page_ = first_page_ = end_page_ = range.begin / page;
  for (const PositionRange& hole : holes) {
    grow_to(std::min(round_up(hole.begin, page), range.end), promise);
    if (hole.end / page > end_page_) skip_to(hole.end / page);
  }
  grow_to(range.end, promise);
}

}  // namespace duplex
