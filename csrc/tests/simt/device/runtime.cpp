#include "device/runtime.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "backend/cpu/page_memory.h"
#include "core/error.h"

namespace duplex::cuda {
namespace {

constexpr std::size_t kRingBytes = std::size_t{4} << 20;  // of the real one
constexpr auto kAlign = std::align_val_t{256};            // that of cudaMalloc

// Of no bytes, memcpy still wants pointers that are none.
void copy_bytes(void* destination, const void* source, std::size_t bytes) {
  if (bytes > 0) std::memcpy(destination, source, bytes);
}

}  // namespace

void* Runtime::allocate(std::size_t bytes) {
  void* const memory = ::operator new(bytes, kAlign, std::nothrow);
  check<CapacityError>(memory != nullptr, "memory: could not allocate ", bytes, " bytes on ",
                       device_name_);
  std::memset(memory, 0, bytes);
  return memory;
}

void Runtime::release(void* memory) noexcept { ::operator delete(memory, kAlign); }

std::unique_ptr<PageMemory> Runtime::create_page_memory(std::size_t page_bytes,
                                                        std::int64_t n_pages) {
  return create_cpu_page_memory(page_bytes, n_pages);
}

void Runtime::write(void* device, const void* host, std::size_t bytes) {
  copy_bytes(device, host, bytes);
}

void Runtime::read(void* host, const void* device, std::size_t bytes) {
  copy_bytes(host, device, bytes);
}

void Runtime::copy(void* destination, const void* source, std::size_t bytes) {
  copy_bytes(destination, source, bytes);
}

// A piece of its own for every call, wiped as soon as the real ring might have reused its place:
// a piece that does not fit behind the others there begins at the front, so after half a ring.
void* Runtime::stage(const void* host, std::size_t bytes) {
  check<CapacityError>(bytes <= kRingBytes / 2, "cuda: expected at most ", kRingBytes / 2,
                       " bytes of input in one piece, found ", bytes,
                       "; give the engine a smaller max_batch_rows");
  while (!staged_.empty() && staged_bytes_ + bytes > kRingBytes / 2) {
    std::fill(staged_.front().begin(), staged_.front().end(), std::byte{0xff});
    staged_bytes_ -= staged_.front().size();
    staged_.pop_front();
  }
  staged_bytes_ += bytes;
  std::vector<std::byte>& piece = staged_.emplace_back(bytes);
  copy_bytes(piece.data(), host, bytes);
  return piece.data();
}

std::unique_ptr<Record> Runtime::record(const std::function<void()>& work) {
  auto record = std::make_unique<Record>();
  recording_ = record.get();
  try {
    work();
  } catch (...) {
    recording_ = nullptr;
    throw;
  }
  recording_ = nullptr;
  return record;
}

void Runtime::play(const Record& record) {
  for (const auto& launch : record.launches) launch();
}

}  // namespace duplex::cuda
