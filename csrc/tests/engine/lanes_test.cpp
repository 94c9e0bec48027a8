// Two lanes of one engine, two engines on one machine, and interruptions. Everything here runs
// under ThreadSanitizer too.
#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "tests/engine/fixtures.h"

namespace duplex::engine_tests {
namespace {

// What a stream says and holds in the end.
struct Story {
  std::vector<std::vector<std::int32_t>> turns;
  Digests digests;
  bool operator==(const Story&) const = default;
};

Story live(Session& session, int seed, int n_turns) {
  Story story;
  for (int turn = 0; turn < n_turns; ++turn)
    story.turns.push_back(hear(session, seed + turn).token_ids);
  story.digests = session.digests();
  return story;
}

TEST_CASE("two lanes at once give the bits of each alone", "[threads]") {
  const int n_threads = GENERATE(1, 2, 3);
  constexpr int kTurns = 12;
  const auto alone = make_engine();
  const auto calm = alone->open_session({});
  const Story past = live(*calm, 5, 3);
  const auto calm_fork = calm->fork(0);
  const std::vector<std::int32_t> thought = think(*calm_fork, 40);
  const Story story = live(*calm, 50, kTurns);

  const auto engine = make_engine(streaming_config(), small_options(n_threads));
  const auto session = engine->open_session({});
  CHECK(live(*session, 5, 3) == past);
  std::vector<std::vector<std::int32_t>> thoughts(3);
  std::vector<std::thread> thinkers;
  for (auto& result : thoughts) {
    const auto fork = session->fork(0, LaneKind::kBackground);
    thinkers.emplace_back([fork, &result] { result = think(*fork, 40); });
  }
  CHECK(live(*session, 50, kTurns) == story);
  for (std::thread& thinker : thinkers) thinker.join();
  for (const auto& result : thoughts) CHECK(result == thought);
  session->close();
  CHECK(is_empty(engine->stats()));
}

TEST_CASE("lanes share pages and pool while forks come and go", "[threads]") {
  const auto engine = make_engine(streaming_config(), small_options(2));
  const auto session = engine->open_session({});
  live(*session, 1, 4);
  std::atomic<bool> is_over{false};
  std::vector<std::thread> thinkers;
  std::atomic<int> n_forks{0};
  for (int i = 0; i < 2; ++i)
    thinkers.emplace_back([&, i] {
      while (!is_over) {
        std::shared_ptr<Session> fork;
        when_free([&] { fork = session->fork(0, LaneKind::kBackground); });
        think(*fork, 3 + i);
        fork->truncate(fork->marks().front());
        ++n_forks;
      }
    });
  for (int turn = 0; turn < 25; ++turn) {
    when_free([&] { hear(*session, turn); });
    if (turn % 6 == 5) when_free([&] { session->truncate(session->marks().front()); });
  }
  while (n_forks < 6) std::this_thread::yield();
  is_over = true;
  for (std::thread& thinker : thinkers) thinker.join();
  session->close();
  CHECK(is_empty(engine->stats()));
}

TEST_CASE("what the background does beside its passes has the share of its passes") {
  const auto engine = make_engine(streaming_config(), small_options(2));
  const auto session = engine->open_session({});
  const auto fork = session->fork(0, LaneKind::kBackground);
  const auto thread_of = [](Lane& lane) {
    const std::lock_guard lock(lane.mutex());
    std::thread::id thread;
    lane.run_aside([&] { thread = std::this_thread::get_id(); });
    return thread;
  };
  CHECK(thread_of(session->lane()) == std::this_thread::get_id());
  CHECK(thread_of(fork->lane()) != std::this_thread::get_id());
}

TEST_CASE("closing the engine ends the work of both lanes", "[threads]") {
  auto engine = make_engine(streaming_config(), small_options(2));
  const auto session = engine->open_session({});
  live(*session, 1, 2);
  const auto fork = session->fork(0, LaneKind::kBackground);
  std::thread thinker([&] {
    CHECK(throws<SessionClosed>([&] {
      for (;;) {
        think(*fork, 5);
        fork->truncate(fork->marks().front());
      }
    }));
  });
  live(*session, 3, 3);
  engine->close();
  thinker.join();
  CHECK(is_empty(engine->stats()));
  CHECK(throws<SessionClosed>([&] { session->fork(0, LaneKind::kBackground); }));
}

TEST_CASE("an engine beside another computes its own bits on its threads", "[threads]") {
  const auto first = make_engine(streaming_config(), small_options(2));
  model_tests::RandomCheckpoint checkpoint(streaming_config(), 1);
  auto second =
      std::make_shared<Engine>(streaming_config(), model_tests::views(checkpoint.tensors()),
                               small_options(), LoadProgress{}, first.get());
  const auto one = first->open_session({});
  const auto two = second->open_session({});
  Story other;
  std::thread driver([&] { other = live(*two, 7, 10); });
  const Story story = live(*one, 7, 10);
  driver.join();
  CHECK(story == other);
  const StepRequest both[] = {{one.get(), 1}, {two.get(), 1}};
  CHECK(throws<InvalidArgument>([&] { first->step(both); }));
}

TEST_CASE("two engines out of one page pool leave each other what they give back", "[threads]") {
  const auto first = make_engine();
  model_tests::RandomCheckpoint checkpoint(streaming_config(), 1);
  const auto make = [&](std::int64_t page_bytes, const Engine* beside) {
    EngineOptions options = small_options();
    options.memory_bytes = beside != nullptr ? 0 : std::int64_t{16} << 20;
    options.page_bytes = page_bytes;
    return std::make_shared<Engine>(streaming_config(), model_tests::views(checkpoint.tensors()),
                                    options, LoadProgress{}, beside);
  };
  const auto second = make(0, first.get());
  const auto one = first->open_session({});
  Story story;
  {
    const auto two = second->open_session({});
    CHECK(first->stats().pool.n_promised == second->stats().pool.n_promised);
    std::thread driver([&] { story = live(*two, 7, 8); });
    CHECK(live(*one, 7, 8).turns.size() == 8);
    driver.join();
    CHECK(story == live(*first->open_session({}), 7, 8));
    std::vector<std::shared_ptr<Session>> all;
    CHECK(throws<CapacityError>([&] {
      for (;;) all.push_back(second->open_session({}));
    }));
    CHECK(throws<CapacityError>([&] { first->open_session({}); }));  // nothing is left
  }
  CHECK_NOTHROW(first->open_session({}));
  one->close();
  CHECK(is_empty(first->stats()));
  CHECK(is_empty(second->stats()));
  const auto large = make(std::int64_t{1} << 20, nullptr);
  CHECK(large->stats().pool.page_bytes == std::int64_t{1} << 20);
  CHECK(throws<InvalidArgument>([&] { make(-1, nullptr); }));
}

TEST_CASE("an interruption ends the turn behind its next token", "[threads]") {
  ModelConfig config = streaming_config();
  config.interaction.reset();  // speaks until its limit
  config.eos_ids.clear();
  const auto engine = make_engine(config);
  const auto session = engine->open_session({});
  const std::vector<std::int32_t> words = {9, 10, 11};
  session->interrupt();  // of nothing: the next turn is whole
  session->feed_text(words);
  CHECK(step_one(*session, 3).stopped == StopReason::kLimit);
  Turn cut;
  std::atomic<bool> is_over{false};
  std::thread stepper([&] {
    cut = step_one(*session, 1500);
    is_over = true;
  });
  while (!is_over) session->interrupt();
  stepper.join();
  REQUIRE(cut.stopped == StopReason::kInterrupted);
  CHECK(cut.epoch < session->epoch());
  CHECK(cut.token_ids.size() < 1500);
  session->feed_text(words);

  const auto again = engine->open_session({});
  again->feed_text(words);
  step_one(*again, 3);
  const auto n_said = static_cast<std::int32_t>(cut.token_ids.size());
  CHECK(step_one(*again, n_said).token_ids == cut.token_ids);
  again->feed_text(words);
  CHECK(step_one(*again, 4).token_ids == step_one(*session, 4).token_ids);
}

}  // namespace
}  // namespace duplex::engine_tests
