// The set-up of multicast memory against a driver that checks the order of calls, and kernels on
// the memory that it gives.
#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <functional>
#include <optional>
#include <thread>

#include "tests/simt/fake_driver.h"
#include "tests/simt/ranks.h"

namespace duplex::simt_tests {
namespace {

using cuda::MulticastMemory;
using Strings = std::vector<std::string>;

// The ranks of a group as threads, each with a driver, and what its set-up gave or threw.
struct Setup {
  explicit Setup(int n) : meetings(n), memories(static_cast<std::size_t>(n)) {
    errors.resize(memories.size());
    for (int rank = 0; rank < n; ++rank) {
      drivers.push_back(std::make_unique<FakeDriver>(fabric));
      drivers.back()->number = rank;
      ranks.push_back(std::make_unique<ThreadRendezvous>(meetings, rank));
    }
  }
  void run(std::size_t bytes, int not_wanted_by = -1) {
    std::vector<std::thread> threads;
    for (std::size_t r = 0; r < drivers.size(); ++r)
      threads.emplace_back([this, r, bytes, not_wanted_by] {
        const int rank = static_cast<int>(r);
        try {
          memories[r].emplace(*drivers[r], *ranks[r],
                              cuda::SharedMemoryOptions{rank, bytes, rank != not_wanted_by});
        } catch (const Error& error) {
          errors[r] = error.what();
        }
      });
    for (std::thread& thread : threads) thread.join();
  }
  void take_down() {
    for (auto& memory : memories) memory.reset();
  }
  bool is_empty() const {
    return fabric.objects.empty() && std::all_of(drivers.begin(), drivers.end(),
                                                 [](auto& driver) { return driver->is_empty(); });
  }
  // All ranks have memory, or none has.
  bool is_alike() const {
    for (std::size_t r = 0; r < memories.size(); ++r) {
      if (memories[r].has_value() != memories[0].has_value() || errors[r] != errors[0])
        return false;
      if (memories[r] && memories[r]->why_not() != memories[0]->why_not()) return false;
      if (memories[r] && (memories[r]->multicast() == nullptr) == memories[r]->why_not().empty())
        return false;
    }
    return true;
  }

  FakeFabric fabric;
  Meetings meetings;
  std::vector<std::unique_ptr<FakeDriver>> drivers;
  std::vector<std::unique_ptr<ThreadRendezvous>> ranks;
  std::vector<std::optional<MulticastMemory>> memories;
  std::vector<std::string> errors;
};

TEST_CASE("multicast memory is set up and taken down in the driver's order", "[simt][groups]") {
  Setup setup(3);
  setup.run(100'000);
  REQUIRE(setup.is_alike());
  CHECK(setup.memories[0]->why_not().empty());
  CHECK(setup.memories[0]->bytes() == 2 * FakeFabric::kMulticastGranularity);
  const Strings own = {
      "abilities", "memory granularity", "multicast granularity", "create memory", "reserve",
      "map",       "allow access"};
  const Strings peers[] = {{"share", "import", "reserve", "map", "allow access", "import",
                            "reserve", "map", "allow access"},
                           {"import", "reserve", "map", "allow access", "share", "import",
                            "reserve", "map", "allow access"}};
  const Strings object[] = {{"create multicast", "share"}, {"import"}};
  const Strings bound = {"add device", "bind", "reserve", "map", "allow access"};
  setup.take_down();
  const Strings down = {"unmap", "free", "unbind",  "release", "unmap", "free",   "release",
                        "unmap", "free", "release", "unmap",   "free",  "release"};
  for (std::size_t rank : {0u, 1u}) {
    Strings expected = own;
    for (const Strings& more : {peers[rank], object[rank], bound, down})
      expected.insert(expected.end(), more.begin(), more.end());
    CHECK(setup.drivers[rank]->calls == expected);
  }
  CHECK(setup.is_empty());
}

TEST_CASE("ranks without multicast reach each other all the same, and say why", "[simt][groups]") {
  struct Case {
    std::function<void(Setup&)> change;
    int not_wanted_by;
    const char* why_not;
  };
  const std::vector<Case> cases = {
      {[](Setup& s) { s.drivers[1]->has.has_multicast = false; }, -1, "rank 1 has no multicast"},
      {[](Setup&) {}, 2, "not wanted by rank 2"},
      {[](Setup& s) { s.drivers[2]->fails_at = 18; }, -1, "rank 2: bind failed"}};
  for (const Case& of : cases) {
    Setup setup(3);
    of.change(setup);
    setup.run(1000, of.not_wanted_by);
    REQUIRE(setup.is_alike());
    REQUIRE(setup.memories[0].has_value());
    CHECK_THAT(setup.memories[0]->why_not(), Catch::Contains(of.why_not));
    for (std::size_t r = 0; r < 3; ++r) setup.memories[r]->own()[7] = static_cast<std::byte>(r);
    for (auto& memory : setup.memories)
      for (int r = 0; r < 3; ++r) CHECK(memory->peer(r)[7] == static_cast<std::byte>(r));
    setup.take_down();
    CHECK(setup.is_empty());
  }
}

TEST_CASE("GPUs that cannot share memory are named", "[simt][groups]") {
  Setup setup(2);
  setup.drivers[1]->has = {true, false, false};
  setup.run(1000);
  CHECK(setup.is_alike());
  CHECK_THAT(setup.errors[0], Catch::Contains("found neither on rank 1 and on rank 0"));
  Setup fabric(2);
  for (auto& driver : fabric.drivers) driver->has = {true, false, true};
  fabric.run(1000);
  CHECK(fabric.is_alike());
  CHECK(fabric.memories[0]->multicast() != nullptr);
  fabric.take_down();
  CHECK(fabric.is_empty());
}

TEST_CASE("whichever call fails, all ranks end alike and nothing is left", "[simt][groups]") {
  const bool is_fabric = GENERATE(false, true);
  const std::size_t victim = GENERATE(0u, 1u);
  int n_without = 0, n_failed = 0, n_calls = 100;
  for (int call = 0; call < n_calls; ++call) {
    Setup setup(3);
    for (auto& driver : setup.drivers) driver->has = {true, !is_fabric, is_fabric};
    setup.drivers[victim]->fails_at = call;
    setup.run(1000);
    CAPTURE(call, setup.errors[0]);
    CHECK(setup.is_alike());
    const bool has_failed = setup.drivers[victim]->n_calls > call;
    if (!has_failed) n_calls = 0;  // that was the last one
    if (!setup.memories[0])
      ++n_failed;
    else if (has_failed) {
      ++n_without;
      CHECK_THAT(setup.memories[0]->why_not(),
                 Catch::StartsWith("rank " + std::to_string(victim) + ": ") ||
                     Catch::Contains("shared nothing"));
    }
    // The first rank that has something to say is heard, and rank 0 knows what failed.
    if (victim == 0 && has_failed)
      CHECK_THAT(setup.memories[0] ? setup.memories[0]->why_not() : setup.errors[0],
                 Catch::Contains("rank 0: ") && Catch::Contains(" failed"));
    setup.take_down();
    CHECK(setup.is_empty());
  }
  CHECK(n_failed >= 15);
  CHECK(n_without >= 6);
}

TEST_CASE("a rank that goes in any meeting leaves nothing of the others", "[simt][groups]") {
  const bool is_fabric = GENERATE(false, true);
  for (int meeting = 0, n_meetings = 100; meeting < n_meetings; ++meeting) {
    Setup setup(3);
    for (auto& driver : setup.drivers) driver->has = {true, !is_fabric, is_fabric};
    setup.meetings.ends_at = meeting;
    setup.run(1000);
    CAPTURE(meeting);
    CHECK(setup.is_alike());
    n_meetings = std::min(n_meetings, setup.memories[0] ? meeting : n_meetings);
    CHECK((setup.memories[0] || setup.errors[0] == "a rank is gone"));
    setup.take_down();
    CHECK(setup.is_empty());
    CHECK(meeting < 40);  // so many there are not
  }
}

TEST_CASE("ranks that meet in their memory wait for the last", "[simt][groups]") {
  constexpr int kRanks = 3;
  Setup setup(kRanks);
  setup.run(1000);
  std::atomic<int> n_come = 0, n_early = 0;
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r)
    threads.emplace_back([&, r] {
      std::this_thread::sleep_for(std::chrono::milliseconds(10 * r));
      ++n_come;
      setup.memories[static_cast<std::size_t>(r)]->meet();
      n_early += n_come < kRanks ? 1 : 0;
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(n_early == 0);
  setup.take_down();
}

TEST_CASE("cuda: all_reduce on memory of a set-up", "[simt][groups][races]") {
  if (!has_fused_cpu()) return;
  constexpr int kRanks = 4;
  const bool wants_multicast = GENERATE(true, false);
  const Scene scene{kRanks, 40, 4, {3, 1}, {5, 0}, DType::kF32};
  const std::int64_t buffer =
      cuda::all_reduce_bytes(kRanks, scene.total(), scene.width, Exchanges::kOneShot);
  Setup setup(kRanks);
  setup.run(static_cast<std::size_t>(cuda::lane_bytes(buffer)), wants_multicast ? -1 : 0);
  Lane lane(kRanks, buffer, false);
  std::vector<std::byte*> members;
  for (auto& memory : setup.memories) members.push_back(memory->own());
  std::vector<std::unique_ptr<simt::Multicast>> objects;
  World world = world_of({scene});
  std::vector<std::function<void()>> programs;
  for (std::size_t r = 0; r < kRanks; ++r) {
    MulticastMemory& memory = *setup.memories[r];
    memory.fill(static_cast<std::size_t>(cuda::kPadBytes), std::byte{0xff},
                memory.bytes() - static_cast<std::size_t>(cuda::kPadBytes));
    if (wants_multicast)
      objects.push_back(
          std::make_unique<simt::Multicast>(members, memory.bytes(), memory.multicast()));
    Group& group = lane.groups[r];
    group.own = memory.own();
    group.multicast = memory.multicast();
    for (int peer = 0; peer < kRanks; ++peer) group.peers[peer] = memory.peer(peer);
    programs.emplace_back([&, r] {
      for (const Exchanges how : {Exchanges::kOneShot, Exchanges::kTwoShot, Exchanges::kOneShot}) {
        world.place(0, r).reset();
        world.place(0, r).all_reduce(lane.groups[r], how);
      }
    });
  }
  simt::run_streams(programs, 9);
  for (auto& place : world.places) CHECK(place->result() == world.expected[0]);
  objects.clear();
  setup.take_down();
  CHECK(setup.is_empty());
}

}  // namespace
}  // namespace duplex::simt_tests
