// The arithmetic of holds and promises. Where pages are mapped is the business of tape.cpp.
#include "sequence/page_pool.h"

#include "core/error.h"

namespace duplex {

Promise::Promise(PagePool& pool, std::int64_t growth_pages, std::int64_t window_pages)
    : pool_(&pool), growth_pages_(growth_pages), window_pages_(window_pages) {}

Promise::~Promise() {
  if (pool_ == nullptr) return;
  const PagePool::Lock lock(pool_->mutex_);
  pool_->n_promised_ -= growth_pages_ + window_pages_;
}

void Promise::swap(Promise& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(growth_pages_, other.growth_pages_);
  std::swap(window_pages_, other.window_pages_);
}

void Promise::extend(std::int64_t growth_pages, const char* why) {
  const PagePool::Lock lock(pool_->mutex_);
  pool_->charge(growth_pages, why);
  growth_pages_ += growth_pages;
}

void Promise::give_up(std::int64_t growth_pages) noexcept {
  const PagePool::Lock lock(pool_->mutex_);
  growth_pages_ -= growth_pages;
  pool_->n_promised_ -= growth_pages;
}

PageId Promise::take(PageUse use) {
  const PagePool::Lock lock(pool_->mutex_);
  if (use == PageUse::kWindow) return pool_->acquire(use);
  check<CapacityError>(growth_pages_ > 0,
                       "page pool: a sequence has taken all pages promised to it");
  const PageId page = pool_->acquire(use);
  give_up(1);
  return page;
}

void Promise::give_back(PageId page) noexcept {
  const PagePool::Lock lock(pool_->mutex_);
  const PageUse use = pool_->pages_[static_cast<std::size_t>(page)].use;
  if (!pool_->release(page) || use != PageUse::kGrowth) return;
  // The page was counted as used a moment ago, so promising it again always fits.
  ++growth_pages_;
  ++pool_->n_promised_;
}

PagePool::PagePool(std::unique_ptr<PageMemory> memory) : memory_(std::move(memory)) {
  const std::int64_t n_pages = memory_->n_pages();
  pages_.resize(static_cast<std::size_t>(n_pages));
  free_.reserve(static_cast<std::size_t>(n_pages));
  for (std::int64_t page = n_pages; page-- > 0;) free_.push_back(static_cast<PageId>(page));
}

Promise PagePool::promise(std::int64_t growth_pages, std::int64_t window_pages, const char* why) {
  charge(growth_pages + window_pages, why);
  return Promise(*this, growth_pages, window_pages);
}

std::int64_t PagePool::n_unpromised() const {
  const Lock lock(mutex_);
  return memory_->n_pages() - n_growth_used_ - n_promised_;
}

void PagePool::charge(std::int64_t n_pages, const char* why) {
  const Lock lock(mutex_);
  const auto bytes = static_cast<std::int64_t>(page_bytes());
  check<CapacityError>(n_pages <= n_unpromised(), why, ": needs ", n_pages * bytes, " bytes, ",
                       n_unpromised() * bytes, " of ", memory_->n_pages() * bytes,
                       " are not promised; close a session or create the engine with more memory");
  n_promised_ += n_pages;
}

PageId PagePool::acquire(PageUse use) {
  const Lock lock(mutex_);
  // Promises make this impossible; without the check a mistake there would corrupt a session.
  check<CapacityError>(!free_.empty(), "page pool: all ", memory_->n_pages(), " pages are in use");
  const PageId page = free_.back();
  free_.pop_back();
  pages_[static_cast<std::size_t>(page)] = {1, use};
  if (use == PageUse::kGrowth) ++n_growth_used_;
  return page;
}

void PagePool::add_ref(PageId page) noexcept {
  const Lock lock(mutex_);
  ++pages_[static_cast<std::size_t>(page)].n_holders;
}

bool PagePool::is_shared(PageId page) const {
  const Lock lock(mutex_);
  return pages_[static_cast<std::size_t>(page)].n_holders > 1;
}

bool PagePool::release(PageId page) noexcept {
  const Lock lock(mutex_);
  Page& entry = pages_[static_cast<std::size_t>(page)];
  if (--entry.n_holders > 0) return false;
  // Window pages stay warm: they are few, and the next sequence begins with them.
  if (entry.use == PageUse::kGrowth) {
    --n_growth_used_;
    memory_->discard(page);
  }
  free_.push_back(page);
  return true;
}

PoolStats PagePool::stats() const {
  const Lock lock(mutex_);
  PoolStats stats;
  stats.page_bytes = static_cast<std::int64_t>(page_bytes());
  stats.n_pages = memory_->n_pages();
  stats.n_free = static_cast<std::int64_t>(free_.size());
  stats.n_used = stats.n_pages - stats.n_free;
  stats.n_growth_used = n_growth_used_;
  stats.n_promised = n_promised_;
  return stats;
}

}  // namespace duplex
