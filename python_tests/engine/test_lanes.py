"""The background lane: the same bits, in threads of its own, and interruptions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from duplex_engine import (
    AsyncEngine,
    DuplexError,
    Engine,
    InvalidArgument,
    Session,
    SessionClosed,
)
from duplex_engine.models import write_random_checkpoint

pytestmark = pytest.mark.core

TURN = 3200  # samples of a micro-turn
PROMPT = [9, 10, 11, 12]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, memory="256MiB", threads=2) as engine:
        yield engine


def hear(session: Session, seed: int) -> tuple[int, ...]:
    samples = np.random.default_rng(seed).standard_normal(TURN).astype(np.float32) * 0.1
    return session.step(audio=samples).token_ids


def think(session: Session, n: int = 40) -> list[int]:
    session.append(text=PROMPT)
    return session.decode(n)


def test_a_fork_thinks_the_same_on_either_lane(engine: Engine) -> None:
    session = engine.open_session()
    for turn in range(3):
        hear(session, turn)
    here = session.fork()
    there = session.fork(background=True)
    assert (here.background, there.background) == (False, True)
    assert think(here) == think(there)
    back = there.fork()  # a fork of a background session is an interaction session again
    assert not back.background
    assert hear(back, 9) == hear(here.fork(), 9)


def test_both_lanes_at_once_change_no_bit(engine: Engine) -> None:
    calm = engine.open_session()
    expected = [hear(calm, turn) for turn in range(20)]
    thought = think(calm.fork(), 120)
    session = engine.open_session()
    heard = [hear(session, turn) for turn in range(20)]
    thoughts: list[list[int]] = []
    thinkers = [
        threading.Thread(target=lambda fork=fork: thoughts.append(think(fork, 120)))
        for fork in [session.fork(background=True) for _ in range(2)]
    ]
    for thinker in thinkers:
        thinker.start()
    again = engine.open_session()
    assert [hear(again, turn) for turn in range(20)] == expected == heard
    for thinker in thinkers:
        thinker.join()
    assert thoughts == [thought, thought]


def test_one_step_takes_sessions_of_one_lane(engine: Engine) -> None:
    session, background = engine.open_session(), engine.open_session(background=True)
    answers = {session: {"text": PROMPT}, background: {"text": PROMPT}}
    with pytest.raises(InvalidArgument, match="sessions of one lane"):
        engine.step_many(answers)  # type: ignore[arg-type]
    assert background.step(text=PROMPT).token_ids == session.step(text=PROMPT).token_ids


def test_an_engine_beside_another_has_its_own_weights(engine: Engine, checkpoint: Path) -> None:
    with Engine.load(checkpoint, memory="64MiB", beside=engine) as other:
        session = other.open_session()
        assert hear(session, 1) == hear(engine.open_session(), 1)
        assert (other.stats["sessions"], engine.stats["sessions"]) == (1, 0)
    with pytest.raises(InvalidArgument, match="beside"):
        Engine.load(checkpoint, beside=engine, threads=2)


@pytest.mark.cpu  # whose pages are small: elsewhere these two have the same
def test_engines_of_two_sizes_share_one_memory(tmp_path: Path) -> None:
    small = write_random_checkpoint(tmp_path / "small", "smallest", seed=1)
    large = write_random_checkpoint(tmp_path / "large", "tiny", seed=1)
    with (
        Engine.load(small, memory="64MiB") as first,
        pytest.raises(InvalidArgument, match="load that one with page = ") as refused,
    ):
        Engine.load(large, beside=first)
    page = int(str(refused.value).partition("page = ")[2].partition(",")[0])
    with (
        Engine.load(small, memory="64MiB", page=page) as first,
        Engine.load(large, beside=first) as second,
    ):
        assert first.stats["page_bytes"] == second.stats["page_bytes"] == page
        session = second.open_session()
        hear(session, 1)
        assert first.stats["pages_used"] == second.stats["pages_used"] > 0
        session.close()
        assert first.stats["pages_used"] == 0


def test_an_engine_lives_on_beside_one_that_closed(checkpoint: Path) -> None:
    with Engine.load(checkpoint, memory="64MiB", threads=2) as first:
        expected = hear(first.open_session(), 1)
        other = Engine.load(checkpoint, memory="64MiB", beside=first)
    with other:
        assert hear(other.open_session(), 1) == expected
    with pytest.raises(SessionClosed, match="beside: the engine is closed"):
        Engine.load(checkpoint, beside=first)


def test_an_interruption_raises_the_epoch_and_nothing_else(engine: Engine) -> None:
    session, calm = engine.open_session(), engine.open_session()
    assert session.epoch == 0
    session.interrupt()
    session.interrupt()
    assert session.epoch == 2
    assert hear(session, 1) == hear(calm, 1)
    turn = session.step(text=PROMPT)
    assert turn.epoch == 2
    assert turn.stopped != "interrupted"
    session.close()
    with pytest.raises(DuplexError):
        session.interrupt()


def test_asyncio_background_work_holds_up_no_step(checkpoint: Path) -> None:
    async def run() -> tuple[list[int], int]:
        async with await AsyncEngine.load(checkpoint, memory="128MiB", threads=1) as engine:
            session = await engine.open_session()
            await session.step(text=PROMPT)
            fork = await session.fork(background=True)
            thinking = asyncio.ensure_future(engine.run_background(think, fork.sync, 4000))
            n_steps = 0
            while not thinking.done():
                await session.step(text=PROMPT, max_tokens=1)
                n_steps += 1
                if n_steps == 20:
                    break
            assert not thinking.done()  # 4,000 tokens are far more work than 20 steps
            ids = await thinking
            assert (await fork.step(text=PROMPT)).token_ids
            await fork.close()
            return ids, n_steps

    ids, n_steps = asyncio.run(run())
    assert len(ids) == 4000
    assert n_steps == 20
