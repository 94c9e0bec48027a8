// Ranks that share no memory: meetings, commands and their order, and the end of a rank, through a
// transport of the test. That of torch.distributed: python_tests/parallel.
#include <catch2/catch.hpp>
#include <cstring>

#include "core/error.h"
#include "parallel/commands.h"
#include "parallel/group_exchange.h"
#include "tests/parallel/mailboxes.h"
#include "tests/parallel/ranks.h"

namespace duplex {
namespace {

using Catch::Matchers::Contains;

// Ranks of one group, each with a region of its own.
struct Apart {
  explicit Apart(const GroupOptions& options) {
    const auto boxes = std::make_shared<Mailboxes>();
    for (int rank = 0; rank < options.n_ranks; ++rank) {
      transports.push_back(std::make_shared<MailTransport>(boxes, rank, options.n_ranks));
      groups.push_back(Group::apart(options, rank, transports.back()));
    }
  }
  std::vector<std::string> run(const std::function<void(Group)>& run_rank) const {
    return run_threads(groups[0], [&](const Group& mine) {
      run_rank(groups[static_cast<std::size_t>(mine.rank())]);
    });
  }
  std::vector<std::shared_ptr<MailTransport>> transports;
  std::vector<Group> groups;
};

std::byte filling(int rank, int meeting) { return static_cast<std::byte>(17 * rank + meeting); }

TEST_CASE("ranks without common memory read what all have filled", "[threads][parallel]") {
  const int n_ranks = GENERATE(2, 4);
  const Apart apart(small_group(n_ranks));
  std::atomic<int> n_right{0};
  const auto ends = apart.run([&](const Group& mine) {
    GroupExchange exchange(mine, 1);
    std::mt19937 random(static_cast<std::uint32_t>(mine.rank()));
    bool right = true;
    for (int meeting = 0; meeting < 300; ++meeting) {
      const auto bytes = static_cast<std::size_t>(1 + meeting * 3 % 1000);  // alike on all ranks
      std::memset(exchange.mine(), std::to_integer<int>(filling(mine.rank(), meeting)), bytes);
      random_delay(random);
      const auto slabs = exchange.meet(bytes);
      // What is filled for the next meeting does not touch what all are reading.
      std::memset(exchange.mine(), 0xff, exchange.slab_bytes());
      for (int rank = 0; rank < n_ranks; ++rank) {
        const auto* slab = static_cast<const std::byte*>(slabs[static_cast<std::size_t>(rank)]);
        right =
            right && slab[0] == filling(rank, meeting) && slab[bytes - 1] == filling(rank, meeting);
      }
    }
    n_right += right;
  });
  CHECK(ends == std::vector<std::string>(static_cast<std::size_t>(n_ranks)));
  CHECK(n_right == n_ranks);
  CHECK_THROWS_WITH(GroupExchange(apart.groups[0], 0).meet(1001), Contains("at most 1000"));
}

TEST_CASE("commands without common memory keep the order of the channels", "[threads][parallel]") {
  const Apart apart(small_group(3));
  constexpr std::uint32_t kRounds = 200;
  std::atomic<std::uint32_t> memory_done[3] = {}, passes_done[3] = {};
  std::atomic<bool> in_order{true};
  const auto number = [](std::span<const std::byte> bytes) {
    std::uint32_t value = 0;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  };
  const auto ends = apart.run([&](const Group& mine) {
    if (mine.rank() == 0) {
      CommandSender sender(mine);
      // The longest one too: it fills what a worker keeps for it.
      const std::vector<std::byte> rest(mine.max_command_bytes() - sizeof(std::uint32_t));
      for (std::uint32_t i = 0; i < kRounds; ++i) {
        const auto bytes = std::as_bytes(std::span(&i, 1));
        sender.send_memory({bytes});
        sender.send_pass(0, {bytes, std::span(rest).first(i % 7 == 0 ? rest.size() : i)});
        sender.end_pass(0);
      }
      return;
    }
    const auto rank = static_cast<std::size_t>(mine.rank());
    auto memory = start_thread([&] {
      CommandReceiver receiver(mine, mine.memory_channel());
      std::mt19937 random(7);
      for (std::uint32_t i = 0; i < kRounds; ++i) {
        // Every pass that ended before it was sent has been done.
        if (number(receiver.receive()) != i || passes_done[rank] < i) in_order = false;
        random_delay(random);
        ++memory_done[rank];
        receiver.done();
      }
    });
    CommandReceiver receiver(mine, 0);
    for (std::uint32_t i = 0; i < kRounds; ++i) {
      if (number(receiver.receive()) != i || memory_done[rank] < i + 1) in_order = false;
      ++passes_done[rank];
      receiver.done();
    }
    memory.join();
  });
  CHECK(ends == std::vector<std::string>(3));
  CHECK(in_order);
}

TEST_CASE("without common memory a rank that is gone ends every wait", "[threads][parallel]") {
  const Apart apart(small_group(3));
  const auto ends = apart.run([&](const Group& mine) {
    GroupExchange exchange(mine, 0);
    exchange.meet(8);
    if (mine.rank() == 1) mine.fail_and_throw(1, "it was told to go");
    if (mine.rank() == 0) {
      exchange.meet(8);
    } else {
      CommandReceiver(mine, 1).receive();
    }
  });
  CHECK_THAT(ends[1], Contains("rank 1 of 3 has failed: it was told to go"));
  // Nobody watches here, so that the others know no more than their transports.
  CHECK_THAT(ends[0], Contains("rank 1 of 3 has failed: meeting of lane 0: its box is closed"));
  CHECK_THAT(ends[2], Contains("rank 0 of 3 has failed: commands of lane 1: its box is closed"));
  for (const auto& transport : apart.transports) CHECK(transport->n_given_up() == 1);
  CHECK_THROWS_AS(GroupExchange(apart.groups[0], 0).meet(8), RankFailed);
}

TEST_CASE("without common memory rank 0 does not wait for ever", "[threads][parallel]") {
  GroupOptions options = small_group(2);
  options.time_out = milliseconds(30);
  const Apart apart(options);
  CHECK_THROWS_WITH(GroupExchange(apart.groups[0], 0).meet(8),
                    Contains("rank 1 of 2 has failed: meeting of lane 0: too late"));
}

TEST_CASE("what a watcher says goes before what the transport noticed", "[threads][parallel]") {
  const Apart apart(small_group(2));
  const auto watcher = start_thread([&] {
    std::this_thread::sleep_for(milliseconds(20));
    apart.groups[0].fail(1, "its process was ended");
  });
  CHECK_THROWS_WITH(apart.groups[0].lose_and_throw({1, "no answer"}, "meeting", 0),
                    Contains("its process was ended"));
}

}  // namespace
}  // namespace duplex
