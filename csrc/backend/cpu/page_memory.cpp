// PageMemory on Linux: one memory file (memfd) holds every page, and mmap places a page at any
// number of addresses. The file is sparse: a page costs memory from its first mapping on.
//
// Which page is free is not known here; see sequence/page_pool.h.
#include "backend/cpu/page_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/owner_process.h"
#include "core/types.h"

namespace duplex {
namespace {

// MADV_POPULATE_READ of Linux 5.14; older system headers do not name it. For a page that has its
// memory it takes a third of the time of MADV_POPULATE_WRITE, and writing needs no fault after it.
constexpr int kPopulateRead = 22;
// MADV_COLLAPSE of Linux 6.1: a huge page even where the system gives none to memory files by
// itself. Nine times as fast as what it replaces, a fault for every small page.
constexpr int kCollapse = 25;
constexpr int kReservedFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

class CpuPageMemory final : public PageMemory {
 public:
  CpuPageMemory(std::size_t page_bytes, std::int64_t n_pages)
      : page_bytes_(page_bytes), n_pages_(n_pages) {
    file_ = ::memfd_create("duplex_pages", MFD_CLOEXEC);
    if (file_ < 0) fail_system(errno, "page memory: cannot create a memory file");
    if (::ftruncate(file_, static_cast<off_t>(page_bytes) * n_pages) != 0) {
      const int error = errno;
      ::close(file_);
      fail_system(error, "page memory: cannot make a file of ", n_pages, " pages of ", page_bytes,
                  " bytes");
    }
  }
  ~CpuPageMemory() override { ::close(file_); }

  std::size_t page_bytes() const override { return page_bytes_; }
  std::int64_t n_pages() const override { return n_pages_; }

  std::byte* reserve_range(std::size_t bytes) override {
    // Huge pages need addresses that are a multiple of their size: reserve more, trim both ends.
    const std::size_t slack = wants_huge_pages() ? kHugePageBytes : 0;
    void* const mapped = ::mmap(nullptr, bytes + slack, PROT_NONE, kReservedFlags, -1, 0);
    if (mapped == MAP_FAILED) {
      fail_system(errno, "page memory: cannot reserve ", bytes,
                  " bytes of addresses; open fewer sessions or raise the limit of virtual memory");
    }
    auto* const start = static_cast<std::byte*>(mapped);
    if (slack == 0) return start;
    const std::size_t head =
        (kHugePageBytes - reinterpret_cast<std::uintptr_t>(start) % kHugePageBytes) %
        kHugePageBytes;
    if (head > 0) ::munmap(start, head);
    if (head < slack) ::munmap(start + head + bytes, slack - head);
    return start + head;
  }

  void release_range(std::byte* base, std::size_t bytes) noexcept override {
    ::munmap(base, bytes);
  }

  void map(std::byte* address, PageId page) override {
    share(address, page);
    if (wants_huge_pages()) make_huge(address);
    // Fault the page in now, so that no micro-turn waits for it. EINVAL: a kernel before 5.14,
    // where the first touch does it.
    if (::madvise(address, page_bytes_, kPopulateRead) != 0 && errno != EINVAL) {
      const int error = errno;
      unmap(address);
      fail_system(error, "page memory: cannot back page ", page, " with memory");
    }
  }

  // If mmap fails the address keeps what it had: Linux checks its limits before it unmaps.
  void share(std::byte* address, PageId page) override {
    const off_t offset = static_cast<off_t>(page_bytes_) * page;
    void* const mapped =
        ::mmap(address, page_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_, offset);
    if (mapped == MAP_FAILED) {
      fail_system(errno, "page memory: cannot map page ", page,
                  "; many small mappings may need a higher vm.max_map_count");
    }
    // Advice: where the kernel has no huge pages for memory files, small ones do.
    if (wants_huge_pages()) ::madvise(address, page_bytes_, MADV_HUGEPAGE);
  }

  // If the system refuses, the old mapping stays: harmless, nothing reads an unmapped address.
  void unmap(std::byte* address) noexcept override {
    ::mmap(address, page_bytes_, PROT_NONE, kReservedFlags | MAP_FIXED, -1, 0);
  }

  void copy(std::byte* destination, const std::byte* source, std::size_t bytes) override {
    std::memcpy(destination, source, bytes);
  }

  void read(void* host, const std::byte* source, std::size_t bytes) const override {
    std::memcpy(host, source, bytes);
  }

  void write(std::byte* destination, const void* host, std::size_t bytes) override {
    std::memcpy(destination, host, bytes);
  }

  void discard(PageId page) noexcept override {
    if (!owner_.is_here()) return;  // the page is still the parent's
    ::fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                static_cast<off_t>(page_bytes_) * page, static_cast<off_t>(page_bytes_));
  }

 private:
  // A huge page begins with a small one that has memory. Where there is none to be had, or the
  // kernel is older, small pages do.
  void make_huge(std::byte* address) const {
    for (std::size_t at = 0; at < page_bytes_; at += kHugePageBytes)
      if (::madvise(address + at, 1, kPopulateRead) != 0 ||
          ::madvise(address + at, kHugePageBytes, kCollapse) != 0)
        return;
  }
  bool wants_huge_pages() const { return page_bytes_ % kHugePageBytes == 0; }

  std::size_t page_bytes_;
  std::int64_t n_pages_;
  int file_ = -1;
  OwnerProcess owner_;
};

}  // namespace

std::unique_ptr<PageMemory> create_cpu_page_memory(std::size_t page_bytes, std::int64_t n_pages) {
  const auto system_page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  check(page_bytes > 0 && page_bytes % system_page == 0,
        "page_bytes: expected a positive multiple of the system page (", system_page,
        " bytes), found ", page_bytes);
  const std::int64_t most = std::min<std::int64_t>(
      std::numeric_limits<PageId>::max(),
      std::numeric_limits<off_t>::max() / static_cast<std::int64_t>(page_bytes));
  check(n_pages > 0 && n_pages <= most, "n_pages: expected 1 to ", most, ", found ", n_pages);
  return std::make_unique<CpuPageMemory>(page_bytes, n_pages);
}

}  // namespace duplex
