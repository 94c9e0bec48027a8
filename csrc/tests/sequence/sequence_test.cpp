// One behaviour of a sequence per test; sequence_property_test.cpp mixes them at random.
#include "sequence/sequence.h"

#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "tests/sequence/fixtures.h"

namespace duplex::sequence_tests {
namespace {

using Catch::Contains;
using Values = std::vector<std::uint64_t>;

TEST_CASE("opening promises growth and windows, and a refusal says what would fit") {
  const SequenceLayout layout = small_layout();
  const std::int64_t window = layout.window_pages();
  const std::int64_t page = layout.global.page_positions();
  TestPool pool(layout, 2 * window + 10);
  const Sequence first = Sequence::open(*pool, layout, 6 * page);
  CHECK(pool->n_unpromised() == window + 4);
  const PoolStats before = pool->stats();
  CHECK_THROWS_WITH(Sequence::open(*pool, layout, 5 * page),
                    Contains("max_positions <= " + std::to_string(4 * page) + " would fit"));
  CHECK(same(pool->stats(), before));
  {
    const Sequence second = Sequence::open(*pool, layout, 4 * page);
    CHECK(pool->n_unpromised() == 0);
    CHECK_THROWS_WITH(Sequence::open(*pool, layout, 1), Contains("close a session"));
  }
  CHECK(pool->n_unpromised() == window + 4);
  CHECK_THROWS_AS(Sequence::open(*pool, layout, 0), InvalidArgument);
  CHECK_THROWS_AS(Sequence::open(*pool, layout, std::int64_t{1} << 40), CapacityError);
}

TEST_CASE("growth inside the promise succeeds when everything else is promised away") {
  const SequenceLayout layout = small_layout();
  const std::int64_t page = layout.global.page_positions();
  TestPool pool(layout, 2 * layout.window_pages() + 6);
  Sequence a = Sequence::open(*pool, layout, 3 * page);
  Sequence b = Sequence::open(*pool, layout, 3 * page);
  Values of_a, of_b;
  append(b, of_b, 3 * page, 5000);
  append(a, of_a, 3 * page, 1);
  CHECK(holds(a, of_a));
  CHECK(holds(b, of_b));
  CHECK_THROWS_WITH(a.reserve(1), Contains("max_positions = " + std::to_string(3 * page)));
}

TEST_CASE("rows must be reserved, and only so many can be pending") {
  const SequenceLayout layout = small_layout({10, 130});
  TestPool pool(layout, 100);
  Sequence sequence = Sequence::open(*pool, layout, 1000);
  CHECK_THROWS_AS(sequence.advance(1), InvalidArgument);
  CHECK_THROWS_AS(sequence.segment(0, 1), InvalidArgument);
  CHECK_THROWS_AS(sequence.reserve(-1), InvalidArgument);
  CHECK_THROWS_WITH(sequence.reserve(131), Contains("pending_rows = 130"));
  sequence.reserve(130);
  sequence.reserve(2);  // what is backed stays so
  CHECK(sequence.backed() == 130);
  sequence.advance(70);
  CHECK_THROWS_AS(sequence.advance(61), InvalidArgument);
  CHECK_THROWS_AS(sequence.reserve(61), CapacityError);
  sequence.commit();
  sequence.reserve(130);
  const Segment segment = sequence.segment(5, 130);
  CHECK(segment.row_begin == 5);
  CHECK(segment.position == 70);
}

TEST_CASE("a fork shares full pages, copies unfinished ones and pays for the rest") {
  const SequenceLayout layout = small_layout();
  const std::int64_t page = layout.global.page_positions();
  TestPool pool(layout, 200);
  Sequence parent = Sequence::open(*pool, layout, 10 * page);
  Values values;
  append(parent, values, 3 * page + 70, 1);
  const std::int64_t unpromised = pool->n_unpromised();
  CHECK_THROWS_AS(parent.fork(3 * page), InvalidArgument);
  Sequence child = parent.fork(5 * page);
  CHECK(pool->n_unpromised() == unpromised - layout.window_pages() - 2);
  CHECK(pool.memory->n_shares >= 3);
  CHECK(child.length() == parent.length());
  CHECK(child.committed() == parent.committed());
  CHECK(holds(child, values));
  CHECK(child.usage().global.held_bytes == 4 * layout.global.page_bytes);
  CHECK(child.usage().global.private_bytes == layout.global.page_bytes);

  // A full page is one memory at two addresses; what follows is private.
  *parent.global().view().block(0) = std::byte{0x5a};
  CHECK(*child.global().view().block(0) == std::byte{0x5a});
  write_mark(parent.global().view(), kBlockPositions, 0, values[0]);
  Values of_parent = values;
  Values of_child = values;
  append(parent, of_parent, 50, 9000);
  append(child, of_child, 50, 7000);
  CHECK(holds(parent, of_parent));
  CHECK(holds(child, of_child));
  parent = Sequence::open(*pool, layout, 1);
  CHECK(holds(child, of_child));
  CHECK(child.usage().global.private_bytes == 4 * layout.global.page_bytes);
}

TEST_CASE("a fork takes no page for what was forgotten") {
  const SequenceLayout layout = small_layout();
  const std::int64_t page = layout.global.page_positions();
  TestPool pool(layout, 200);
  Sequence parent = Sequence::open(*pool, layout, 10 * page);
  Values values;
  append(parent, values, 3 * page + 100, 1);
  parent.forget(page, 3 * page);  // up to the unfinished page
  const Sequence child = parent.fork(10 * page);
  CHECK(child.usage().global.held_bytes == 2 * layout.global.page_bytes);
  CHECK(holds(child, values));
}

TEST_CASE("truncating below a shared page and writing again leaves the fork alone") {
  const SequenceLayout layout = small_layout({300, 130});
  const std::int64_t page = layout.global.page_positions();
  TestPool pool(layout, 300);
  Sequence parent = Sequence::open(*pool, layout, 10 * page);
  Values values;
  append(parent, values, 2 * page + 5, 1);
  const Sequence child = parent.fork(2 * page + 5);
  Values of_parent(values.begin(), values.begin() + page + 7);
  parent.truncate(page + 7);
  CHECK(parent.committed() == page + 7);
  CHECK(holds(parent, of_parent));
  append(parent, of_parent, 200, 9000);
  CHECK(holds(parent, of_parent));
  CHECK(holds(child, values));
}

TEST_CASE("truncate refuses when shared pages cannot be paid twice") {
  const SequenceLayout layout = small_layout({300, 130});
  const std::int64_t page = layout.global.page_positions();
  TestPool pool(layout, 2 * layout.window_pages() + 4 + 1);
  Sequence parent = Sequence::open(*pool, layout, 4 * page);
  Values values;
  append(parent, values, 2 * page, 1);
  // One page is free of promises, and two are shared.
  CHECK_THROWS_WITH(parent.fork(4 * page),
                    Contains("max_positions <= " + std::to_string(3 * page) + " would fit"));
  {
    const Sequence child = parent.fork(2 * page + 1);
    CHECK(pool->n_unpromised() == 0);
    const PoolStats before = pool->stats();
    CHECK_THROWS_WITH(parent.truncate(page - 1), Contains("shared with a fork"));
    CHECK(same(pool->stats(), before));
    CHECK(holds(parent, values));
  }
  parent.truncate(page - 1);
  values.resize(static_cast<std::size_t>(page - 1));
  append(parent, values, 3 * page + 1, 9000);
  CHECK(holds(parent, values));
}

TEST_CASE("truncate goes back as far as windows are held") {
  const SequenceLayout layout = small_layout({10, 130});
  TestPool pool(layout, 100);
  Sequence sequence = Sequence::open(*pool, layout, 3000);
  Values values;
  append(sequence, values, 2000, 1);
  while (sequence.length() < 2130) {  // wherever pages begin
    append(sequence, values, 1, 1);
    REQUIRE(sequence.lowest_truncation() <= sequence.length() - 10);
  }
  CHECK_THROWS_WITH(sequence.truncate(sequence.lowest_truncation() - 1),
                    Contains("expected " + std::to_string(sequence.lowest_truncation())));
  CHECK_THROWS_AS(sequence.truncate(2131), InvalidArgument);
  sequence.reserve(20);
  sequence.advance(20);
  sequence.truncate(2140);
  CHECK(sequence.committed() == 2130);
  sequence.truncate(2120);
  CHECK(sequence.committed() == 2120);
  CHECK(sequence.backed() == 2120);
  values.resize(2120);
  append(sequence, values, 10, 9000);
  CHECK(holds(sequence, values));
}

TEST_CASE("forget hides whole blocks and returns whole pages, which are room again") {
  const SequenceLayout layout = small_layout();
  const std::int64_t page = layout.global.page_positions();  // 192
  TestPool pool(layout, 100);
  Sequence sequence = Sequence::open(*pool, layout, 8 * page);
  Values values;
  append(sequence, values, 8 * page, 1);
  CHECK_THROWS_AS(sequence.reserve(1), CapacityError);
  const std::int64_t used = pool->stats().n_used;
  const PositionRange hidden = sequence.forget(page - 1, 3 * page + 65);
  CHECK(hidden.begin == page);
  CHECK(hidden.end == 3 * page + 64);
  CHECK(pool->stats().n_used == used - 2);
  CHECK(pool.memory->n_discards == 2);  // their memory goes back to the system
  CHECK(sequence.held_positions() == 6 * page);
  CHECK(sequence.segment(0, 0).n_forgotten == 1);
  append(sequence, values, 2 * page, 9000);
  CHECK(holds(sequence, values));
  CHECK_THROWS_AS(sequence.reserve(1), CapacityError);

  // A neighbour joins the hole; a page that only both together cover goes now.
  sequence.forget(3 * page + 64, 4 * page);
  REQUIRE(sequence.forgotten().size() == 1);
  CHECK(sequence.forgotten()[0].end == 4 * page);
  CHECK(sequence.held_positions() == 7 * page);
  CHECK(holds(sequence, values));

  const PositionRange nothing = sequence.forget(10, 60);
  CHECK(nothing.begin == nothing.end);
  const std::int64_t limit = sequence.committed() - layout.longest_window();
  CHECK_THROWS_WITH(sequence.forget(0, limit + 1), Contains("end <= " + std::to_string(limit)));
  CHECK_THROWS_AS(sequence.forget(20, 10), InvalidArgument);
  CHECK_THROWS_AS(sequence.forget(-1, 10), InvalidArgument);
}

TEST_CASE("there are at most eight holes") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 100);
  Sequence sequence = Sequence::open(*pool, layout, 4000);
  Values values;
  append(sequence, values, 3000, 1);
  for (const std::int64_t i : {3, 1, 7, 0, 2, 6, 5, 4}) sequence.forget(128 * i, 128 * i + 64);
  CHECK_THROWS_AS(sequence.forget(128 * 8, 128 * 8 + 64), InvalidArgument);
  REQUIRE(sequence.forgotten().size() == 8);
  for (std::size_t i = 0; i < 8; ++i)
    CHECK(sequence.forgotten()[i].begin == 128 * static_cast<std::int64_t>(i));
  sequence.forget(64, 128);  // touches one on either side
  CHECK(sequence.forgotten().size() == 7);
  sequence.forget(64, 128 * 8);
  REQUIRE(sequence.forgotten().size() == 1);
  CHECK(sequence.forgotten()[0].begin == 0);
  CHECK(sequence.forgotten()[0].end == 128 * 8);
  CHECK(sequence.lowest_truncation() > 128 * 8);
}

TEST_CASE("a rewind keeps the window of the next row clear of holes") {
  // Large pages hold more than the windows need: 640 local and 113 convolution positions.
  const SequenceLayout layout =
      SequenceLayout::make(small_config(), DType::kBF16, std::size_t{1} << 18, {10, 130});
  TestPool pool(layout, 20);
  Sequence sequence = Sequence::open(*pool, layout, 2000);
  Values values;
  append(sequence, values, 801, 1);
  CHECK(sequence.local().held().begin == 640);
  CHECK(sequence.conv().held().begin == 678);
  CHECK(sequence.lowest_truncation() == 640 + 70);
  sequence.forget(64, 720);
  CHECK(sequence.lowest_truncation() == 704 + 70);
}

TEST_CASE("windows keep a bounded number of pages however long the stream is") {
  ModelConfig config = small_config();
  SECTION("with a forgotten past") {}
  SECTION("without global layers there is no position limit") { config.layers = {{true, false}}; }
  const SequenceLayout layout = SequenceLayout::make(config, DType::kBF16, 4096, {10, 130});
  TestPool pool(layout, layout.window_pages() + layout.growth_pages(1000));
  Sequence sequence = Sequence::open(*pool, layout, 1000);
  std::int64_t most_held = 0;
  while (sequence.length() < 100'000) {
    sequence.reserve(130);
    sequence.advance(97);
    most_held = std::max(most_held, sequence.usage().window_pages_held);
    sequence.commit();
    if (sequence.held_positions() > 800) sequence.forget(0, sequence.length() - 100);
  }
  CHECK(most_held <= layout.window_pages());
  CHECK(most_held >= layout.window_pages() - 2);
  CHECK(pool->stats().n_used <= pool->stats().n_pages);
}

TEST_CASE("a system that refuses a mapping leaves everything as it was") {
  const SequenceLayout layout = small_layout({300, 130});
  const std::int64_t page = layout.global.page_positions();
  TestPool pool(layout, 300);
  {
    Sequence parent = Sequence::open(*pool, layout, 10 * page);
    Values values;
    append(parent, values, 2 * page - 2, 1);
    const PoolStats before_reserve = pool->stats();
    for (std::int64_t n = 0; n < 8; ++n) {  // the fewest mappings of the two
      pool.memory->fail_at = n;
      REQUIRE_THROWS_AS(parent.reserve(130), CapacityError);
      REQUIRE(same(pool->stats(), before_reserve));
      pool.memory->fail_at = n;
      REQUIRE_THROWS_AS(parent.fork(10 * page), CapacityError);
      REQUIRE(same(pool->stats(), before_reserve));
    }
    pool.memory->fail_at = -1;
    const Sequence child = parent.fork(2 * page);
    const PoolStats before_truncate = pool->stats();
    // Each tape takes two mappings, and one that was done before the refusal stays done.
    for (const std::int64_t n : {0, 1, 2, 1, 2, 1}) {
      pool.memory->fail_at = n;
      REQUIRE_THROWS_AS(parent.truncate(page - 3), CapacityError);
      REQUIRE(pool->stats().n_growth_used == before_truncate.n_growth_used);
      REQUIRE(pool->stats().n_promised == before_truncate.n_promised);
      REQUIRE(holds(parent, values));
    }
    pool.memory->fail_at = -1;
    Values of_parent(values.begin(), values.begin() + page - 3);
    parent.truncate(page - 3);
    append(parent, of_parent, page, 9000);
    CHECK(holds(parent, of_parent));
    CHECK(holds(child, values));
  }
  CHECK(is_whole(pool));
}

}  // namespace
}  // namespace duplex::sequence_tests
