#include "memory.h"

#include <sys/mman.h>

#include <new>

namespace duplex_bench {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Ordinary small numbers whether they are read as float32, bfloat16 or integers: no denormals. By
// xorshift, since rows of a matrix must not resemble one another.
void fill(std::byte* data, std::size_t bytes) {
  auto* words = reinterpret_cast<std::uint32_t*>(data);
  std::uint32_t state = 2463534242u;
  for (std::size_t i = 0; i < bytes / 4; ++i) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    words[i] = (state & 0x83ff83ffu) | 0x3c003c00u;
  }
}

}  // namespace

HugeBuffer::HugeBuffer(std::size_t bytes)
    : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage), mapped_(bytes_ + kHugePage) {
  base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base_ == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(base_);
  data_ = reinterpret_cast<std::byte*>((address + kHugePage - 1) / kHugePage * kHugePage);
  madvise(data_, bytes_, MADV_HUGEPAGE);
  fill(data_, bytes_);
}

HugeBuffer::~HugeBuffer() { munmap(base_, mapped_); }

}  // namespace duplex_bench
