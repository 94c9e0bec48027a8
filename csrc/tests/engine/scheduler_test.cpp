// The scheduler against its six rules (scheduler.h): single decisions, then thousands of random
// days of sessions and tasks on a made-up clock.
#include "engine/scheduler.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <random>
#include <vector>

#include "core/error.h"

namespace duplex {
namespace {

constexpr std::int64_t kPeriod = 200'000;
constexpr std::int64_t kPatience = 100'000;
constexpr std::int64_t kLongestSlice = 300'000;  // of the random days
constexpr std::int64_t kLongestPass = 60'000 + 6 * 40 * 300;

struct Scene {
  std::vector<TurnLoad> sessions;
  std::vector<TaskLoad> tasks;
  SchedulerState state;

  Action at(std::int64_t now_us) {
    state.sessions = sessions;
    state.tasks = tasks;
    return next_action(state, now_us);
  }
};

std::vector<std::int64_t> ids(const Action& action) {
  std::vector<std::int64_t> sessions;
  for (const TurnPlan& plan : action.turns) sessions.push_back(plan.session);
  return sessions;
}

TEST_CASE("nothing to do is a wait without end", "[scheduler]") {
  const Action action = Scene{}.at(5);
  CHECK(action.kind == ActionKind::kWait);
  CHECK(action.until_us == kNever);
}

TEST_CASE("whole input runs when it is due, missing input when patience ends", "[scheduler]") {
  Scene scene{{{1, 1000, 1, 5}, {2, 900, 0, 5}}, {}, {}};
  CHECK(scene.at(999).until_us == 1000);
  CHECK(ids(scene.at(1000)) == std::vector<std::int64_t>{1});
  scene.sessions.erase(scene.sessions.begin());
  CHECK(scene.at(1000).until_us == 900 + kPatience);
  CHECK(ids(scene.at(900 + kPatience)) == std::vector<std::int64_t>{2});
}

TEST_CASE("a pass takes with it what becomes due meanwhile, if it is whole", "[scheduler]") {
  Scene scene{{{1, 0, 1, 5}, {2, 5000, 1, 5}, {3, 5000, 0, 5}, {4, 5001, 1, 5}}, {}, {}};
  scene.state.pass_us = 5000;
  CHECK(ids(scene.at(0)) == std::vector<std::int64_t>{1, 2});
  scene.state.row_ns = 200;  // five rows: one microsecond more
  CHECK(ids(scene.at(0)) == std::vector<std::int64_t>{1, 2, 4});
}

TEST_CASE("a pass ends before it costs more than a period, but is never empty", "[scheduler]") {
  Scene scene{{{1, 3, 1, 100}, {2, 1, 1, 1900}, {3, 2, 1, 200}}, {}, {}};
  scene.state.row_ns = 100'000;
  CHECK(ids(scene.at(5)) == std::vector<std::int64_t>{2});
  scene.sessions[1].n_rows = 1000;
  CHECK(ids(scene.at(5)) == std::vector<std::int64_t>{2, 3, 1});
  scene.sessions[1].n_rows = 1'000'000;
  CHECK(ids(scene.at(5)) == std::vector<std::int64_t>{2});
}

TEST_CASE("what is late is merged, and counted to the microsecond", "[scheduler]") {
  const TurnLoad gone{1, 0, 0, 5};
  CHECK(turns_to_run(gone, kPatience, kPeriod, kPatience) == 1);
  CHECK(turns_to_run(gone, kPatience + kPeriod - 1, kPeriod, kPatience) == 1);
  CHECK(turns_to_run(gone, kPatience + kPeriod, kPeriod, kPatience) == 2);
  const TurnLoad slow{1, 0, 3, 5};  // three are there, the machine is late
  CHECK(turns_to_run(slow, 3 * kPeriod + kPatience - 1, kPeriod, kPatience) == 3);
  CHECK(turns_to_run(slow, 3 * kPeriod + kPatience, kPeriod, kPatience) == 4);
  CHECK(turns_to_run(slow, -kPeriod, kPeriod, kPatience) == 3);  // ahead of its time
}

TEST_CASE("background work fills the gaps, oldest first, if its slice fits", "[scheduler]") {
  Scene scene{{{1, 10'000, 1, 5}}, {{7, 50, 4000}, {8, 40, 4000}}, {}};
  Action action = scene.at(100);
  CHECK(action.kind == ActionKind::kBackground);
  CHECK(action.task == 8);
  CHECK(action.until_us == 10'000);
  CHECK_FALSE(action.is_forced);
  scene.tasks[1].slice_us = 9901;
  CHECK(scene.at(100).task == 7);
  scene.tasks[0].slice_us = 9901;
  action = scene.at(100);
  CHECK(action.kind == ActionKind::kWait);
  CHECK(action.until_us == 10'000);
  scene.sessions[0].n_whole = 0;  // its input may come when it is due, or until patience ends
  scene.tasks[0].slice_us = 9900;
  CHECK(scene.at(100).task == 7);
  CHECK(scene.at(101).kind == ActionKind::kWait);
  CHECK(scene.at(10'000).task == 8);
  scene.sessions.clear();
  CHECK(scene.at(100).task == 8);
}

TEST_CASE("a task that never fits is let in now and then", "[scheduler]") {
  Scene scene{{{1, 2'000'000, 1, 5}}, {{7, 1'000'000, 5'000'000}}, {}};
  CHECK(scene.at(1'500'000).until_us == 2'000'000);
  CHECK(scene.at(1'999'999).kind == ActionKind::kWait);
  const Action action = scene.at(2'000'000);  // before the session that is ready
  CHECK(action.kind == ActionKind::kBackground);
  CHECK(action.is_forced);
  scene.state.forced_us = 1'500'000;  // another task has delayed sessions a moment ago
  CHECK(scene.at(2'000'000).kind == ActionKind::kTurns);
}

TEST_CASE("a state without a period is refused", "[scheduler]") {
  Scene scene;
  scene.state.period_us = 0;
  CHECK_THROWS_AS(scene.at(0), InvalidArgument);
  scene.state = {};
  scene.state.patience_us = -1;
  CHECK_THROWS_AS(scene.at(0), InvalidArgument);
}

// ---- random days: input comes late or never, passes and slices take their time

using Random = std::mt19937_64;

std::int64_t between(Random& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

// One user: micro-turn k of the sound arrives at arrivals[k], or never (kNever).
struct User {
  std::int64_t due_us = 0;
  std::int64_t n_taken = 0;  // micro-turns appended, silence included
  std::vector<std::int64_t> arrivals;

  std::int64_t n_whole(std::int64_t now_us) const {
    std::int64_t n = 0;
    for (auto k = static_cast<std::size_t>(n_taken); k < arrivals.size(); ++k, ++n)
      if (arrivals[k] > now_us) break;
    return n;
  }
  std::int64_t next_arrival(std::int64_t now_us) const {
    for (auto k = static_cast<std::size_t>(n_taken); k < arrivals.size(); ++k)
      if (arrivals[k] > now_us) return arrivals[k];
    return kNever;
  }
};

struct Day {
  Random random;
  Scene scene;
  std::map<std::int64_t, User> users;
  std::int64_t now_us = 0;
  std::int64_t forced_us = 0;

  explicit Day(std::uint64_t seed) : random(seed) {
    scene.state.pass_us = between(random, 0, 60'000);
    scene.state.row_ns = between(random, 0, 300'000);
    const std::int64_t n_users = between(random, 0, 6);
    for (std::int64_t id = 1; id <= n_users; ++id) {
      User& user = users[id];
      const std::int64_t begin_us = between(random, 0, kPeriod - 1);
      user.due_us = begin_us + kPeriod;
      for (std::int64_t k = 0; k < 400; ++k) {
        const bool is_lost = between(random, 0, 9) == 0;
        user.arrivals.push_back(
            is_lost ? kNever : begin_us + (k + 1) * kPeriod + between(random, 0, 250'000));
      }
    }
    const std::int64_t n_tasks = between(random, 0, 3);
    for (std::int64_t id = 1; id <= n_tasks; ++id)
      scene.tasks.push_back(
          {100 + id, between(random, -50'000, 0), between(random, 0, kLongestSlice)});
  }

  void observe() {
    scene.sessions.clear();
    for (auto& [id, user] : users) {
      const TurnLoad load{id, user.due_us, user.n_whole(now_us), between(random, 1, 40)};
      scene.sessions.push_back(load);
    }
    std::shuffle(scene.sessions.begin(), scene.sessions.end(), random);
    scene.state.forced_us = forced_us;
  }

  std::int64_t cost_us(const Action& action) const {
    std::int64_t n_rows = 0;
    for (const TurnPlan& plan : action.turns)
      for (const TurnLoad& load : scene.sessions)
        if (load.session == plan.session) n_rows += load.n_rows;
    return scene.state.pass_us + scene.state.row_ns * n_rows / 1000;
  }

  void check_pass(const Action& action) {
    REQUIRE_FALSE(action.turns.empty());
    std::int64_t last_due_us = -kNever;
    for (const TurnPlan& plan : action.turns) {
      User& user = users.at(plan.session);
      const TurnLoad load{plan.session, user.due_us, user.n_whole(now_us), 0};
      REQUIRE(load.due_us >= last_due_us);  // earliest first
      last_due_us = load.due_us;
      REQUIRE((load.n_whole > 0 || now_us >= load.due_us + kPatience));
      REQUIRE(plan.n_turns == turns_to_run(load, now_us, kPeriod, kPatience));
      user.due_us += plan.n_turns * kPeriod;
      user.n_taken += plan.n_turns;
    }
    for (const TurnLoad& load : scene.sessions) {  // who stays out is not due before
      const auto planned = ids(action);
      if (std::find(planned.begin(), planned.end(), load.session) != planned.end()) continue;
      if (ready_us(load, kPatience) <= now_us) REQUIRE(load.due_us >= last_due_us);
    }
    if (action.turns.size() > 1) REQUIRE(cost_us(action) <= kPeriod);
    now_us += cost_us(action);
  }

  void check_slice(const Action& action) {
    const auto task = std::find_if(scene.tasks.begin(), scene.tasks.end(),
                                   [&](const TaskLoad& t) { return t.task == action.task; });
    REQUIRE(task != scene.tasks.end());
    if (action.is_forced) {
      REQUIRE(now_us - task->waits_since_us >= scene.state.max_wait_us);
      REQUIRE(now_us - forced_us >= scene.state.max_wait_us);
    } else {
      for (const TurnLoad& load : scene.sessions)
        REQUIRE((load.due_us > now_us ? load.due_us : ready_us(load, kPatience)) >=
                now_us + task->slice_us);
    }
    // Nobody waits longer than rule 5 says.
    const auto n_tasks = static_cast<std::int64_t>(scene.tasks.size());
    REQUIRE(now_us - task->waits_since_us <=
            n_tasks * (scene.state.max_wait_us + kLongestPass + kLongestSlice));
    now_us += std::max<std::int64_t>(task->slice_us, 1000);
    task->waits_since_us = now_us;
    if (action.is_forced) forced_us = now_us;
  }

  void run() {
    for (int n = 0; n < 300; ++n) {
      observe();
      const Action action = scene.at(now_us);
      std::shuffle(scene.sessions.begin(), scene.sessions.end(), random);
      std::shuffle(scene.tasks.begin(), scene.tasks.end(), random);
      const Action again = scene.at(now_us);
      REQUIRE(action.kind == again.kind);
      REQUIRE(ids(action) == ids(again));
      REQUIRE(action.task == again.task);
      REQUIRE(action.until_us == again.until_us);
      const bool is_anyone_ready =
          std::any_of(scene.sessions.begin(), scene.sessions.end(),
                      [&](const TurnLoad& load) { return ready_us(load, kPatience) <= now_us; });
      if (is_anyone_ready) REQUIRE((action.kind == ActionKind::kTurns || action.is_forced));
      if (action.kind == ActionKind::kTurns) {
        check_pass(action);
      } else if (action.kind == ActionKind::kBackground) {
        check_slice(action);
      } else {
        REQUIRE(action.until_us > now_us);
        std::int64_t next_us = action.until_us;
        for (const auto& [id, user] : users) next_us = std::min(next_us, user.next_arrival(now_us));
        if (next_us == kNever) return;
        now_us = next_us;
      }
    }
  }
};

TEST_CASE("the rules hold on thousands of random days", "[scheduler]") {
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    INFO("seed " << seed);
    Day day(seed);
    day.run();
    for (const auto& [id, user] : day.users)  // all time is accounted for: none is dropped
      REQUIRE(user.due_us / kPeriod == user.n_taken + 1);
  }
}

}  // namespace
}  // namespace duplex
