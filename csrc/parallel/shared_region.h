// One block of memory that processes share: a memory file, mapped whole.
//
// It starts as zeros and is backed at once, so that no wait for a page and no lack of memory comes
// later. Another process gets it by file descriptor (inherited, or sent over a socket).
#pragma once

#include <cstddef>

namespace duplex {

class SharedRegion {
 public:
  // At least `bytes` (> 0) of zeros. Throws CapacityError when the system refuses.
  static SharedRegion create(std::size_t bytes);
  // Maps what another process created and takes over the descriptor. Throws InvalidArgument for
  // what is no memory file, CapacityError when the system refuses.
  static SharedRegion attach(int fd);

  SharedRegion(SharedRegion&& other) noexcept;
  SharedRegion& operator=(SharedRegion&&) = delete;
  ~SharedRegion();

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  // Closed on exec: a parent clears the flag, or passes a duplicate, for the child it starts.
  int fd() const { return fd_; }

 private:
  SharedRegion(int fd, std::size_t bytes);

  int fd_;
  std::size_t bytes_;
  std::byte* data_ = nullptr;
};

}  // namespace duplex
