#include "tests/parallel/protocol_steps.h"

#include <catch2/catch.hpp>
#include <utility>

namespace duplex::model {

std::size_t Variables::make(const std::string& name) {
  names_.push_back(name);
  return names_.size() - 1;
}

std::vector<std::size_t> Variables::make(std::size_t n, const std::string& name) {
  std::vector<std::size_t> made;
  for (std::size_t i = 0; i < n; ++i) made.push_back(make(name + std::to_string(i)));
  return made;
}

std::vector<ModelBell> make_bells(Variables& variables, std::size_t n, const std::string& name) {
  std::vector<ModelBell> bells;
  for (std::size_t i = 0; i < n; ++i) {
    const std::string number = std::to_string(i);
    bells.push_back(
        {variables.make(name + "rung" + number), variables.make(name + "awaits" + number)});
  }
  return bells;
}

void normalise(State& state, const std::vector<ModelBell>& bells) {
  for (std::size_t i = 0; i < bells.size(); ++i) {
    std::uint8_t& rung = state.memory[bells[i].rung];
    std::uint8_t& seen = state.processes[i].registers[kRung];
    rung = seen != 0 && rung + 1 != seen ? 1 : 0;
    if (seen != 0) seen = 1;
  }
}

void add_wait(std::vector<Step>& steps, const Wait& wait, const Faults& faults) {
  const auto step = [&](const std::string& what, std::function<void(Actor&)> run) {
    steps.push_back({wait.name + what, std::move(run)});
  };
  const std::string announce = wait.name + ", announces sleep";
  const std::string clear = wait.name + ", is awake";
  const bool sleeps = wait.bell.rung != kNone;
  step("", [wait, sleeps](Actor& a) {
    if (wait.is_ready(a)) return wait.on_ready(a);
    if (!sleeps) a.wait();
  });
  if (!sleeps) return;
  if (wait.failed != kNone)
    step(", looks for a failure", [wait](Actor& a) {
      if (a.load(wait.failed) != 0) a.end();
    });
  step(", announces sleep",
       [wait, faults](Actor& a) { a.store(wait.bell.awaits, wait.what(a), faults.announce); });
  const auto read_bell = [wait](Actor& a) {
    a.local(kRung) = static_cast<std::uint8_t>(a.load(wait.bell.rung) + 1);
  };
  if (!faults.reads_bell_last) step(", reads its bell", read_bell);
  if (faults.checks_before_sleep) {
    step(", looks again", [wait, clear](Actor& a) {
      a.local(kIsReady) = wait.is_ready(a) ? 1 : 0;
      if (a.local(kIsReady) != 0) a.go_to(clear);
    });
    if (wait.failed != kNone)
      step(", looks again for a failure", [wait, clear](Actor& a) {
        if (a.load(wait.failed) != 0) a.go_to(clear);
      });
  }
  if (faults.reads_bell_last) step(", reads its bell", read_bell);
  step(", sleeps", [wait, announce](Actor& a) {
    a.go_to(announce);
    a.sleep(wait.bell.rung, static_cast<std::uint8_t>(a.local(kRung) - 1));
    a.local(kRung) = 0;
  });
  step(", is awake", [wait](Actor& a) {
    a.store(wait.bell.awaits, 0, Order::kRelaxed);
    const bool is_ready = a.local(kIsReady) != 0;
    a.local(kRung) = a.local(kIsReady) = 0;
    if (is_ready) {
      wait.on_ready(a);
    } else {
      a.end();
    }
  });
}

void add_ring(std::vector<Step>& steps, const std::string& name, std::vector<ModelBell> bells,
              std::uint8_t what, std::size_t except, std::function<void(Actor&)> then) {
  if (bells.empty()) return steps.push_back({name, std::move(then)});
  const auto go_on = [=, n = bells.size()](Actor& a) {
    if (++a.local(kOther) == except) ++a.local(kOther);
    if (a.local(kOther) < n) return a.go_to(name);
    a.local(kOther) = except == 0 ? 1 : 0;
    then(a);
  };
  steps.push_back({name, [=](Actor& a) {
                     if (a.load(bells[a.local(kOther)].awaits) != what) go_on(a);
                   }});
  steps.push_back({name + ", rings", [=](Actor& a) { a.add(bells[a.local(kOther)].rung, 1); }});
  steps.push_back({name + ", wakes", [=](Actor& a) {
                     a.wake(bells[a.local(kOther)].rung);
                     go_on(a);
                   }});
}

Process watcher_of(std::size_t victim, std::size_t failed, std::vector<ModelBell> bells,
                   const Faults& faults) {
  Process watcher{"watcher", {}};
  watcher.steps.push_back({"watches", [=](Actor& a) {
                             const Mode mode = a.mode_of(victim);
                             if (mode == Mode::kEnded) return a.end();
                             if (mode != Mode::kDead) a.wait();
                           }});
  watcher.steps.push_back({"says it", [=](Actor& a) {
                             a.store(failed, 1, Order::kSeqCst);
                             if (!faults.failure_rings) a.end();
                           }});
  watcher.steps.push_back({"rings", [=](Actor& a) { a.add(bells[a.local(kOther)].rung, 1); }});
  watcher.steps.push_back({"wakes", [=](Actor& a) {
                             a.wake(bells[a.local(kOther)].rung);
                             if (++a.local(kOther) == bells.size()) return a.end();
                             a.go_to("rings");
                           }});
  return watcher;
}

void check_right(const Protocol& protocol, std::size_t at_least) {
  const Report report = explore(protocol);
  std::string trace;
  for (const std::string& step : report.trace) trace += step + "\n";
  INFO(trace << report.n_states << " states, " << report.n_transitions << " transitions");
  CHECK(report.error == "");
  CHECK(report.is_whole);
  CHECK(report.n_states >= at_least);
}

}  // namespace duplex::model
