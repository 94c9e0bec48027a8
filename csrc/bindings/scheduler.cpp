// The scheduler's decision: tuples in, an Action out.
#include "engine/scheduler.h"

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"

namespace duplex {
namespace {

using SessionTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using TaskTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

const char* kind_name(const Action& action) {
  switch (action.kind) {
    case ActionKind::kTurns:
      return "turns";
    case ActionKind::kBackground:
      return "background";
    case ActionKind::kWait:
      return "wait";
  }
  return "wait";
}

std::optional<std::int64_t> until_us(const Action& action) {
  if (action.until_us == kNever) return std::nullopt;
  return action.until_us;
}

}  // namespace

void bind_scheduler(py::module_& m) {
  py::class_<Action>(m, "Action", "What to do next.")
      .def_property_readonly("kind", &kind_name, "\"turns\", \"background\" or \"wait\".")
      .def_property_readonly(
          "turns",
          [](const Action& a) {
            std::vector<std::pair<std::int64_t, std::int64_t>> turns;
            for (const TurnPlan& plan : a.turns) turns.emplace_back(plan.session, plan.n_turns);
            return turns;
          },
          "(session, micro-turns to append), of one pass.")
      .def_readonly("task", &Action::task)
      .def_readonly("is_forced", &Action::is_forced)
      .def_property_readonly("until_us", &until_us, "None: until something new comes.");
  m.def(
      "next_action",
      [](std::int64_t now_us, const std::vector<SessionTuple>& sessions,
         const std::vector<TaskTuple>& tasks, std::int64_t period_us, std::int64_t patience_us,
         std::int64_t pass_us, std::int64_t row_ns, std::int64_t max_wait_us,
         std::int64_t forced_us) {
        std::vector<TurnLoad> turns;
        for (const auto& [session, due_us, n_whole, n_rows] : sessions)
          turns.push_back({session, due_us, n_whole, n_rows});
        std::vector<TaskLoad> loads;
        for (const auto& [task, waits_since_us, slice_us] : tasks)
          loads.push_back({task, waits_since_us, slice_us});
        return next_action(
            {period_us, patience_us, pass_us, row_ns, max_wait_us, forced_us, turns, loads},
            now_us);
      },
      py::arg("now_us"), py::arg("sessions"), py::arg("tasks"), py::kw_only(), py::arg("period_us"),
      py::arg("patience_us"), py::arg("pass_us"), py::arg("row_ns"), py::arg("max_wait_us"),
      py::arg("forced_us"),
      "What an engine's driver does next: csrc/engine/scheduler.h. A session is (id, due_us, whole "
      "micro-turns, rows), a task (id, waits_since_us, slice_us).");
}

}  // namespace duplex
