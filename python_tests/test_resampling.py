"""Sound at another rate than 16 kHz: what the resampler holds back never outlives its sound."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from duplex_engine import CapacityError, Engine
from duplex_engine.models import write_random_checkpoint

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The tiny random model."""
    path = write_random_checkpoint(tmp_path_factory.mktemp("tiny"), "tiny")
    with Engine.load(path, threads=1, memory="32MiB", max_positions=1024) as loaded:
        yield loaded


def test_truncate_restarts_the_resampler(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    first, dropped, last = (rng.uniform(-0.3, 0.3, 48_000).astype(np.float32) for _ in range(3))

    def logits(*, detour: bool) -> bytes:
        with engine.open_session() as session:
            session.append(audio=first, sample_rate=48_000)
            length = session.length
            if detour:
                session.append(audio=dropped, sample_rate=48_000)
            else:
                session.append(text=[5])  # anything to take back
            session.truncate(length)
            rows = session.append(audio=last, sample_rate=48_000, logits="all")
            return rows.tobytes()

    assert logits(detour=True) == logits(detour=False)


def test_the_end_of_sound_is_any_truth_value(engine: Engine) -> None:
    with engine.open_session() as session:
        session.append(audio=np.zeros(100, np.float32), end_of_audio="yes")  # type: ignore[call-overload]
        assert session.length == 1


@pytest.mark.parametrize("rates", [(48_000, 16_000), (16_000, 48_000)])
def test_refused_sound_does_not_fix_the_rate(engine: Engine, rates: tuple[int, int]) -> None:
    refused, taken = rates
    with engine.open_session(max_positions=64) as session:
        with pytest.raises(CapacityError):
            session.append(audio=np.zeros(refused * 10, np.float32), sample_rate=refused)
        session.append(audio=np.zeros(taken // 10, np.float32), sample_rate=taken)
        assert session.length == 2
