"""Random programs and random workers, with real threads: what holds whatever happens."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from delegating import Clock, Stream, streaming, until

from duplex_engine import Engine
from duplex_engine.background import Task, by_sentence

pytestmark = pytest.mark.usefixtures("nothing_is_left")

N_STEPS = 40


class Moody:
    """Works as long as it likes, in any of the four forms, and fails one time in four.

    Its text holds a mark of the job, so that it can be told what entered.
    """

    fork_positions = 64

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, task: Task) -> Any:
        rng = random.Random(f"{self._seed} {task.id}")
        work = rng.choice((self._plain, self._pieces, self._awaited, self._streamed))
        return work(task, rng)

    def _text(self, task: Task, rng: random.Random) -> str:
        if rng.random() < 0.25:
            raise OSError("moody")
        return f"job {task.id}. " * rng.randint(1, 3)

    def _plain(self, task: Task, rng: random.Random) -> str:
        time.sleep(rng.random() * 0.01)
        return self._text(task, rng)

    def _pieces(self, task: Task, rng: random.Random) -> Iterator[str]:
        assert task.session is not None
        for _ in range(rng.randint(1, 4)):
            task.session.append(text="a")
            yield ""
        yield self._text(task, rng)

    async def _awaited(self, task: Task, rng: random.Random) -> str:
        await asyncio.sleep(rng.choice((0, 0.005, 60)))
        return self._text(task, rng)

    async def _streamed(self, task: Task, rng: random.Random) -> Any:
        for _ in range(rng.randint(1, 3)):
            await asyncio.sleep(rng.random() * 0.003)
            yield self._text(task, rng)


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(tiny: Engine, seed: int) -> None:
    rng = random.Random(seed)
    clock = Clock()
    ended: dict[int, int] = {}  # job -> the micro-turn before which it was cancelled or replaced
    options: dict[str, Any] = {
        "max_running": rng.randint(1, 3),
        "max_waiting": rng.randint(0, 3),
        "split": rng.choice((None, by_sentence)),
        "timeout_s": 2.0,
        "clock": clock,
        "history": N_STEPS * 4,
    }
    with streaming(tiny, Moody(seed), **options) as stream:
        background = stream.background
        is_over = threading.Event()
        reader = threading.Thread(target=reads_all_the_time, args=(stream, is_over))
        reader.start()
        for _ in range(N_STEPS):
            requests = [f"request {rng.randint(0, 20)}" for _ in range(rng.choice((0, 0, 1, 3)))]
            turn = stream.step(*requests).index
            clock.now_s += rng.choice((0.0, 0.1, 0.5))
            job_ids = [job.id for job in background.jobs]
            if job_ids and rng.random() < 0.3:
                job_id = rng.choice(job_ids)
                if rng.random() < 0.5:
                    background.cancel(job_id)
                else:
                    background.replace(job_id, f"new {turn}")
                ended.setdefault(job_id, turn)
            if rng.random() < 0.03:
                background.cancel_all()
            time.sleep(rng.random() * 0.002)
        clock.now_s += 10
        for _ in range(3 * N_STEPS):  # all that waits enters, and everything has an end
            stream.step()
        is_over.set()
        reader.join()
        until(lambda: not background._jobs._running)
        check_what_entered(stream, ended)


def reads_all_the_time(stream: Stream, is_over: threading.Event) -> None:
    """What a user interface does."""
    while not is_over.is_set():
        for job in stream.background.jobs:
            assert job.id > 0
        str(stream.background.transcript)
        time.sleep(0.001)


def check_what_entered(stream: Stream, ended: dict[int, int]) -> None:
    jobs = {job.id: job for job in stream.background.jobs}
    assert not any(job.is_open for job in jobs.values())
    turns = [turn for turn, _ in stream.results]
    assert len(set(turns)) == len(turns)  # one a micro-turn
    assert sorted(turn for job in jobs.values() for turn in job.entered) == sorted(turns)
    told = dict(stream.told)
    for job in jobs.values():
        marks = [told[turn] for turn in job.entered]
        assert all(f"job {job.id}." in text or job.failure for text in marks)
        assert all(turn <= ended.get(job.id, turn) for turn in job.entered)
        if job.state == "failed":
            assert job.failure
        assert job.ended_s is not None
