"""Streams as plain lists of operations, so that two sessions, or two processes, can do the same.

`play` runs them and returns what came out of each, `memory` what a session remembers. Run as a
program it goes on from a snapshot and prints both: `python stream_ops.py checkpoint snapshot`, with
the operations and the options of the engine as JSON on stdin.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hypothesis import strategies as st
from random_models import BLOCK, HOP, TURN, load, picture, sound, words

from duplex_engine import DuplexError, Engine, Session

Op: TypeAlias = tuple[Any, ...]

OPS: st.SearchStrategy[Op] = st.one_of(
    st.tuples(st.just("text"), st.sampled_from([0, 1, 5, BLOCK, 150]), st.integers(0, 9)),
    st.tuples(st.just("audio"), st.sampled_from([1, 799, 5 * HOP, 20 * HOP + 7]), st.booleans()),
    st.tuples(st.just("image"), st.integers(1, 30), st.integers(1, 30)),
    st.tuples(
        st.just("step"), st.sampled_from([0, 5, TURN, 2 * TURN + 9]), st.integers(0, 6),
        st.booleans(), st.integers(0, 4),
    ),
    st.tuples(st.just("feed"), st.sampled_from([3, 1000]), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("decode"), st.sampled_from([1, 3, 40])),
    st.tuples(st.just("truncate"), st.integers(1, 6)),
    st.tuples(st.just("forget"), st.integers(0, 3), st.integers(1, 5)),
    st.tuples(st.just("fork")),
)  # fmt: skip


def play(session: Session, ops: Sequence[Op], opened: list[Session]) -> tuple[Session, list[str]]:
    """Runs the operations; returns the session at the end (a fork takes over) and the outputs.

    What is refused is part of the output. Forks are added to `opened`.
    """
    outputs = []
    for what, *arguments in ops:
        try:
            if what == "fork":
                session = session.fork()
                opened.append(session)
                output: Any = session.length
            else:
                output = _do(session, what, *arguments)
        except DuplexError as error:
            output = type(error).__name__
        outputs.append(f"{what}: {output}")
    return session, outputs


def check_goes_on(
    start: Session, before: Sequence[Op], after: Sequence[Op], opened: list[Session],
    path: Path, engines: Sequence[Engine],
) -> None:  # fmt: skip
    """A stream goes on alike behind `before`: from a snapshot at `path` on each engine, and
    migrated to the last. `start` is a session of the first; all sessions are added to `opened`."""
    opened.append(start)
    session, _ = play(start, before, opened)
    session.snapshot(path)
    others = [engine.restore(path) for engine in engines]
    others.append(session.fork().migrate(engines[-1]))
    opened += others
    for other in others:
        assert memory(other) == memory(session)
    end, expected = play(session, after, opened)
    for other in others:
        other_end, outputs = play(other, after, opened)
        assert outputs == expected
        assert memory(other_end) == memory(end)


def memory(session: Session) -> list[Any]:
    """What a session remembers, as hashes, and what it can go back to."""
    core = session._core
    return [core.turn, core.epoch, session.marks, [list(d) for d in core.digests()]]


def _do(session: Session, what: str, *arguments: Any) -> Any:
    inputs: dict[str, Any]
    if what == "text":
        return _hash(session.append(text=words(*arguments), logits="all"))
    if what == "audio":
        n, end = arguments
        return _hash(session.append(audio=sound(n, n), end_of_audio=end, logits="all"))
    if what == "image":
        return _hash(session.append(image=picture(*arguments), logits="last"))
    if what in ("step", "feed"):
        n, n_text, image, *n_result = arguments
        inputs = {"audio": sound(n, n), "text": words(n_text, n) or None}
        if image:
            inputs["image"] = picture(9, 20, n)
        if what == "feed":
            session.feed(**inputs)
            return None
        turn = session.step(**inputs, result=words(*n_result) or None)
        return turn.token_ids, turn.text, [str(event) for event in turn.events]
    if what == "decode":
        return session.decode(*arguments)
    if what == "truncate":
        marks = session.marks
        return session.truncate(marks[-min(arguments[0], len(marks))])
    begin, n_blocks = arguments
    return session.forget(begin * BLOCK, (begin + n_blocks) * BLOCK)


def _hash(array: Any) -> str:
    return f"{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def main() -> None:
    """What the head of the file says."""
    request = json.load(sys.stdin)
    with load(Path(sys.argv[1]), **request["options"]) as engine:
        session = engine.restore(sys.argv[2])
        before = memory(session)
        end, outputs = play(session, request["ops"], [])
        print(json.dumps([before, outputs, memory(end)]))


if __name__ == "__main__":
    main()
