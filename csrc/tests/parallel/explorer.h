// A model checker for small protocols: every interleaving of every process's steps, state by state.
//
// A protocol is a table of steps for each process. A step does at most one thing that others can
// see: a load, a store, an addition, going to sleep, waking. Memory is weaker than the order of the
// program: stores wait in a buffer of their process and reach memory later, relaxed ones in any
// order, a release store after all stores before it; a sequentially consistent store and an
// addition wait until the buffer is empty and reach memory at once. A load sees its own process's
// newest store, else memory; loads are not reordered. A process that may die can do so before any
// step; what is in its buffer still reaches memory.
//
// explore() looks for a step that calls violate(), and for a state from which the processes can
// no longer all end: a deadlock, a livelock, a sleeper that nobody will wake. It says how to get
// there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace duplex::model {

inline constexpr std::size_t kMaxVariables = 32;
inline constexpr std::size_t kMaxProcesses = 5;
inline constexpr std::size_t kRegisters = 4;
inline constexpr std::size_t kMaxPending = 4;  // stores in a buffer; one more waits

enum class Order : std::uint8_t { kRelaxed, kRelease, kSeqCst };
enum class Mode : std::uint8_t { kRuns, kSleeps, kEnded, kDead };

// Bytes throughout, so that equal states have equal bytes.
struct Pending {
  std::uint8_t variable, value;
  Order order;
};
struct ProcessState {
  std::uint8_t step;
  Mode mode;
  std::uint8_t sleeps_on;
  std::uint8_t n_pending;
  std::array<std::uint8_t, kRegisters> registers;
  std::array<Pending, kMaxPending> pending;  // oldest first
};
struct State {
  std::array<std::uint8_t, kMaxVariables> memory;
  std::array<ProcessState, kMaxProcesses> processes;
};

struct Protocol;

// What a step may do. After it the process goes on with the next step, unless it says otherwise.
class Actor {
 public:
  Actor(const Protocol& protocol, State& state, std::size_t process);

  std::uint8_t& local(std::size_t i) { return self().registers[i]; }
  std::uint8_t load(std::size_t variable);
  void store(std::size_t variable, std::uint8_t value, Order order);
  std::uint8_t add(std::size_t variable, std::uint8_t n);  // gives the value before
  // A futex: sleeps if the variable has this value; goes on at once if not. Both wait for the
  // buffer to empty.
  void sleep(std::size_t variable, std::uint8_t expected);
  void wake(std::size_t variable);  // all who sleep on it
  Mode mode_of(std::size_t process);

  void go_to(std::string_view step);
  void end();
  void wait() { is_blocked_ = true; }  // the step cannot be taken in this state
  void violate(std::string what) { violation_ = std::move(what); }

 private:
  friend class Walk;
  ProcessState& self() { return state_.processes[process_]; }
  void take_access();
  bool is_buffer_empty();

  const Protocol& protocol_;
  State& state_;
  std::size_t process_;
  int n_accesses_ = 0;
  bool is_blocked_ = false;
  bool is_local_ = true;  // nothing that another process could see or change
  std::string violation_;
};

struct Step {
  std::string name;
  std::function<void(Actor&)> run;
};

struct Process {
  std::string name;
  std::vector<Step> steps;
  bool may_die = false;
};

struct Protocol {
  std::vector<std::string> variables;  // all start as 0
  std::vector<Process> processes;
  bool is_weak = true;  // false: every store reaches memory at once
  // Optional: makes states equal that differ in nothing that a step could notice.
  std::function<void(State&)> normalise;
};

struct Report {
  std::size_t n_states = 0;
  std::size_t n_transitions = 0;
  std::string error;               // empty: none
  std::vector<std::string> trace;  // the steps that lead to it
  bool is_whole = false;           // all states were visited
};

// Throws std::logic_error for a protocol that is no protocol (an unknown step, two accesses in
// one). Stops at `max_states`.
Report explore(const Protocol& protocol, std::size_t max_states = 8'000'000);

}  // namespace duplex::model
