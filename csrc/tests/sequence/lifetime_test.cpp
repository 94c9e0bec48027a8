// Sequences that live long: positions beyond 2^24 and 2^31, over a short range of addresses for
// the windows. Nothing is computed here; a sequence starts late by being restored there.
#include <catch2/catch.hpp>

#include "tests/sequence/fixtures.h"

namespace duplex::sequence_tests {
namespace {

// A sequence of `length` rows that has forgotten all but the first and the newest 256.
SequenceState late_state(const SequenceLayout& layout, std::int64_t length) {
  const auto window_begin = [&](const TapeLayout& tape) {
    return (length - tape.window) / tape.page_positions() * tape.page_positions();
  };
  return {2000,
          length,
          length,
          window_begin(layout.local),
          window_begin(layout.conv),
          {{256, (length - 256) / kBlockPositions * kBlockPositions}}};
}

void write_held(Sequence& sequence, std::int64_t n_rows) {
  sequence.reserve(n_rows);
  std::vector<std::uint64_t> rows;
  for (std::int64_t i = 0; i < n_rows; ++i)
    rows.push_back(static_cast<std::uint64_t>(sequence.length() + i));
  write_rows(sequence, rows);
  sequence.commit();
}

// Every row since `begin` that a window holds, or that was not forgotten, is its own position.
bool reads_back(const Sequence& sequence, std::int64_t begin) {
  const Segment segment = sequence.segment(0, 0);
  const auto has = [&](const Tape& tape, const TapeView& view, std::int64_t position) {
    return position < tape.held().begin || has_mark(view, tape.layout().block_positions, position,
                                                    static_cast<std::uint64_t>(position));
  };
  for (std::int64_t position = begin; position < sequence.length(); ++position) {
    if (!has(sequence.local(), segment.local, position)) return false;
    if (!has(sequence.conv(), segment.conv, position)) return false;
    if (!is_hidden(sequence, position) && !has(sequence.global(), segment.global, position))
      return false;
  }
  return true;
}

TEST_CASE("a sequence goes on past 2^24, 2^31 and 2^32 positions") {
  const std::int64_t border = std::int64_t{1} << GENERATE(24, 31, 32);
  const SequenceLayout layout = small_layout();
  REQUIRE(layout.lifetime_positions() > border + 100'000);
  TestPool pool(layout, 200);
  {
    const std::int64_t begin = border - 1500;
    Sequence sequence = Sequence::restore(*pool, layout, late_state(layout, begin), 2000);
    REQUIRE(sequence.held_positions() < 1000);
    const SequenceUsage usage = sequence.usage();
    for (int i = 0; i < 300; ++i) {
      write_held(sequence, 1 + i % 130);
      REQUIRE(sequence.usage().window_pages_held <= usage.window_pages);
      const std::int64_t limit = sequence.committed() - layout.longest_window();
      if (i % 9 == 0) sequence.forget(256, limit);
    }
    REQUIRE(sequence.length() > border + 15'000);
    REQUIRE(reads_back(sequence, begin));
    const std::int64_t lowest = sequence.lowest_truncation();
    REQUIRE(sequence.length() - lowest >= layout.limits.rewind_rows);
    Sequence child = sequence.fork(2000);
    child.truncate(lowest);
    write_held(child, 100);
    REQUIRE(reads_back(child, begin));
    REQUIRE(reads_back(sequence, begin));
    REQUIRE(sequence.forgotten().size() == 1);
  }
  CHECK(is_whole(pool));
}

TEST_CASE("windows go round in the same pages, which are mapped once") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200);
  Sequence sequence = Sequence::open(*pool, layout, 2000);
  std::int64_t n_moved = 0, n_maps = 0;
  std::byte* base = sequence.conv().view().base;
  while (sequence.length() < 200'000) {
    write_held(sequence, 100);
    if (sequence.length() > 1000) sequence.forget(64, sequence.length() - 200);
    n_moved += base != sequence.conv().view().base;
    base = sequence.conv().view().base;
    // Only the global tape takes pages, as long as no fork holds one of a ring.
    const std::int64_t n_global = sequence.global().held().end / layout.global.page_positions();
    if (sequence.length() % 5000 == 1000) n_maps = pool.memory->n_maps - n_global;
    if (sequence.length() % 5000 == 4000) REQUIRE(pool.memory->n_maps - n_global == n_maps);
    if (sequence.length() % 5000 == 0) {
      REQUIRE(reads_back(sequence, sequence.length() - 400));
      Sequence child = sequence.fork(2000);
      write_held(child, 130);
      REQUIRE(reads_back(child, sequence.length() - 400));
    }
  }
  CHECK(n_moved > 100);
}

TEST_CASE("the range of the global tape grows, and a refusal to grow changes nothing") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200);
  const std::int64_t border = layout.first_range_positions();
  Sequence sequence = Sequence::restore(*pool, layout, late_state(layout, border - 1000), 3000);
  std::byte* const base = sequence.global().view().base;
  while (sequence.length() < border - 100) write_held(sequence, 100);
  REQUIRE(sequence.global().view().base == base);
  std::int64_t n_refused = 0;
  for (; sequence.length() < border + 1000; write_held(sequence, 100)) {
    for (std::int64_t fail_at = 0; fail_at >= 0;) {
      const PoolStats before = pool->stats();
      const std::int64_t n_ranges = pool.memory->n_ranges;
      pool.memory->fail_at = fail_at++;
      try {
        sequence.reserve(100);
        fail_at = pool.memory->fail_at = -1;
      } catch (const CapacityError&) {
        ++n_refused;
        REQUIRE(same(pool->stats(), before));
        REQUIRE(pool.memory->n_ranges == n_ranges);
        REQUIRE(reads_back(sequence, border - 1000));
      }
    }
  }
  CHECK(n_refused > 10);
  REQUIRE(sequence.global().view().base != base);
  REQUIRE(reads_back(sequence, border - 1000));
  Sequence child = sequence.fork(3000);
  write_held(child, 100);
  REQUIRE(reads_back(child, border - 1000));
}

TEST_CASE("a mapping that the system refuses changes nothing") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200);
  Sequence sequence = Sequence::open(*pool, layout, 2000);
  std::int64_t n_refused = 0;
  while (sequence.length() < 60'000) {
    if (sequence.length() > 1000) sequence.forget(64, sequence.length() - 200);
    for (std::int64_t fail_at = 0;; ++fail_at) {
      const PoolStats before = pool->stats();
      pool.memory->fail_at = fail_at;
      try {
        sequence.reserve(100);
        break;
      } catch (const CapacityError&) {
        ++n_refused;
        REQUIRE(same(pool->stats(), before));
        REQUIRE(reads_back(sequence, std::max<std::int64_t>(sequence.length() - 400, 0)));
      }
    }
    pool.memory->fail_at = -1;
    write_held(sequence, 100);
  }
  CHECK(n_refused > 300);
}

TEST_CASE("what is left of a lifetime is said, and the end of it") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200);
  const std::int64_t end = layout.lifetime_positions();
  Sequence sequence = Sequence::restore(*pool, layout, late_state(layout, end - 100), 2000);
  write_held(sequence, 90);
  CHECK_THROWS_AS(sequence.check_room(11), CapacityError);
  CHECK_THROWS_AS(sequence.reserve(11), CapacityError);
  write_held(sequence, 10);
  CHECK(reads_back(sequence, end - 100));
  CHECK_THROWS_AS(Sequence::restore(*pool, layout, late_state(layout, end + 100), 2000),
                  CheckpointError);
}

}  // namespace
}  // namespace duplex::sequence_tests
