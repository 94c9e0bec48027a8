// Engines whose ranks are threads: what they say and hold, on both lanes, and how they end. All of
// it runs under ThreadSanitizer too (`make tsan`). Processes: python_tests/parallel.
#include <catch2/catch.hpp>
#include <chrono>
#include <functional>
#include <thread>

#include "engine/snapshot.h"
#include "tests/model/shards.h"
#include "tests/ranks/fixtures.h"

namespace duplex::ranks_tests {
namespace {

using namespace engine_tests;

// Turns, a fork, a rewind, a hole; everything that was said, and logits.
std::vector<std::vector<float>> live(Engine& engine) {
  std::vector<std::vector<float>> story;
  const auto session = engine.open_session({});
  const std::vector<std::int32_t> words(100, 9);
  for (int turn = 0; turn < 20; ++turn) {
    const auto ids = hear(*session, turn).token_ids;
    story.emplace_back(ids.begin(), ids.end());
  }
  story.push_back(session->lane().append_text(*session, words, LogitsWanted::kAll));
  const auto fork = session->fork(0);
  session->truncate(session->marks().front());
  fork->forget(0, 64);
  for (Session* each : {session.get(), fork.get()}) {
    const auto ids = think(*each, 30);
    story.emplace_back(ids.begin(), ids.end());
    story.push_back(each->lane().append_text(*each, words, LogitsWanted::kLast));
  }
  return story;
}

TEST_CASE("one and two ranks say the same where sums are invariant", "[ranks][threads]") {
  const auto kv_dtype = GENERATE(DType::kF32, DType::kInt8);
  EngineOptions options = small_options();
  options.kv_dtype = kv_dtype;
  const RankedEngine one(streaming_config(), 1, Reduction::kInvariant, options);
  const RankedEngine two(streaming_config(), 2, Reduction::kInvariant, options);
  CHECK(live(*one) == live(*two));
  CHECK(is_empty(two->stats()));
}

TEST_CASE("ranks say the same whether they share memory or not", "[ranks][threads]") {
  const auto reduction = GENERATE(Reduction::kRanks, Reduction::kInvariant);
  const RankedEngine shared(streaming_config(), 2, reduction);
  const RankedEngine apart(streaming_config(), 2, reduction, small_options(), true);
  CHECK(live(*shared) == live(*apart));
  CHECK(is_empty(apart->stats()));
  CHECK(apart->description().find("2 ranks x 1 thread, mail") != std::string::npos);
}

TEST_CASE("both lanes at once on several ranks give the bits of each alone", "[ranks][threads]") {
  const std::int32_t n_ranks = GENERATE(2, 4);
  const bool is_apart = GENERATE(false, true);
  ModelConfig config = model_tests::cut_config();
  config.interaction = streaming_config().interaction;
  const RankedEngine engine(config, n_ranks, Reduction::kRanks, small_options(), is_apart);
  const auto calm = engine->open_session({});
  std::vector<std::vector<std::int32_t>> heard;
  for (int turn = 0; turn < 10; ++turn) heard.push_back(hear(*calm, turn).token_ids);
  const std::vector<std::int32_t> thought = think(*calm->fork(0), 40);

  const auto session = engine->open_session({});
  for (int turn = 0; turn < 10; ++turn)
    CHECK(hear(*session, turn).token_ids == heard[static_cast<std::size_t>(turn)]);
  std::vector<std::int32_t> there;
  const auto fork = session->fork(0, LaneKind::kBackground);
  std::thread thinker([&] { there = think(*fork, 40); });
  const auto again = engine->open_session({});
  for (int turn = 0; turn < 10; ++turn)
    CHECK(hear(*again, turn).token_ids == heard[static_cast<std::size_t>(turn)]);
  thinker.join();
  CHECK(there == thought);
}

TEST_CASE("a session moves between groups with the blocks of all ranks", "[ranks][threads]") {
  const std::int32_t n_ranks = GENERATE(2, 4);
  ModelConfig config = model_tests::cut_config();
  config.interaction = streaming_config().interaction;
  const RankedEngine first(config, n_ranks, Reduction::kRanks);
  const RankedEngine second(config, n_ranks, Reduction::kRanks);
  const auto session = first->open_session({});
  for (int turn = 0; turn < 30; ++turn) hear(*session, turn);
  const auto moved = copy_session(*session, *second);
  CHECK(moved->digests() == session->digests());
  CHECK(think(*moved, 40) == think(*session, 40));
}

TEST_CASE("a rank that is gone ends every call, and the engine closes", "[ranks][threads]") {
  const bool is_apart = GENERATE(false, true);
  RankedEngine engine(streaming_config(), 2, Reduction::kRanks, small_options(), is_apart);
  const auto session = engine->open_session({});
  hear(*session, 0);
  engine.leader().fail(1, "it was told to go");
  CHECK_THROWS_WITH(hear(*session, 1), Catch::Contains("it was told to go"));
  CHECK_THROWS_AS(engine->open_session({}), RankFailed);
  CHECK_THROWS_AS(think(*session, 3), RankFailed);
  engine->close();
  CHECK(throws<SessionClosed>([&] { hear(*session, 1); }));
}

TEST_CASE("a rank that goes while guesses are made ends the next call too", "[ranks][threads]") {
  ModelConfig config = streaming_config();
  config.mtp.layers.assign(3, {true, false});
  RankedEngine engine(config, 2, Reduction::kRanks);
  const auto guessing = engine->open_session({0, {}, 4}), plain = engine->open_session({});
  for (Session* session : {guessing.get(), plain.get()}) think(*session, 1);
  engine.leader().fail(1, "it was told to go");
  for (Session* session : {guessing.get(), plain.get()})
    CHECK_THROWS_AS(session->lane().decode(*session, 4, {}), RankFailed);
}

// Whatever the ranks are doing at that moment, in passes of both lanes and in page memory.
TEST_CASE("a rank that goes in the middle of the work of both lanes ends it", "[ranks][threads]") {
  const bool is_apart = GENERATE(false, true);
  const int after_ms = GENERATE(1, 3, 9);
  RankedEngine engine(streaming_config(), 2, Reduction::kRanks, small_options(), is_apart);
  const auto session = engine->open_session({});
  const auto fork = session->fork(0, LaneKind::kBackground);
  const auto ends = [](const std::function<void()>& work) {
    return throws<RankFailed>([&] {
      while (true) work();
    });
  };
  bool has_ended = false;
  std::thread thinker([&] {
    has_ended = ends([&] {
      engine->open_session({});
      think(*fork, 1);
    });
  });
  std::thread watcher([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(after_ms));
    engine.leader().fail(1, "it was told to go");
  });
  int turn = 0;
  CHECK(ends([&] { hear(*session, turn++); }));
  thinker.join();
  watcher.join();
  CHECK(has_ended);
}

}  // namespace
}  // namespace duplex::ranks_tests
