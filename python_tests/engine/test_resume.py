"""A snapshot, restored anywhere, goes on bit for bit: the same tokens, logits and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import stream_ops
from hypothesis import given
from hypothesis import strategies as st
from random_models import BLOCK, TURN, counts, examples, load, sound, words, write
from stream_ops import OPS, check_goes_on, memory, play

from duplex_engine import CapacityError, CheckpointError, Engine, InvalidArgument, Session, Window

pytestmark = [pytest.mark.core, pytest.mark.fuzz]

SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "seed": 5}
# Steps, a fork, rewinding, forgetting, and sound that waits: whatever a session can carry.
STREAM: list[stream_ops.Op] = [
    ("text", 150, 1),
    *[("step", TURN + 9 * k, k % 3, k % 5 == 0, k % 2) for k in range(12)],
    ("forget", 0, 2),
    ("truncate", 2),
    ("fork",),
    ("audio", 799, False),
    ("decode", 3),
    ("feed", 1000, 2, True),
]
AFTER: list[stream_ops.Op] = [
    ("truncate", 3),
    ("step", TURN, 0, False, 0),
    ("audio", 5000, False),
    ("decode", 40),
    ("text", 150, 3),
    ("truncate", 1),
    ("step", 0, 2, False, 2),
]

Engines = dict[str, Engine]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Engines]]:
    """engines(model): "one" and "other" of the same checkpoint, which differ in what is free to."""
    made: dict[str, Engines] = {}

    def get(model: str) -> Engines:
        if model not in made:
            mtp_layers = 2 if model == "dense" else 0
            folder = write(tmp_path_factory.mktemp(model), model, mtp_layers=mtp_layers)
            options = {"mtp_layers": mtp_layers, "memory": "256MiB"}
            made[model] = {
                "one": load(folder, **options),
                "other": load(folder, threads=3, max_batch_rows=19, **options),
            }
        return made[model]

    yield get
    for pair in made.values():
        for engine in pair.values():
            engine.close()


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("model", ["dense", "moe", "local"])
@examples(40)
@given(
    before=st.lists(OPS, max_size=25),
    after=st.lists(OPS, max_size=12),
    max_positions=st.sampled_from([None, 400]),  # 400 are soon full: the session forgets
)
def test_any_stream_goes_on_anywhere(
    engines: Callable[[str], Engines], model: str, speculate: int, tmp_path: Path, before: Any,
    after: Any, max_positions: int | None,
) -> None:  # fmt: skip
    pair = engines(model)
    with closing_all() as opened:
        start = pair["one"].open_session(
            max_positions=max_positions, speculate=speculate, **SAMPLING
        )
        check_goes_on(start, before, after, opened, tmp_path / "snapshot", list(pair.values()))
    for engine in pair.values():
        assert engine.stats["pages_used"] == engine.stats["pages_promised"] == 0


@contextmanager
def closing_all() -> Iterator[list[Session]]:
    """A list of sessions that are closed in the end."""
    opened: list[Session] = []
    try:
        yield opened
    finally:
        for session in opened:
            session.close()


def test_another_process_goes_on(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "moe")
    with load(folder) as engine, engine.open_session(**SAMPLING) as start:
        session, _ = play(start, STREAM, [])
        session.snapshot(tmp_path / "snapshot")
        expected = [memory(session)]
        end, outputs = play(session, AFTER, [])
        expected += [outputs, memory(end)]
    for threads in (1, 3):
        answer = subprocess.run(
            [sys.executable, stream_ops.__file__, str(folder), str(tmp_path / "snapshot")],
            input=json.dumps({"ops": AFTER, "options": {"threads": threads}}),
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(answer.stdout) == expected


def test_what_waits_in_the_inbox_is_taken_along(
    engines: Callable[[str], Engines], tmp_path: Path
) -> None:
    pair = engines("dense")
    with pair["one"].open_session() as session:
        session.feed(audio=sound(2 * TURN + 77), text=words(3), result=words(4))
        session.snapshot(tmp_path / "a")  # nothing is in the sequence yet
        expected = session.step()
        with pair["other"].restore(tmp_path / "a") as other:
            assert other.length == 0
            found = other.step()
            assert found.token_ids == expected.token_ids
            assert found.events == expected.events
            assert found.input == expected.input


@pytest.mark.parametrize("rewind_rows", [(8, 90), (90, 8)])
def test_engines_may_rewind_more_or_less_far(tmp_path: Path, rewind_rows: tuple[int, int]) -> None:
    folder = write(tmp_path / "model", "dense")
    first, second = (load(folder, rewind_rows=rows) for rows in rewind_rows)
    with first, second, first.open_session() as session:
        for k in range(60):
            session.append(text=words(5, k))
        session.snapshot(tmp_path / "a")
        with second.restore(tmp_path / "a") as other:
            marks = set(session.marks) & set(other.marks)
            assert marks >= {300 - 5, 300}
            for target in (session, other):
                target.truncate(min(marks))
            answers = [s.append(text=words(200), logits="all") for s in (session, other)]
            assert answers[0].tobytes() == answers[1].tobytes()
        # It held no more than its windows were promised.
        assert second.stats["pages_used"] == second.stats["pages_promised"] == 0


def room(engine: Engine, session: Session) -> int:
    """Pages that the only session has, and those that it may still take."""
    stats = engine.stats
    return stats["pages_promised"] + session.memory["global_bytes"] // stats["page_bytes"]


class TestRoom:
    def test_a_restored_session_is_promised_its_pages(
        self, engines: Callable[[str], Engines], tmp_path: Path
    ) -> None:
        pair = engines("moe")
        with pair["one"].open_session(max_positions=1000, endless=None) as session:
            session.append(text=words(300))
            session.snapshot(tmp_path / "a")
            expected = room(pair["one"], session)
        with pair["one"].restore(tmp_path / "a") as other:
            assert room(pair["one"], other) == expected
            other.append(text=words(699))
            with pytest.raises(CapacityError, match="left of max_positions = 1000"):
                other.append(text=words(2))

    def test_another_limit_can_be_asked_for(
        self, engines: Callable[[str], Engines], tmp_path: Path
    ) -> None:
        engine = engines("moe")["one"]
        with engine.open_session(max_positions=200, endless=None) as session:
            session.append(text=words(150))
            session.snapshot(tmp_path / "a")
        with engine.restore(tmp_path / "a", max_positions=1000) as session:
            session.append(text=words(800))
        with pytest.raises(InvalidArgument, match="at least the 150 positions"):
            engine.restore(tmp_path / "a", max_positions=149)

    def test_a_refusal_says_what_would_fit_and_leaves_no_trace(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "model", "dense")
        pages = {"page": "2MiB", "memory": "64MiB"}  # of 8192 positions
        with load(folder, **pages) as engine, engine.open_session(max_positions=20_000) as session:
            session.append(text=words(150))
            session.snapshot(tmp_path / "a")
            full = load(folder, **pages | {"memory": "22MiB"})
            with full, full.open_session(max_positions=64):
                before = counts(full)
                with pytest.raises(CapacityError, match=r"max_positions <= \d+ would fit"):
                    full.restore(tmp_path / "a")
                with pytest.raises(CapacityError, match=r"max_positions <= \d+ would fit"):
                    session.migrate(full)
                assert counts(full) == before
            assert not session.closed


class TestMigration:
    def test_the_old_session_is_closed_after_the_move(
        self, engines: Callable[[str], Engines]
    ) -> None:
        pair = engines("dense")
        session = pair["one"].open_session()
        session.append(text=words(100))
        before = memory(session)
        moved = session.migrate(pair["other"])
        assert session.closed
        assert memory(moved) == before
        assert pair["one"].stats["sessions"] == 0
        moved.close()

    def test_the_resampler_moves_too(self, engines: Callable[[str], Engines]) -> None:
        pair = engines("dense")
        chunks = [sound(9600, seed) for seed in range(8)]
        outputs = []
        for moves in (False, True):
            session = pair["one"].open_session(**SAMPLING)
            for k, chunk in enumerate(chunks):
                if moves and k in (3, 5):
                    session = session.migrate(pair["other" if k == 3 else "one"])
                outputs.append(session.step(chunk, sample_rate=48_000).token_ids)
            outputs.append(memory(session))
            session.close()
        assert outputs[:9] == outputs[9:]

    def test_another_model_is_refused(self, engines: Callable[[str], Engines]) -> None:
        session = engines("dense")["one"].open_session()
        with session, pytest.raises(CheckpointError, match="migrate: config: expected"):
            session.migrate(engines("moe")["one"])
        session = engines("dense")["one"].open_session()
        session.close()


def test_a_fork_and_a_hole_survive(engines: Callable[[str], Engines], tmp_path: Path) -> None:
    """The pages of a hole are neither stored nor taken."""
    engine = engines("dense")["one"]
    with engine.open_session(max_positions=2048) as session:
        session.append(text=words(1500))
        session.snapshot(tmp_path / "whole")
        session.forget(2 * BLOCK, 20 * BLOCK)
        session.snapshot(tmp_path / "hole")
        held = session.memory["global_bytes"]
        with engine.restore(tmp_path / "hole") as other:
            assert other.memory["global_bytes"] == held
            assert memory(other) == memory(session)
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "hole")]
    block_bytes = 2 * (2 * 16) * BLOCK * 4  # keys and values of two padded heads of one layer
    assert sizes[0] - sizes[1] == pytest.approx(18 * block_bytes, abs=100)


def test_a_policy_that_another_engine_cannot_keep_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")
    with load(folder, rewind_rows=8) as engine, load(folder, rewind_rows=200) as other:
        session = engine.open_session(max_positions=400)
        assert session.endless is not None
        session.append(text=words(100))
        session.snapshot(tmp_path / "session")
        with pytest.raises(CheckpointError, match="endless: recent: expected at least"):
            other.restore(tmp_path / "session")
        with pytest.raises(CheckpointError, match="endless: recent: expected at least"):
            session.migrate(other)
        assert engine.restore(tmp_path / "session").endless == session.endless


def test_an_endless_session_that_drafts_is_promised_the_same_elsewhere(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense", mtp_layers=2)
    options = {"mtp_layers": 2, "memory": "16MiB"}
    with load(folder, **options) as engine, load(folder, **options) as other:
        session = engine.open_session(max_positions=700, speculate=3, endless=Window(60, 200))
        promised = engine.stats["pages_promised"] + engine.stats["pages_used"]
        moved = session.migrate(other)
        assert other.stats["pages_promised"] + other.stats["pages_used"] == promised
        moved.close()
