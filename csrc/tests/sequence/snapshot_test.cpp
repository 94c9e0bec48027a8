// A sequence restored elsewhere holds what the first one held, and goes on as it would have.
#include "sequence/snapshot.h"

#include <catch2/catch.hpp>
#include <random>

#include "tests/sequence/fixtures.h"

namespace duplex::sequence_tests {
namespace {

std::vector<std::byte> bytes_of(const SequenceState& state) {
  ByteWriter to;
  state.write(to);
  return {to.bytes().begin(), to.bytes().end()};
}

SequenceState state_of(const std::vector<std::byte>& bytes) {
  ByteReader from(bytes);
  return SequenceState::read(from);
}

void copy_blocks(PagePool& pool, const Sequence& from, const Sequence& to,
                 const SequenceState& state) {
  const auto source = held_blocks(from, state);
  const auto target = held_blocks(to, state);
  REQUIRE(source.size() == target.size());
  for (std::size_t i = 0; i < source.size(); ++i) {
    REQUIRE(source[i].bytes == target[i].bytes);
    if (target[i].data != nullptr)
      pool.memory().write(target[i].data, source[i].data, source[i].bytes);
  }
}

bool same_digests(const Sequence& a, const Sequence& b) {
  const auto one = a.digests(), other = b.digests();
  return std::equal(one.begin(), one.end(), other.begin(), other.end(),
                    [](const BlockDigest& x, const BlockDigest& y) {
                      return x.tape == y.tape && x.block == y.block && x.hash == y.hash;
                    });
}

TEST_CASE("a restored sequence holds the same rows and goes on") {
  const auto seed = GENERATE(range<std::uint32_t>(0, 30));
  std::mt19937 random(seed);
  const auto pick = [&](std::int64_t most) {
    return std::uniform_int_distribution<std::int64_t>(0, most)(random);
  };
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 200), other_pool(layout, 200);
  Sequence first = Sequence::open(*pool, layout, 3000);
  std::vector<std::uint64_t> values;
  for (int i = 0; i < 12; ++i) {
    append(first, values, pick(150), random(), 1 + pick(99));
    const std::int64_t most = std::max<std::int64_t>(first.length() - layout.longest_window(), 0);
    if (pick(3) == 0) first.forget(pick(most / 2), most / 2 + pick(most / 2));
    if (pick(3) == 0) {
      const std::int64_t lowest = first.lowest_truncation();
      first.truncate(lowest + pick(first.length() - lowest));
      values.resize(static_cast<std::size_t>(first.length()));
    }
  }
  const bool is_fork = pick(1) == 1;
  Sequence sequence = is_fork ? first.fork(3000) : std::move(first);

  const SequenceState state = state_of(bytes_of(sequence.state()));
  {
    Sequence restored = Sequence::restore(*other_pool, layout, state, state.max_positions);
    copy_blocks(*other_pool, sequence, restored, state);
    REQUIRE(holds(restored, values, true));
    REQUIRE(same_digests(restored, sequence));
    REQUIRE(restored.lowest_truncation() == sequence.lowest_truncation());
    REQUIRE(restored.held_positions() == sequence.held_positions());
    REQUIRE(restored.usage().global.held_bytes == sequence.usage().global.held_bytes);
    append(sequence, values, 300, 7);
    std::vector<std::uint64_t> again(values.begin(), values.end() - 300);
    append(restored, again, 300, 7);
    REQUIRE(again == values);
    REQUIRE(holds(restored, values, true));
  }
  CHECK(is_whole(other_pool));
}

TEST_CASE("a sequence that cannot be restored leaves no trace") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 100), small(layout, layout.window_pages() + 2);
  Sequence sequence = Sequence::open(*pool, layout, 1500);
  std::vector<std::uint64_t> values;
  append(sequence, values, 1000, 1);
  const SequenceState state = sequence.state();
  CHECK_THROWS_AS(Sequence::restore(*small, layout, state, 1500), CapacityError);
  CHECK(is_whole(small));
  CHECK_THROWS_AS(Sequence::restore(*pool, layout, state, 999), InvalidArgument);
  const PoolStats before = pool->stats();
  const std::int64_t n_maps = pool.memory->n_maps;
  Sequence::restore(*pool, layout, state, 1500);
  const std::int64_t needed = pool.memory->n_maps - n_maps;
  CHECK(needed >= before.n_used / 2);
  for (std::int64_t fail_at = 0; fail_at < needed; ++fail_at) {
    pool.memory->fail_at = fail_at;
    CHECK_THROWS_AS(Sequence::restore(*pool, layout, state, 1500), CapacityError);
    CHECK(same(pool->stats(), before));
  }
}

TEST_CASE("a state of another layout or of no sequence is refused") {
  const SequenceLayout layout = small_layout();
  TestPool pool(layout, 100);
  Sequence sequence = Sequence::open(*pool, layout, 1500);
  std::vector<std::uint64_t> values;
  append(sequence, values, 1300, 1);
  sequence.forget(64, 512);
  const SequenceState good = sequence.state();
  const auto is_refused = [&](auto change) {
    SequenceState state = good;
    change(state);
    try {
      Sequence::restore(*pool, layout, state_of(bytes_of(state)), 1500);
      return false;
    } catch (const CheckpointError&) {
      return true;
    }
  };
  CHECK(is_refused([](SequenceState& s) { s.length = -1; }));
  CHECK(is_refused([](SequenceState& s) { s.length = INT64_MAX; }));
  CHECK(is_refused([](SequenceState& s) { s.committed = s.length + 1; }));
  CHECK(is_refused([](SequenceState& s) { s.committed = s.length - 131; }));
  CHECK(is_refused([](SequenceState& s) { s.local_begin = 1280; }));  // a page, within the window
  CHECK(is_refused([](SequenceState& s) { s.local_begin = -64; }));
  CHECK(is_refused([](SequenceState& s) { s.conv_begin -= 1; }));
  CHECK(is_refused([](SequenceState& s) { s.max_positions = 0; }));
  CHECK(is_refused([](SequenceState& s) { s.forgotten[0].begin = 65; }));
  CHECK(is_refused([](SequenceState& s) { s.forgotten[0].end = 500; }));
  CHECK(is_refused([](SequenceState& s) { s.forgotten[0].end = 64 * 100; }));
  CHECK(is_refused([](SequenceState& s) { s.forgotten.push_back({640, 576}); }));
  CHECK(is_refused([](SequenceState& s) { s.forgotten.push_back({512, 576}); }));  // it touches
  CHECK(is_refused([](SequenceState& s) {
    s.forgotten.clear();
    for (std::int64_t i = 0; i < 9; ++i) s.forgotten.push_back({128 * i, 128 * i + 64});
  }));
  const std::vector<std::byte> bytes = bytes_of(good);
  for (std::size_t n = 0; n < bytes.size(); ++n)
    CHECK_THROWS_AS(state_of({bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n)}),
                    CheckpointError);
}

}  // namespace
}  // namespace duplex::sequence_tests
