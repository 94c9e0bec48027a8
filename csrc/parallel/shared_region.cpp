#include "parallel/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/types.h"

namespace duplex {
namespace {

// MADV_POPULATE_WRITE of Linux 5.14; older system headers do not name it.
constexpr int kPopulateWrite = 23;

}  // namespace

SharedRegion SharedRegion::create(std::size_t bytes) {
  check(bytes > 0, "shared memory: expected at least one byte, found 0");
  const int fd = ::memfd_create("duplex_ranks", MFD_CLOEXEC);
  if (fd < 0) fail_system(errno, "shared memory: cannot create a memory file");
  auto size = static_cast<std::int64_t>(bytes);
  if (bytes >= kHugePageBytes) size = round_up(size, std::int64_t{kHugePageBytes});
  if (::ftruncate(fd, size) != 0) {
    const int error = errno;
    ::close(fd);
    fail_system(error, "shared memory: cannot make a file of ", size, " bytes");
  }
  return SharedRegion(fd, static_cast<std::size_t>(size));
}

SharedRegion SharedRegion::attach(int fd) {
  struct stat status{};
  const int error = ::fstat(fd, &status) == 0 ? 0 : errno;
  check(error == 0, "shared memory: expected the descriptor of a memory file, found ", fd, ": ",
        std::strerror(error));
  check(S_ISREG(status.st_mode) && status.st_size > 0,
        "shared memory: expected the descriptor of a memory file, found another kind: ", fd);
  return SharedRegion(fd, static_cast<std::size_t>(status.st_size));
}

SharedRegion::SharedRegion(int fd, std::size_t bytes) : fd_(fd), bytes_(bytes) {
  void* const mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    ::close(fd);
    fail_system(error, "shared memory: cannot map ", bytes, " bytes");
  }
  data_ = static_cast<std::byte*>(mapped);
  // Advice: where the kernel has no huge pages for memory files, small ones do.
  if (bytes % kHugePageBytes == 0) ::madvise(mapped, bytes, MADV_HUGEPAGE);
  // EINVAL: a kernel before 5.14, where the first touch backs a page.
  if (::madvise(mapped, bytes, kPopulateWrite) != 0 && errno != EINVAL) {
    const int error = errno;
    ::munmap(mapped, bytes);
    ::close(fd);
    fail_system(error, "shared memory: cannot back ", bytes, " bytes with memory");
  }
}

SharedRegion::SharedRegion(SharedRegion&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      bytes_(other.bytes_),
      data_(std::exchange(other.data_, nullptr)) {}

SharedRegion::~SharedRegion() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace duplex
