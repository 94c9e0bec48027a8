// The shared region and the group in it: who may join, what is refused.
#include "parallel/group.h"

#include <fcntl.h>

#include <catch2/catch.hpp>
#include <cstring>

#include "core/error.h"
#include "parallel/layout.h"
#include "tests/parallel/ranks.h"

namespace duplex {
namespace {

using Catch::Matchers::Contains;

TEST_CASE("a region is one memory in every process that maps it", "[parallel]") {
  const SharedRegion region = SharedRegion::create(5 << 20);
  CHECK(region.bytes() >= 5 << 20);
  bool is_zero = true;
  for (std::size_t i = 0; i < region.bytes(); ++i) is_zero &= region.data()[i] == std::byte{0};
  CHECK(is_zero);
  const pid_t child = ::fork();
  if (child == 0) {
    const SharedRegion same = SharedRegion::attach(::dup(region.fd()));
    std::memset(same.data(), 9, same.bytes());
    ::_exit(same.bytes() == region.bytes() ? 0 : 1);
  }
  CHECK(end_of(child) == 0);
  CHECK(region.data()[0] == std::byte{9});
  CHECK(region.data()[region.bytes() - 1] == std::byte{9});
}

TEST_CASE("what is no memory file is not mapped", "[parallel]") {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  CHECK_THROWS_AS(SharedRegion::attach(ends[0]), InvalidArgument);
  CHECK_THROWS_AS(SharedRegion::attach(-1), InvalidArgument);
  CHECK(::fcntl(ends[0], F_GETFD) >= 0);  // what was refused is still the caller's
  ::close(ends[0]);
  ::close(ends[1]);
  CHECK_THROWS_AS(SharedRegion::create(0), InvalidArgument);
  CHECK_THROWS_AS(SharedRegion::create(std::size_t{1} << 62), CapacityError);
}

TEST_CASE("a group is joined by descriptor, and all ranks see its sizes", "[parallel]") {
  GroupOptions options = small_group(3);
  options.time_out = milliseconds(77);
  const Group group = Group::create(options);
  const Group other = Group::join(::dup(group.fd()), 2);
  CHECK(other.rank() == 2);
  CHECK(other.n_ranks() == 3);
  CHECK(other.n_channels() == 3);
  CHECK(other.memory_channel() == 2);
  CHECK(other.slab_bytes() == options.slab_bytes);
  CHECK(other.max_command_bytes() == options.max_command_bytes);
  CHECK(other.time_out() == milliseconds(77));
  CHECK(other.failed_rank() == -1);
  CHECK(other.failure().empty());
  CHECK_NOTHROW(other.check_alive());
  group.fail(1, "out of memory");
  CHECK(other.failed_rank() == 1);
  CHECK_THROWS_WITH(other.check_alive(), Contains("rank 1 of 3 has failed: out of memory"));
}

TEST_CASE("the parts of a group do not overlap", "[parallel]") {
  GroupOptions options = small_group(4);
  options.slab_bytes = 5000;
  const Group group = Group::create(options);
  const std::byte* end = nullptr;
  for (int i = 0; i < group.n_channels(); ++i) {
    const GroupChannel part = group.channel(i);
    const auto* const flags = reinterpret_cast<const std::byte*>(part.arrivals);
    CHECK(flags >= end);
    CHECK(part.ring == flags + 9 * sizeof(Flag));
    CHECK(part.slabs >= part.ring + part.ring_bytes);
    CHECK(part.slab(3, 1) == part.slabs + 7 * part.slab_stride);
    CHECK(part.slab_stride == 8192);
    end = part.slabs + 8 * part.slab_stride;
  }
  const std::byte* const first = group.channel(0).ring - 9 * sizeof(Flag);
  CHECK(static_cast<std::size_t>(end - first) < group.region_bytes());
}

TEST_CASE("options and ranks that make no group are refused by name", "[parallel]") {
  GroupOptions options = small_group(0);
  CHECK_THROWS_WITH(Group::create(options), Contains("n_ranks: expected 1 to 64, found 0"));
  options = small_group(2);
  options.n_lanes = 7;
  CHECK_THROWS_WITH(Group::create(options), Contains("n_lanes: expected 1 to 6, found 7"));
  options = small_group(2);
  options.slab_bytes = 0;
  CHECK_THROWS_WITH(Group::create(options), Contains("slab_bytes"));
  options = small_group(2);
  options.max_command_bytes = 0;
  CHECK_THROWS_WITH(Group::create(options), Contains("max_command_bytes"));
  options = small_group(2);
  options.time_out = milliseconds(0);
  CHECK_THROWS_WITH(Group::create(options), Contains("time_out"));

  const Group group = Group::create(small_group(2));
  CHECK_THROWS_WITH(group.as(2), Contains("rank: expected 0 to 1, found 2"));
  CHECK_THROWS_WITH(Group::join(::dup(group.fd()), -1), Contains("found -1"));
  CHECK_THROWS_AS(group.channel(3), InvalidArgument);
  const SharedRegion strange = SharedRegion::create(1 << 20);
  CHECK_THROWS_WITH(Group::join(::dup(strange.fd()), 1), Contains("made by this build"));
}

}  // namespace
}  // namespace duplex
