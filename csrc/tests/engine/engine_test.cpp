// The engine with a tiny random model made in memory: the life of sessions, one micro-turn after
// another, what is refused and what stays as it was. Threads: engine_threads_test.cpp.
#include "engine/engine.h"

#include <catch2/catch.hpp>

#include "engine/snapshot.h"
#include "tests/engine/fixtures.h"

namespace duplex::engine_tests {
namespace {

TEST_CASE("a micro-turn takes what was fed and answers") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  session->feed_audio(sound(kTurnSamples));
  const Turn turn = step_one(*session);
  CHECK(turn.turn == 1);
  CHECK(turn.n_rows == 4);
  CHECK(turn.missing_samples == 0);
  REQUIRE(!turn.token_ids.empty());
  CHECK(turn.token_ids.size() <= 3);
  // The last token waits for the next input.
  CHECK(turn.position == 4 + static_cast<std::int64_t>(turn.token_ids.size()) - 1);
  CHECK(session->length() == turn.position);
  CHECK((turn.stopped == StopReason::kListen) == (turn.token_ids.back() == kListen));

  const std::vector<std::int32_t> typed = {10, 11};
  session->feed_text(typed);
  session->feed_result(typed);
  session->feed_image(picture(4, 4));  // two patches, one of them padding
  session->feed_audio(sound(kTurnSamples - 100));
  const Turn second = step_one(*session);
  CHECK(second.turn == 2);
  CHECK(second.n_rows == 1 + 2 * (2 + 2) + 2 + 4);
  CHECK(second.missing_samples == 100);

  session->feed_audio(sound(3 * kTurnSamples));
  const Turn late = step_one(*session);
  CHECK(late.merged_turns == 2);
  CHECK(late.turn == 5);
}

TEST_CASE("a session computes the same alone and among others") {
  const int n_threads = GENERATE(1, 3);
  const auto alone = make_engine()->open_session({});
  const auto engine = make_engine(streaming_config(), small_options(n_threads));
  std::vector<std::shared_ptr<Session>> sessions;
  for (int i = 0; i < 5; ++i) sessions.push_back(engine->open_session({}));
  for (int turn = 0; turn < 6; ++turn) {
    const Turn expected = hear(*alone, turn);
    std::vector<StepRequest> requests;
    for (std::size_t i = 0; i < sessions.size(); ++i) {
      const bool is_twin = i == 2;
      if (!is_twin && (static_cast<int>(i) + turn) % 3 == 0) continue;  // others come and go
      sessions[i]->feed_audio(sound(kTurnSamples, is_twin ? turn : 40 + static_cast<int>(i)));
      requests.push_back({sessions[i].get(), -1});
    }
    for (std::size_t i = 0; const Turn& found : engine->step(requests)) {
      REQUIRE(found.error == nullptr);
      if (requests[i++].session != sessions[2].get()) continue;
      CHECK(found.token_ids == expected.token_ids);
      CHECK(found.position == expected.position);
    }
  }
  CHECK((sessions[2]->digests() == alone->digests()));
}

TEST_CASE("logits do not depend on how rows are cut") {
  const auto engine = make_engine();
  const auto whole = engine->open_session({});
  const auto cut = engine->open_session({});
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 60; ++i) ids.push_back(i * 7 % 40);
  const std::vector<float> expected = whole->lane().append_text(*whole, ids, LogitsWanted::kAll);
  REQUIRE(expected.size() == 60 * 37);
  std::vector<float> logits;
  for (std::size_t begin = 0, n = 1; begin < ids.size(); begin += n, n = n * 2 % 23) {
    n = std::min(n, ids.size() - begin);
    const auto part =
        cut->lane().append_text(*cut, std::span(ids).subspan(begin, n), LogitsWanted::kAll);
    logits.insert(logits.end(), part.begin(), part.end());
  }
  CHECK((logits == expected));
  CHECK((cut->digests() == whole->digests()));
}

TEST_CASE("guesses change no turn, alone or with others") {
  ModelConfig config = streaming_config();
  config.mtp.layers.resize(GENERATE(0, 3), {true, false});
  const auto engine = make_engine(config);
  const auto open = [&](std::int32_t max_drafts) {
    return engine->open_session({0, {1, 0.6f, 3, 1.0f}, max_drafts});
  };
  const auto plain = open(0);
  const std::vector<std::shared_ptr<Session>> guessing = {open(1), open(4), open(kMaxDrafts)};
  const std::vector<std::int32_t> song = {10, 11, 12, 10, 11, 12, 10, 11, 12};
  std::int64_t n_accepted = 0;
  for (int turn = 0; turn < 20; ++turn) {
    plain->feed_text(song);
    plain->feed_audio(sound(kTurnSamples, turn));
    const Turn expected = step_one(*plain, 12);
    CHECK(expected.n_drafted == 0);
    std::vector<StepRequest> requests;
    for (const auto& session : guessing) {
      session->feed_text(song);
      session->feed_audio(sound(kTurnSamples, turn));
      requests.push_back({session.get(), 12});
    }
    for (std::size_t i = 0; const Turn& found : engine->step(requests)) {
      REQUIRE(found.error == nullptr);
      CHECK(found.token_ids == expected.token_ids);
      CHECK(found.position == expected.position);
      CHECK(found.kv_bytes == expected.kv_bytes + guessing[i++]->draft_bytes());
      CHECK(found.n_accepted <= found.n_drafted);
      n_accepted += found.n_accepted;
    }
  }
  CHECK(n_accepted > 0);
  CHECK(engine->stats().accepted == n_accepted);
  for (const auto& session : guessing) CHECK((session->digests() == plain->digests()));
}

TEST_CASE("the error of one session is in its own turn") {
  const auto engine = make_engine();
  const auto full = engine->open_session({6, {}});
  const auto other = engine->open_session({});
  const auto reference = engine->open_session({});
  CHECK(hear(*other, 0).token_ids == hear(*reference, 0).token_ids);
  for (const auto& session : {full, other, reference}) session->feed_audio(sound(kTurnSamples, 1));
  full->feed_text(std::vector<std::int32_t>{1, 2, 3});
  const std::vector<StepRequest> requests = {{full.get(), -1}, {other.get(), -1}};
  const std::vector<Turn> turns = engine->step(requests);
  CHECK(holds<CapacityError>(turns[0].error));
  CHECK(full->length() == 0);
  CHECK(turns[1].error == nullptr);
  CHECK(turns[1].token_ids == step_one(*reference).token_ids);
  CHECK((other->digests() == reference->digests()));
}

// A call that cannot have its rows takes nothing, not even the token that waits.
TEST_CASE("sessions are filled to the last position and no further") {
  const auto engine = make_engine();
  const auto open = [&](std::int64_t max_positions) {
    return engine->open_session({max_positions, {}});
  };
  const auto text = [](Session& session, std::size_t n) {
    session.lane().append_text(session, std::vector<std::int32_t>(n, 9), LogitsWanted::kNone);
  };
  const auto full = open(10);
  text(*full, 7);
  full->lane().decode(*full, 1, {});  // it waits
  CHECK(throws<CapacityError>([&] { text(*full, 3); }));
  CHECK(throws<CapacityError>([&] { full->lane().decode(*full, 4, {}); }));
  text(*full, 2);
  CHECK(full->length() == 10);
  const auto said = open(10);
  text(*said, 8);
  CHECK(throws<CapacityError>([&] { said->lane().decode(*said, 4, {}); }));
  CHECK(said->lane().decode(*said, 3, {}).size() == 3);
  CHECK(said->length() == 10);
  CHECK(throws<CapacityError>([&] { said->lane().decode(*said, 1, {}); }));

  const auto turns = open(6);
  turns->feed_audio(sound(kTurnSamples));
  CHECK(holds<CapacityError>(step_one(*turns, 4).error));
  const Turn turn = step_one(*turns, 3);
  CHECK(turn.error == nullptr);
  CHECK(turn.n_rows == 4);
  const auto passes = open(30);  // more rows than a pass has
  passes->feed_text(std::vector<std::int32_t>(30, 9));
  CHECK(holds<CapacityError>(step_one(*passes).error));
  CHECK(passes->length() == 0);
}

TEST_CASE("sound that has no room is not taken") {
  const auto engine = make_engine();
  const auto full = engine->open_session({4, {}});
  const auto append = [](Session& session, std::int64_t n_samples, bool is_end) {
    return session.lane().append_audio(session, sound(n_samples), is_end, LogitsWanted::kLast);
  };
  const std::int64_t hop = kTurnSamples / 4;
  append(*full, 5 * hop - 1, false);
  CHECK(throws<CapacityError>([&] { append(*full, 1, false); }));
  CHECK(throws<CapacityError>([&] { append(*full, 0, true); }));
  const auto other = engine->open_session({});
  append(*other, 5 * hop - 1, false);
  CHECK((append(*full->fork(5), 1, false) == append(*other, 1, false)));
}

TEST_CASE("forks share a past and part ways") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  for (int turn = 0; turn < 5; ++turn) hear(*session, turn);
  const auto fork = session->fork(0);
  const auto other = session->fork(0);
  CHECK((fork->digests() == session->digests()));
  hear(*other, 99);
  CHECK(hear(*fork, 7).token_ids == hear(*session, 7).token_ids);
  CHECK((fork->digests() == session->digests()));
  CHECK(throws<InvalidArgument>([&] { session->fork(-1); }));
}

TEST_CASE("truncate goes back to the end of an earlier call") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  const auto straight = engine->open_session({});
  for (int turn = 0; turn < 2; ++turn) hear(*session, turn), hear(*straight, turn);
  const std::int64_t position = session->length();
  hear(*session, 50);
  session->truncate(position);
  CHECK(session->epoch() == 1);
  CHECK(session->turn() == 2);
  CHECK(hear(*session, 2).token_ids == hear(*straight, 2).token_ids);
  CHECK((session->digests() == straight->digests()));
  CHECK(throws<InvalidArgument>([&] { session->truncate(session->length() - 1); }));
}

TEST_CASE("a closed session answers nothing and gives its memory back") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  hear(*session, 0);
  CHECK(engine->stats().n_sessions == 1);
  CHECK(engine->stats().pool.n_used > 0);
  session->close();
  session->close();  // twice is once
  CHECK(session->is_closed());
  CHECK(is_empty(engine->stats()));
  const std::vector<std::int32_t> ids = {1};
  CHECK(holds<SessionClosed>(step_one(*session).error));
  CHECK(throws<SessionClosed>([&] { session->interrupt(); }));
  CHECK(throws<SessionClosed>([&] { session->feed_audio({}); }));
  CHECK(throws<SessionClosed>([&] { session->feed_text(ids); }));
  CHECK(throws<SessionClosed>([&] { session->feed_result(ids); }));
  CHECK(throws<SessionClosed>([&] { session->feed_image(picture(4, 4)); }));
  CHECK(throws<SessionClosed>([&] { session->length(); }));
  CHECK(throws<SessionClosed>([&] { session->usage(); }));
  CHECK(throws<SessionClosed>([&] { session->marks(); }));
  CHECK(throws<SessionClosed>([&] { session->digests(); }));
  CHECK(throws<SessionClosed>([&] { session->truncate(0); }));
  CHECK(throws<SessionClosed>([&] { session->forget(0, 64); }));
  CHECK(throws<SessionClosed>([&] { session->fork(0); }));
  CHECK(throws<SessionClosed>([&] { session->set_sampling({}); }));
  CHECK(throws<SessionClosed>(
      [&] { session->lane().append_text(*session, ids, LogitsWanted::kNone); }));
  CHECK(throws<SessionClosed>([&] { session->lane().decode(*session, 1, {}); }));
}

TEST_CASE("a session that drafts gives back the memory of both, closed or moved") {
  ModelConfig config = streaming_config();
  config.mtp.layers = {{true, false}};
  const auto engine = make_engine(config), other = make_engine(config);
  const auto session = engine->open_session({0, {}, 4});
  for (int turn = 0; turn < 9; ++turn) hear(*session, turn);
  CHECK(session->draft_bytes() > 0);
  const auto moved = copy_session(*session, *other);
  for (int turn = 9; turn < 30; ++turn)
    CHECK(hear(*moved, turn).token_ids == hear(*session, turn).token_ids);
  session->close();
  moved->close();
  CHECK(is_empty(engine->stats()));
  CHECK(is_empty(other->stats()));
}

TEST_CASE("closing the engine closes its sessions") {
  const auto engine = make_engine();
  const auto first = engine->open_session({});
  const auto second = engine->open_session({});
  hear(*first, 0);
  engine->close();
  engine->close();
  CHECK(first->is_closed());
  CHECK(second->is_closed());
  CHECK(is_empty(engine->stats()));
  CHECK(throws<SessionClosed>([&] { step_one(*first); }));
  CHECK(throws<SessionClosed>([&] { engine->open_session({}); }));
  CHECK(throws<SessionClosed>([&] { engine->step({}); }));
  CHECK(throws<SessionClosed>([&] { engine->embed_text(std::vector<std::int32_t>{1}); }));
  CHECK(throws<SessionClosed>([&] { engine->weights_hash(); }));
}

TEST_CASE("a session keeps its engine alive") {
  auto engine = make_engine();
  const auto session = engine->open_session({});
  engine.reset();
  CHECK(hear(*session, 0).turn == 1);
}

TEST_CASE("a session cannot be in one step twice") {
  const auto engine = make_engine();
  const auto session = engine->open_session({});
  const auto other = engine->open_session({});
  const std::vector<StepRequest> requests = {
      {other.get(), -1}, {session.get(), -1}, {session.get(), -1}};
  CHECK(throws<SessionBusy>([&] { engine->step(requests); }));
  CHECK(hear(*session, 0).turn == 1);  // nobody stays busy
  CHECK(hear(*other, 0).turn == 1);
}

TEST_CASE("an engine that cannot work is not made") {
  const auto refuses = [](auto spoil) {
    EngineOptions options = small_options();
    spoil(options);
    make_engine(streaming_config(), options);
  };
  CHECK(throws<CapacityError>([&] { refuses([](auto& o) { o.memory_bytes = 4096; }); }));
  CHECK(throws<InvalidArgument>([&] { refuses([](auto& o) { o.memory_bytes = 0; }); }));
  CHECK(throws<InvalidArgument>([&] { refuses([](auto& o) { o.max_batch_rows = 0; }); }));
  CHECK(throws<InvalidArgument>([&] { refuses([](auto& o) { o.device = "abacus"; }); }));
  CHECK(throws<InvalidArgument>([&] { refuses([](auto& o) { o.rewind_rows = -1; }); }));
  CHECK(throws<InvalidArgument>([&] { refuses([](auto& o) { o.n_ranks = 2; }); }));  // alone
  CHECK(throws<InvalidArgument>(
      [&] { refuses([](auto& o) { o.dtype = o.weights = o.kv_dtype = DType::kInt8; }); }));
  CHECK(throws<Error>([&] {
    refuses([](auto& o) {
      o.device = "cuda";
      o.backend.isa = "sparc";  // wrong where there is a GPU, too
    });
  }));
  const auto engine = make_engine();
  CHECK(throws<CapacityError>([&] { engine->open_session({1 << 30, {}}); }));
  CHECK(throws<InvalidArgument>([&] { engine->open_session({-1, {}}); }));
  CHECK(throws<InvalidArgument>([&] { engine->open_session({0, {}, -1}); }));
  CHECK(throws<InvalidArgument>([&] { engine->open_session({0, {}, kMaxDrafts + 1}); }));
  CHECK(is_empty(engine->stats()));
}

}  // namespace
}  // namespace duplex::engine_tests
