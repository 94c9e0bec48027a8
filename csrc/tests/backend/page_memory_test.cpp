// CpuPageMemory: one page at several addresses, backing, discard and the sizes it refuses.
#include "backend/cpu/page_memory.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstdint>
#include <cstring>

#include "core/error.h"

namespace duplex {
namespace {

constexpr std::size_t kPage = 4096;

TEST_CASE("a page mapped twice is one memory") {
  const auto memory = create_cpu_page_memory(kPage, 4);
  std::byte* const first = memory->reserve_range(2 * kPage);
  std::byte* const second = memory->reserve_range(2 * kPage);
  memory->map(first + kPage, 3);
  memory->map(second, 3);
  std::memset(first + kPage, 7, kPage);
  CHECK(std::memcmp(first + kPage, second, kPage) == 0);

  memory->map(second + kPage, 0);
  memory->copy(second + kPage, second, kPage);
  std::memset(first + kPage, 8, kPage);
  CHECK(second[0] == std::byte{8});
  CHECK(second[kPage] == std::byte{7});

  memory->unmap(first + kPage);
  CHECK(second[1] == std::byte{8});
  memory->release_range(first, 2 * kPage);
  memory->release_range(second, 2 * kPage);
}

long faults_of_this_thread() {
  rusage usage{};
  ::getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_minflt;
}

// note: AddressSanitizer would look at its own memory, with faults of its own.
[[gnu::no_sanitize_address]] void touch(std::byte* data, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 4096)
    *const_cast<volatile std::byte*>(data + i) = std::byte{7};
}

TEST_CASE("a shared page is brought to its address by the first touch, a mapped one is there") {
  constexpr std::size_t kLarge = 64 * kPage;
  constexpr std::size_t kPages = 8;
  const auto memory = create_cpu_page_memory(kLarge, kPages);
  std::byte* const first = memory->reserve_range(kPages * kLarge);
  std::byte* const again = memory->reserve_range(kPages * kLarge);
  for (std::size_t i = 0; i < kPages; ++i) memory->map(first + i * kLarge, static_cast<PageId>(i));
  long before = faults_of_this_thread();
  touch(first, kPages * kLarge);
  CHECK(faults_of_this_thread() - before < 4);

  before = faults_of_this_thread();
  for (std::size_t i = 0; i < kPages; ++i)
    memory->share(again + i * kLarge, static_cast<PageId>(i));
  CHECK(faults_of_this_thread() - before < 4);
  CHECK(std::memcmp(first, again, kPages * kLarge) == 0);
  CHECK(faults_of_this_thread() - before >= static_cast<long>(kPages));
  memory->release_range(first, kPages * kLarge);
  memory->release_range(again, kPages * kLarge);
}

TEST_CASE("a discarded page is zero when it comes back") {
  const auto memory = create_cpu_page_memory(kPage, 1);
  std::byte* const base = memory->reserve_range(kPage);
  memory->map(base, 0);
  std::memset(base, 1, kPage);
  memory->unmap(base);
  memory->map(base, 0);
  CHECK(base[kPage - 1] == std::byte{1});
  memory->unmap(base);
  memory->discard(0);
  memory->map(base, 0);
  CHECK(base[kPage - 1] == std::byte{0});
  memory->release_range(base, kPage);
}

TEST_CASE("a fork discards no page of its parent") {
  const auto memory = create_cpu_page_memory(kPage, 1);
  std::byte* const base = memory->reserve_range(kPage);
  memory->map(base, 0);
  base[0] = std::byte{1};
  const pid_t child = ::fork();
  if (child == 0) {
    memory->discard(0);
    ::_exit(0);
  }
  REQUIRE(child > 0);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  CHECK(base[0] == std::byte{1});
  memory->release_range(base, kPage);
}

TEST_CASE("large pages lie on addresses that huge pages can back") {
  constexpr std::size_t kLarge = std::size_t{2} << 20;
  const auto memory = create_cpu_page_memory(kLarge, 2);
  std::byte* const small_first = memory->reserve_range(kLarge);
  std::byte* const base = memory->reserve_range(3 * kLarge);
  CHECK(reinterpret_cast<std::uintptr_t>(base) % kLarge == 0);
  memory->map(base + kLarge, 1);
  base[2 * kLarge - 1] = std::byte{5};
  memory->release_range(base, 3 * kLarge);
  memory->release_range(small_first, kLarge);
}

TEST_CASE("impossible sizes and impossible ranges are refused") {
  CHECK_THROWS_AS(create_cpu_page_memory(0, 1), InvalidArgument);
  CHECK_THROWS_AS(create_cpu_page_memory(1000, 1), InvalidArgument);
  CHECK_THROWS_AS(create_cpu_page_memory(kPage, 0), InvalidArgument);
  const auto memory = create_cpu_page_memory(kPage, 1);
  CHECK_THROWS_AS(memory->reserve_range(std::size_t{1} << 60), CapacityError);
}

}  // namespace
}  // namespace duplex
