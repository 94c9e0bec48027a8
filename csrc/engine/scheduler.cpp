#include "engine/scheduler.h"

#include <algorithm>
#include <tuple>

#include "core/error.h"

namespace duplex {
namespace {

void check_state(const SchedulerState& state) {
  check(state.period_us > 0, "scheduler: period_us: expected more than 0, found ", state.period_us);
  check(state.patience_us >= 0 && state.pass_us >= 0 && state.row_ns >= 0 && state.max_wait_us >= 0,
        "scheduler: expected patience, costs and max_wait of 0 or more, found ", state.patience_us,
        ", ", state.pass_us, ", ", state.row_ns, ", ", state.max_wait_us);
}

std::int64_t cost_us(const SchedulerState& state, std::int64_t n_rows) {
  return state.pass_us + state.row_ns * n_rows / 1000;
}

// Sessions that are ready now, then those that become due while the ready ones run.
std::vector<TurnLoad> candidates(const SchedulerState& state, std::int64_t now_us) {
  std::vector<TurnLoad> ready;
  std::int64_t n_rows = 0;
  for (const TurnLoad& load : state.sessions) {
    if (ready_us(load, state.patience_us) > now_us) continue;
    ready.push_back(load);
    n_rows += load.n_rows;
  }
  if (ready.empty()) return ready;
  const std::int64_t end_us = now_us + cost_us(state, n_rows);
  for (const TurnLoad& load : state.sessions)
    if (load.n_whole > 0 && load.due_us > now_us && load.due_us <= end_us) ready.push_back(load);
  std::sort(ready.begin(), ready.end(), [](const TurnLoad& a, const TurnLoad& b) {
    return std::tie(a.due_us, a.session) < std::tie(b.due_us, b.session);
  });
  return ready;
}

std::vector<TurnPlan> plan_pass(const SchedulerState& state, std::int64_t now_us) {
  std::vector<TurnPlan> turns;
  std::int64_t n_rows = 0;
  for (const TurnLoad& load : candidates(state, now_us)) {
    n_rows += load.n_rows;
    if (!turns.empty() && cost_us(state, n_rows) > state.period_us) break;
    turns.push_back({load.session, turns_to_run(load, now_us, state.period_us, state.patience_us)});
  }
  return turns;
}

// The task that has waited longest among those whose slice ends by `end_us`; nullptr if none.
const TaskLoad* oldest_task(const SchedulerState& state, std::int64_t now_us, std::int64_t end_us) {
  const TaskLoad* oldest = nullptr;
  for (const TaskLoad& task : state.tasks) {
    if (end_us != kNever && task.slice_us > end_us - now_us) continue;
    if (oldest == nullptr ||
        std::tie(task.waits_since_us, task.task) < std::tie(oldest->waits_since_us, oldest->task))
      oldest = &task;
  }
  return oldest;
}

// When the task gets a slice even if that delays a session.
std::int64_t forced_at_us(const SchedulerState& state, const TaskLoad& task) {
  return std::max(task.waits_since_us, state.forced_us) + state.max_wait_us;
}

}  // namespace

std::int64_t ready_us(const TurnLoad& load, std::int64_t patience_us) {
  return load.n_whole > 0 ? load.due_us : load.due_us + patience_us;
}

std::int64_t turns_to_run(const TurnLoad& load, std::int64_t now_us, std::int64_t period_us,
                          std::int64_t patience_us) {
  const std::int64_t given_up_us = load.due_us + load.n_whole * period_us + patience_us;
  const std::int64_t n_given_up = now_us < given_up_us ? 0 : (now_us - given_up_us) / period_us + 1;
  return std::max<std::int64_t>(load.n_whole + n_given_up, 1);
}

Action next_action(const SchedulerState& state, std::int64_t now_us) {
  check_state(state);
  Action action;
  std::int64_t next_us = kNever;
  for (const TurnLoad& load : state.sessions)
    next_us = std::min(next_us, ready_us(load, state.patience_us));
  const TaskLoad* task = oldest_task(state, now_us, kNever);
  if (task != nullptr && now_us >= forced_at_us(state, *task)) {
    action.kind = ActionKind::kBackground;
    action.task = task->task;
    action.is_forced = true;
    action.until_us = std::max(next_us, now_us);
    return action;
  }
  if (next_us <= now_us) {
    action.kind = ActionKind::kTurns;
    action.turns = plan_pass(state, now_us);
    return action;
  }
  action.until_us = next_us;
  std::int64_t gap_end_us = kNever;  // input may come as soon as it is due
  for (const TurnLoad& load : state.sessions)
    gap_end_us = std::min(gap_end_us,
                          load.due_us > now_us ? load.due_us : ready_us(load, state.patience_us));
  if (const TaskLoad* const fits = oldest_task(state, now_us, gap_end_us)) {
    action.kind = ActionKind::kBackground;
    action.task = fits->task;
  } else if (task != nullptr) {
    action.until_us = std::min(next_us, forced_at_us(state, *task));
  }
  return action;
}

}  // namespace duplex
