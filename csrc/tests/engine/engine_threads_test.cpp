// Sessions and engines under several threads: one caller at a time for a session, closing at any
// moment, feeding while stepping. Everything here runs under ThreadSanitizer too.
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "tests/engine/fixtures.h"

namespace duplex::engine_tests {
namespace {

// Returns when another thread is inside a call on the session.
void wait_until_busy(Session& session) {
  while (!throws<SessionBusy>([&] { session.set_sampling({}); })) std::this_thread::yield();
}

TEST_CASE("a second caller of a session is told that it is busy", "[threads]") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  session->feed_audio(sound(kTurnSamples));
  std::thread stepper;
  {
    const std::lock_guard hold(session->lane().mutex());  // the step gets in and no further
    stepper = std::thread([&] { when_free([&] { step_one(*session); }); });
    wait_until_busy(*session);
    const std::vector<std::int32_t> ids = {1};
    CHECK(throws<SessionBusy>([&] { step_one(*session); }));
    CHECK(throws<SessionBusy>([&] { session->lane().decode(*session, 1, {}); }));
    CHECK(throws<SessionBusy>(
        [&] { session->lane().append_text(*session, ids, LogitsWanted::kNone); }));
    CHECK(throws<SessionBusy>([&] { session->truncate(0); }));
    CHECK(throws<SessionBusy>([&] { session->fork(0); }));
    CHECK(throws<SessionBusy>([&] { session->forget(0, 64); }));
    CHECK_NOTHROW(session->feed_text(ids));  // feeding is free
  }
  stepper.join();
  CHECK(session->turn() == 1);
}

TEST_CASE("threads that share a session take turns, and no turn is lost", "[threads]") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  constexpr int kTurns = 15;
  const auto drive = [&] {
    for (int turn = 0; turn < kTurns; ++turn) when_free([&] { step_one(*session, 1); });
  };
  std::thread other(drive);
  drive();
  other.join();
  CHECK(session->turn() == 2 * kTurns);
  CHECK(session->length() == 2 * kTurns * 5 - 1);  // four frames and a token, the last one waits
}

TEST_CASE("closing a session that waits to step ends that step", "[threads]") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  session->feed_audio(sound(kTurnSamples));
  Turn turn;
  std::thread stepper, closer;
  {
    const std::lock_guard hold(session->lane().mutex());
    stepper = std::thread([&] { when_free([&] { turn = step_one(*session); }); });
    wait_until_busy(*session);
    closer = std::thread([&] { session->close(); });
    while (!session->is_closed()) std::this_thread::yield();
  }
  stepper.join();
  closer.join();
  CHECK(holds<SessionClosed>(turn.error));
  CHECK(is_empty(engine->stats()));
}

TEST_CASE("a session can be closed in the middle of its steps", "[threads]") {
  const auto engine = make_engine(streaming_config(), small_options(2));
  constexpr int kMostTurns = 100;
  for (int round = 0; round < 5; ++round) {
    const auto session = engine->open_session({});
    std::atomic<int> n_turns{0};
    bool was_told = false;
    std::thread stepper([&] {
      for (int turn = 0; !was_told; ++turn) {
        if (turn > kMostTurns) {  // the closer was kept waiting; the session is not to run full
          was_told = throws<SessionClosed>([&] { session->length(); });
          continue;
        }
        was_told = throws<SessionClosed>([&] { session->feed_audio(sound(kTurnSamples, turn)); }) ||
                   throws<SessionClosed>([&] {
                     const Turn done = step_one(*session);
                     if (done.error) std::rethrow_exception(done.error);
                   });
        ++n_turns;
      }
    });
    while (n_turns < round) std::this_thread::yield();
    session->close();
    stepper.join();
    CHECK(was_told);
    CHECK(is_empty(engine->stats()));
  }
}

TEST_CASE("sessions that come and go leave the others as they were", "[threads]") {
  constexpr int kTurns = 12;
  const auto reference = make_engine()->open_session({});
  std::vector<std::vector<std::int32_t>> expected;
  for (int turn = 0; turn < kTurns; ++turn) expected.push_back(hear(*reference, turn).token_ids);

  const auto engine = make_engine(streaming_config(), small_options(2));
  const auto session = engine->open_session({});
  std::atomic<bool> is_done{false};
  std::thread visitors([&] {
    for (int visit = 0; !is_done; ++visit) {
      const auto visitor = engine->open_session({});
      hear(*visitor, 100 + visit);
      const auto fork = visitor->fork(0);
      visitor->close();
      hear(*fork, visit);
    }
  });
  for (int turn = 0; turn < kTurns; ++turn)
    CHECK(hear(*session, turn).token_ids == expected[static_cast<std::size_t>(turn)]);
  is_done = true;
  visitors.join();
  CHECK((session->digests() == reference->digests()));
  session->close();
  CHECK(is_empty(engine->stats()));
}

TEST_CASE("an engine can be closed while its sessions step", "[threads]") {
  const auto engine = make_engine(streaming_config(), small_options(2));
  std::atomic<int> n_turns{0};
  std::vector<std::thread> steppers;
  for (int i = 0; i < 2; ++i)
    steppers.emplace_back([&engine, &n_turns, session = engine->open_session({})] {
      while (!throws<SessionClosed>([&] {
        try {
          const Turn turn = step_one(*session, 1);
          if (turn.error) std::rethrow_exception(turn.error);
        } catch (const CapacityError&) {
          // On a busy machine the session may be full before this test gets to close the engine.
        }
      }))
        ++n_turns;
    });
  std::thread reader(
      [&engine] { while (!throws<SessionClosed>([&] { engine->weights_hash(); })); });
  while (n_turns < 6) std::this_thread::yield();
  engine->close();
  for (std::thread& stepper : steppers) stepper.join();
  reader.join();
  CHECK(is_empty(engine->stats()));
}

// A step plans its room for what it finds in the inbox; what comes while it plans is for the next.
TEST_CASE("an engine closes while the last owner of a session lets it go", "[threads]") {
  for (int i = 0; i < 20; ++i) {
    auto engine = make_engine();
    auto session = engine->open_session({});
    std::thread closing([&] { engine->close(); });
    while (!session->is_closed()) std::this_thread::yield();
    session.reset();
    closing.join();
    CHECK(engine->stats().pool.n_used == 0);
  }
}

TEST_CASE("decoding ends behind the next token when it is interrupted", "[threads]") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  const std::vector<std::int32_t> ids{9, 10, 11};
  session->lane().append_text(*session, ids, LogitsWanted::kNone);
  std::atomic<bool> is_over{false};
  std::thread interrupting([&] {
    while (!is_over.load()) session->interrupt();
  });
  const std::vector<std::int32_t> tokens = session->lane().decode(*session, 1500, {});
  is_over.store(true);
  interrupting.join();
  CHECK(tokens.size() < 1500);
  CHECK(session->length() == 3 + static_cast<std::int64_t>(tokens.size()) - 1);
}

TEST_CASE("what is fed during a step enters whole and in order", "[threads]") {
  ModelConfig config = streaming_config();
  config.audio.reset();
  config.vision.reset();
  EngineOptions options = small_options();
  options.max_positions = 12000;
  const auto engine = make_engine(config, options);
  const auto session = engine->open_session({});
  constexpr int kFeeds = 2000;
  std::atomic<bool> is_done{false};
  std::thread feeder([&] {
    const std::vector<std::int32_t> ids = {10, 11};
    for (int i = 0; i < kFeeds; ++i) session->feed_text(ids);
    is_done = true;
  });
  std::int64_t n_turns_with_text = 0;
  bool is_as_planned = true;
  for (bool was_last = false; !was_last;) {
    was_last = is_done;
    const std::int64_t before = session->length();
    const Turn turn = step_one(*session, 0);
    is_as_planned &= turn.error == nullptr && turn.position == before + turn.n_rows;
    n_turns_with_text += turn.n_rows > 0 ? 1 : 0;
  }
  feeder.join();
  CHECK(is_as_planned);
  CHECK(session->length() == 2 * kFeeds + 2 * n_turns_with_text);  // two brackets a turn
}

TEST_CASE("questions can be asked while a session steps", "[threads]") {
  const auto engine = make_engine(streaming_config(), small_options(2));
  const auto session = engine->open_session({});
  std::atomic<bool> is_done{false};
  bool is_right = true;
  std::thread asker([&] {
    std::int64_t length = 0;
    while (!is_done) {
      is_right &= !engine->description().empty() && !engine->memory_plan().empty();
      is_right &= engine->stats().n_sessions == 1;
      const std::int64_t now = session->length();
      is_right &= now >= length;
      length = now;
      session->usage();
      session->marks();
      session->digests();
    }
  });
  for (int turn = 0; turn < 10; ++turn) hear(*session, turn);
  is_done = true;
  asker.join();
  CHECK(is_right);
  CHECK(session->turn() == 10);
}

TEST_CASE("two engines work at once", "[threads]") {
  const auto drive = [](std::vector<std::int32_t>& tokens) {
    const auto session = make_engine(streaming_config(), small_options(2))->open_session({});
    for (int turn = 0; turn < 5; ++turn)
      for (const std::int32_t token : hear(*session, turn).token_ids) tokens.push_back(token);
  };
  std::vector<std::int32_t> here, there;
  std::thread other([&] { drive(there); });
  drive(here);
  other.join();
  CHECK(here == there);
}

}  // namespace
}  // namespace duplex::engine_tests
