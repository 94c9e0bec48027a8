// How hosts meet while devices are connected: words through shared memory, descriptors through
// sockets, between threads and between processes.
#include "parallel/group_rendezvous.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <catch2/catch.hpp>

#include "core/error.h"
#include "parallel/group_exchange.h"
#include "tests/parallel/ranks.h"

namespace duplex {
namespace {

using Catch::Contains;

std::vector<int> sockets_of(const RankSockets& sockets, const Group& group) {
  if (group.rank() > 0) return {sockets.worker(group.rank())};
  std::vector<int> all;
  for (int rank = 1; rank < group.n_ranks(); ++rank) all.push_back(sockets.leader(rank));
  return all;
}

struct Meeting {
  Meeting(const Group& group, const RankSockets& sockets)
      : words(group, group.memory_channel()),
        rendezvous(group, words, sockets_of(sockets, group)) {}
  GroupExchange words;
  GroupRendezvous rendezvous;
};

// Every rank shares a file that holds its number, twice; each writes its own into all of them.
// 0: all is as it should be.
int share_files(const Group& group, const RankSockets& sockets) {
  Meeting meeting(group, sockets);
  for (int round = 0; round < 2; ++round)
    for (int from = 0; from < group.n_ranks(); ++from) {
      const bool is_mine = from == group.rank();
      const int own = is_mine ? ::memfd_create("shared", MFD_CLOEXEC) : -1;
      const auto number = static_cast<char>('a' + from);
      if (is_mine && ::pwrite(own, &number, 1, 0) != 1) return 1;
      const int shared = meeting.rendezvous.share_descriptor(from, own);
      char found = 0;
      if (::pread(shared, &found, 1, 0) != 1 || found != number) return 2;
      if ((::fcntl(shared, F_GETFD) & FD_CLOEXEC) == 0) return 3;
      const auto mine = static_cast<char>('A' + group.rank());
      if (::pwrite(shared, &mine, 1, 1 + group.rank()) != 1) return 4;
      meeting.rendezvous.all_gather("");
      for (int rank = 0; rank < group.n_ranks(); ++rank)
        if (::pread(shared, &found, 1, 1 + rank) != 1 || found != 'A' + rank) return 5;
      meeting.rendezvous.all_gather("");
      ::close(shared);
    }
  return 0;
}

TEST_CASE("every rank hears what every rank says", "[threads][parallel]") {
  const int n_ranks = GENERATE(1, 2, 4);
  const Group group = Group::create(small_group(n_ranks));
  const RankSockets sockets(n_ranks);
  const auto ends = run_threads(group, [&](const Group& mine) {
    Meeting meeting(mine, sockets);
    for (std::size_t n = 0; n < 30; ++n) {
      const auto all =
          meeting.rendezvous.all_gather(std::string(n * 30, static_cast<char>('0' + mine.rank())));
      for (std::size_t rank = 0; rank < all.size(); ++rank)
        check(all[rank] == std::string(n * 30, static_cast<char>('0' + rank)), "heard ", all[rank]);
      check(std::ssize(all) == n_ranks, "found ", all.size());
    }
  });
  CHECK(ends == std::vector<std::string>(static_cast<std::size_t>(n_ranks)));
}

TEST_CASE("descriptors reach every rank, thread or process", "[threads][parallel]") {
  const int n_ranks = GENERATE(2, 4);
  const RankSockets sockets(n_ranks);
  SECTION("threads") {
    const Group group = Group::create(small_group(n_ranks));
    const auto ends = run_threads(group, [&](const Group& mine) {
      const int end = share_files(mine, sockets);
      check(end == 0, "ended with ", end);
    });
    CHECK(ends == std::vector<std::string>(static_cast<std::size_t>(n_ranks)));
  }
  SECTION("processes") {
    const Group group = Group::create(small_group(n_ranks));
    std::vector<pid_t> children;
    for (int rank = 1; rank < n_ranks; ++rank)
      children.push_back(start_process(
          group, rank, [&](const Group& mine) { return share_files(mine, sockets); }));
    CHECK(share_files(group, sockets) == 0);
    for (const pid_t child : children) CHECK(end_of(child) == 0);
  }
}

TEST_CASE("a rank that goes ends the wait for its descriptor", "[threads][parallel]") {
  GroupOptions options = small_group(3);
  const bool is_silent = GENERATE(false, true);
  options.time_out = milliseconds(is_silent ? 100 : 10'000);
  const Group group = Group::create(options);
  const RankSockets sockets(3);
  const auto begin = Clock::now();
  const auto ends = run_threads(group, [&](const Group& mine) {
    Meeting meeting(mine, sockets);
    if (mine.rank() == 1) {
      if (is_silent) return;
      mine.fail(1, "it was ended");
      return;
    }
    meeting.rendezvous.share_descriptor(1, -1);
  });
  CHECK(Clock::now() - begin < milliseconds(5000));
  for (const std::size_t rank : {0u, 2u})
    CHECK_THAT(ends[rank], Contains("rank 1 of 3 has failed: ") &&
                               Contains(is_silent ? "it sent no descriptor" : "it was ended"));
}

TEST_CASE("what a slab does not hold is refused", "[parallel]") {
  const Group group = Group::create(small_group(1));
  const RankSockets sockets(1);
  Meeting meeting(group, sockets);
  CHECK(meeting.rendezvous.all_gather(std::string(992, 'x'))[0].size() == 992);
  CHECK_THROWS_WITH(meeting.rendezvous.all_gather(std::string(993, 'x')),
                    Contains("expected at most 992 bytes, found 993"));
}

}  // namespace
}  // namespace duplex
