"""Does the engine compute on a GPU what it computes on the CPU, exactly, and how fast?

Owns the checks and the timings of `duplex-engine gpu-check`. A check compares bytes: digests of all
that a session holds in memory (keys, values, convolution inputs), and tokens. In float32, whatever
the weights and the cache, the GPU does every operation in the CPU's order, so its memory must be
the same; in bfloat16, where the matrix units add in an order of their own, the same stream must
give the same bits on the GPU in any chunks, with any company, and from weights in MXFP8 or NVFP4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any, Literal

import numpy as np

from duplex_engine.engine import Engine
from duplex_engine.errors import CapacityError
from duplex_engine.evaluation.showcase import read_showcase
from duplex_engine.evaluation.work import FORMATS as BYTES
from duplex_engine.evaluation.work import Pass, Recipe, pass_work
from duplex_engine.models.random import Preset, write_random_checkpoint
from duplex_engine.session import Session
from duplex_engine.types import StepInput

__all__ = [
    "CODED",
    "FORMATS",
    "SHAPES",
    "Check",
    "Shape",
    "Timing",
    "checks",
    "coded_checks",
    "timings",
]

Dtype = Literal["float32", "bfloat16"]
Coded = Literal["mxfp8", "nvfp4"]
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
CODED: tuple[Coded, ...] = ("mxfp8", "nvfp4")  # compared with bfloat16 weights of the same values
TIMED_FORMATS: tuple[tuple[Weights | Coded, KvDtype], ...] = (
    ("auto", "auto"),
    ("auto", "int8"),
    ("int8", "auto"),
    ("int4", "auto"),
    ("mxfp8", "auto"),
    ("nvfp4", "auto"),
)
Digests = list[tuple[int, int, int]]
TURN = 3200  # samples
N_COMPANIONS = 5
TEXT, TYPED_TURN = "seven plus two", 7
PROBE = [1, 2, 3]
N_THOUGHTS = 8  # tokens that a background fork decodes
DRAWN: dict[str, Any] = {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": 5}
WARM_UP = 3  # calls before the timed ones
PREFILL, N_PREFILLS = 2048, 5
N_SESSIONS = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: its name, whether it held, and what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one kind of call: median and 99th percentile of `n` calls.

    `context` is what the sequence held before each of them. `floor_bytes` are what must be read:
    the weights of every pass and of every choice of a token, keys and values of every pass.
    """

    shape: str
    weights: str
    kv_dtype: str
    what: str
    context: int
    n_sessions: int
    n: int
    median_ms: float
    p99_ms: float
    floor_bytes: float
    gb_per_s: float


@dataclass(frozen=True, slots=True)
class Shape:
    """A random model to time, the contexts at which, and the formats of weights and cache."""

    preset: Preset | str
    contexts: tuple[int, ...]
    formats: tuple[tuple[Weights | Coded, KvDtype], ...] = TIMED_FORMATS[:1]
    memory: str = "4GiB"


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
        TIMED_FORMATS,
        "24GiB",  # of which 32 sessions take about half
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
    with load() as engine:
        with engine.open_session() as session:
            cpu_said, cpu_memory = stream.play(session), _digests(session)
        with engine.open_session(**DRAWN) as session:
            cpu_drawn = stream.play(session)
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
        yield from _draws(engine, stream, name, cpu_drawn if dtype == "float32" else None)
        yield from _both_lanes(engine, stream, name, said, memory)


def coded_checks(device: str, weights: Coded, n_turns: int = 100) -> Iterator[Check]:
    """Compares weights in MXFP8 or NVFP4 with the same values in bfloat16, on the device.

    The model is random: a mixture of experts. The arguments are those of `checks`.
    """
    stream = _Stream(n_turns)
    found = []
    with TemporaryDirectory() as folder:
        plain = write_random_checkpoint(
            Path(folder) / "plain", "moe", dtype="bfloat16", exact_in=weights
        )
        coded = plain  # MXFP8 is made while loading
        if weights == "nvfp4":
            coded = write_random_checkpoint(Path(folder) / "coded", "moe", dtype="nvfp4")
        either: tuple[tuple[Path, Coded | Literal["auto"]], ...] = (
            (plain, "auto"),
            (coded, weights),
        )
        for path, asked in either:
            with (
                Engine.load(path, device=device, dtype="bfloat16", weights=asked) as engine,
                engine.open_session() as session,
            ):
                found.append((stream.play(session), _digests(session), engine.weights))
    (said, memory, _), (coded_said, coded_memory, held) = found
    name = f"{held} weights: the bits of bfloat16"
    yield _same(name, said, coded_said, "micro-turns")
    yield _same(name, memory, coded_memory, "blocks")


def _forks(session: Session, name: str) -> Iterator[Check]:
    """A fork goes on as its origin does; cut back, it goes on as it did."""
    with session.fork() as fork:
        answers = [s.append(text=PROBE, logits="all").tobytes() for s in (session, fork)]
        yield Check(f"{name}: a fork", answers[0] == answers[1], "logits of three rows")
        fork.truncate(fork.marks[-2])
        again = fork.append(text=PROBE, logits="all").tobytes()
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


def _draws(
    engine: Engine, stream: _Stream, name: str, expected: list[tuple[int, ...]] | None
) -> Iterator[Check]:
    """Tokens drawn by temperature: those of the CPU, if given, and in other pieces the same."""
    drawn = []
    for pieces in (1, 3):
        with engine.open_session(**DRAWN) as session:
            drawn.append(stream.play(session, pieces))
    if expected is not None:
        yield _same(f"{name}: drawn tokens of the CPU", expected, drawn[0], "micro-turns")
    yield _same(f"{name}: drawn, in other pieces", drawn[0], drawn[1], "micro-turns")


def _both_lanes(
    engine: Engine, stream: _Stream, name: str, said: list[tuple[int, ...]], memory: Digests
) -> Iterator[Check]:
    """The background decodes as long as the stream plays; each gives what it gives alone."""
    is_over = Event()
    with engine.open_session() as origin, engine.open_session() as session:
        origin.append(text=PROBE)

        def think() -> list[int]:
            with origin.fork(background=True) as fork:
                fork.append(text=PROBE)
                return fork.decode(N_THOUGHTS)

        def keep_thinking() -> list[list[int]]:
            thoughts = [think()]
            while not is_over.is_set():
                thoughts.append(think())
            return thoughts

        alone = think()
        with ThreadPoolExecutor(1) as background:
            thinking = background.submit(keep_thinking)
            try:
                beside = stream.play(session)
            finally:
                is_over.set()
            thoughts = thinking.result()
        yield _same(f"{name}: beside the background", said, beside, "micro-turns")
        yield _same(f"{name}: beside the background", memory, _digests(session), "blocks")
        expected = [alone] * len(thoughts)
        yield _same(f"{name}: the background", expected, thoughts, "lists of tokens")


class _Timer:
    """Times calls of one engine, and knows what they must read."""

    def __init__(self, engine: Engine, shape: str, n: int) -> None:
        self.engine, self.shape, self.n = engine, shape, n
        self._recipe = Recipe(*[BYTES[engine.weights]] * len(Recipe._fields))
        text = engine.config.text
        d_head = text.head_dim
        self._cache_bytes = {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / d_head}[engine.kv_dtype]

    def floor_bytes(self, rows: Pass, n_passes: int, n_tokens: int) -> float:
        """Of so many passes, and of the head for each token."""
        ops = pass_work(self.engine.config, self._recipe, rows, cache_bytes=self._cache_bytes)
        head = sum(op.n * op.weight_bytes for op in ops if op.kind == "head")
        layers = sum(
            op.n * (op.weight_bytes + op.cache_bytes)
            for op in ops
            if op.kind in ("weights", "attention")
        )
        return n_passes * layers + n_tokens * head

    def time(
        self,
        call: Callable[[], object],
        what: str,
        floor_bytes: float,
        *,
        context: int = 0,
        n_sessions: int = 1,
        after: Callable[[], object] = lambda: None,
        n: int | None = None,
    ) -> Timing:
        """Times `call`, which must end with an answer of the device; `after` is not timed."""
        times = np.empty(n or self.n)
        for i in range(-WARM_UP, len(times)):
            begin = time.perf_counter()
            call()
            times[max(i, 0)] = 1000.0 * (time.perf_counter() - begin)
            after()
        median, p99 = (float(ms) for ms in np.percentile(times, (50, 99)))
        engine = self.engine
        return Timing(
            self.shape,
            engine.weights,
            engine.kv_dtype,
            what,
            context,
            n_sessions,
            len(times),
            median,
            p99,
            floor_bytes,
            1e-6 * floor_bytes / median,
        )


def timings(device: str, name: str, n: int = 100) -> Iterator[Timing]:
    """Times one of SHAPES, rows in bfloat16: tokens, appends, a prefill, sessions together."""
    shape = SHAPES[name]
    with TemporaryDirectory() as folder:
        for weights, kv_dtype in shape.formats:
            with Engine.load(
                _checkpoint(Path(folder), shape, weights),
                dtype="bfloat16",
                weights=weights,
                kv_dtype=kv_dtype,
                device=device,
                memory=shape.memory,
                max_positions=max(16_384, *shape.contexts),
            ) as engine:
                timer = _Timer(engine, name, n)
                for context in shape.contexts:
                    yield from _time_one(timer, context)
                yield from _time_many(timer, shape.contexts[0])
                yield _time_prefill(timer)


def _checkpoint(folder: Path, shape: Shape, weights: str) -> str | Path:
    """Weights of the format that this needs in its file; those of one are written once."""
    if shape.preset == "reference":
        return "reference"
    dtype: Literal["bfloat16", "nvfp4"] = "nvfp4" if weights == "nvfp4" else "bfloat16"
    path = folder / dtype
    return path if path.exists() else write_random_checkpoint(path, shape.preset, dtype=dtype)


def _ids(engine: Engine, n: int) -> list[int]:
    ids: list[int] = np.random.default_rng(0).integers(8, engine.config.text.n_logits, n).tolist()
    return ids


def _time_one(timer: _Timer, context: int) -> Iterator[Timing]:
    """One session. Every call ends with tokens chosen: without, it would not wait for the GPU.

    A first pass also takes the token that was chosen last.
    """
    for n_rows, n_tokens in ((0, 1), (4, 1), (19, 1), (20, 5)):
        what = f"append {n_rows}, decode {n_tokens}" if n_rows else f"decode {n_tokens}"
        rows = _ids(timer.engine, n_rows)
        with timer.engine.open_session() as session:
            session.append(text=_ids(timer.engine, context))
            session.decode(1)
            mark = session.length
            call = partial(_append_and_decode, session, rows, n_tokens)
            back = partial(session.truncate, mark)
            floor = timer.floor_bytes(Pass(text=1, context=context), n_tokens, n_tokens)
            yield timer.time(call, what, floor, context=context, after=back)


def _append_and_decode(session: Session, rows: list[int], n_tokens: int) -> None:
    if rows:
        session.append(text=rows)
    session.decode(n_tokens)


def _time_prefill(timer: _Timer) -> Timing:
    """A new session's prompt, in passes as large as the engine takes."""
    prompt = _ids(timer.engine, PREFILL)

    def call() -> None:
        with timer.engine.open_session(max_positions=2 * PREFILL) as session:
            session.append(text=prompt)
            session.decode(1)

    floor = timer.floor_bytes(Pass(text=PREFILL, context=PREFILL), 1, 1)
    return timer.time(call, f"prefill {PREFILL}, decode 1", floor, n=min(N_PREFILLS, timer.n))


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


def _time_many(timer: _Timer, context: int) -> Iterator[Timing]:
    sound = np.zeros(TURN, np.float32)
    for n_sessions in N_SESSIONS:
        sessions = _sessions(timer.engine, n_sessions)
        if not sessions:
            return
        for session in sessions:
            session.append(text=_ids(timer.engine, context))
        silence: StepInput = {"audio": sound, "max_tokens": 1}
        requests = [(session, silence) for session in sessions]
        call = partial(timer.engine.step_many, requests)
        rows = Pass(n_sessions, audio=4, text=1, context=context)
        yield timer.time(
            call,
            "silent micro-turn",
            timer.floor_bytes(rows, 1, 1),
            context=context,
            n_sessions=n_sessions,
        )
        for session in sessions:
            session.close()
