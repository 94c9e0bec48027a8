"""A session that delegates when told, a worker that answers when told, a clock, and waiting."""

from __future__ import annotations

import asyncio
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from pydantic import Field

from duplex_engine import Delegation, Engine, MicroTurn, Session
from duplex_engine.background import Delegations, Task, Worker

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TURN = 3200  # samples of a micro-turn
SILENCE = np.zeros(TURN, np.float32)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Stream:
    """A session driven by silence, whose model delegates exactly what the test says.

    `results` holds what entered: (micro-turn, token ids), as the session was fed.
    """

    def __init__(self, session: Session, background: Delegations) -> None:
        self.session, self.background = session, background
        self.results: list[tuple[int, tuple[int, ...]]] = []
        self._fed: list[tuple[int, ...]] = []
        feed = session.feed

        def feed_and_note(*args: object, result: object = None, **kwargs: object) -> None:
            feed(*args, result=result, **kwargs)  # type: ignore[arg-type]
            if result is not None:
                self._fed.append(tuple(result))  # type: ignore[arg-type]

        session.feed = feed_and_note  # type: ignore[method-assign]

    def step(self, *requests: str, text: str | None = None) -> MicroTurn:
        """One micro-turn, at whose end the model hands on `requests`, and nothing else."""
        inputs = {"audio": SILENCE, "text": text}
        self.background.before_step(inputs)
        turn = self.session.step(audio=SILENCE, text=text)
        delegations = tuple(Delegation(request, (1, 2)) for request in requests)
        turn = replace(turn, events=delegations, text="")
        self.background.after_step(turn, inputs)
        self.results += [(turn.index, ids) for ids in self._fed]
        self._fed.clear()
        return turn

    @property
    def told(self) -> list[tuple[int, str]]:
        """(micro-turn, text) of what entered."""
        tokenizer = self.session.tokenizer
        assert tokenizer is not None
        return [(turn, tokenizer.decode(list(ids))) for turn, ids in self.results]


@contextmanager
def streaming(engine: Engine, worker: Worker, **options: Any) -> Iterator[Stream]:
    """A stream with a worker; afterwards every page of memory is back."""
    before = engine.stats["pages_used"], engine.stats["pages_promised"], engine.stats["sessions"]
    with (
        engine.open_session(max_positions=4096) as session,
        Delegations(session, worker, **options) as background,
    ):
        yield Stream(session, background)
    after = engine.stats["pages_used"], engine.stats["pages_promised"], engine.stats["sessions"]
    assert after == before


class Gate:
    """A worker that answers with the request's last word when it is let through."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self._open = threading.Event()

    async def __call__(self, task: Task) -> str:
        self.tasks.append(task)
        while not self._open.is_set():
            await asyncio.sleep(0.002)
        return task.text.split()[-1]

    def open(self) -> None:
        self._open.set()


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits for something that another thread does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def showcase_chunks() -> Iterator[NDArray[np.float32]]:
    """The recorded scene that comes with the package, in micro-turns; a question is at turn 72."""
    with (files("duplex_engine") / "examples" / "showcase.flac").open("rb") as file:
        samples, _ = soundfile.read(file, dtype="float32")
    for start in range(0, len(samples), TURN):
        yield samples[start : start + TURN]


def answer(engine: Engine, worker: Worker, request: str = "weather paris", **options: Any) -> str:
    """The result of one delegation; a failure is raised as its text."""
    with streaming(engine, worker, **options) as stream:
        stream.step(text="hello")
        stream.step(request)
        assert stream.background.wait(30)
        (job,) = stream.background.jobs
        if job.failure:
            raise AssertionError(job.error)
        return job.text.strip()


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


# ---- tools
def weather(city: Annotated[str, Field(description="a town")], days: int = 1) -> str:
    """The weather to come."""
    return f"sunny {city}" if days == 1 else "rainy"


async def price(thing: str, currency: Literal["euros", "dollars"] = "euros") -> str:
    return f"three {currency}" if thing == "a cup" else "closed"


def broken(number: int) -> str:
    raise RuntimeError(f"no {number}")
