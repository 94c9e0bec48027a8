#include "host/shared_pages.h"

#include <iterator>
#include <limits>
#include <utility>

#include "core/error.h"

namespace duplex::cuda {

SharedPages::SharedPages(std::shared_ptr<Lanes> lanes, Runtime& beside, std::size_t page_bytes,
                         std::int64_t n_pages)
    : lanes_(std::move(lanes)), page_bytes_(page_bytes), n_pages_(n_pages) {
  const std::size_t granularity = beside.page_granularity();
  check(page_bytes > 0 && page_bytes % granularity == 0,
        "page_bytes: expected a positive multiple of ", granularity, " bytes, found ", page_bytes);
  check(n_pages > 0 && n_pages <= std::numeric_limits<PageId>::max(), "n_pages: expected 1 to ",
        std::numeric_limits<PageId>::max(), ", found ", n_pages);
  pages_ = beside.create_pages(page_bytes, n_pages);
  stream_ = std::make_unique<Runtime>(beside, LaneKind::kInteraction);
}

// Where no lane is left, stream_ may still be at work.
void SharedPages::wait() noexcept {
  try {
    lanes_->synchronize();
    stream_->synchronize();
  } catch (...) {  // a failed kernel is reported by the next call that can throw
  }
}

void SharedPages::release_range(std::byte* base, std::size_t bytes) noexcept {
  wait();
  const std::lock_guard lock(mutex_);
  for (auto at = mapped_.begin(); at != mapped_.end();) {
    const bool is_inside = *at >= base && *at < base + bytes;
    if (is_inside) pages_->unmap(*at);
    at = is_inside ? mapped_.erase(at) : std::next(at);
  }
  pages_->free(base, bytes);
}

void SharedPages::map(std::byte* address, PageId page) {
  unmap(address);
  const std::lock_guard lock(mutex_);
  mapped_.reserve(mapped_.size() + 1);
  pages_->map(address, page);
  mapped_.insert(address);
}

void SharedPages::unmap(std::byte* address) noexcept {
  std::unique_lock lock(mutex_);
  if (mapped_.erase(address) == 0) return;
  lock.unlock();
  wait();
  pages_->unmap(address);
}

void SharedPages::copy(std::byte* destination, const std::byte* source, std::size_t bytes) {
  lanes_->put_between(*stream_, [&] { stream_->copy(destination, source, bytes); });
}

void SharedPages::read(void* host, const std::byte* source, std::size_t bytes) const {
  lanes_->put_behind_all(*stream_);
  stream_->read(host, source, bytes);
}

void SharedPages::write(std::byte* destination, const void* host, std::size_t bytes) {
  lanes_->put_between(*stream_, [&] { stream_->write(destination, host, bytes); });
}

}  // namespace duplex::cuda
