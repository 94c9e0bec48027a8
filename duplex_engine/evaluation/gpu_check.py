"""Does the engine compute on a GPU what it computes on the CPU, exactly, and how fast?

Owns the checks and the timings of `duplex-engine gpu-check`. A check compares bytes: digests of all
that a session holds in memory (keys, values, convolution inputs), and tokens. In float32, whatever
the weights and the cache, the GPU does every operation in the CPU's order, so its memory must be
the same; in bfloat16, where the matrix units add in an order of their own, the same stream must
give the same bits on the GPU in any chunks and with any company.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from duplex_engine.engine import Engine
from duplex_engine.errors import CapacityError
from duplex_engine.evaluation.showcase import read_showcase
from duplex_engine.models.random import Preset, write_random_checkpoint
from duplex_engine.session import Session
from duplex_engine.types import StepInput

__all__ = ["FORMATS", "SHAPES", "Check", "Shape", "Timing", "checks", "timings"]

Dtype = Literal["float32", "bfloat16"]
Weights = Literal["auto", "int8", "int4"]
KvDtype = Literal["auto", "int8"]
# What is compared: types of the rows, of the weights, and of keys and values.
FORMATS: tuple[tuple[Dtype, Weights, KvDtype], ...] = (
    ("float32", "auto", "auto"),
    ("bfloat16", "auto", "auto"),
    ("float32", "int8", "auto"),
    ("float32", "int4", "auto"),
    ("float32", "auto", "int8"),
    ("bfloat16", "auto", "int8"),
)
Digests = list[tuple[int, int, int]]
TURN = 3200  # samples
N_COMPANIONS = 5
TEXT, TYPED_TURN = "seven plus two", 7
WARM_UP = 3  # calls before the timed ones


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: its name, whether it held, and what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one kind of call: median and 99th percentile of `n` calls.

    `context` is what the sequence held before the first of them.
    """

    shape: str
    what: str
    context: int
    n_sessions: int
    n: int
    median_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Shape:
    """A random model to time, and the contexts at which."""

    preset: Preset | str
    contexts: tuple[int, ...]


def _dense(d_model: int, d_ff: int, layers: str, heads: tuple[int, int], d_head: int) -> Preset:
    return Preset(
        vocab_size=4096 if d_model < 1024 else 32_768,
        d_model=d_model,
        d_ff=d_ff,
        layers=layers,
        heads=heads,
        local_heads=heads,
        d_head=d_head,
        d_rel=16,
        rel_extent=1024,
        window=512,
        patch_size=40,
        vision_layers=3,
    )


# "0.6b": sizes of Qwen3-0.6B, every sixth of the 28 layers global.
SHAPES: dict[str, Shape] = {
    "reference": Shape("reference", (1024,)),
    "small": Shape("small", (1024, 4096)),
    "0.6b": Shape(
        _dense(1024, 3072, " ".join(["ld ld ld ld ld gd"] * 4 + ["ld ld ld gd"]), (16, 8), 128),
        (1024, 4096),
    ),
}


class _Stream:
    """The sound of the showcase, micro-turn by micro-turn, with typed text in one of them."""

    def __init__(self, n_turns: int) -> None:
        with as_file(files("duplex_engine") / "examples") as folder:
            sound = read_showcase(folder).audio
        self.turns = [sound[i * TURN : (i + 1) * TURN] for i in range(n_turns)]

    def typed(self, number: int) -> str | None:
        """The text that is typed in a micro-turn."""
        return TEXT if number == TYPED_TURN else None

    def play(self, session: Session, pieces: int = 1) -> list[tuple[int, ...]]:
        """Feeds every micro-turn in so many pieces; returns the tokens of each."""
        said = []
        for number, turn in enumerate(self.turns):
            for piece in np.array_split(turn, pieces):
                session.feed(piece)
            said.append(session.step(text=self.typed(number)).token_ids)
        return said


def _digests(session: Session) -> Digests:
    return list(session._core.digests())


def _same(name: str, one: Any, other: Any, what: str) -> Check:
    different = sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
    detail = f"{len(one)} {what}" if different == 0 else f"{different} of {len(one)} {what} differ"
    return Check(name, different == 0, detail)


def checks(
    device: str,
    checkpoint: str,
    dtype: Dtype,
    n_turns: int = 100,
    weights: Weights = "auto",
    kv_dtype: KvDtype = "auto",
) -> Iterator[Check]:
    """Compares the device with the CPU, and with itself under other chunks and company.

    Args:
        device: as `Engine.load` takes it.
        checkpoint: with audio and a tokenizer.
        dtype: of rows and cache.
        n_turns: micro-turns of the stream.
        weights: as `Engine.load` takes it.
        kv_dtype: as `Engine.load` takes it.
    """
    stream = _Stream(n_turns)
    name = dtype if weights == "auto" else f"{dtype}, {weights} weights"
    name += "" if kv_dtype == "auto" else f", {kv_dtype} keys and values"
    load = partial(Engine.load, checkpoint, dtype=dtype, weights=weights, kv_dtype=kv_dtype)
    with load() as engine, engine.open_session() as session:
        cpu_said, cpu_memory = stream.play(session), _digests(session)
    with load(device=device) as engine:
        with engine.open_session() as session:
            said, memory = stream.play(session), _digests(session)
            yield _same(f"{name}: tokens of the CPU", cpu_said, said, "micro-turns")
            if dtype == "float32":
                # Pages differ in size, so the devices hold old blocks for longer or shorter.
                held = {block[:2] for block in cpu_memory} & {block[:2] for block in memory}
                ours, theirs = ([b for b in m if b[:2] in held] for m in (memory, cpu_memory))
                yield _same(f"{name}: memory of the CPU", theirs, ours, "blocks")
            yield from _forks(session, name)
        with engine.open_session() as session:
            again = stream.play(session, pieces=3)
            yield _same(f"{name}: in other pieces", memory, _digests(session), "blocks")
            yield _same(f"{name}: in other pieces", said, again, "micro-turns")
        yield from _with_company(engine, stream, name, said, memory)


def _forks(session: Session, name: str) -> Iterator[Check]:
    """A fork goes on as its origin does; cut back, it goes on as it did."""
    probe = [1, 2, 3]
    with session.fork() as fork:
        answers = [s.append(text=probe, logits="all").tobytes() for s in (session, fork)]
        yield Check(f"{name}: a fork", answers[0] == answers[1], "logits of three rows")
        fork.truncate(fork.marks[-2])
        again = fork.append(text=probe, logits="all").tobytes()
        yield Check(f"{name}: cut back", again == answers[0], "logits of three rows")


def _with_company(
    engine: Engine, stream: _Stream, name: str, said: list[tuple[int, ...]], memory: Digests
) -> Iterator[Check]:
    sessions = [engine.open_session() for _ in range(1 + N_COMPANIONS)]
    together = []
    for number, turn in enumerate(stream.turns):
        requests: list[tuple[Session, StepInput]] = [
            (sessions[0], {"audio": turn, "text": stream.typed(number)})
        ]
        for other in sessions[1:]:
            requests.append((other, {"audio": stream.turns[-1 - number]}))
        first = engine.step_many(requests)[0]
        if isinstance(first, Exception):
            raise first
        together.append(first.token_ids)
    yield _same(f"{name}: with {N_COMPANIONS} others", said, together, "micro-turns")
    yield _same(f"{name}: with {N_COMPANIONS} others", memory, _digests(sessions[0]), "blocks")
    for session in sessions:
        session.close()


def _percentiles(
    call: Callable[[], object], n: int, shape: str, what: str, context: int, n_sessions: int = 1
) -> Timing:
    times = np.empty(n)
    for _ in range(WARM_UP):
        call()
    for i in range(n):
        begin = time.perf_counter()
        call()
        times[i] = 1000.0 * (time.perf_counter() - begin)
    median, p99 = np.percentile(times, (50, 99))
    return Timing(shape, what, context, n_sessions, n, float(median), float(p99))


def timings(device: str, name: str, n: int = 50) -> Iterator[Timing]:
    """Times one of SHAPES in bfloat16: appends, decode steps, whole turns, sessions together."""
    shape = SHAPES[name]
    with TemporaryDirectory() as folder:
        path: str | Path = "reference"
        if shape.preset != "reference":
            path = write_random_checkpoint(folder, shape.preset, dtype="bfloat16")
        with Engine.load(
            path, dtype="bfloat16", device=device, memory="12GiB", max_positions=16_384
        ) as engine:
            for context in shape.contexts:
                yield from _time_one(engine, name, context, n)
            yield from _time_many(engine, name, n)


def _ids(engine: Engine, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(8, engine.config.text.n_logits, n)


def _time_one(engine: Engine, name: str, context: int, n: int) -> Iterator[Timing]:
    for what, n_rows, n_tokens in (
        ("append 1", 1, 0),
        ("append 5", 5, 0),
        ("append 20", 20, 0),
        ("append 20, decode 5", 20, 5),
    ):
        rows = _ids(engine, n_rows).tolist()
        with engine.open_session() as session:
            session.append(text=_ids(engine, context).tolist())
            call = partial(_append_and_decode, session, rows, n_tokens)
            yield _percentiles(call, n, name, what, context)


def _append_and_decode(session: Session, rows: list[int], n_tokens: int) -> None:
    session.append(text=rows)
    if n_tokens:
        session.decode(n_tokens)


def _sessions(engine: Engine, n: int) -> list[Session]:
    """So many sessions; none where the memory is not enough for all."""
    sessions: list[Session] = []
    try:
        for _ in range(n):
            sessions.append(engine.open_session(max_positions=2048))
    except CapacityError:
        for session in sessions:
            session.close()
        return []
    return sessions


def _time_many(engine: Engine, name: str, n: int) -> Iterator[Timing]:
    sound = np.zeros(TURN, np.float32)
    for n_sessions in (1, 8, 32):
        sessions = _sessions(engine, n_sessions)
        if not sessions:
            return
        silence: StepInput = {"audio": sound, "max_tokens": 1}
        requests = [(session, silence) for session in sessions]
        call = partial(engine.step_many, requests)
        yield _percentiles(call, n, name, "silent micro-turn", 0, n_sessions)
        for session in sessions:
            session.close()
