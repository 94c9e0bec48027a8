#include "tests/parallel/explorer.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace duplex::model {

static_assert(sizeof(State) == kMaxVariables + kMaxProcesses * (4 + kRegisters + 3 * kMaxPending));

Actor::Actor(const Protocol& protocol, State& state, std::size_t process)
    : protocol_(protocol), state_(state), process_(process) {}

void Actor::take_access() {
  if (++n_accesses_ > 1) {
    const Process& process = protocol_.processes[process_];
    throw std::logic_error("two accesses in one step: " + process.name);
  }
  is_local_ = false;
}

bool Actor::is_buffer_empty() {
  if (self().n_pending > 0) is_blocked_ = true;
  return self().n_pending == 0;
}

std::uint8_t Actor::load(std::size_t variable) {
  take_access();
  for (std::size_t i = self().n_pending; i > 0; --i)
    if (self().pending[i - 1].variable == variable) return self().pending[i - 1].value;
  return state_.memory[variable];
}

void Actor::store(std::size_t variable, std::uint8_t value, Order order) {
  take_access();
  if (order == Order::kSeqCst || !protocol_.is_weak) {
    if (is_buffer_empty()) state_.memory[variable] = value;
  } else if (self().n_pending == kMaxPending) {
    is_blocked_ = true;
  } else {
    self().pending[self().n_pending++] = {static_cast<std::uint8_t>(variable), value, order};
    is_local_ = true;
  }
}

std::uint8_t Actor::add(std::size_t variable, std::uint8_t n) {
  take_access();
  const std::uint8_t before = state_.memory[variable];
  if (is_buffer_empty()) state_.memory[variable] = static_cast<std::uint8_t>(before + n);
  return before;
}

void Actor::sleep(std::size_t variable, std::uint8_t expected) {
  take_access();
  if (!is_buffer_empty() || state_.memory[variable] != expected) return;
  self().mode = Mode::kSleeps;
  self().sleeps_on = static_cast<std::uint8_t>(variable);
}

void Actor::wake(std::size_t variable) {
  take_access();
  if (!is_buffer_empty()) return;
  for (ProcessState& other : state_.processes) {
    if (other.mode != Mode::kSleeps || other.sleeps_on != variable) continue;
    other.mode = Mode::kRuns;
    other.sleeps_on = 0;
  }
}

Mode Actor::mode_of(std::size_t process) {
  take_access();
  return state_.processes[process].mode;
}

void Actor::end() {
  self().mode = Mode::kEnded;
  self().step = 0;
  self().registers = {};
}

void Actor::go_to(std::string_view step) {
  const auto& steps = protocol_.processes[process_].steps;
  const auto is_named = [&](const Step& candidate) { return candidate.name == step; };
  const auto found = std::find_if(steps.begin(), steps.end(), is_named);
  if (found == steps.end()) throw std::logic_error("no such step: " + std::string(step));
  self().step = static_cast<std::uint8_t>(found - steps.begin());
}

// The states that were seen, how each was first reached, and all transitions between them.
class Walk {
 public:
  explicit Walk(const Protocol& protocol) : protocol_(protocol), slots_(1 << 12, kNone) {
    if (protocol.variables.size() > kMaxVariables || protocol.processes.size() > kMaxProcesses)
      throw std::logic_error("a protocol of too many variables or processes");
    State start{};
    for (std::size_t i = protocol.processes.size(); i < kMaxProcesses; ++i)
      start.processes[i].mode = Mode::kEnded;
    visit(start, {kNone, 0, 0});
  }

  Report run(std::size_t max_states) {
    for (std::uint32_t i = 0; i < states_.size() && report_.error.empty(); ++i) {
      if (states_.size() > max_states) return finish();
      const std::size_t n = protocol_.processes.size();
      bool is_taken = false;
      for (std::size_t p = 0; p < n && !is_taken; ++p) is_taken = take_step(i, p, true);
      for (std::size_t p = 0; p < n && !is_taken; ++p) take_steps(i, p);
    }
    report_.is_whole = true;
    if (report_.error.empty()) find_stuck();
    return finish();
  }

 private:
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};
  // What a process did: a step, or one of these.
  static constexpr std::uint8_t kDies = 255;
  static constexpr std::uint8_t kCommits = 200;  // + which pending store
  struct Origin {
    std::uint32_t from;
    std::uint8_t process, action;
  };

  void take_steps(std::uint32_t from, std::size_t p) {
    const ProcessState& self = states_[from].processes[p];
    const Mode mode = self.mode;
    for (std::uint8_t i = 0; i < states_[from].processes[p].n_pending; ++i) commit(from, p, i);
    if (mode != Mode::kRuns && mode != Mode::kSleeps) return;
    if (protocol_.processes[p].may_die) {
      State next = states_[from];
      ProcessState& victim = next.processes[p];
      victim = {0, Mode::kDead, 0, victim.n_pending, {}, victim.pending};
      visit(next, {from, static_cast<std::uint8_t>(p), kDies});
    }
    if (mode == Mode::kRuns) take_step(from, p, false);
  }

  // With `only_local`: takes a step only where no other process can see it or get in its way. Such
  // a step can be taken first, alone: whatever else is possible stays so, and leads to the same.
  bool take_step(std::uint32_t from, std::size_t p, bool only_local) {
    State next = states_[from];
    if (next.processes[p].mode != Mode::kRuns) return false;
    if (only_local && protocol_.processes[p].may_die) return false;
    const std::uint8_t step = next.processes[p].step;
    const auto& steps = protocol_.processes[p].steps;
    if (step >= steps.size()) throw std::logic_error("behind the last step");
    ++next.processes[p].step;
    Actor actor(protocol_, next, p);
    steps[step].run(actor);
    if (actor.is_blocked_) return false;
    if (only_local && (!actor.is_local_ || is_equal(next, states_[from]))) return false;
    const std::uint32_t at = visit(next, {from, static_cast<std::uint8_t>(p), step});
    if (!actor.violation_.empty() && report_.error.empty()) set_error(actor.violation_, at);
    return true;
  }

  // A pending store reaches memory, unless one before it must come first.
  void commit(std::uint32_t from, std::size_t p, std::uint8_t i) {
    State next = states_[from];
    ProcessState& self = next.processes[p];
    const Pending store = self.pending[i];
    if (store.order == Order::kRelease && i > 0) return;
    for (std::uint8_t k = 0; k < i; ++k)
      if (self.pending[k].variable == store.variable) return;
    next.memory[store.variable] = store.value;
    std::copy(self.pending.begin() + i + 1, self.pending.end(), self.pending.begin() + i);
    self.pending.back() = {};
    --self.n_pending;
    visit(next, {from, static_cast<std::uint8_t>(p), static_cast<std::uint8_t>(kCommits + i)});
  }

  std::uint32_t visit(State state, Origin origin) {
    if (protocol_.normalise) protocol_.normalise(state);
    if (2 * states_.size() >= slots_.size()) grow();
    std::size_t slot = slot_of(state);
    while (slots_[slot] != kNone && !is_equal(states_[slots_[slot]], state))
      slot = (slot + 1) & (slots_.size() - 1);
    if (slots_[slot] == kNone) {
      slots_[slot] = static_cast<std::uint32_t>(states_.size());
      states_.push_back(state);
      origins_.push_back(origin);
    }
    if (origin.from != kNone) transitions_.push_back({slots_[slot], origin.from});
    return slots_[slot];
  }

  static bool is_equal(const State& a, const State& b) {
    return std::memcmp(&a, &b, sizeof(State)) == 0;
  }
  std::size_t slot_of(const State& state) const {
    const std::string_view bytes(reinterpret_cast<const char*>(&state), sizeof(State));
    return std::hash<std::string_view>{}(bytes) & (slots_.size() - 1);
  }
  void grow() {
    slots_.assign(2 * slots_.size(), kNone);
    for (std::uint32_t i = 0; i < states_.size(); ++i) {
      std::size_t slot = slot_of(states_[i]);
      while (slots_[slot] != kNone) slot = (slot + 1) & (slots_.size() - 1);
      slots_[slot] = i;
    }
  }

  static bool is_end(const State& state) {
    return std::all_of(state.processes.begin(), state.processes.end(), [](const ProcessState& p) {
      return p.mode == Mode::kEnded || p.mode == Mode::kDead;
    });
  }

  // A state from which no state is reached where all processes have ended: walks back from those.
  void find_stuck() {
    std::sort(transitions_.begin(), transitions_.end());
    std::vector<bool> can_end(states_.size());
    std::vector<std::uint32_t> open;
    for (std::uint32_t i = 0; i < states_.size(); ++i)
      if (is_end(states_[i])) open.push_back(i);
    for (const std::uint32_t i : open) can_end[i] = true;
    while (!open.empty()) {
      const std::uint32_t to = open.back();
      open.pop_back();
      for (auto it = std::lower_bound(transitions_.begin(), transitions_.end(),
                                      std::pair<std::uint32_t, std::uint32_t>{to, 0});
           it != transitions_.end() && it->first == to; ++it) {
        if (can_end[it->second]) continue;
        can_end[it->second] = true;
        open.push_back(it->second);
      }
    }
    const auto stuck = std::find(can_end.begin(), can_end.end(), false);
    if (stuck != can_end.end())
      set_error("the processes cannot all end",
                static_cast<std::uint32_t>(stuck - can_end.begin()));
  }

  void set_error(const std::string& what, std::uint32_t at) {
    report_.error = what;
    for (; origins_[at].from != kNone; at = origins_[at].from) {
      const Origin& origin = origins_[at];
      const Process& process = protocol_.processes[origin.process];
      report_.trace.push_back(process.name + ": " + name_of(origin));
    }
    std::reverse(report_.trace.begin(), report_.trace.end());
  }

  std::string name_of(const Origin& origin) const {
    if (origin.action == kDies) return "dies";
    if (origin.action < kCommits)
      return protocol_.processes[origin.process].steps[origin.action].name;
    const Pending& store =
        states_[origin.from].processes[origin.process].pending[origin.action - kCommits];
    return protocol_.variables[store.variable] + " becomes " + std::to_string(store.value);
  }

  Report finish() {
    report_.n_states = states_.size();
    report_.n_transitions = transitions_.size();
    return std::move(report_);
  }

  const Protocol& protocol_;
  std::vector<State> states_;
  std::vector<Origin> origins_;
  std::vector<std::uint32_t> slots_;  // hash table of indices into states_
  std::vector<std::pair<std::uint32_t, std::uint32_t>> transitions_;  // (to, from)
  Report report_;
};

Report explore(const Protocol& protocol, std::size_t max_states) {
  return Walk(protocol).run(max_states);
}

}  // namespace duplex::model
