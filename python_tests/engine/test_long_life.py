"""A session far beyond a million positions: it forgets, its windows move, and nothing drifts."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_models import TURN, load, same_bytes, sound, words, write
from stream_ops import memory

from duplex_engine import Session, Window

pytestmark = [pytest.mark.core, pytest.mark.cpu, pytest.mark.slow]

WINDOW = Window(64, 128)
ROWS = 500  # of a call


def feed(session: Session, n_calls: int, first: int) -> None:
    for k in range(first, first + n_calls):
        session.append(text=words(ROWS, k % 7))


@pytest.mark.timeout(300)
def test_a_million_positions(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "dense")
    with load(folder) as engine, engine.open_session(max_positions=1024, endless=WINDOW) as session:
        feed(session, 100, 0)
        held, pages = session.memory, engine.stats["pages_used"]
        feed(session, 2100, 100)
        assert session.length > 2**20
        after = session.memory
        assert after["global_bytes"] <= held["global_bytes"] + 2 * engine.stats["page_bytes"]
        assert abs(engine.stats["pages_used"] - pages) <= 4
        # It is the session that goes on from a snapshot here, and what it says is the same.
        session.snapshot(tmp_path / "late")
        with engine.restore(tmp_path / "late") as other, session.fork() as fork:
            assert memory(other) == memory(session) == memory(fork)
            expected = session.append(text=words(9), logits="all")
            for twin in (other, fork):
                assert same_bytes(twin.append(text=words(9), logits="all"), expected)
            turns = [s.step(sound(TURN)).token_ids for s in (session, other, fork)]
            assert turns[0] == turns[1] == turns[2]
