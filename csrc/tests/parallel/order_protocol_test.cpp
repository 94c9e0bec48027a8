// The order between passes and page-memory commands (parallel/commands.h) as a table of steps:
// lanes of rank 0 that map a page, run a pass on it and unmap it, and a worker with a thread for
// each lane and one for page memory. No pass may find its page gone, and nobody may wait for ever.
#include <catch2/catch.hpp>
#include <string>
#include <utility>
#include <vector>

#include "tests/parallel/protocol_steps.h"

namespace duplex::model {
namespace {

// What a sleeper waits for, as in commands.cpp.
constexpr std::uint8_t kCommand = 1;
constexpr std::uint8_t kOtherChannel = 3;

struct OrderFaults {
  bool pass_waits = true;
  bool memory_waits = true;
  bool is_done_before_write = false;
};

// A page-memory command in a byte: map or unmap, the page (of its lane), the passes of each lane
// that must be done before.
constexpr std::uint8_t pack(bool maps, std::size_t page, std::size_t after0, std::size_t after1) {
  return static_cast<std::uint8_t>(maps + 2 * page + 4 * after0 + 32 * after1);
}
constexpr bool maps(std::uint8_t command) { return command % 2 != 0; }
constexpr std::size_t page_of(std::uint8_t command) { return command / 2 % 2; }
constexpr std::size_t after(std::uint8_t command, std::size_t lane) {
  return lane == 0 ? command / 4 % 8 : command / 32;
}

struct OrderVariables {
  std::vector<std::size_t> pages;  // 1: mapped
  std::vector<std::size_t> memory_ring, passes;
  std::size_t memory_sent, memory_done, lock;
  std::vector<std::size_t> sent, done, ended, leader_met, worker_met;  // by lane
  std::vector<ModelBell> bells;  // of the worker's threads, page memory last; empty: none sleeps
  ModelBell bell(std::size_t i) const { return bells.empty() ? ModelBell{kNone, kNone} : bells[i]; }
  // Those of threads [begin, end), to ring.
  std::vector<ModelBell> some(std::size_t begin, std::size_t end) const {
    if (bells.empty()) return {};
    return {bells.begin() + static_cast<std::ptrdiff_t>(begin),
            bells.begin() + static_cast<std::ptrdiff_t>(end)};
  }
  std::size_t n_lanes() const { return sent.size(); }
};

using Steps = std::vector<Step>;
constexpr std::size_t kRecord = kRung, kPosition = kIsReady;  // registers of rank 0's threads

// CommandSender::send_memory; `name` begins the names of the steps.
void add_send_memory(Steps& steps, const std::string& name, bool is_map, std::size_t lane,
                     const OrderVariables& v, const OrderFaults& faults) {
  const auto step = [&](const char* what, std::function<void(Actor&)> run) {
    steps.push_back({name + what, std::move(run)});
  };
  step("", [=](Actor& a) {
    const std::size_t ended = a.load(v.ended[0]);
    a.local(kRecord) = pack(is_map, lane, faults.memory_waits ? ended : 0, 0);
  });
  if (v.ended.size() > 1) {
    step(", looks at lane 1", [=](Actor& a) {
      a.local(kRecord) = pack(is_map, lane, after(a.local(kRecord), 0), a.load(v.ended[1]));
    });
  }
  step(", locks", [=](Actor& a) {
    if (a.add(v.lock, 1) != 0) a.wait();
  });
  step(", looks where", [=](Actor& a) { a.local(kPosition) = a.load(v.memory_sent); });
  step(", writes", [=](Actor& a) {
    a.store(v.memory_ring[a.local(kPosition)], a.local(kRecord), Order::kRelaxed);
  });
  step(", sends", [=](Actor& a) {
    a.store(v.memory_sent, static_cast<std::uint8_t>(a.local(kPosition) + 1), Order::kSeqCst);
    a.local(kPosition) = a.local(kRecord) = 0;
  });
  add_ring(steps, name + ", looks who sleeps", v.some(v.n_lanes(), v.n_lanes() + 1), kCommand,
           kMaxProcesses, [next = name + ", unlocks"](Actor& a) { a.go_to(next); });
  step(", unlocks", [=](Actor& a) { a.store(v.lock, 0, Order::kRelease); });
}

// A lane of rank 0.
Process leader_lane(std::size_t lane, std::uint8_t n_passes, const OrderVariables& v,
                    const OrderFaults& faults) {
  Process process{"rank 0, lane " + std::to_string(lane), {}};
  Steps& steps = process.steps;
  const auto step = [&](const char* what, std::function<void(Actor&)> run) {
    steps.push_back({what, std::move(run)});
  };
  add_send_memory(steps, "maps", true, lane, v, faults);
  step("looks at the memory ring", [=](Actor& a) {
    ++a.local(kCount);
    a.local(kPosition) = a.load(v.memory_sent);
  });
  step("writes the pass", [=](Actor& a) {
    a.store(v.passes[lane], a.local(kPosition), Order::kRelaxed);
    a.local(kPosition) = 0;
  });
  step("sends the pass", [=](Actor& a) { a.store(v.sent[lane], a.local(kCount), Order::kSeqCst); });
  add_ring(steps, "looks who sleeps", v.some(lane, lane + 1), kCommand, kMaxProcesses,
           [](Actor& a) { a.go_to("arrives"); });
  step("arrives", [=](Actor& a) { a.store(v.leader_met[lane], a.local(kCount), Order::kSeqCst); });
  step("meets", [=](Actor& a) {
    if (a.load(v.worker_met[lane]) < a.local(kCount)) a.wait();
  });
  step("ends the pass", [=](Actor& a) { a.store(v.ended[lane], a.local(kCount), Order::kSeqCst); });
  add_send_memory(steps, "unmaps", false, lane, v, faults);
  step("goes on", [=](Actor& a) { a.local(kCount) == n_passes ? a.end() : a.go_to("maps"); });
  return process;
}

// A worker's thread of a lane.
Process worker_lane(std::size_t lane, std::uint8_t n_passes, const OrderVariables& v,
                    const OrderFaults& faults) {
  Process process{"worker, lane " + std::to_string(lane), {}};
  Steps& steps = process.steps;
  const auto needs_page = [=](Actor& a) {
    if (a.load(v.pages[lane]) != 1) a.violate("a pass has no page");
  };
  Wait wait{"waits for a pass", v.bell(lane), kNone, [](Actor&) { return kCommand; }, {}, {}};
  wait.is_ready = [=](Actor& a) { return a.load(v.sent[lane]) > a.local(kCount); };
  wait.on_ready = [](Actor& a) {
    ++a.local(kCount);
    a.go_to("reads the pass");
  };
  add_wait(steps, wait, {});
  steps.push_back({"reads the pass", [=](Actor& a) {
                     a.local(kOther) = a.load(v.passes[lane]);
                     if (!faults.pass_waits) a.local(kOther) = 0;
                   }});
  wait.name = "waits for page memory";
  wait.what = [](Actor&) { return kOtherChannel; };
  wait.is_ready = [=](Actor& a) { return a.load(v.memory_done) >= a.local(kOther); };
  wait.on_ready = [](Actor& a) { a.go_to("reads its page"); };
  add_wait(steps, wait, {});
  steps.push_back({"reads its page", needs_page});
  steps.push_back({"arrives", [=](Actor& a) {
                     a.local(kOther) = 0;
                     a.store(v.worker_met[lane], a.local(kCount), Order::kSeqCst);
                   }});
  steps.push_back({"meets", [=](Actor& a) {
                     if (a.load(v.leader_met[lane]) < a.local(kCount)) a.wait();
                   }});
  const Step writes{"writes its page", needs_page};
  const Step is_done{"is done",
                     [=](Actor& a) { a.store(v.done[lane], a.local(kCount), Order::kSeqCst); }};
  steps.push_back(faults.is_done_before_write ? is_done : writes);
  steps.push_back(faults.is_done_before_write ? writes : is_done);
  add_ring(steps, "looks if page memory waits", v.some(v.n_lanes(), v.n_lanes() + 1), kOtherChannel,
           kMaxProcesses,
           [=](Actor& a) { a.local(kCount) == n_passes ? a.end() : a.go_to("waits for a pass"); });
  return process;
}

// A worker's thread of page memory.
Process worker_memory(std::size_t n_commands, const OrderVariables& v) {
  Process process{"worker, page memory", {}};
  Steps& steps = process.steps;
  Wait wait{"waits", v.bell(v.n_lanes()), kNone, [](Actor&) { return kCommand; }, {}, {}};
  wait.is_ready = [=](Actor& a) { return a.load(v.memory_sent) > a.local(kCount); };
  wait.on_ready = [](Actor& a) { a.go_to("reads the command"); };
  add_wait(steps, wait, {});
  steps.push_back({"reads the command", [=](Actor& a) {
                     a.local(kOther) = a.load(v.memory_ring[a.local(kCount)]);
                     ++a.local(kCount);
                   }});
  wait.what = [](Actor&) { return kOtherChannel; };
  for (std::size_t lane = 0; lane < v.done.size(); ++lane) {
    const bool is_last = lane + 1 == v.done.size();
    wait.name = "waits for lane " + std::to_string(lane);
    wait.is_ready = [=](Actor& a) { return a.load(v.done[lane]) >= after(a.local(kOther), lane); };
    wait.on_ready = [=](Actor& a) { a.go_to(is_last ? "carries it out" : "waits for lane 1"); };
    add_wait(steps, wait, {});
  }
  steps.push_back({"carries it out", [=](Actor& a) {
                     const std::uint8_t command = a.local(kOther);
                     a.local(kOther) = 0;
                     a.store(v.pages[page_of(command)], maps(command) ? 1 : 0, Order::kRelaxed);
                   }});
  steps.push_back(
      {"is done", [=](Actor& a) { a.store(v.memory_done, a.local(kCount), Order::kSeqCst); }});
  add_ring(steps, "looks which lane waits", v.some(0, v.n_lanes()), kOtherChannel, kMaxProcesses,
           [=](Actor& a) { a.local(kCount) == n_commands ? a.end() : a.go_to("waits"); });
  return process;
}

Protocol ordered(std::size_t n_lanes, std::uint8_t n_passes, bool sleeps,
                 const OrderFaults& faults = {}) {
  Protocol protocol;
  Variables variables(protocol);
  OrderVariables v;
  const std::size_t n_commands = 2 * n_lanes * n_passes;
  v.pages = variables.make(n_lanes, "page");
  v.memory_ring = variables.make(n_commands, "command");
  v.passes = variables.make(n_lanes, "pass");
  v.memory_sent = variables.make("commands sent");
  v.memory_done = variables.make("commands done");
  v.lock = variables.make("lock");
  v.sent = variables.make(n_lanes, "sent");
  v.done = variables.make(n_lanes, "done");
  v.ended = variables.make(n_lanes, "ended");
  v.leader_met = variables.make(n_lanes, "leader's meetings");
  v.worker_met = variables.make(n_lanes, "worker's meetings");
  if (sleeps) v.bells = make_bells(variables, n_lanes + 1, "");
  for (std::size_t i = 0; i < n_lanes; ++i)
    protocol.processes.push_back(worker_lane(i, n_passes, v, faults));
  protocol.processes.push_back(worker_memory(n_commands, v));
  for (std::size_t i = 0; i < n_lanes; ++i)
    protocol.processes.push_back(leader_lane(i, n_passes, v, faults));
  protocol.normalise = [bells = v.bells](State& state) { normalise(state, bells); };
  return protocol;
}

TEST_CASE("passes and page memory keep their order in every interleaving", "[parallel]") {
  SECTION("one lane") { check_right(ordered(1, 3, true), 50'000); }
  SECTION("two lanes, awake") { check_right(ordered(2, 1, false), 100'000); }
}

TEST_CASE("a fault in the order is found", "[parallel]") {
  OrderFaults faults;
  SECTION("a pass that does not wait for page memory") { faults.pass_waits = false; }
  SECTION("page memory that does not wait for passes") { faults.memory_waits = false; }
  SECTION("a pass that is done before its last write") { faults.is_done_before_write = true; }
  CHECK(explore(ordered(1, 2, true, faults)).error == "a pass has no page");
}

}  // namespace
}  // namespace duplex::model
