"""What a step costs on this machine, measured while it runs, and whether one session more fits.

Owns the two numbers of the model (a pass, a row) and the budget. A step is timed as
`passes * pass_us + rows * row_us`: weights are read once a pass, rows are computed one by one.
"""

from __future__ import annotations

from duplex_engine.arguments import number
from duplex_engine.config import InteractionConfig
from duplex_engine.engine import Engine
from duplex_engine.errors import CapacityError

__all__ = ["CostModel"]

FORGET = 0.99  # weight of the past with each step
OUTLIER = 4.0  # times what was expected: the machine was away, and not for the model's sake
LEARNED = 8  # steps before outliers are told
MEASURED_STEPS = 6  # before the first session is admitted
# A session that becomes due waits at most for the step at work and for its own.
SHARE = 0.5  # of the period that one step may take


class CostModel:
    """Least squares over the steps seen, the newest counting most."""

    def __init__(self, *, pass_us: float = 0.0, row_us: float = 0.0, learn: bool = True) -> None:
        """The numbers to begin with; `learn=False` keeps them."""
        self.pass_us = number(pass_us, "CostModel: pass_us")
        self.row_us = number(row_us, "CostModel: row_us")
        self._learn = learn
        self._forget_all()

    def _forget_all(self) -> None:
        self._n_seen = 0
        self._pp = self._pr = self._rr = self._py = self._ry = 0.0

    def observe(self, n_passes: int, n_rows: int, us: float) -> None:
        """Learns from a step that took `us` microseconds."""
        if not self._learn:
            return
        expected = n_passes * self.pass_us + n_rows * self.row_us
        if self._n_seen >= LEARNED:
            us = min(us, OUTLIER * expected)
        self._n_seen += 1
        self._pp = FORGET * self._pp + n_passes * n_passes
        self._pr = FORGET * self._pr + n_passes * n_rows
        self._rr = FORGET * self._rr + n_rows * n_rows
        self._py = FORGET * self._py + n_passes * us
        self._ry = FORGET * self._ry + n_rows * us
        determinant = self._pp * self._rr - self._pr * self._pr
        pass_us = row_us = -1.0
        if determinant > 1e-6 * self._pp * self._rr:
            pass_us = (self._py * self._rr - self._ry * self._pr) / determinant
            row_us = (self._ry * self._pp - self._py * self._pr) / determinant
        if row_us < 0:  # steps too much alike to tell the two apart, or no cost of rows
            pass_us, row_us = self._py / self._pp, 0.0
        elif pass_us < 0:
            pass_us, row_us = 0.0, self._ry / self._rr
        self.pass_us, self.row_us = pass_us, row_us

    def measure(self, engine: Engine, layout: InteractionConfig) -> None:
        """Learns anew, from a session of its own that it steps through short and long input."""
        if not self._learn:
            return
        self._forget_all()
        rows = self.turn_rows(layout) + 64
        with engine.open_session(max_positions=MEASURED_STEPS * rows) as session:
            for n in range(MEASURED_STEPS):
                turn = session.step(text=[0] * (16 * (n % 3)) or None)
                rows = turn.input.rows + len(turn.token_ids) - 1
                if n > 0:  # the first touches memory for the first time
                    self.observe(len(turn.token_ids), rows, turn.timing.total_us)

    def check(self, layout: InteractionConfig, n_sessions: int) -> None:
        """Raises CapacityError if so many sessions are too much for this machine."""
        estimate, budget = self.step_us(layout, n_sessions), self.budget_us(layout)
        if estimate > budget:
            raise CapacityError(
                f"open: a step of {n_sessions} sessions is estimated at {estimate / 1000:.1f} ms, "
                f"expected at most {budget / 1000:.0f} ms, half a micro-turn; "
                f"{self.most_sessions(layout)} would fit on this machine: close one first, or take "
                "a smaller model or quantised weights"
            )

    def turn_rows(self, layout: InteractionConfig) -> int:
        """Rows of one session's micro-turn with all the output that the checkpoint allows."""
        return layout.audio_frames + layout.max_output_tokens

    def step_us(self, layout: InteractionConfig, n_sessions: int) -> float:
        """A step of `n_sessions` that all say as much as they may."""
        rows_us = n_sessions * self.turn_rows(layout) * self.row_us
        return layout.max_output_tokens * self.pass_us + rows_us

    def budget_us(self, layout: InteractionConfig) -> float:
        """The most that such a step may take."""
        return layout.micro_turn_ms * 1000 * SHARE

    def most_sessions(self, layout: InteractionConfig) -> int | None:
        """How many sessions fit; None if rows cost nothing, so that time is no limit."""
        fixed = self.step_us(layout, 0)
        if fixed > self.budget_us(layout):
            return 0
        each = self.turn_rows(layout) * self.row_us
        return None if each <= 0 else int((self.budget_us(layout) - fixed) / each)
