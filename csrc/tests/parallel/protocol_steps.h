// What the protocols of the parallel layer have in common, as steps for the explorer: bells, a wait
// as in waiting.h, the ringing of those who sleep, a watcher that says who is dead.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "tests/parallel/explorer.h"

namespace duplex::model {

// What can be done wrong.
struct Faults {
  std::size_t n_slabs = 2;
  Order publish = Order::kSeqCst;
  Order announce = Order::kSeqCst;
  bool checks_before_sleep = true;
  bool reads_bell_last = false;
  bool failure_rings = true;
  bool is_done_before_read = false;
};

// Makes the variables of a protocol; a variable is its index.
class Variables {
 public:
  explicit Variables(Protocol& protocol) : names_(protocol.variables) {}
  std::size_t make(const std::string& name);
  std::vector<std::size_t> make(std::size_t n, const std::string& name);

 private:
  std::vector<std::string>& names_;
};
constexpr std::size_t kNone = kMaxVariables;  // no variable

struct ModelBell {
  std::size_t rung, awaits;
};
std::vector<ModelBell> make_bells(Variables& variables, std::size_t n, const std::string& name);

// Registers: what a process counts, whom it is looking at, and what a wait needs.
enum Register : std::size_t { kCount, kOther, kRung, kIsReady };  // kRung: + 1; 0: not read

// Of a bell it matters only whether it has rung since its owner read it. Bell i is of process i.
void normalise(State& state, const std::vector<ModelBell>& bells);

// wait_until of waiting.h. `is_ready` loads once; `on_ready` says where to go on.
struct Wait {
  std::string name;
  ModelBell bell;      // with kNone: waits awake
  std::size_t failed;  // kNone: nobody can fail
  std::function<std::uint8_t(Actor&)> what;
  std::function<bool(Actor&)> is_ready;
  std::function<void(Actor&)> on_ready;
};

void add_wait(std::vector<Step>& steps, const Wait& wait, const Faults& faults);

// ring_if_awaited for every bell in turn, but for number `except`; kOther is the first of them
// before and after. Then `then`.
void add_ring(std::vector<Step>& steps, const std::string& name, std::vector<ModelBell> bells,
              std::uint8_t what, std::size_t except, std::function<void(Actor&)> then);

// Who sees that a process is dead: Group::fail.
Process watcher_of(std::size_t victim, std::size_t failed, std::vector<ModelBell> bells,
                   const Faults& faults);

// For CHECK: no error, all states, and at least so many of them.
void check_right(const Protocol& protocol, std::size_t at_least);
inline constexpr const char* kStuck = "the processes cannot all end";

}  // namespace duplex::model
