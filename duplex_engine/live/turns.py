"""One step of the live sessions whose turn it is: what each is given, and what becomes of it.

Owns the order of things at a micro-turn boundary: calls that wait, the rewind after an
interruption, the input, the pass, the output. `Session.step` on the same values gives the same
output (see `journal.py`). Read `driver.py` for who decides that it is time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duplex_engine.errors import SessionClosed
from duplex_engine.live.delegating import after_step, before_step, note_request
from duplex_engine.live.heard import Record, merge_inputs, truncated_to
from duplex_engine.live.journal import Entry
from duplex_engine.live.session import LiveSession
from duplex_engine.live.summary import begin_summary
from duplex_engine.live.types import LiveTurn, NotRewound, Rewound, TurnInput
from duplex_engine.types import Delegation, MicroTurn, StepInput

if TYPE_CHECKING:
    from duplex_engine.live.driver import LiveEngine

__all__ = ["hand_over", "run_jobs", "run_turns"]


@dataclass(slots=True)
class _Part:
    """One session's part in a step."""

    session: LiveSession
    given: TurnInput
    begin: int  # length of the sequence before
    epoch: int  # when the step began
    late_us: int
    inputs: StepInput


def run_jobs(live: LiveEngine) -> None:
    """Does what callers of `at_boundary` asked for."""
    with live._lock:
        jobs = [
            (s, *s._jobs.popleft()) for s in live._sessions.values() for _ in range(len(s._jobs))
        ]
    for session, call, future in jobs:
        if not future.set_running_or_notify_cancel():
            continue
        before = _marks(session)
        try:
            future.set_result(call(session._inner))
        except BaseException as error:
            future.set_exception(error)
        length = truncated_to(before, _marks(session))
        if length is not None:
            live._journal(session, Entry("truncate", length))
            with live._lock:
                session._heard.drop_from(length)


def _marks(session: LiveSession) -> list[int]:
    try:
        return session._inner.marks
    except SessionClosed:
        return []


def hand_over(live: LiveEngine, session: LiveSession) -> None:
    """Moves what waits for the next step into the session itself, which is parked with it.

    Raises:
        CapacityError: it cannot hold so much.
    """
    with live._lock:
        given = TurnInput(0, session._intake.take_all())
        session._mailbox.take_all(given)
    inputs = [{"audio": given.audio, "text": given.text or None, "result": given.result or None}]
    inputs += [{"image": image} for image in given.images]
    for values in inputs:
        if any(value is not None for value in values.values()):
            session._inner.feed(**values)
            live._journal(session, Entry("feed", values))


def run_turns(live: LiveEngine, plans: Sequence[tuple[int, int]]) -> None:
    """One pass of `plans`: (session number, micro-turns to append)."""
    begin_us = live.now_us()
    prepared = [_prepare(live, number, n_turns, begin_us) for number, n_turns in plans]
    parts = [part for part in prepared if part is not None]
    if not parts:
        return
    answers: Sequence[MicroTurn | Exception]
    try:
        answers = live.engine.step_many([(part.session._inner, part.inputs) for part in parts])
    except Exception as error:  # nothing that one session did: none of these can go on
        answers = [error] * len(parts)
    _learn(live, answers)
    for part, answer in zip(parts, answers, strict=True):
        if not isinstance(answer, MicroTurn):
            live._end_with(part.session, answer)
            continue
        try:
            _finish(live, part, answer, begin_us)
        except Exception as error:  # of code that this session brought: it ends alone
            live._end_with(part.session, error)


def _prepare(live: LiveEngine, number: int, n_turns: int, now_us: int) -> _Part | None:
    """Rewinds the session if it was interrupted, and takes its input; None if it is gone."""
    with live._lock:
        session = live._sessions.get(number)
        if session is None or not session.attached:
            return None
        is_interrupted, session._is_interrupted = session._is_interrupted, False
        epoch = session._epoch
    try:
        again = _rewind(live, session) if is_interrupted else None
        begin = session._inner.length
        before_step(session)
        with live._lock:
            late_us = max(now_us - session._due_us, 0)
            given = session._take(n_turns, now_us)
        if again is not None:
            given = merge_inputs([again, given])
        for image in given.images[:-1]:  # a step takes one
            session._inner.feed(image=image)
            live._journal(session, Entry("feed", {"image": image}))
    except Exception as error:  # of this session, or of code that it brought: it ends alone
        live._end_with(session, error)
        return None
    inputs: StepInput = {
        "audio": given.audio,
        "text": given.text or None,
        "result": given.result or None,
        "image": given.images[-1] if given.images else None,
    }
    return _Part(session, given, begin, epoch, late_us, inputs)


def _rewind(live: LiveEngine, session: LiveSession) -> TurnInput | None:
    """Takes unheard output out of the sequence; returns the input to append again."""
    with live._lock:
        first, records = session._heard.unheard()
    if first is None:
        return None
    if not records or records[0].begin not in session._inner.marks:
        with live._lock:
            session._heard.settle()
            session._events.append(NotRewound(first))
        live._count("not_rewound")
        return None
    session._inner.truncate(records[0].begin)
    live._journal(session, Entry("truncate", records[0].begin))
    with live._lock:
        again, results = session._heard.take_back(len(records))
        session._mailbox.take_back(first, results)
        session._events.append(Rewound(first, again.n_turns))
    if session.delegations is not None:
        session.delegations.take_back(first)
    live._count("rewound")
    return again


def _learn(live: LiveEngine, answers: Sequence[MicroTurn | Exception]) -> None:
    turns = [answer for answer in answers if isinstance(answer, MicroTurn)]
    if turns:
        n_passes = max(max(len(turn.token_ids) for turn in turns), 1)
        n_rows = sum(turn.input.rows + max(len(turn.token_ids) - 1, 0) for turn in turns)
        live.cost.observe(n_passes, n_rows, turns[0].timing.total_us)


def _finish(live: LiveEngine, part: _Part, answer: MicroTurn, begin_us: int) -> None:
    """Notes the output and hands it out."""
    session = part.session
    inputs = part.inputs
    if answer.stopped == "interrupted":
        inputs = {**inputs, "max_tokens": len(answer.token_ids)}
    live._journal(session, Entry("step", inputs))
    after_step(session, answer, inputs)
    turn = dataclasses.replace(answer, epoch=part.epoch)
    with live._lock:
        spoke = any(token != live._layout.listen for token in turn.token_ids)
        session._heard.add(Record(turn.index, part.begin, part.given, spoke))
        live.trace.turn(session.id, begin_us, turn, part.late_us)
        for event in turn.events:
            if isinstance(event, Delegation):
                note_request(session)
        live._measure(turn, part.late_us)
        if session._ended is not None or part.epoch < session._epoch:
            live._count("stale_turns")
            return
        events = (*session._events, *turn.events)
        session._events.clear()
        out = LiveTurn(session.id, part.epoch, turn, events, part.late_us)
        live._count("output_lost", session._outbox.put(out))
    if session._summary is not None:
        begin_summary(live, session, session._summary)
