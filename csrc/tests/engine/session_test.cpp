// Where a session can be rewound to, and what a rewind or a fork brings back.
#include "engine/session.h"

#include <malloc.h>

#include <algorithm>
#include <catch2/catch.hpp>

#include "tests/engine/fixtures.h"

namespace duplex::engine_tests {
namespace {

using Positions = std::vector<std::int64_t>;

void append(Session& session, std::size_t n) {
  session.lane().append_text(session, std::vector<std::int32_t>(n, 9), LogitsWanted::kNone);
}

TEST_CASE("marks are the ends of calls, in order, however many there were") {
  const auto session = make_engine()->open_session({});
  for (int turn = 0; turn < 50; ++turn) {
    hear(*session, turn);
    const Positions marks = session->marks();
    REQUIRE(std::ranges::is_sorted(marks));
    REQUIRE(marks.back() == session->length());
  }
}

TEST_CASE("a mark of what was dropped is none of what comes instead") {
  const auto session = make_engine()->open_session({});
  for (int i = 0; i < 3; ++i) append(*session, 5);
  session->truncate(5);
  append(*session, 12);
  CHECK(session->marks() == Positions{0, 5, 17});
  CHECK(throws<InvalidArgument>([&] { session->truncate(15); }));
}

TEST_CASE("decoding again after a rewind says the same, however far it was guessed ahead") {
  const auto engine = make_engine();
  const auto session = engine->open_session({0, {}, 4});
  for (int i = 0; i < 3; ++i) append(*session, 3);
  const std::vector<std::int32_t> all = session->lane().decode(*session, 12, {});
  for (std::int32_t n = 2; n <= 12; ++n) {  // one token appends nothing and would renew the mark
    session->truncate(9);
    const std::vector<std::int32_t> ids = session->lane().decode(*session, n, {});
    CHECK(std::equal(ids.begin(), ids.end(), all.begin(), all.begin() + n));
    CHECK(session->marks().back() == session->length());
  }
}

TEST_CASE("a fork takes along what waits, and where it can be rewound to") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  for (int i = 0; i < 3; ++i) append(*session, 1);
  session->interrupt();
  session->feed_text(std::vector<std::int32_t>{10, 11});
  const auto fork = session->fork(0);
  CHECK(fork->epoch() == 1);
  const Turn turn = hear(*session, 3), other = hear(*fork, 3);
  CHECK(other.turn == 1);
  CHECK(other.n_rows == turn.n_rows);
  CHECK(other.token_ids == turn.token_ids);
  CHECK(fork->marks() == session->marks());
  CHECK(fork->marks() == Positions{0, 1, 2, 3, fork->length()});
}

TEST_CASE("sound beyond a turn is the beginning of the next") {
  const auto engine = make_engine();
  const auto even = engine->open_session({}), uneven = engine->open_session({});
  const std::vector<float> all = sound(3 * kTurnSamples);
  const auto turn = [&](Session& session, std::int64_t begin, std::int64_t end) {
    session.feed_audio(std::span(all).subspan(static_cast<std::size_t>(begin),
                                              static_cast<std::size_t>(end - begin)));
    const Turn answer = step_one(session);
    CHECK(answer.missing_samples == 0);
    return answer.token_ids;
  };
  const std::int64_t ends[] = {0, kTurnSamples + 100, 2 * kTurnSamples, 3 * kTurnSamples};
  for (int i = 0; i < 3; ++i)
    CHECK(turn(*even, i * kTurnSamples, (i + 1) * kTurnSamples) ==
          turn(*uneven, ends[i], ends[i + 1]));
  CHECK((even->digests() == uneven->digests()));
}

// Of the C library's heap.
std::size_t bytes_in_use() {
  const struct mallinfo2 heap = mallinfo2();
  return heap.uordblks + heap.hblkhd;
}

TEST_CASE("nobody keeps the pictures of a session that is gone") {
  ModelConfig config = streaming_config();
  config.interaction.reset();
  EngineOptions options = small_options();
  options.max_positions = 4000;
  const auto engine = make_engine(config, options);
  const Image image = picture(200, 200);
  append(*engine->open_session({}), 3000);  // buffers grow to as many rows
  const std::size_t before = bytes_in_use();
  {
    const int way = GENERATE(0, 1, 2);
    const auto session = engine->open_session({way == 2 ? 100 : 0, {}});
    const auto append_it = [&] {
      session->lane().append_image(*session, image, LogitsWanted::kNone);
    };
    if (way == 0) {
      session->feed_image(image);
      CHECK(step_one(*session, 0).n_rows > 2500);
    } else if (way == 1) {
      append_it();
    } else {
      CHECK(throws<CapacityError>(append_it));  // it has no room for it
    }
  }
  CHECK(bytes_in_use() < before + image.pixels.size() / 2);
}

TEST_CASE("layers that draft have nothing to go by at first") {
  ModelConfig config = streaming_config();
  config.mtp.layers.assign(3, {true, false});
  const auto engine = make_engine(config);
  const auto guessing = engine->open_session({0, {}, 4}), plain = engine->open_session({});
  append(*guessing, 1), append(*plain, 1);
  CHECK(guessing->lane().decode(*guessing, 9, {}) == plain->lane().decode(*plain, 9, {}));
}

}  // namespace
}  // namespace duplex::engine_tests
