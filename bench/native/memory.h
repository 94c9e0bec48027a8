// Memory of the benchmarks: filled, never moved, on 2 MiB pages where the system gives them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace duplex_bench {

class HugeBuffer {
 public:
  explicit HugeBuffer(std::size_t bytes);  // throws std::bad_alloc
  ~HugeBuffer();
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_;
  std::size_t mapped_;
  void* base_;
  std::byte* data_;
};

}  // namespace duplex_bench
