// Meetings through shared memory: ranks as threads and as processes, with random delays, late, dead
// and missing ranks. All interleavings of the same steps: exchange_protocol_test.cpp.
#include "parallel/group_exchange.h"

#include <signal.h>
#include <time.h>

#include <catch2/catch.hpp>
#include <cstring>

#include "core/error.h"
#include "tests/parallel/ranks.h"

namespace duplex {
namespace {

using Catch::Matchers::Contains;

std::uint64_t word_of(std::uint64_t meeting, int rank, std::size_t i) {
  std::uint64_t x = meeting * 1'000'003 + static_cast<std::uint64_t>(rank) * 7919 + i;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  return x ^ (x >> 27);
}

void fill(void* slab, std::size_t bytes, std::uint64_t meeting, int rank) {
  auto* const words = static_cast<std::uint64_t*>(slab);
  for (std::size_t i = 0; i < bytes / 8; ++i) words[i] = word_of(meeting, rank, i);
}

bool holds(const void* slab, std::size_t bytes, std::uint64_t meeting, int rank) {
  const auto* const words = static_cast<const std::uint64_t*>(slab);
  for (std::size_t i = 0; i < bytes / 8; ++i)
    if (words[i] != word_of(meeting, rank, i)) return false;
  return true;
}

// Meets `n` times with random delays; false when a slab held anything else than it should.
bool meet_often(const Group& group, int channel, std::uint64_t n, std::uint32_t seed) {
  GroupExchange exchange(group, channel);
  std::mt19937 random(seed * 64 + static_cast<std::uint32_t>(group.rank()));
  for (std::uint64_t meeting = 0; meeting < n; ++meeting) {
    random_delay(random);
    fill(exchange.mine(), exchange.slab_bytes(), meeting, exchange.rank());
    random_delay(random);
    const auto slabs = exchange.meet(exchange.slab_bytes());
    random_delay(random);
    for (int i = 0; i < exchange.size(); ++i)
      if (!holds(slabs[static_cast<std::size_t>(i)], exchange.slab_bytes(), meeting, i))
        return false;
  }
  return true;
}

double cpu_ms() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) / 1e6;
}

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

TEST_CASE("threads that meet read what all of them have filled", "[threads][parallel]") {
  const int n_ranks = GENERATE(1, 2, 4, 8);
  const int spin_us = GENERATE(0, 20);
  GroupOptions options = small_group(n_ranks);
  options.spin = std::chrono::microseconds(spin_us);
  const Group group = Group::create(options);
  std::atomic<int> n_right{0};
  const auto ends = run_threads(group, [&](const Group& mine) {
    if (meet_often(mine, 0, 2000, static_cast<std::uint32_t>(spin_us))) ++n_right;
  });
  CHECK(ends == std::vector<std::string>(static_cast<std::size_t>(n_ranks)));
  CHECK(n_right == n_ranks);
}

TEST_CASE("the channels of a group do not touch each other", "[threads][parallel]") {
  const Group group = Group::create(small_group(2));
  std::atomic<int> n_right{0};
  const auto ends = run_threads(group, [&](const Group& mine) {
    std::vector<std::jthread> threads;
    for (int channel = 0; channel < mine.n_channels(); ++channel) {
      threads.push_back(start_thread([&, channel] {
        if (meet_often(mine, channel, 1000, static_cast<std::uint32_t>(channel))) ++n_right;
      }));
    }
    for (std::jthread& thread : threads) thread.join();
  });
  CHECK(group.failed_rank() == -1);
  CHECK(n_right == 2 * group.n_channels());
}

TEST_CASE("processes that meet read what all of them have filled", "[threads][parallel]") {
  const int n_ranks = GENERATE(2, 4);
  GroupOptions options = small_group(n_ranks);
  options.slab_bytes = 64 << 10;
  const Group group = Group::create(options);
  std::vector<pid_t> children;
  for (int rank = 1; rank < n_ranks; ++rank) {
    children.push_back(start_process(
        group, rank, [](const Group& mine) { return meet_often(mine, 1, 1000, 5) ? 0 : 1; }));
  }
  CHECK(meet_often(group, 1, 1000, 5));
  for (const pid_t child : children) CHECK(end_of(child) == 0);
}

TEST_CASE("meetings are counted beyond 32 bits", "[threads][parallel]") {
  const Group group = Group::create(small_group(2));
  for (int rank = 0; rank < 2; ++rank)
    group.channel(0).arrivals[rank].count = (std::uint64_t{1} << 32) - 100;
  std::atomic<int> n_right{0};
  run_threads(group, [&](const Group& mine) {
    if (meet_often(mine, 0, 200, 1)) ++n_right;
  });
  CHECK(n_right == 2);
  CHECK(group.channel(0).arrivals[0].count == (std::uint64_t{1} << 32) + 100);
}

TEST_CASE("a late rank is waited for asleep", "[threads][parallel]") {
  const Group group = Group::create(small_group(4));
  std::atomic<int> n_idle{0};
  const auto ends = run_threads(group, [&](const Group& mine) {
    GroupExchange exchange(mine, 0);
    for (int i = 0; i < 3; ++i) {
      if (mine.rank() == 2) std::this_thread::sleep_for(milliseconds(60));
      const double before = cpu_ms();
      exchange.meet(8);
      if (mine.rank() != 2 && cpu_ms() - before < 20) ++n_idle;
    }
  });
  CHECK(ends == std::vector<std::string>(4));
  CHECK(n_idle == 9);
}

TEST_CASE("a rank that does not come is named to all who wait", "[threads][parallel]") {
  GroupOptions options = small_group(3);
  options.time_out = milliseconds(200);
  const Group group = Group::create(options);
  const auto start = Clock::now();
  const auto ends = run_threads(group, [&](const Group& mine) {
    GroupExchange exchange(mine, mine.memory_channel());
    exchange.meet(8);
    exchange.meet(8);
    if (mine.rank() != 1) exchange.meet(8);
  });
  const double waited_ms = ms_since(start);
  CHECK(waited_ms >= 200);
  CHECK(waited_ms < 2000);
  CHECK(ends[1].empty());
  for (const std::size_t rank : {0u, 2u}) {
    CHECK_THAT(ends[rank], Contains("rank 1 of 3 has failed") && Contains("page memory") &&
                               Contains("in 200 ms") && Contains("expected 3, seen 2"));
  }
  CHECK(group.failed_rank() == 1);
  GroupExchange other(group, 0);  // the whole group is over, in every channel
  CHECK_THROWS_AS(other.meet(8), RankFailed);
}

TEST_CASE("a failure said by anyone ends every wait at once", "[threads][parallel]") {
  const int spin_us = GENERATE(0, 10'000'000);  // asleep, and awake
  GroupOptions options = small_group(4);
  options.spin = std::chrono::microseconds(spin_us);
  const Group group = Group::create(options);
  Clock::time_point failed_at;
  const auto ends = run_threads(group, [&](const Group& mine) {
    if (mine.rank() == 3) {
      std::this_thread::sleep_for(milliseconds(20));
      failed_at = Clock::now();
      mine.fail(3, "the first reason");
      mine.fail(2, "another reason");
      return;
    }
    GroupExchange(mine, mine.rank() % 2).meet(8);
  });
  CHECK(ms_since(failed_at) < 500);
  for (const std::size_t rank : {0u, 1u, 2u})
    CHECK_THAT(ends[rank], Contains("rank 3 of 4 has failed: the first reason"));
  CHECK(group.failure() == "the first reason");
}

// What the parent of worker processes does: a thread that sees one end and says so.
TEST_CASE("a killed process ends the meetings of all others", "[threads][parallel]") {
  const int n_ranks = GENERATE(2, 4);
  std::mt19937 random(11);
  for (int round = 0; round < 10; ++round) {
    const Group group = Group::create(small_group(n_ranks));
    std::vector<pid_t> children;
    for (int rank = 1; rank < n_ranks; ++rank) {
      children.push_back(start_process(group, rank, [](const Group& mine) {
        try {
          meet_often(mine, 0, ~std::uint64_t{0}, 3);
        } catch (const RankFailed&) {
          return 7;
        }
        return 1;
      }));
    }
    const std::size_t victim = random() % children.size();
    Clock::time_point killed_at;
    int end = 0;
    std::jthread watcher([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 20'000));
      killed_at = Clock::now();
      ::kill(children[victim], SIGKILL);
      end = end_of(children[victim]);
      group.fail(static_cast<int>(victim) + 1, "its process was killed");
    });
    CHECK_THROWS_AS(meet_often(group, 0, ~std::uint64_t{0}, 3), RankFailed);
    for (std::size_t i = 0; i < children.size(); ++i)
      if (i != victim) CHECK(end_of(children[i]) == 7);
    watcher.join();
    CHECK(end == -SIGKILL);
    CHECK(ms_since(killed_at) < 1000);
  }
}

}  // namespace
}  // namespace duplex
