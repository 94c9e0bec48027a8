// Physical pages of one size and the address ranges they are mapped into.
//
// A page can be mapped at several addresses at once: that is how a fork shares a prefix. Which
// page is free or shared is not known here; sequence/page_pool.h keeps the books.
#pragma once

#include <cstddef>
#include <cstdint>

namespace duplex {

using PageId = std::int32_t;
inline constexpr PageId kNoPage = -1;

class PageMemory {
 public:
  virtual ~PageMemory() = default;
  PageMemory() = default;
  PageMemory(const PageMemory&) = delete;
  PageMemory& operator=(const PageMemory&) = delete;

  virtual std::size_t page_bytes() const = 0;
  virtual std::int64_t n_pages() const = 0;

  // Reserves addresses without backing; throws CapacityError when the system refuses.
  virtual std::byte* reserve_range(std::size_t bytes) = 0;
  virtual void release_range(std::byte* base, std::size_t bytes) noexcept = 0;
  // `address` lies on a page boundary of a reserved range. Touching an unmapped page faults. Where
  // it throws, what was mapped there may be gone.
  virtual void map(std::byte* address, PageId page) = 0;
  // As map, for a page that is mapped elsewhere too; its memory may be brought to this address when
  // it is first touched.
  virtual void share(std::byte* address, PageId page) { map(address, page); }
  virtual void unmap(std::byte* address) noexcept = 0;
  virtual void copy(std::byte* destination, const std::byte* source, std::size_t bytes) = 0;
  // To the host's memory, after all that was asked for before.
  virtual void read(void* host, const std::byte* source, std::size_t bytes) const = 0;
  // From the host's memory, before all that is asked for afterwards.
  virtual void write(std::byte* destination, const void* host, std::size_t bytes) = 0;
  // In a tensor-parallel group an address has a content on each rank; read and write are of rank 0.
  virtual int n_ranks() const { return 1; }
  virtual void read_rank(int /*rank*/, void* host, const std::byte* source, std::size_t bytes) {
    read(host, source, bytes);
  }
  virtual void write_rank(int /*rank*/, std::byte* destination, const void* host,
                          std::size_t bytes) {
    write(destination, host, bytes);
  }
  // The page's memory may go back to the system; its content is lost.
  virtual void discard(PageId page) noexcept = 0;
};

}  // namespace duplex
