// A tape: one address range, reserved once and backed page by page as a sequence grows.
//
// Kernels see plain memory: the address of a position is a base and an offset. At the end of the
// range the pages that are held are mapped again and the base moves: those of a tape with a window
// at the beginning of the same range, those of a tape that keeps everything in one twice as long.
// Pages can be shared with the tape of a fork; a shared page is never written, because a tape
// replaces it by a copy first (make_private). The tape does not know about commits, holes or
// limits: that is sequence/sequence.h.
#pragma once

#include <cstdint>
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
  std::int64_t held_bytes = 0;     // of all pages mapped, shared ones included
  std::int64_t private_bytes = 0;  // of the pages that nobody else holds
};

class Tape {
 public:
  // Reserves addresses for `range_positions`, backs none. Throws CapacityError.
  Tape(PagePool& pool, const TapeLayout& layout, std::int64_t range_positions);
  Tape(Tape&& other) noexcept;
  Tape& operator=(Tape&& other) noexcept;
  ~Tape();

  const TapeLayout& layout() const { return layout_; }
  TapeView view() const;
  // From the first page held to the end of the last; forgotten pages between are not mapped.
  PositionRange held() const;
  TapeUsage usage() const;
  std::int64_t n_pages() const;
  // Pages with a position of `range` that another tape holds too.
  std::int64_t n_shared_pages(PositionRange range) const;

  // Backs positions up to `end`; view() may be another then. Throws CapacityError, nothing changed.
  void grow_to(std::int64_t end, Promise& promise);
  // Lets go of the pages that lie wholly before / from / inside.
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

  std::byte* address(std::int64_t page_index) const {
    return base_ + (page_index - origin_page_) * layout_.page_bytes;
  }
  // The first page held at `page_index` or behind it.
  Pages::const_iterator from(std::int64_t page_index) const;
  PageUse use() const { return layout_.window > 0 ? PageUse::kWindow : PageUse::kGrowth; }
  void swap(Tape& other) noexcept;
  void append(PageId page, bool is_shared);
  void skip_to(std::int64_t page_index);
  void rebase();
  void widen(std::int64_t n_pages);
  // Lets go of the pages held in [begin, end).
  void drop(std::int64_t begin, std::int64_t end, Promise& promise) noexcept;

  PagePool* pool_ = nullptr;
  TapeLayout layout_;
  std::byte* base_ = nullptr;
  std::int64_t range_pages_ = 0;  // and one more behind them: a place to write a copy of a page
  std::int64_t origin_page_ = 0;  // the page whose place is the beginning of the range
  std::int64_t first_page_ = 0;
  std::int64_t end_page_ = 0;
  Pages pages_;  // ascending, in [first_page_, end_page_); the forgotten ones are missing
};

}  // namespace duplex
