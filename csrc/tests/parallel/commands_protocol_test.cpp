// The rings of commands.cpp as a table of steps, and all their interleavings; the faults too.
#include <catch2/catch.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/parallel/protocol_steps.h"

namespace duplex::model {
namespace {

struct RingVariables {
  std::vector<std::size_t> slots, done;
  std::size_t sent, failed;
  ModelBell sender;
  std::vector<ModelBell> receivers;
};
constexpr std::uint8_t kCommand = 1;
constexpr std::uint8_t kRoom = 2;

// CommandSender::send, of commands that fill a slot each.
Process ring_sender(std::uint8_t n_commands, const RingVariables& v, const Faults& faults) {
  Process process{"sender", {}};
  Wait wait{"waits for room", v.sender, v.failed, [](Actor&) { return kRoom; }, {}, {}};
  wait.is_ready = [=](Actor& a) {
    return a.local(kCount) + 1u - a.load(v.done[a.local(kOther)]) <= v.slots.size();
  };
  wait.on_ready = [=](Actor& a) {
    if (++a.local(kOther) < v.done.size()) return a.go_to("waits for room");
    a.local(kOther) = 0;
    a.go_to("writes");
  };
  add_wait(process.steps, wait, faults);
  process.steps.push_back({"writes", [=](Actor& a) {
                             const auto command = ++a.local(kCount);
                             a.store(v.slots[command % v.slots.size()], command, Order::kRelaxed);
                           }});
  process.steps.push_back(
      {"sends", [=](Actor& a) { a.store(v.sent, a.local(kCount), faults.publish); }});
  add_ring(process.steps, "looks who sleeps", v.receivers, kCommand, kMaxProcesses, [=](Actor& a) {
    if (a.local(kCount) == n_commands) return a.end();
    a.go_to("waits for room");
  });
  return process;
}

Process ring_receiver(std::size_t i, std::uint8_t n_commands, const RingVariables& v,
                      const Faults& faults) {
  Process process{"receiver " + std::to_string(i), {}};
  Wait wait{"waits", v.receivers[i], v.failed, [](Actor&) { return kCommand; }, {}, {}};
  wait.is_ready = [=](Actor& a) { return a.load(v.sent) > a.local(kCount); };
  const Step reads{"reads", [=](Actor& a) {
                     const std::uint8_t found = a.load(v.slots[a.local(kCount) % v.slots.size()]);
                     if (found < a.local(kCount)) a.violate("a stale command was read");
                     if (found > a.local(kCount)) a.violate("a command was overwritten");
                   }};
  const Step is_done{"is done",
                     [=](Actor& a) { a.store(v.done[i], a.local(kCount), faults.publish); }};
  const std::vector<Step> order =
      faults.is_done_before_read ? std::vector{is_done, reads} : std::vector{reads, is_done};
  wait.on_ready = [next = order[0].name](Actor& a) {
    ++a.local(kCount);
    a.go_to(next);
  };
  add_wait(process.steps, wait, faults);
  process.steps.insert(process.steps.end(), order.begin(), order.end());
  add_ring(process.steps, "looks if the sender sleeps", {v.sender}, kRoom, kMaxProcesses,
           [=](Actor& a) {
             if (a.local(kCount) == n_commands) return a.end();
             a.go_to("waits");
           });
  return process;
}

Protocol ring(std::size_t n_receivers, std::uint8_t n_commands, bool last_may_die,
              const Faults& faults = {}) {
  Protocol protocol;
  Variables variables(protocol);
  RingVariables v;
  v.slots = variables.make(2, "slot");
  v.done = variables.make(n_receivers, "done");
  v.sent = variables.make("sent");
  v.failed = last_may_die ? variables.make("failed") : kNone;
  v.sender = make_bells(variables, 1, "sender ")[0];
  v.receivers = make_bells(variables, n_receivers, "");
  protocol.processes.push_back(ring_sender(n_commands, v, faults));
  for (std::size_t i = 0; i < n_receivers; ++i)
    protocol.processes.push_back(ring_receiver(i, n_commands, v, faults));
  std::vector<ModelBell> bells = v.receivers;
  bells.insert(bells.begin(), v.sender);
  protocol.normalise = [bells](State& state) { normalise(state, bells); };
  if (last_may_die) {
    protocol.processes.back().may_die = true;
    protocol.processes.push_back(watcher_of(n_receivers, v.failed, bells, faults));
  }
  return protocol;
}

TEST_CASE("commands are right in every interleaving", "[parallel]") {
  SECTION("one worker") { check_right(ring(1, 5, false), 1500); }
  SECTION("one worker that may die") { check_right(ring(1, 4, true), 3500); }
  SECTION("two workers") { check_right(ring(2, 5, false), 40'000); }
}

TEST_CASE("a fault in the commands is found", "[parallel]") {
  Faults faults;
  SECTION("a command that may be overwritten") {
    faults.is_done_before_read = true;
    CHECK(explore(ring(1, 4, false, faults)).error == "a command was overwritten");
  }
  SECTION("a count that may pass the command") {
    faults.publish = Order::kRelaxed;
    CHECK(explore(ring(1, 2, false, faults)).error == "a stale command was read");
  }
  SECTION("a count that may come after the look at the sleeper") {
    faults.publish = Order::kRelease;
    CHECK(explore(ring(1, 2, false, faults)).error == kStuck);
  }
  SECTION("a sleeper that does not look again") {
    faults.checks_before_sleep = false;
    CHECK(explore(ring(1, 2, false, faults)).error == kStuck);
  }
  SECTION("a failure that does not ring") {
    faults.failure_rings = false;
    CHECK(explore(ring(1, 3, true, faults)).error == kStuck);
  }
}

}  // namespace
}  // namespace duplex::model
