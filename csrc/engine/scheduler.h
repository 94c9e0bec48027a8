// What the one driver of an engine does next. A pure function: no clock, no engine, no state of its
// own, so that every decision can be tested with made-up times and repeats from the same state.
//
// A session's micro-turn is *due* when its input should be whole. Whole input runs at that moment;
// input that is not whole is given `patience_us` more, then what is missing counts as silence. A
// session that is late by k micro-turns gets one step that appends all of them and decodes the
// newest: turns are merged, none is dropped.
//
// What always holds (scheduler_test.cpp):
//  1. The same state and time give the same action, whatever the order of sessions and tasks.
//  2. Nothing waits that could run: a wait or a background slice is chosen only when no session is
//     ready, but for rule 5.
//  3. Earliest first: a session that stays out of a pass is not due before one that is in it.
//  4. A pass takes all sessions that are ready, and those with whole input that become due while
//     it runs, until its estimated cost exceeds one period; the first is always taken.
//  5. Background work delays a ready session by one slice, and at most once in `max_wait_us`;
//     a task that waits gets its slice after at most (number of tasks) * `max_wait_us`, the pass at
//     work and the slices of older tasks.
//  6. A slice is let run only if it ends before the next session is due, or ready if it is due
//     already, but for rule 5.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace duplex {

inline constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// An open session. Times of all structs are of one clock, in microseconds.
struct TurnLoad {
  std::int64_t session = 0;
  std::int64_t due_us = 0;   // when its next micro-turn's input should be whole
  std::int64_t n_whole = 0;  // micro-turns whose input is there
  std::int64_t n_rows = 0;   // that the step would compute, output included
};

// A background task that has work for a slice.
struct TaskLoad {
  std::int64_t task = 0;
  std::int64_t waits_since_us = 0;  // the end of its last slice, or when it came
  std::int64_t slice_us = 0;        // what one slice of it takes; 0 = it gives way by itself
};

struct SchedulerState {
  std::int64_t period_us = 200'000;    // of a micro-turn
  std::int64_t patience_us = 100'000;  // for input that is late
  std::int64_t pass_us = 0;            // measured: a step without rows
  std::int64_t row_ns = 0;             // measured: what a row adds to it
  std::int64_t max_wait_us = 1'000'000;
  std::int64_t forced_us = 0;  // end of the newest slice that was forced (rule 5)
  std::span<const TurnLoad> sessions;
  std::span<const TaskLoad> tasks;
};

struct TurnPlan {
  std::int64_t session = 0;
  std::int64_t n_turns = 1;  // to append, the newest of which decodes
};

enum class ActionKind : std::uint8_t { kWait, kTurns, kBackground };

struct Action {
  ActionKind kind = ActionKind::kWait;
  std::vector<TurnPlan> turns;     // kTurns: of one pass, earliest due first
  std::int64_t task = 0;           // kBackground
  bool is_forced = false;          // kBackground: one slice, whatever is ready
  std::int64_t until_us = kNever;  // kWait, kBackground: when to ask again at the latest
};

Action next_action(const SchedulerState& state, std::int64_t now_us);

// When the session is ready if nothing more comes.
std::int64_t ready_us(const TurnLoad& load, std::int64_t patience_us);
// Micro-turns that a step at `now_us` appends: the whole ones, and those behind them whose patience
// is over. At least one.
std::int64_t turns_to_run(const TurnLoad& load, std::int64_t now_us, std::int64_t period_us,
                          std::int64_t patience_us);

}  // namespace duplex
