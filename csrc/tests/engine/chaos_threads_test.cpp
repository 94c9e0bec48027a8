// Random schedules of threads on one engine: users who are fed, stepped, interrupted, rewound,
// forked into the background, copied, and closed in the middle of a call. All of it runs under
// ThreadSanitizer: ten schedules always, five hundred with `duplex_tests "[chaos]"`.
#include <atomic>
#include <catch2/catch.hpp>
#include <random>
#include <thread>

#include "engine/snapshot.h"
#include "tests/engine/fixtures.h"

namespace duplex::engine_tests {
namespace {

class Schedule {
 public:
  explicit Schedule(std::uint64_t seed)
      : random_(seed),
        engine_(make_engine(streaming_config(), options(static_cast<int>(1 + seed % 3)))) {}

  // Returns the micro-turns that were run.
  int run() {
    std::vector<std::thread> threads;
    for (int user = 0; user < 3; ++user)
      threads.emplace_back([this, seed = random_()] { live(seed); });
    for (std::thread& thread : threads) thread.join();
    CHECK(n_strange == 0);
    CHECK(is_empty(engine_->stats()));
    return n_turns;
  }

  std::atomic<int> n_strange{0};  // errors that nobody documents
  std::atomic<int> n_turns{0};

 private:
  static EngineOptions options(int n_threads) {
    EngineOptions options = small_options(n_threads);
    options.max_positions = 400;
    return options;
  }

  // What may be refused: a busy or closed session, a full pool, and a mark that another thread has
  // just left behind.
  template <class Fn>
  void dare(const Fn& fn) {
    try {
      fn();
    } catch (const SessionBusy&) {
    } catch (const SessionClosed&) {
    } catch (const CapacityError&) {
    } catch (const InvalidArgument&) {
    } catch (const std::exception&) {
      ++n_strange;
    }
  }

  // A user, somebody who meddles from another thread, and a fork that thinks in a third.
  void live(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::shared_ptr<Session> session;
    dare([&] { session = engine_->open_session({}); });
    if (session == nullptr) return;
    std::thread meddler([&, meddling = random()] { meddle(*session, meddling); });
    std::vector<std::thread> thinkers;
    for (int turn = 0; turn < 12; ++turn) {
      dare([&] {
        session->feed_audio(sound(static_cast<std::int64_t>(random() % 4000), turn));
        n_turns += !step_one(*session, static_cast<std::int32_t>(random() % 4)).error;
      });
      if (random() % 4 == 0)
        dare([&] {
          thinkers.emplace_back([this, fork = session->fork(0, LaneKind::kBackground)] {
            dare([&] { fork->lane().decode(*fork, 15, {}); });
            fork->close();
          });
        });
      if (random() % 6 == 0) dare([&] { copy_session(*session, *engine_)->close(); });
      if (random() % 40 == 0) session->close();
    }
    meddler.join();
    for (std::thread& thinker : thinkers) thinker.join();
    session->close();
  }

  void meddle(Session& session, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int i = 0; i < 25; ++i) {
      const std::vector<std::int32_t> words = {9, 10, static_cast<std::int32_t>(11 + i % 5)};
      dare([&] {
        switch (random() % 6) {
          case 0:
            return session.interrupt();
          case 1:
            return session.feed_text(words);
          case 2:
            return session.feed_result(words);
          case 3: {
            const auto marks = session.marks();
            return marks.empty() ? void() : session.truncate(marks[random() % marks.size()]);
          }
          case 4:
            session.length();
            return session.set_sampling({});
          default:
            step_one(session, 1);
        }
      });
      if (random() % 60 == 0) session.close();
      std::this_thread::yield();
    }
  }

  std::mt19937_64 random_;
  std::shared_ptr<Engine> engine_;
};

void run_schedules(std::uint64_t first, std::uint64_t end) {
  std::uint64_t n_turns = 0;
  for (std::uint64_t seed = first; seed < end; ++seed)
    n_turns += static_cast<std::uint64_t>(Schedule(seed).run());
  CHECK(n_turns > 5 * (end - first));
}

TEST_CASE("no schedule of threads loses a page, a turn or an error", "[threads]") {
  run_schedules(0, 10);
}

TEST_CASE("five hundred schedules of threads", "[.][chaos]") { run_schedules(1000, 1500); }

}  // namespace
}  // namespace duplex::engine_tests
