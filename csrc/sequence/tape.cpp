// Mapping, sharing and copying the pages of one tape.
#include "sequence/tape.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace duplex {

Tape::Tape(PagePool& pool, const TapeLayout& layout, std::int64_t first_positions)
    : pool_(&pool), layout_(layout) {
  if (layout_.is_inert() || is_ring()) return;
  range_pages_ = div_up(first_positions, layout_.page_positions());
  base_ = pool.memory().reserve_range(range_bytes(range_pages_));
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
  pool_->memory().release_range(base_, range_bytes(range_pages_));
  if (!is_ring())
    for (const HeldPage& held : pages_) pool_->release(held.page);
  for (const PageId page : ring_)
    if (page != kNoPage) pool_->release(page);
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
  std::swap(ring_, other.ring_);
  std::swap(fresh_, other.fresh_);
}

std::int64_t Tape::place_of_zero() const {
  if (!is_ring()) return -origin_page_;
  return ring_.empty() ? 0 : first_page_ % ring_size() - first_page_;
}

TapeView Tape::view() const {
  // Of position 0, which a window has long left: as a number, since nothing lies there.
  const auto offset = static_cast<std::uintptr_t>(place_of_zero() * layout_.page_bytes);
  auto* const base = reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(base_) + offset);
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

std::int64_t Tape::held_bytes() const {
  const std::int64_t n_pages =
      is_ring() ? std::ranges::count_if(ring_, [](PageId page) { return page != kNoPage; })
                : std::ssize(pages_);
  return n_pages * layout_.page_bytes;
}

TapeUsage Tape::usage() const {
  TapeUsage usage;
  usage.held_bytes = held_bytes();
  const auto count = [&](PageId page) {
    if (page != kNoPage && !pool_->is_shared(page)) usage.private_bytes += layout_.page_bytes;
  };
  if (is_ring())
    for (const PageId page : ring_) count(page);
  else
    for (const HeldPage& held : pages_) count(held.page);
  return usage;
}

std::int64_t Tape::n_shared_pages(PositionRange range) const {
  if (range.is_empty()) return 0;
  const auto end = from(div_up(range.end, layout_.page_positions()));
  return std::count_if(from(range.begin / layout_.page_positions()), end,
                       [this](const HeldPage& held) { return pool_->is_shared(held.page); });
}

template <class Place>
void Tape::take(Promise& promise, const Place& place) {
  const PageId page = promise.take(use());
  try {
    place(page);
  } catch (...) {
    promise.give_back(page);
    throw;
  }
}

void Tape::append(PageId page, bool is_shared) {
  if (end_page_ - origin_page_ == range_pages_) widen(2 * range_pages_);
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

void Tape::append_in_ring(Promise& promise) {
  const std::int64_t slot = end_page_ % ring_size();
  const PageId kept = ring_page(slot);
  if (kept == kNoPage || pool_->is_shared(kept)) {
    take(promise, [&](PageId page) { put(slot, page, false); });
    fresh_.push_back(slot);
  }
  pages_.push_back({end_page_, ring_page(slot)});
  ++end_page_;
}

void Tape::put(std::int64_t slot, PageId page, bool is_shared) {
  PageMemory& memory = pool_->memory();
  try {
    for (std::byte* const there : {place(slot), place(slot + ring_size())})
      is_shared ? memory.share(there, page) : memory.map(there, page);
  } catch (...) {
    empty(slot);
    throw;
  }
  hold(slot, page);
}

void Tape::empty(std::int64_t slot) noexcept {
  pool_->memory().unmap(place(slot));
  pool_->memory().unmap(place(slot + ring_size()));
  hold(slot, kNoPage);
}

void Tape::hold(std::int64_t slot, PageId page) noexcept {
  const PageId old = std::exchange(ring_page(slot), page);
  if (old != kNoPage) pool_->release(old);
}

// The pages before `page_index` that are not held yet are forgotten ones.
void Tape::skip_to(std::int64_t page_index) {
  std::int64_t n_pages = range_pages_;
  while (page_index - origin_page_ > n_pages) n_pages *= 2;
  if (n_pages > range_pages_) widen(n_pages);
  end_page_ = std::max(end_page_, page_index);
}

void Tape::widen(std::int64_t n_pages) {
  PageMemory& memory = pool_->memory();
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

// A ring of its own takes the pages over, those that are kept for later behind the others.
void Tape::widen_ring(std::int64_t n_slots) {
  Tape wide(*pool_, layout_, 0);
  wide.base_ = pool_->memory().reserve_range(range_bytes(2 * n_slots));
  wide.range_pages_ = 2 * n_slots;
  wide.ring_.assign(static_cast<std::size_t>(n_slots), kNoPage);
  wide.pages_.reserve(static_cast<std::size_t>(n_slots));
  wide.fresh_.reserve(static_cast<std::size_t>(n_slots));
  const auto take_over = [&](std::int64_t index, PageId page) {
    pool_->add_ref(page);  // until this tape lets go of it
    try {
      wide.put(index % n_slots, page, false);
    } catch (...) {
      pool_->release(page);
      throw;
    }
  };
  for (const HeldPage& held : pages_) take_over(held.index, held.page);
  std::int64_t next = end_page_;
  for (std::int64_t index = end_page_; index < first_page_ + ring_size(); ++index)
    if (const PageId kept = ring_page(index); kept != kNoPage) take_over(next++, kept);
  wide.pages_.assign(pages_.begin(), pages_.end());
  wide.first_page_ = first_page_;
  wide.end_page_ = end_page_;
  swap(wide);
}

void Tape::drop(std::int64_t begin, std::int64_t end, Promise& promise) noexcept {
  const auto first = from(begin), last = from(end);
  if (!is_ring())
    for (auto held = first; held != last; ++held) {
      pool_->memory().unmap(address(held->index));
      promise.give_back(held->page);
    }
  pages_.erase(first, last);
}

void Tape::grow_to(std::int64_t end, Promise& promise) {
  fresh_.clear();
  if (layout_.is_inert()) return;
  const std::int64_t old_end = held().end;
  const std::int64_t end_page = div_up(end, layout_.page_positions());
  try {
    if (is_ring()) {
      if (end_page - first_page_ > ring_size()) widen_ring(end_page - first_page_);
      while (end_page_ < end_page) append_in_ring(promise);
    } else {
      while (end_page_ < end_page) take(promise, [&](PageId page) { append(page, false); });
    }
  } catch (...) {
    ungrow(old_end, promise);
    throw;
  }
}

void Tape::ungrow(std::int64_t position, Promise& promise) noexcept {
  release_from(position, promise);
  for (const std::int64_t slot : fresh_) empty(slot);
  fresh_.clear();
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
  const auto held = pages_.begin() + (from(index) - pages_.cbegin());
  std::byte* const here = address(index);
  std::byte* const aside = place(range_pages_);
  // In a ring the page has a second place, which is not looked at now.
  std::byte* there = nullptr;
  if (is_ring()) {
    const std::int64_t slot = index % ring_size();
    there = place(here == place(slot) ? slot + ring_size() : slot);
  }
  bool is_replacing = false;
  try {
    memory.map(aside, copy);
    // All of it: the caller may fail after this call, and then the rows from `position` on stay.
    memory.copy(aside, here, memory.page_bytes());
    is_replacing = true;
    if (there != nullptr) memory.map(there, copy);
    memory.map(here, copy);  // backed already: this takes no memory
  } catch (...) {
    if (is_replacing) map_again({here, there}, held->page);
    memory.unmap(aside);
    promise.give_back(copy);
    throw;
  }
  memory.unmap(aside);
  if (is_ring()) ring_page(index) = copy;
  promise.give_back(std::exchange(held->page, copy));
}

// Other ranks and devices may leave nothing at a place that refused a page; the one that was there
// can be mapped there.
void Tape::map_again(std::initializer_list<std::byte*> places, PageId page) noexcept {
  for (std::byte* const each : places) {
    if (each == nullptr) continue;
    try {
      pool_->memory().map(each, page);
    } catch (const Error&) {  // nothing is lost where it still is
    }
  }
}

void Tape::fork_from(const Tape& source, std::int64_t length, Promise& promise) {
  if (layout_.is_inert()) return;
  const std::int64_t n_full = length / layout_.page_positions();
  origin_page_ = first_page_ = end_page_ = source.first_page_;
  if (is_ring() && source.ring_size() > 0) widen_ring(source.ring_size());
  const auto end = source.from(n_full);
  for (auto shared = source.pages_.begin(); shared != end; ++shared) {
    if (is_ring()) {
      put(shared->index % ring_size(), shared->page, true);
      pages_.push_back(*shared);
      end_page_ = shared->index + 1;
    } else {
      skip_to(shared->index);
      append(shared->page, true);
    }
    pool_->add_ref(shared->page);
  }
  if (!is_ring()) skip_to(std::max(n_full, first_page_));
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
    grow_to(hole.begin, promise);
    skip_to(hole.end / page);
  }
  grow_to(range.end, promise);
}

}  // namespace duplex
