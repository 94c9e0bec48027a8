// Commands of rank 0: all of them, in order, and in the right order between lanes and page memory.
#include "parallel/commands.h"

#include <time.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstring>

#include "core/error.h"
#include "parallel/group_exchange.h"
#include "tests/parallel/ranks.h"

namespace duplex {
namespace {

using Catch::Matchers::Contains;

template <class T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

// Command i of a stream: its bytes, of a length up to `longest`, follow from i.
std::vector<std::byte> command(std::uint32_t i, std::size_t longest) {
  std::mt19937 random(i);
  std::vector<std::byte> bytes(random() % 8 == 0 ? random() % (longest + 1) : random() % 100);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

void send_many(const Group& group, int lane, std::uint32_t n) {
  CommandSender sender(group);
  std::mt19937 random(1);
  for (std::uint32_t i = 0; i < n; ++i) {
    const auto bytes = command(i, group.max_command_bytes());
    const std::span<const std::byte> all(bytes);
    const std::size_t cut = random() % (bytes.size() + 1);
    sender.send_pass(lane, {all.first(cut), all.subspan(cut)});
    random_delay(random);
  }
}

bool receive_many(const Group& group, int lane, std::uint32_t n) {
  CommandReceiver receiver(group, lane);
  std::mt19937 random(static_cast<std::uint32_t>(group.rank()));
  for (std::uint32_t i = 0; i < n; ++i) {
    const auto found = receiver.receive();
    random_delay(random);
    const auto expected = command(i, group.max_command_bytes());
    if (!std::ranges::equal(found, expected)) return false;
    receiver.done();
  }
  return true;
}

TEST_CASE("every worker gets every command, whole and in order", "[threads][parallel]") {
  const int n_ranks = GENERATE(2, 4);
  const std::size_t longest = GENERATE(4000, 100'000);  // of a ring of 64 KiB and of two commands
  GroupOptions options = small_group(n_ranks);
  options.max_command_bytes = longest;
  options.spin = std::chrono::microseconds(10);
  const Group group = Group::create(options);
  constexpr std::uint32_t kCommands = 2000;
  std::atomic<int> n_right{0};
  const auto ends = run_threads(group, [&](const Group& mine) {
    if (mine.rank() == 0) return send_many(mine, 1, kCommands);
    if (receive_many(mine, 1, kCommands)) ++n_right;
  });
  CHECK(ends == std::vector<std::string>(static_cast<std::size_t>(n_ranks)));
  CHECK(n_right == n_ranks - 1);
}

TEST_CASE("commands reach other processes", "[threads][parallel]") {
  const Group group = Group::create(small_group(4));
  std::vector<pid_t> children;
  for (int rank = 1; rank < 4; ++rank) {
    children.push_back(start_process(
        group, rank, [](const Group& mine) { return receive_many(mine, 0, 1000) ? 0 : 1; }));
  }
  send_many(group, 0, 1000);
  for (const pid_t child : children) CHECK(end_of(child) == 0);
}

// A worker's page memory in the small: plain memory, so that ThreadSanitizer sees a wrong order.
struct Pages {
  struct Page {
    bool is_mapped = false;
    std::uint32_t value = 0;
  };
  std::vector<Page> pages = std::vector<Page>(8);
  std::atomic<int> n_wrong{0};
};

constexpr std::uint32_t kStop = ~std::uint32_t{0};

void serve_memory(const Group& group, Pages& pages) {
  CommandReceiver receiver(group, group.memory_channel());
  std::mt19937 random(static_cast<std::uint32_t>(group.rank()));
  for (;;) {
    std::uint32_t word = 0;
    std::memcpy(&word, receiver.receive().data(), sizeof(word));
    random_delay(random);
    if (word != kStop) {
      Pages::Page& page = pages.pages[word / 2];
      if (page.is_mapped == (word % 2 == 1)) ++pages.n_wrong;
      page.is_mapped = word % 2 == 1;
    }
    receiver.done();
    if (word == kStop) return;
  }
}

void serve_lane(const Group& group, int lane, Pages& pages) {
  CommandReceiver receiver(group, lane);
  GroupExchange exchange(group, lane);
  std::mt19937 random(static_cast<std::uint32_t>(8 * group.rank() + lane));
  for (;;) {
    std::uint32_t word = 0;
    std::memcpy(&word, receiver.receive().data(), sizeof(word));
    if (word != kStop) {
      Pages::Page& page = pages.pages[word];
      if (!page.is_mapped) ++pages.n_wrong;
      random_delay(random);
      exchange.meet(8);
      random_delay(random);  // rank 0 may have ended the pass by now
      ++page.value;
      if (!page.is_mapped) ++pages.n_wrong;
    }
    receiver.done();
    if (word == kStop) return;
  }
}

// A lane of rank 0: maps a page, uses it in passes, unmaps it.
void drive_lane(CommandSender& sender, const Group& group, int lane) {
  GroupExchange exchange(group, lane);
  std::mt19937 random(static_cast<std::uint32_t>(lane));
  for (int i = 0; i < 300; ++i) {
    const auto page =
        static_cast<std::uint32_t>(4 * lane) + static_cast<std::uint32_t>(random() % 4);
    sender.send_memory({bytes_of(2 * page + 1)});
    for (auto n = random() % 3; n > 0; --n) {
      random_delay(random);
      sender.send_pass(lane, {bytes_of(page)});
      exchange.meet(8);
      sender.end_pass(lane);
    }
    random_delay(random);
    sender.send_memory({bytes_of(2 * page)});
  }
  sender.send_pass(lane, {bytes_of(kStop)});
}

TEST_CASE("no pass runs before its pages are mapped or after they are gone",
          "[threads][parallel]") {
  const int n_ranks = GENERATE(2, 3);
  GroupOptions options = small_group(n_ranks);
  options.spin = std::chrono::microseconds(20);
  const Group group = Group::create(options);
  std::vector<Pages> pages_of(static_cast<std::size_t>(n_ranks));
  const auto ends = run_threads(group, [&](const Group& mine) {
    if (mine.rank() == 0) {
      CommandSender sender(mine);
      std::jthread other = start_thread([&] { drive_lane(sender, mine, 1); });
      drive_lane(sender, mine, 0);
      other.join();
      sender.send_memory({bytes_of(kStop)});
      return;
    }
    Pages& pages = pages_of[static_cast<std::size_t>(mine.rank())];
    std::jthread memory = start_thread([&] { serve_memory(mine, pages); });
    std::jthread other = start_thread([&] { serve_lane(mine, 1, pages); });
    serve_lane(mine, 0, pages);
    memory.join();
    other.join();
  });
  CHECK(ends == std::vector<std::string>(static_cast<std::size_t>(n_ranks)));
  CHECK(group.failed_rank() == -1);
  for (const Pages& pages : pages_of) CHECK(pages.n_wrong == 0);
}

TEST_CASE("a pass of one lane that is still running holds up no other", "[threads][parallel]") {
  const Group group = Group::create(small_group(2));
  CommandSender sender(group);
  sender.send_pass(1, {});  // has not ended on rank 0
  sender.send_memory({bytes_of(1)});
  sender.send_pass(0, {});
  CommandReceiver background(group.as(1), 1);
  background.receive();
  CommandReceiver memory(group.as(1), 2);
  CHECK(memory.receive().size() == sizeof(int));
  memory.done();
  CommandReceiver interaction(group.as(1), 0);
  CHECK(interaction.receive().empty());
}

TEST_CASE("a worker that takes no commands is named", "[threads][parallel]") {
  GroupOptions options = small_group(3);
  options.time_out = milliseconds(300);
  const Group group = Group::create(options);
  const auto ends = run_threads(group, [&](const Group& mine) {
    if (mine.rank() == 0) send_many(mine, 0, 5000);
    if (mine.rank() == 1) receive_many(mine, 0, 5000);
  });
  for (const std::size_t rank : {0u, 1u}) {
    CHECK_THAT(ends[rank], Contains("rank 2 of 3 has failed: it took no commands of lane 0 in 300 "
                                    "ms (waiting: rank 0;"));
  }
}

TEST_CASE("a worker that does not carry out what comes first is named", "[threads][parallel]") {
  GroupOptions options = small_group(2);
  options.time_out = milliseconds(30);
  const Group group = Group::create(options);
  CommandSender sender(group);
  sender.send_memory({bytes_of(1)});
  sender.send_pass(0, {});
  CommandReceiver lane(group.as(1), 0);
  CHECK_THROWS_WITH(lane.receive(), Contains("rank 1 of 2 has failed: it did not carry out the "
                                             "commands of page memory in 30 ms"));
  CHECK_THROWS_AS(sender.send_pass(0, {}), RankFailed);
}

TEST_CASE("workers without work sleep, and wake when the group is over", "[threads][parallel]") {
  GroupOptions options = small_group(3);
  options.time_out = milliseconds(10);  // waiting for a command does not end
  const Group group = Group::create(options);
  std::atomic<int> n_idle{0};
  const auto ends = run_threads(group, [&](const Group& mine) {
    if (mine.rank() == 0) {
      std::this_thread::sleep_for(milliseconds(300));
      return mine.fail(0, "it was closed");
    }
    try {
      CommandReceiver(mine, mine.rank()).receive();
    } catch (const RankFailed&) {
      timespec used{};
      ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
      if (used.tv_sec == 0 && used.tv_nsec < 3'000'000) ++n_idle;
      throw;
    }
  });
  CHECK(n_idle == 2);  // less than 1 % of a core
  for (const std::size_t rank : {1u, 2u})
    CHECK_THAT(ends[rank], Contains("rank 0 of 3 has failed: it was closed"));
}

TEST_CASE("wrong uses of the command rings are refused", "[parallel]") {
  const Group group = Group::create(small_group(2));
  CHECK_THROWS_AS(CommandSender(group.as(1)), InvalidArgument);
  CHECK_THROWS_AS(CommandReceiver(group, 0), InvalidArgument);
  CHECK_THROWS_AS(CommandReceiver(group.as(1), 3), InvalidArgument);
  CommandSender sender(group);
  const std::vector<std::byte> too_long(group.max_command_bytes() + 1);
  CHECK_THROWS_WITH(sender.send_memory({too_long}), Contains("at most 4000 bytes, found 4001"));
  CHECK_THROWS_AS(sender.send_pass(2, {}), InvalidArgument);
  CHECK_THROWS_AS(sender.end_pass(-1), InvalidArgument);
  sender.send_pass(0, {bytes_of(1)});
  sender.send_pass(0, {bytes_of(2)});
  CommandReceiver receiver(group.as(1), 0);
  receiver.receive();
  CHECK_THROWS_WITH(receiver.receive(), Contains("expected done() before the next receive()"));
}

}  // namespace
}  // namespace duplex
