// What a full session forgets, as arithmetic on a sequence; sessions that live so are in
// python_tests/engine/test_endless.py.
#include "engine/endless.h"

#include <catch2/catch.hpp>
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "tests/sequence/fixtures.h"

namespace duplex::sequence_tests {
namespace {

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

bool same(const PositionRange& range, std::int64_t begin, std::int64_t end) {
  return range.begin == begin && range.end == end;
}

TEST_CASE("a policy must leave room for a turn behind its head and recent part") {
  const SequenceLayout layout = small_layout();  // the longest window is 80
  CHECK_NOTHROW(Endless{0, 80, 208}.validate(layout));
  CHECK_THROWS_AS((Endless{0, 80, 207}.validate(layout)), InvalidArgument);
  CHECK_THROWS_AS((Endless{0, 79, 1000}.validate(layout)), InvalidArgument);
  CHECK_THROWS_AS((Endless{-1, 80, 1000}.validate(layout)), InvalidArgument);
  CHECK_NOTHROW(Endless{65, 100, 356}.validate(layout));  // the head ends with a block, at 128
  CHECK_THROWS_AS((Endless{65, 100, 355}.validate(layout)), InvalidArgument);
  CHECK_THROWS_AS((Endless{kMost, 100, 355}.validate(layout)), InvalidArgument);
  CHECK_THROWS_AS((Endless{0, kMost, 355}.validate(layout)), InvalidArgument);
  const Endless automatic{0, 0, 0, true}, given{65, 100, 356, false};
  CHECK(automatic.with_limit(1000, layout)->recent == 500);
  CHECK(automatic.with_limit(1000, layout)->head == 125);
  CHECK_FALSE(automatic.with_limit(150, layout).has_value());
  CHECK(given.with_limit(400, layout)->max_positions == 400);
  CHECK_THROWS_AS(given.with_limit(300, layout), InvalidArgument);
}

TEST_CASE("an endless sequence is promised the parts of pages at the edges of its hole") {
  const SequenceLayout layout = small_layout();  // pages of three blocks
  CHECK(Endless{65, 100, 400}.held_positions(layout) == 400 + 2 * 128);
  CHECK(Endless{65, 100, kMost}.held_positions(layout) == kMost);  // which nobody can have
}

TEST_CASE("as much is forgotten as is asked for, or as a call needs") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200);
  const Endless endless{65, 100, 400};
  Sequence sequence = Sequence::open(*pool, layout, endless.held_positions(layout));
  std::vector<std::uint64_t> values;
  append(sequence, values, 390, 1);
  CHECK(same(endless.to_forget(sequence, 10), 0, 0));
  // From the head's last block to 100 before the end, in whole blocks.
  CHECK(same(endless.to_forget(sequence, 11), 128, 256));
  // More than that: down to the longest window. 10 and two blocks are to be had.
  CHECK(endless.room(sequence) == 10 + 128);
  CHECK(same(endless.to_forget(sequence, 10 + 128), 128, 256));
  CHECK_THROWS_AS(endless.to_forget(sequence, 10 + 129), CapacityError);
  CHECK(same(Endless{65, 200, 400}.to_forget(sequence, 75), 128, 256));
  append(sequence, values, 10, 1);
  sequence.forget(128, 256);
  CHECK(endless.room(sequence) == 128 + 64);
  append(sequence, values, 128, 1);
  CHECK(same(endless.to_forget(sequence, 1), 256, 384));
}

TEST_CASE("a hole that lies across the end of the head is the one that grows") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200);
  const Endless endless{65, 100, 400};
  Sequence sequence = Sequence::open(*pool, layout, endless.held_positions(layout));
  std::vector<std::uint64_t> values;
  append(sequence, values, 400, 1);
  sequence.forget(64, 192);
  CHECK(endless.room(sequence) == 128 + 128);
  CHECK(same(endless.to_forget(sequence, 129), 192, 256));
}

TEST_CASE("one of the eight holes is that of the policy") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200);
  const Endless endless{64, 100, 3000};
  Sequence sequence = Sequence::open(*pool, layout, 3000);
  std::vector<std::uint64_t> values;
  append(sequence, values, 2000, 1);
  for (std::int64_t i = 2; i < 9; ++i) sequence.forget(128 * i, 128 * i + 64);
  CHECK_THROWS_AS(endless.check_forget(sequence, 1280, 1344), InvalidArgument);
  CHECK_NOTHROW(endless.check_forget(sequence, 1280, 1300));                   // no whole block
  CHECK_NOTHROW(endless.check_forget(sequence, 128 * 8 + 64, 128 * 8 + 128));  // one grows
  CHECK_NOTHROW(endless.check_forget(sequence, 64, 128));
  sequence.forget(64, 128);
  CHECK_NOTHROW(endless.check_forget(sequence, 128, 192));
}

TEST_CASE("without global layers all of a lifetime is room") {
  ModelConfig config = small_config();
  config.layers = {{true, false}};
  const SequenceLayout layout = SequenceLayout::make(config, DType::kBF16, 4096, {10, 130});
  TestPool pool(layout, 200);
  const Endless endless{65, 100, 400};
  CHECK(endless.held_positions(layout) == 400);
  Sequence sequence = Sequence::open(*pool, layout, 400);
  std::vector<std::uint64_t> values;
  append(sequence, values, 1000, 1);
  CHECK(endless.room(sequence) == layout.lifetime_positions() - 1000);
  CHECK(same(endless.to_forget(sequence, 500), 0, 0));
}

}  // namespace
}  // namespace duplex::sequence_tests
