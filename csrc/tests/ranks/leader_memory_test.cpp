// Page memory of several ranks: addresses as all know them, and what one of them cannot do.
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cstring>
#include <set>
#include <thread>

#include "backend/registry.h"
#include "core/error.h"
#include "parallel/group_exchange.h"
#include "ranks/leader.h"
#include "tests/model/checkpoint.h"

namespace duplex {
namespace {

constexpr std::size_t kPage = 4096;

// A worker that maps nothing, keeps what is written to its first range, notes what it is asked for,
// and refuses one page. Its end is the first range that is released.
class FakeWorker {
 public:
  FakeWorker(const Group& group, PageId refused)
      : exchange_(group.as(1), group.memory_channel()), thread_([this, group, refused] {
          CommandReceiver commands(group.as(1), group.memory_channel());
          while (take(commands.receive(), refused)) commands.done();
          commands.done();
        }) {}
  void join() { thread_.join(); }
  std::vector<MemoryCommand> heard;

 private:
  bool take(std::span<const std::byte> bytes, PageId refused) {
    ByteReader from(bytes);
    const auto command = from.get<MemoryCommand>();
    heard.push_back(command);
    if (command == MemoryCommand::kReserve) answer({});
    if (command == MemoryCommand::kMap) {
      get_address(from);
      Status status;
      if (from.get<PageId>() == refused) status = {1, "no memory here"};
      answer(status);
    }
    if (command == MemoryCommand::kWrite || command == MemoryCommand::kRead)
      transfer(from, command == MemoryCommand::kRead);
    return command != MemoryCommand::kRelease;
  }
  void transfer(ByteReader& from, bool is_read) {
    from.get<std::int32_t>();  // this rank
    const std::span<std::byte> place =
        std::span(content_).subspan(static_cast<std::size_t>(get_address(from).offset));
    if (!is_read) {
      std::memcpy(place.data(), from.rest().data(), from.rest().size());
      return;
    }
    const auto n_bytes = static_cast<std::size_t>(from.get<std::uint64_t>());
    std::memcpy(exchange_.mine(), place.data(), n_bytes);
    exchange_.meet(n_bytes);
  }
  void answer(const Status& status) {
    std::memcpy(exchange_.mine(), &status, sizeof status);
    exchange_.meet(sizeof status);
  }

  GroupExchange exchange_;
  std::vector<std::byte> content_ = std::vector<std::byte>(1 << 20);
  std::thread thread_;
};

TEST_CASE("what one rank cannot map is mapped on none", "[ranks][threads]") {
  const auto leader = std::make_shared<RankLeader>(
      model_tests::tiny_config(), EngineOptions{.max_batch_rows = 16, .n_ranks = 2});
  FakeWorker worker(leader->group(), 3);
  const auto backend = create_backend("cpu", {1, "portable"});
  LeaderMemory memory(leader, backend->create_page_memory(kPage, 8));
  std::byte* const base = memory.reserve_range(4 * kPage);
  memory.map(base, 2);
  base[0] = std::byte{7};
  CHECK_THROWS_AS(memory.map(base + kPage, 3), CapacityError);
  CHECK_THROWS_WITH(memory.map(base + kPage, 3), "rank 1: no memory here");
  memory.map(base + kPage, 2);  // the place is as good as before
  CHECK(base[kPage] == std::byte{7});
  memory.unmap(base);
  memory.discard(5);
  memory.release_range(base, 4 * kPage);
  worker.join();
  using enum MemoryCommand;
  CHECK(worker.heard == std::vector{kOpen, kReserve, kMap, kMap, kUnmap, kMap, kUnmap, kMap, kUnmap,
                                    kDiscard, kRelease});
}

TEST_CASE("bytes of another rank travel in as many pieces as they take", "[ranks][threads]") {
  const auto leader = std::make_shared<RankLeader>(
      model_tests::tiny_config(), EngineOptions{.max_batch_rows = 16, .n_ranks = 2});
  FakeWorker worker(leader->group(), kNoPage);
  const auto backend = create_backend("cpu", {1, "portable"});
  LeaderMemory memory(leader, backend->create_page_memory(kPage, 8));
  std::byte* const base = memory.reserve_range(1 << 20);
  std::vector<std::byte> written(2 * leader->group().slab_bytes() + 1000), read(written.size());
  for (std::size_t i = 0; i < written.size(); ++i) written[i] = static_cast<std::byte>(i * i / 7);
  memory.write_rank(1, base + 100, written.data(), written.size());
  memory.read_rank(1, read.data(), base + 100, read.size());
  CHECK((read == written));
  memory.release_range(base, 1 << 20);
  worker.join();
  CHECK(std::ranges::count(worker.heard, MemoryCommand::kWrite) > 1);
  CHECK(std::ranges::count(worker.heard, MemoryCommand::kRead) == 3);
}

TEST_CASE("addresses go to other ranks by range and offset", "[ranks]") {
  std::array<std::byte, 512> here, there;
  AddressRanges ranges, others;
  ranges.add(0, here.data(), 256);
  ranges.add(1, here.data() + 256, 256);
  others.add(0, there.data() + 128, 256);
  others.add(1, there.data(), 128);
  CHECK(ranges.find(here.data() + 255).range == 0);
  CHECK(ranges.find(here.data() + 256).range == 1);
  CHECK(others.address(ranges.find(here.data() + 5)) == there.data() + 133);
  CHECK(others.address({}) == nullptr);
  CHECK_THROWS_AS(ranges.find(here.data() + 512), InvalidArgument);
  ranges.remove(0);
  CHECK_FALSE(ranges.has(0));
  CHECK_THROWS_AS(ranges.find(here.data()), InvalidArgument);
}

TEST_CASE("segments arrive with their tapes and holes", "[ranks]") {
  std::vector<std::byte> here(1 << 16), there(1 << 16);
  AddressRanges ranges, others;
  ranges.add(4, here.data(), here.size());
  others.add(4, there.data(), there.size());
  // Position 0 lies 100 blocks before the range, as behind a window that has moved on.
  const auto before = [](std::byte* base, std::int64_t bytes) {
    return reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(base) -
                                        static_cast<std::uintptr_t>(bytes));
  };
  const PositionRange holes[] = {{64, 128}, {256, 320}};
  Segment segment{3, 5, 110 * kBlockPositions, {}, {}, {}, holes, 2};
  segment.global = {before(here.data(), 100 * 64), 1, 64, 64};
  segment.conv = {before(here.data(), 110 * kBlockPositions * 16), 4, 64, 16};
  Segment other = segment;
  other.row_begin = 8;
  other.forgotten = nullptr;
  other.n_forgotten = 0;
  const Segment both[] = {segment, other};
  ByteWriter bytes;
  put_segments(bytes, {both, 2, 13}, ranges);
  CHECK(bytes.bytes().size() <= 2 * kSegmentBytes);
  ByteReader from(bytes.bytes());
  SegmentStore store;
  const Segments got = get_segments(from, others, store);
  CHECK(from.rest().empty());
  REQUIRE(got.count == 2);
  CHECK(got.n_rows == 13);
  CHECK(got.data[0].row_begin == 3);
  CHECK(got.data[1].row_begin == 8);
  CHECK(got.data[0].position == segment.position);
  CHECK(got.data[0].global.block(110) == there.data() + 10 * 64);
  CHECK(got.data[0].conv.block(segment.position) == there.data());
  CHECK(got.data[0].local.base == nullptr);
  REQUIRE(got.data[0].n_forgotten == 2);
  CHECK(got.data[0].forgotten[1].begin == 256);
  CHECK(got.data[1].n_forgotten == 0);
}

}  // namespace
}  // namespace duplex
