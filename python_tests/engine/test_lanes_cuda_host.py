"""Two lanes and the choice of tokens on the CUDA backend, whose kernels run on the host here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duplex_engine import Engine, InvalidArgument, Session, _core
from duplex_engine.models import write_random_checkpoint

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        "cuda_host" not in _core.backend_names(), reason="only a build with tests has it"
    ),
]

SAMPLING: dict[str, Any] = {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("smallest"), "smallest", seed=3)


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, dtype="float32", memory="64MiB", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def on_gpu(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, dtype="float32", memory="64MiB", device="cuda_host") as engine:
        yield engine


def hear(session: Session, seed: int) -> tuple[int, ...]:
    samples = np.random.default_rng(seed).standard_normal(3200).astype(np.float32) * 0.1
    return session.step(audio=samples, max_tokens=2).token_ids


def think(session: Session, n: int = 6) -> list[int]:
    session.append(text=[9, 10, 11, 12])
    return session.decode(n)


def test_the_lanes_of_the_gpu_say_what_the_cpu_says(on_cpu: Engine, on_gpu: Engine) -> None:
    for options in ({}, SAMPLING):
        answers = []
        for engine in (on_cpu, on_gpu):
            with engine.open_session(**options) as session:
                heard = [hear(session, turn) for turn in range(2)]
                with session.fork() as here, session.fork(background=True) as there:
                    thoughts = [think(here), think(there)]
                    assert thoughts[0] == thoughts[1]
                    with there.fork() as back:
                        answers.append((heard, thoughts, hear(back, 9), hear(session, 9)))
        assert answers[0] == answers[1]


def test_lanes_at_work_at_once_change_nothing(on_gpu: Engine) -> None:
    with on_gpu.open_session() as session:
        expected = [hear(session, turn) for turn in range(4)]
        thought = think(session.fork())
    with on_gpu.open_session() as session, on_gpu.open_session() as other:
        assert [hear(other, turn) for turn in range(4)] == expected
        fork = other.fork(background=True)
        thoughts: list[list[int]] = []
        thinker = threading.Thread(target=lambda: thoughts.append(think(fork)))
        thinker.start()
        assert [hear(session, turn) for turn in range(4)] == expected
        thinker.join()
        assert thoughts == [thought]
        fork.close()


def test_an_engine_beside_another_is_on_its_device(
    checkpoint: Path, on_gpu: Engine, tmp_path: Path
) -> None:
    with (
        Engine.load(checkpoint, dtype="float32", memory="16MiB", beside=on_gpu) as other,
        other.open_session() as session,
        on_gpu.open_session() as first,
    ):
        assert hear(session, 1) == hear(first, 1)
    with pytest.raises(InvalidArgument, match="cache: expected False on the device 'cuda_host'"):
        Engine.load(checkpoint, beside=on_gpu, cache=tmp_path)
