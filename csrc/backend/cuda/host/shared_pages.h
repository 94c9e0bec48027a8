// The pages that the lanes of one GPU share: mapping them, and their bytes.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_set>

#include "backend/page_memory.h"
#include "host/lanes.h"

namespace duplex::cuda {

// What is done to pages outside a pass has a stream of its own and lies between everything. An
// address loses its page when no lane can be at work there any more.
class SharedPages final : public PageMemory {
 public:
  SharedPages(std::shared_ptr<Lanes> lanes, Runtime& beside, std::size_t page_bytes,
              std::int64_t n_pages);

  std::size_t page_bytes() const override { return page_bytes_; }
  std::int64_t n_pages() const override { return n_pages_; }

  std::byte* reserve_range(std::size_t bytes) override { return pages_->reserve(bytes); }
  void release_range(std::byte* base, std::size_t bytes) noexcept override;
  void map(std::byte* address, PageId page) override;
  void unmap(std::byte* address) noexcept override;
  void copy(std::byte* destination, const std::byte* source, std::size_t bytes) override;
  void read(void* host, const std::byte* source, std::size_t bytes) const override;
  void write(std::byte* destination, const void* host, std::size_t bytes) override;
  // The page stays with the engine: to take it back from the driver could fail.
  void discard(PageId) noexcept override {}

 private:
  void wait() noexcept;

  std::shared_ptr<Lanes> lanes_;
  std::unique_ptr<Runtime> stream_;
  std::unique_ptr<DevicePages> pages_;
  std::size_t page_bytes_;
  std::int64_t n_pages_;
  std::mutex mutex_;  // guards mapped_; lanes map their sequences' pages at the same time
  std::unordered_set<std::byte*> mapped_;
};

}  // namespace duplex::cuda
