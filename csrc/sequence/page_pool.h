// The books of one PageMemory: which pages are free, how many tapes hold each, and what is
// promised.
//
// Admission is by promise. An open sequence holds a promise for every page it may ever need, so
// growth inside it cannot fail because of another session:
//     growth pages in use + growth pages promised + window pages promised <= all pages.
// A *growth* page holds positions that are kept (global layers) and is counted once however many
// forks share it; a *window* page belongs to a tape that drops what it no longer reads, and each
// sequence is charged for the most it can hold.
//
// Sequences of both lanes share a pool, so every call is safe from any thread. Who decides by what
// it sees here, as a sequence does that pays again for pages it shares, holds the mutex meanwhile.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "backend/page_memory.h"

namespace duplex {

class PagePool;

enum class PageUse : std::uint8_t { kGrowth, kWindow };

struct PoolStats {
  std::int64_t page_bytes = 0;
  std::int64_t n_pages = 0;
  std::int64_t n_used = 0;  // held by at least one tape
  std::int64_t n_free = 0;
  std::int64_t n_growth_used = 0;  // of n_used
  std::int64_t n_promised = 0;     // growth still to take, and every window in full
};

// The right of one sequence to take pages. Its destructor gives up what was not taken.
class Promise {
 public:
  Promise() = default;
  Promise(Promise&& other) noexcept { swap(other); }
  Promise& operator=(Promise&& other) noexcept {
    Promise taken(std::move(other));
    swap(taken);
    return *this;
  }
  ~Promise();

  std::int64_t growth_pages() const { return growth_pages_; }  // left
  std::int64_t window_pages() const { return window_pages_; }  // in full

  // Asks for more growth. Throws CapacityError (`why` begins the message), nothing changed.
  void extend(std::int64_t growth_pages, const char* why);
  void give_up(std::int64_t growth_pages) noexcept;

  // A page with one holder. Its content is arbitrary: kernels never read what was not written.
  PageId take(PageUse use);
  // Lets go of one hold on a page; the last hold on a growth page turns into growth again.
  void give_back(PageId page) noexcept;

 private:
  friend class PagePool;
  Promise(PagePool& pool, std::int64_t growth_pages, std::int64_t window_pages);
  void swap(Promise& other) noexcept;

  PagePool* pool_ = nullptr;
  std::int64_t growth_pages_ = 0;
  std::int64_t window_pages_ = 0;
};

// Outlives its promises and the tapes that hold its pages.
class PagePool {
 public:
  explicit PagePool(std::unique_ptr<PageMemory> memory);
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  using Lock = std::lock_guard<std::recursive_mutex>;
  std::recursive_mutex& mutex() const { return mutex_; }
  PageMemory& memory() const { return *memory_; }
  std::size_t page_bytes() const { return memory_->page_bytes(); }

  // Throws CapacityError (`why` begins the message) when that many pages are not to be had.
  Promise promise(std::int64_t growth_pages, std::int64_t window_pages, const char* why);
  std::int64_t n_unpromised() const;

  void add_ref(PageId page) noexcept;
  // True when that was the last hold and the page is free now.
  bool release(PageId page) noexcept;
  bool is_shared(PageId page) const;

  PoolStats stats() const;

 private:
  friend class Promise;
  struct Page {
    std::int32_t n_holders = 0;
    PageUse use = PageUse::kGrowth;
  };

  void charge(std::int64_t n_pages, const char* why);
  PageId acquire(PageUse use);

  mutable std::recursive_mutex mutex_;
  std::unique_ptr<PageMemory> memory_;
  std::vector<Page> pages_;   // (n_pages)
  std::vector<PageId> free_;  // a stack, with room for every page: release never allocates
  std::int64_t n_growth_used_ = 0;
  std::int64_t n_promised_ = 0;
};

}  // namespace duplex
