// Zeroed anonymous memory on 2 MiB pages where the system gives them.
#include <sys/mman.h>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/page_memory.h"
#include "core/error.h"

namespace duplex {
namespace {

class MappedBuffer final : public Buffer {
 public:
  explicit MappedBuffer(std::size_t bytes) : bytes_(bytes) {
    // Large buffers are over-reserved to start on a huge page; small ones take what they need.
    const bool is_large = bytes >= kHugePageBytes;
    mapped_ = is_large ? bytes + kHugePageBytes : (bytes == 0 ? 1 : bytes);
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check<CapacityError>(base_ != MAP_FAILED, "memory: could not allocate ", bytes, " bytes");
    const auto address = reinterpret_cast<std::uintptr_t>(base_);
    data_ = is_large ? reinterpret_cast<void*>((address + kHugePageBytes - 1) / kHugePageBytes *
                                               kHugePageBytes)
                     : base_;
    if (is_large) madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: without it we are only slower
  }
  ~MappedBuffer() override { munmap(base_, mapped_); }
  MappedBuffer(const MappedBuffer&) = delete;
  MappedBuffer& operator=(const MappedBuffer&) = delete;

  void* data() const override { return data_; }
  std::size_t bytes() const override { return bytes_; }

 private:
  std::size_t bytes_;
  std::size_t mapped_;
  void* base_;
  void* data_;
};

}  // namespace

std::unique_ptr<Buffer> CpuBackend::allocate(std::size_t bytes) {
  return std::make_unique<MappedBuffer>(bytes);
}

std::unique_ptr<PageMemory> CpuBackend::create_page_memory(std::size_t page_bytes,
                                                           std::int64_t n_pages) {
  return create_cpu_page_memory(page_bytes, n_pages);
}

}  // namespace duplex
