// The protocol of group_exchange.cpp as a table of steps, and all its interleavings: no stale
// read, nothing overwritten that may still be read, no lost wake-up, no deadlock, and an end for
// all when a rank dies. Each deliberate fault must be found.
#include <catch2/catch.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/parallel/protocol_steps.h"

namespace duplex::model {
namespace {

struct ExchangeVariables {
  std::vector<std::vector<std::size_t>> slabs;  // by rank
  std::vector<std::size_t> arrivals;
  std::vector<ModelBell> bells;
  std::size_t failed;
};

Process exchange_rank(std::size_t rank, std::uint8_t n_meetings, const ExchangeVariables& v,
                      const Faults& faults) {
  Process process{"rank " + std::to_string(rank), {}};
  const std::size_t n_ranks = v.arrivals.size();
  const std::uint8_t first = rank == 0 ? 1 : 0;
  const auto slab = [=](Actor& a, std::size_t of) {
    return v.slabs[of][a.local(kCount) % faults.n_slabs];
  };
  // The next of the others and `step` again, or back to the first and `then`.
  const auto next_other = [=](Actor& a, const char* step, const std::function<void(Actor&)>& then) {
    if (++a.local(kOther) == rank) ++a.local(kOther);
    if (a.local(kOther) < n_ranks) return a.go_to(step);
    a.local(kOther) = first;
    then(a);
  };
  process.steps.push_back({"fills its slab", [=](Actor& a) {
                             const auto meeting = ++a.local(kCount);
                             a.local(kOther) = first;
                             a.store(slab(a, rank), meeting, Order::kRelaxed);
                           }});
  process.steps.push_back(
      {"arrives", [=](Actor& a) { a.store(v.arrivals[rank], a.local(kCount), faults.publish); }});
  const auto code = static_cast<std::uint8_t>(rank + 1);
  add_ring(process.steps, "looks who sleeps", v.bells, code, rank,
           [](Actor& a) { a.go_to("looks who has come"); });
  Wait wait{"looks who has come", v.bells[rank], v.failed, {}, {}, {}};
  wait.what = [](Actor& a) { return static_cast<std::uint8_t>(a.local(kOther) + 1); };
  wait.is_ready = [=](Actor& a) { return a.load(v.arrivals[a.local(kOther)]) >= a.local(kCount); };
  wait.on_ready = [=](Actor& a) {
    next_other(a, "looks who has come", [](Actor& b) { b.go_to("reads a slab"); });
  };
  add_wait(process.steps, wait, faults);
  process.steps.push_back({"reads a slab", [=](Actor& a) {
                             const std::uint8_t found = a.load(slab(a, a.local(kOther)));
                             if (found < a.local(kCount)) a.violate("a stale slab was read");
                             if (found > a.local(kCount)) a.violate("a slab was overwritten");
                             next_other(a, "reads a slab", [=](Actor& b) {
                               if (b.local(kCount) == n_meetings) return b.end();
                               b.go_to("fills its slab");
                             });
                           }});
  return process;
}

Protocol exchange(std::size_t n_ranks, std::uint8_t n_meetings, bool last_may_die,
                  const Faults& faults = {}) {
  Protocol protocol;
  Variables variables(protocol);
  ExchangeVariables v;
  for (std::size_t i = 0; i < n_ranks; ++i) {
    const std::string name = "slab" + std::to_string(i) + ".";
    v.slabs.push_back(variables.make(faults.n_slabs, name));
  }
  v.arrivals = variables.make(n_ranks, "arrivals");
  v.bells = make_bells(variables, n_ranks, "");
  v.failed = last_may_die ? variables.make("failed") : kNone;
  for (std::size_t i = 0; i < n_ranks; ++i)
    protocol.processes.push_back(exchange_rank(i, n_meetings, v, faults));
  protocol.normalise = [bells = v.bells](State& state) { normalise(state, bells); };
  if (last_may_die) {
    protocol.processes.back().may_die = true;
    protocol.processes.push_back(watcher_of(n_ranks - 1, v.failed, v.bells, faults));
  }
  return protocol;
}

TEST_CASE("meetings are right in every interleaving", "[parallel]") {
  SECTION("two ranks, strong memory") {
    Protocol protocol = exchange(2, 4, false);
    protocol.is_weak = false;
    check_right(protocol, 1000);
  }
  SECTION("two ranks") { check_right(exchange(2, 6, false), 2000); }
  SECTION("two ranks, one may die") { check_right(exchange(2, 6, true), 8000); }
  SECTION("three ranks") { check_right(exchange(3, 4, false), 200'000); }
  SECTION("three ranks, one may die") { check_right(exchange(3, 2, true), 600'000); }
}

TEST_CASE("a fault in the meetings is found", "[parallel]") {
  Faults faults;
  SECTION("one slab") {
    faults.n_slabs = 1;
    CHECK(explore(exchange(2, 2, false, faults)).error == "a slab was overwritten");
  }
  SECTION("an arrival that may pass the slab") {
    faults.publish = Order::kRelaxed;
    CHECK(explore(exchange(2, 2, false, faults)).error == "a stale slab was read");
  }
  SECTION("an arrival that may come after the look at the sleepers") {
    faults.publish = Order::kRelease;
    CHECK(explore(exchange(2, 1, false, faults)).error == kStuck);
  }
  SECTION("an announcement that may come after the last look") {
    faults.announce = Order::kRelease;
    CHECK(explore(exchange(2, 1, false, faults)).error == kStuck);
  }
  SECTION("no look between announcement and sleep") {
    faults.checks_before_sleep = false;
    CHECK(explore(exchange(2, 1, false, faults)).error == kStuck);
  }
  SECTION("a bell that is read after the last look") {
    faults.reads_bell_last = true;
    CHECK(explore(exchange(2, 1, false, faults)).error == kStuck);
  }
  SECTION("a failure that does not ring") {
    faults.failure_rings = false;
    CHECK(explore(exchange(2, 1, true, faults)).error == kStuck);
  }
}

}  // namespace
}  // namespace duplex::model
