// A tape: one address range, reserved once and backed page by page as a sequence grows.
//
// Kernels see plain memory: the address of a position is a base and an offset. A tape that keeps
// everything moves to a range twice as long when its range ends. A tape with a window is a ring:
// page i lies at place i % n and again at that + n, so a window of up to n pages is in one piece
// wherever it begins, and a page that falls behind it becomes a later one without a call of the
// system. Pages can be shared with the tape of a fork; a shared page is never written, because a
// tape replaces it first, by a copy (make_private) or, in a ring, by an empty one. The tape does
// not know about commits, holes or limits: that is sequence/sequence.h.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "backend/op_args.h"
#include "core/types.h"
#include "sequence/page_pool.h"

namespace duplex {

struct TapeLayout {
  std::int64_t block_positions = 1;
  std::int64_t block_bytes = 0;  // 0 = the model has no such layers: the tape stays empty
  std::int64_t blocks_per_page = 1;
  std::int64_t page_bytes = 0;
  std::int64_t window = 0;  // positions that stay readable behind the newest; 0 = all

  bool is_inert() const { return block_bytes == 0; }
  std::int64_t page_positions() const { return blocks_per_page * block_positions; }
};

struct TapeUsage {
  std::int64_t held_bytes = 0;     // of all pages mapped, also shared ones and those kept for later
  std::int64_t private_bytes = 0;  // of the pages that nobody else holds
};

class Tape {
 public:
  // Without a window: reserves addresses for `first_positions`. Backs none. Throws CapacityError.
  Tape(PagePool& pool, const TapeLayout& layout, std::int64_t first_positions);
  Tape(Tape&& other) noexcept;
  Tape& operator=(Tape&& other) noexcept;
  ~Tape();

  const TapeLayout& layout() const { return layout_; }
  TapeView view() const;
  // From the first page held to the end of the last; forgotten pages between are not mapped.
  PositionRange held() const;
  TapeUsage usage() const;
  std::int64_t held_bytes() const;
  // Pages with a position of `range` that another tape holds too.
  std::int64_t n_shared_pages(PositionRange range) const;

  // Backs positions up to `end`; view() may be another then. Throws CapacityError, nothing changed.
  void grow_to(std::int64_t end, Promise& promise);
  // Takes the last grow_to back, which found `position` as the end of what was backed.
  void ungrow(std::int64_t position, Promise& promise) noexcept;
  // Lets go of the pages that lie wholly before / from / inside. A ring keeps them for later.
  void release_before(std::int64_t position, Promise& promise) noexcept;
  void release_from(std::int64_t position, Promise& promise) noexcept;
  void forget(PositionRange range, Promise& promise) noexcept;
  // Lets this tape write on from `position`: where its page is shared and holds earlier positions,
  // a copy takes its place. Throws CapacityError, nothing changed.
  void make_private(std::int64_t position, Promise& promise);
  // Fills this empty tape with the first `length` positions of `source`: full pages are shared, the
  // unfinished one is copied. After an exception the tape is only good for destruction.
  void fork_from(const Tape& source, std::int64_t length, Promise& promise);
  // Backs the pages of this empty tape that hold positions of `range`, without those that lie
  // wholly inside a hole. After an exception the tape is only good for destruction.
  void resume(PositionRange range, std::span<const PositionRange> holes, Promise& promise);

 private:
  struct HeldPage {
    std::int64_t index = 0;  // in the tape
    PageId page = kNoPage;
  };
  using Pages = std::vector<HeldPage>;

  bool is_ring() const { return layout_.window > 0; }
  std::int64_t ring_size() const { return std::ssize(ring_); }
  std::size_t range_bytes(std::int64_t n_pages) const {
    return static_cast<std::size_t>((n_pages + 1) * layout_.page_bytes);
  }
  std::byte* place(std::int64_t i) const { return base_ + i * layout_.page_bytes; }
  // The place that page 0 would have.
  std::int64_t place_of_zero() const;
  std::byte* address(std::int64_t page_index) const { return place(place_of_zero() + page_index); }
  PageId& ring_page(std::int64_t page_index) {
    return ring_[static_cast<std::size_t>(page_index % ring_size())];
  }
  // The first page held at `page_index` or behind it.
  Pages::const_iterator from(std::int64_t page_index) const;
  PageUse use() const { return is_ring() ? PageUse::kWindow : PageUse::kGrowth; }
  void swap(Tape& other) noexcept;
  // place(page) for a new page, which is given back if that throws.
  template <class Place>
  void take(Promise& promise, const Place& place);
  void append(PageId page, bool is_shared);
  // The next page of a ring, of which there is one already or a new one is taken.
  void append_in_ring(Promise& promise);
  // Maps a page at both places of a slot, in place of what is there.
  void put(std::int64_t slot, PageId page, bool is_shared);
  void empty(std::int64_t slot) noexcept;
  // Lets go of what the slot held before.
  void hold(std::int64_t slot, PageId page) noexcept;
  void map_again(std::initializer_list<std::byte*> places, PageId page) noexcept;
  void skip_to(std::int64_t page_index);
  // A longer range; the pages that are held move there.
  void widen(std::int64_t n_pages);
  void widen_ring(std::int64_t n_slots);
  // Lets go of the pages held in [begin, end).
  void drop(std::int64_t begin, std::int64_t end, Promise& promise) noexcept;

  PagePool* pool_ = nullptr;
  TapeLayout layout_;
  std::byte* base_ = nullptr;
  std::int64_t range_pages_ = 0;  // and one more behind them: a place to write a copy of a page
  std::int64_t origin_page_ = 0;  // without a window: the page at the beginning of the range
  std::int64_t first_page_ = 0;
  std::int64_t end_page_ = 0;
  Pages pages_;  // ascending, in [first_page_, end_page_); the forgotten ones are missing
  std::vector<PageId> ring_;  // by slot: what is mapped there, in the window or kept for later
  std::vector<std::int64_t> fresh_;  // slots that the last grow_to filled
};

}  // namespace duplex
