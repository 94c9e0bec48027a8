"""A rule machine: sessions of one small engine under any order of operations.

Hypothesis opens up to six sessions over a pool of pages too small for all of them and appends,
decodes, steps, forks, truncates, forgets and closes at random. After every rule:

- a whole block that a session has committed holds the bytes it held before, until it is truncated;
- no page is lost or held twice, and never more is promised than there is;
- an operation that was refused has changed nothing.

At the end each session must equal one that another engine computes from its history alone, in
other pieces and with other threads; then all are closed and every page must be free.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from random_models import BLOCK, HOP, MODELS, REWIND, TURN, examples, load, picture, sound, words
from random_models import write as write_model

from duplex_engine import CapacityError, DuplexError, InvalidArgument, Session

pytestmark = [pytest.mark.core, pytest.mark.fuzz]

MAX_SESSIONS = 6
ROWS = 16  # of one pass
WINDOW = MODELS["dense"].window
Digests: TypeAlias = dict[tuple[int, int], int]  # (tape, block) -> hash
BLOCK_POSITIONS = (BLOCK, BLOCK, 1)  # of a block of the global, local and convolution tape


@dataclass
class Twin:
    """A session, and all that is known about it from outside."""

    session: Session
    max_positions: int
    sampling: dict[str, Any]
    # (what was done, its arguments, its output, the length behind it), in order
    history: list[tuple[str, Any, Any, int]] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)  # fed in a step that was refused
    committed: Digests = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.history[-1][3] if self.history else 0

    def did(self, what: str, arguments: Any, output: Any = None) -> None:
        self.history.append((what, arguments, output, self.session.length))


def digests(session: Session) -> Digests:
    return {(tape, block): hash_ for tape, block, hash_ in session._core.digests()}


class SequenceRules(RuleBasedStateMachine):
    sessions = Bundle("sessions")
    folder: Path  # of the checkpoint

    def __init__(self) -> None:
        super().__init__()
        # Enough for four of the longest sessions, or for six of which some are short.
        self.engine = load(self.folder, memory="2200KiB", max_batch_rows=ROWS)
        self.twins: list[Twin] = []

    # ---- rules

    @initialize(target=sessions, length=st.sampled_from([0, 200, 450]))
    def start(self, length: int) -> Any:
        return self.open(max_positions=1000, prompt=length, temperature=0.0)

    @precondition(lambda self: len(self.twins) < MAX_SESSIONS)
    @rule(
        target=sessions,
        max_positions=st.sampled_from([40, 200, 500, 1000]),
        prompt=st.sampled_from([0, 30, 280, 400]),
        temperature=st.sampled_from([0.0, 0.9]),
    )
    def open(self, max_positions: int, prompt: int, temperature: float) -> Any:
        sampling = {"seed": prompt, "temperature": temperature, "top_k": 30}
        session = self.attempt(
            lambda: self.engine.open_session(max_positions=max_positions, endless=None, **sampling)
        )
        if session is None:
            return multiple()
        twin = self.adopt(Twin(session, max_positions, sampling))
        self.append(twin, "text", words(prompt), prompt, "last")
        return twin

    @rule(
        twin=sessions,
        n=st.one_of(st.integers(0, 5), st.sampled_from([BLOCK - 1, BLOCK, 2 * BLOCK, 150])),
        seed=st.integers(0, 5),
        logits=st.sampled_from([None, "last", "all"]),
    )
    def append_text(self, twin: Twin, n: int, seed: int, logits: Any) -> None:
        self.append(twin, "text", words(n, seed), n, logits)

    @rule(
        twin=sessions,
        n=st.sampled_from([0, 1, 799, 800, 801, 5 * HOP, 20 * HOP + 7]),
        end=st.booleans(),
    )
    def append_audio(self, twin: Twin, n: int, end: bool) -> None:
        rows = -(-(n + HOP - 1) // HOP)  # all but a whole frame may wait already
        self.append(twin, "audio", sound(n, n), rows, "all", end_of_audio=end)

    @rule(twin=sessions, height=st.integers(1, 30), width=st.integers(1, 30))
    def append_image(self, twin: Twin, height: int, width: int) -> None:
        rows = -(-height // 8) * (width // 8 + 1)
        self.append(twin, "image", picture(height, width), rows, "last")

    @rule(twin=sessions, n=st.sampled_from([0, 1, 2, 7, 40]))
    def decode(self, twin: Twin, n: int) -> None:
        tokens = self.attempt(
            lambda: twin.session.decode(n),
            # An empty session has nothing to go on from.
            may_refuse=lambda error: (
                isinstance(error, InvalidArgument)
                if twin.length == 0
                else self.is_full(error, twin, n)
            ),
        )
        if tokens is not None:
            assert len(tokens) == n
            twin.did("decode", n, tokens)

    @rule(
        twin=sessions,
        n=st.sampled_from([0, 1, TURN, TURN, 2 * TURN + 9]),
        text=st.integers(0, 30),
        image=st.booleans(),
        max_tokens=st.sampled_from([None, 0, 3]),
    )
    def step(self, twin: Twin, n: int, text: int, image: bool, max_tokens: int | None) -> None:
        inputs: dict[str, Any] = {"audio": sound(n, n), "text": words(text) or None}
        if image:
            inputs["image"] = picture(9, 20)
        turn = self.attempt(
            lambda: twin.session.step(**inputs, max_tokens=max_tokens),
            # The input waits, so it may have grown far beyond this step's.
            may_refuse=lambda error: isinstance(error, CapacityError),
        )
        twin.waiting.append(inputs)
        if turn is not None:
            twin.did("step", (twin.waiting, max_tokens), turn.token_ids)
            twin.waiting = []

    @precondition(lambda self: len(self.twins) < MAX_SESSIONS)
    @rule(target=sessions, twin=sessions, grow=st.sampled_from([None, -50, 0, 300]))
    def fork(self, twin: Twin, grow: int | None) -> Any:
        limit = None if grow is None else max(twin.max_positions + grow, 1)
        child = self.attempt(
            lambda: twin.session.fork(limit),
            may_refuse=lambda error: (
                isinstance(error, CapacityError)
                or (limit is not None and limit < twin.length)  # too short for what it inherits
            ),
        )
        if child is None:
            return multiple()
        assert child.length == twin.length
        assert digests(child) == digests(twin.session)
        return self.adopt(
            replace(
                twin,
                session=child,
                max_positions=limit or twin.max_positions,
                history=list(twin.history),
                waiting=list(twin.waiting),
                committed=dict(twin.committed),
            )
        )

    @rule(twin=sessions, data=st.data())
    def truncate(self, twin: Twin, data: st.DataObject) -> None:
        marks = twin.session.marks
        lengths = {0} | {entry[3] for entry in twin.history}
        assert set(marks) <= lengths
        length = data.draw(st.sampled_from([*marks, *marks, 0, twin.length + 1]))
        done = self.attempt(
            lambda: twin.session.truncate(length) or True,
            may_refuse=lambda error: (
                # Pages that a fork keeps would have to be paid twice.
                isinstance(error, CapacityError) if length in marks else True
            ),
        )
        if done is None:
            return
        assert twin.session.marks[-1] == length
        kept, dropped = list(twin.history), []
        while kept and kept[-1][3] > length:
            dropped.append(kept.pop())
        # What was forgotten stays forgotten, so it has to be done again, and then undone.
        if any(what == "forget" for what, *_ in dropped):
            kept = [*twin.history, ("truncate", length, None, length)]
        twin.history = kept
        twin.committed = {
            (tape, block): hash_
            for (tape, block), hash_ in twin.committed.items()
            if (block + 1) * BLOCK_POSITIONS[tape] <= length
        }

    @precondition(lambda self: len(self.twins) < MAX_SESSIONS)
    @rule(target=sessions, twin=sessions, n=st.integers(1, 70), data=st.data())
    def fork_and_part(self, twin: Twin, n: int, data: st.DataObject) -> Any:
        """One of two takes back what they share and goes elsewhere."""
        child = self.fork(twin, None)
        if isinstance(child, Twin):
            one = data.draw(st.sampled_from([twin, child]))
            self.truncate(one, data)
            self.append_text(one, n, seed=7, logits=None)
        return child

    @rule(twin=sessions, data=st.data())
    def forget(self, twin: Twin, data: st.DataObject) -> None:
        limit = twin.length - WINDOW - REWIND
        n_blocks = max(limit, 0) // BLOCK
        begin = BLOCK * data.draw(st.integers(0, max(n_blocks - 1, 0)))
        end = BLOCK * data.draw(st.integers(begin // BLOCK + 1, max(n_blocks, 1)))
        begin += data.draw(st.sampled_from([0, 0, 0, 1]))
        end += data.draw(st.sampled_from([0, 0, 0, 9, -1, 9 * BLOCK]))
        hidden = self.attempt(
            lambda: twin.session.forget(begin, end),
            # Pages that a fork keeps would have to be paid twice.
            may_refuse=lambda error: end > max(limit, 0) or isinstance(error, CapacityError),
        )
        if hidden is None:
            return
        first, last = -(-begin // BLOCK) * BLOCK, end // BLOCK * BLOCK
        assert hidden == (first, max(first, last))
        twin.did("forget", hidden)

    @rule(twin=consumes(sessions))
    def close(self, twin: Twin) -> None:
        twin.session.close()
        self.twins.remove(twin)

    # ---- after every rule

    @invariant()
    def committed_blocks_are_never_written(self) -> None:
        for twin in self.twins:
            held = digests(twin.session)
            for key in held.keys() & twin.committed.keys():
                assert held[key] == twin.committed[key], f"tape and block {key} changed"
            twin.committed |= held
            assert twin.session.length == twin.length

    @invariant()
    def pages_add_up(self) -> None:
        stats = self.engine.stats
        assert stats["pages_used"] + stats["pages_free"] == stats["pages_total"]
        assert 0 <= stats["pages_promised"] <= stats["pages_total"]
        assert stats["sessions"] == len(self.twins)
        held = [twin.session.memory for twin in self.twins]
        private = sum(
            m["global_bytes"] + m["local_bytes"] + m["conv_bytes"] - m["shared_bytes"] for m in held
        )
        shared = sum(m["shared_bytes"] for m in held)
        used = stats["pages_used"] * stats["page_bytes"]
        assert private + shared / max(len(held), 1) <= used <= private + shared / 2

    def teardown(self) -> None:
        try:
            for twin in self.twins[:2]:
                self.compare_with_its_history(twin)
            for twin in self.twins:
                twin.session.close()
            stats = self.engine.stats
            assert stats["pages_used"] == stats["pages_promised"] == stats["sessions"] == 0
        finally:
            self.engine.close()

    # ---- how

    def attempt(
        self,
        operation: Callable[[], Any],
        may_refuse: Callable[[DuplexError], bool] = lambda error: isinstance(error, CapacityError),
    ) -> Any:
        """Returns the result, or None if it was refused: with reason, and leaving no trace."""
        before = self.everything()
        try:
            return operation()
        except DuplexError as refusal:
            error = refusal
        assert may_refuse(error), error
        assert self.everything() == before
        return None

    def everything(self) -> Any:
        """All that can be seen of the engine and its sessions."""
        seen = [
            (s.length, s.marks, s.memory, s._core.turn, s._core.epoch, digests(s))
            for s in (twin.session for twin in self.twins)
        ]
        return self.engine.stats, seen

    def adopt(self, twin: Twin) -> Twin:
        self.twins.append(twin)
        return twin

    def append(
        self, twin: Twin, kind: str, data: Any, rows: int, logits: Any, **options: Any
    ) -> None:
        operation = lambda: (twin.session.append(**{kind: data}, logits=logits, **options),)  # noqa: E731
        done = self.attempt(operation, may_refuse=lambda error: self.is_full(error, twin, rows))
        if done is not None:
            twin.did(kind, (data, options), (logits, done[0]))

    def is_full(self, error: DuplexError, twin: Twin, rows: int) -> bool:
        """Whether so many rows, and the token that may wait, do not fit."""
        return isinstance(error, CapacityError) and twin.length + rows + 1 > twin.max_positions

    def compare_with_its_history(self, twin: Twin) -> None:
        with ExitStack() as stack:
            other = stack.enter_context(
                load(self.folder, memory="8MiB", max_batch_rows=64, threads=2)
            )
            again = stack.enter_context(
                other.open_session(max_positions=4000, endless=None, **twin.sampling)
            )
            # Smaller pieces leave more marks, which could push out the one a truncation needs.
            in_pieces = all(what != "truncate" for what, *_ in twin.history)
            for entry in twin.history:
                repeat(again, in_pieces, *entry)
            held, expected = digests(twin.session), digests(again)
            # The other has lost no page of its windows to what was truncated later.
            assert held.items() <= expected.items()
            assert {key for key in held if key[0] == 0} == {key for key in expected if key[0] == 0}
            for inputs in twin.waiting:
                again.feed(**inputs)
            fork = stack.enter_context(again.fork())
            found = self.attempt(lambda: twin.session.append(text=words(2), logits="all"))
            if found is not None:
                assert found.tobytes() == again.append(text=words(2), logits="all").tobytes()
                found = self.attempt(lambda: twin.session.step(max_tokens=2))
            if found is not None:
                fork.append(text=words(2))
                assert found.token_ids == fork.step(max_tokens=2).token_ids


def repeat(
    session: Session, in_pieces: bool, what: str, arguments: Any, output: Any, length: int
) -> None:
    """Does again what another session did, and expects the same output."""
    if what == "decode":
        portions = [1] * arguments if in_pieces else [arguments]
        assert [i for n in portions for i in session.decode(n)] == output
    elif what == "step":
        waiting, max_tokens = arguments
        for inputs in waiting:
            session.feed(**inputs)
        assert session.step(max_tokens=max_tokens).token_ids == output
    elif what == "forget":
        begin, end = arguments
        for block in range(begin, end, BLOCK):
            assert session.forget(block, block + BLOCK) == (block, block + BLOCK)
    elif what == "truncate":
        session.truncate(arguments)
    else:
        data, options = arguments
        logits, expected = output
        is_whole = what == "image" or not in_pieces
        pieces = [data] if is_whole else np.array_split(data, 3)
        rows = []
        for k, piece in enumerate(pieces):
            piece = np.asarray(piece, np.int64) if what == "text" else piece
            last = options if k + 1 == len(pieces) else {}
            rows.append(session.append(**{what: piece}, logits="all", **last))
        if logits is not None:
            found = np.concatenate(rows)
            assert (found[-1:] if logits == "last" else found).tobytes() == expected.tobytes()
    assert session.length == length


@pytest.fixture(scope="module", autouse=True)
def checkpoint() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        SequenceRules.folder = write_model(Path(folder), "dense")
        yield


TestSequenceRules = pytest.mark.cpu(SequenceRules.TestCase)
TestSequenceRules.settings = examples(60, stateful_step_count=50)
