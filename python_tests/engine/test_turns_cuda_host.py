"""Whole micro-turns on the device (one record each), on the CUDA backend that runs on the host.

What they leave, byte for byte, is what the CPU leaves, which asks for each pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duplex_engine import Engine, MicroTurn, Session, _core
from duplex_engine.models import write_random_checkpoint
from duplex_engine.types import StepInput

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        "cuda_host" not in _core.backend_names(), reason="only a build with tests has it"
    ),
]

DRAWN: dict[str, Any] = {"temperature": 2.5, "seed": 3}  # ends turns at any token
OPTIONS: tuple[dict[str, Any], ...] = ({}, DRAWN, {"temperature": 1.2, "top_k": 9, "seed": 8})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("smallest"), "smallest", seed=3)


def load(checkpoint: Path, **options: Any) -> Engine:
    return Engine.load(checkpoint, dtype="float32", memory="1GiB", **options)


@pytest.fixture(scope="module", params=[1, 2])
def engines(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Engine]]:
    """The CPU, and the GPU's twin, of one rank and of two."""
    ranks = {"tensor_parallel": request.param}
    with (
        load(checkpoint, threads=request.param, **ranks) as on_cpu,
        load(checkpoint, device="cuda_host", **ranks) as on_gpu,
    ):
        yield on_cpu, on_gpu


def sound(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(3200).astype(np.float32) * 0.1


def memory(session: Session) -> list[tuple[int, int, int]]:
    """Hashes of the blocks that are held, of the committed rows."""
    return list(session._core.digests())


def outcome(turn: MicroTurn) -> tuple[tuple[int, ...], str]:
    return turn.token_ids, turn.stopped


def together(
    engine: Engine, requests: list[tuple[Session, StepInput]]
) -> list[tuple[tuple[int, ...], str]]:
    """The outcomes of a step of several sessions."""
    found = engine.step_many(requests)
    assert all(isinstance(turn, MicroTurn) for turn in found)
    return [outcome(turn) for turn in found if isinstance(turn, MicroTurn)]


def talk(
    engine: Engine, n_turns: int
) -> tuple[list[tuple[tuple[int, ...], str]], list[list[tuple[int, int, int]]]]:
    """Micro-turns of several sessions together, which say more and less."""
    sessions = [engine.open_session(**OPTIONS[i % 3]) for i in range(5)]
    said = []
    for number in range(n_turns):
        requests: list[tuple[Session, StepInput]] = [
            (session, {"audio": sound(10 * number + i), "max_tokens": (number + 2 * i) % 7})
            for i, session in enumerate(sessions)
            if (number + i) % 4 != 3  # now and then one is away
        ]
        said += together(engine, requests)
    found = [memory(session) for session in sessions]
    for session in sessions:
        session.close()
    return said, found


def test_sessions_with_different_ends_are_the_cpus(engines: tuple[Engine, Engine]) -> None:
    (said, blocks), (gpu_said, gpu_blocks) = (talk(engine, 12) for engine in engines)
    assert gpu_said == said
    assert gpu_blocks == blocks
    assert {stopped for _, stopped in said} == {"listen", "limit"}


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_turn_is_one_launch_and_one_wait(checkpoint: Path, n_ranks: int) -> None:
    # In pages so large that none is given back: for that the host waits for both lanes.
    with (
        load(checkpoint, device="cuda_host", page="256KiB", tensor_parallel=n_ranks) as engine,
        engine.open_session(**DRAWN) as session,
    ):
        counts, lengths = [], []
        for number in range(12):
            before = engine.stats
            turn = session.step(audio=sound(number))
            after = {key: value - before[key] for key, value in engine.stats.items()}
            counts.append((after["launches"], after["waits"]))
            lengths.append(len(turn.token_ids))
            assert after["passes"] == len(turn.token_ids)
    # Turns of a kind are recorded when the second comes.
    assert set(lengths[3:]) == {1, 6}
    assert counts[3:] == [(1, 1)] * 9


def test_rewound_and_forked_it_says_the_same(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        with engine.open_session(**DRAWN) as session:
            for number in range(4):
                session.step(audio=sound(number))
            with session.fork() as fork:
                first = [outcome(fork.step(audio=sound(9 + i))) for i in range(2)]
                fork.truncate(fork.marks[-3])
                assert [outcome(fork.step(audio=sound(9 + i))) for i in range(2)] == first
                found.append(
                    (first, memory(fork), fork.decode(9), session.decode(3), memory(session))
                )
    assert found[0] == found[1]


def test_decoding_ends_at_a_stop_and_goes_on(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        with engine.open_session(temperature=1.0, seed=4) as session:
            session.append(text=[5, 6, 7])
            every = session.decode(40)  # more than a device says at once
            session.truncate(session.marks[-2])
            stop = every[20]
            cut = session.decode(40, stop=[383, stop])
            assert cut == every[: every.index(stop) + 1]
            found.append((every, cut, session.decode(2), memory(session)))
    assert found[0] == found[1]


def test_to_the_last_position_of_a_session(engines: tuple[Engine, Engine]) -> None:
    found = []
    for engine in engines:
        with engine.open_session(max_positions=64, endless=None, temperature=1.0) as session:
            session.append(text=list(range(9, 65)))
            said = session.decode(9)
            assert session.length == 64
            found.append((said, memory(session)))
    assert found[0] == found[1]


def test_guesses_and_pictures_beside_it(engines: tuple[Engine, Engine]) -> None:
    """What the device is not asked for in one go says the same, too."""
    picture = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)
    found = []
    for engine in engines:
        with engine.open_session(**DRAWN) as first, engine.open_session(speculate=3) as second:
            said: list[tuple[tuple[int, ...], str]] = []
            for number in range(4):
                audio = sound(number)
                said += together(engine, [(first, {"audio": audio}), (second, {"audio": audio})])
                turn = first.step(audio=audio, image=picture if number % 2 else None)
                said.append(outcome(turn))
            found.append(said)
    assert found[0] == found[1]


def test_an_interruption_leaves_what_was_said(engines: tuple[Engine, Engine]) -> None:
    """Whenever it comes: what is held is what a limit of so many tokens leaves."""
    on_cpu, on_gpu = engines
    with on_gpu.open_session() as session, on_cpu.open_session() as alike:
        for number in range(6):
            is_over = threading.Event()

            def keep_interrupting(is_over: threading.Event = is_over) -> None:
                while not is_over.wait(0.0002):
                    session.interrupt()

            thread = threading.Thread(target=keep_interrupting)
            thread.start()
            turn = session.step(audio=sound(number))
            is_over.set()
            thread.join()
            expected = alike.step(audio=sound(number), max_tokens=len(turn.token_ids))
            assert turn.token_ids == expected.token_ids
        assert memory(session) == memory(alike)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_in_bfloat16_it_says_what_passes_one_by_one_say(checkpoint: Path, kv_dtype: Any) -> None:
    """Sessions that guess go pass by pass; the tape has several parts from position 128 on."""
    with Engine.load(
        checkpoint, dtype="bfloat16", kv_dtype=kv_dtype, memory="1GiB", device="cuda_host"
    ) as engine:
        found = []
        for speculate in (0, 1):
            with engine.open_session(**DRAWN, speculate=speculate) as session:
                session.append(text=[number % 300 for number in range(9, 120)])
                said = [outcome(session.step(audio=sound(number))) for number in range(4)]
                found.append((said, memory(session)))
        assert found[0] == found[1]
