"""Random bad days: on a made-up clock (bench/chaos.py, where the rules are), and with threads."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from live_scene import drain, sound

from duplex_engine import CapacityError, Engine, SessionClosed
from duplex_engine.live import CostModel, Entry, LiveEngine, LiveSession, LiveTurn, replay

pytestmark = pytest.mark.core

N_SCHEDULES = 150
N_THREADED = 20


def chaos() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "chaos.py"
    spec = importlib.util.spec_from_file_location("chaos", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_random_schedules_keep_every_promise(tmp_path: Path) -> None:
    script = chaos()
    with script.load(tmp_path) as engine:
        seen = script.run_schedules(engine, range(N_SCHEDULES), verify_every=4)
    # Everything that the schedules are meant to do has really happened.
    for name in (
        "forked",
        "resumed",
        "deeds in mid-step",
        "work refused",
        "ended capacity",
        "ended closed",
        "ended lease",
        "live background_failed",
        "live merged_turns",
        "live refused_late",
        "live refused_early",
        "live refused_repeated",
        "live rewound",
        "live stale_turns",
    ):
        assert seen[name] > 0, name
    assert seen["recomputed turns"] > 1000


class Talker(threading.Thread):
    """A client in a thread of its own: pushes, interrupts, acknowledges, reads, perhaps leaves."""

    def __init__(self, live: LiveEngine, seed: int) -> None:
        super().__init__()
        self.session: LiveSession = live.open(lease_s=5)
        self.heard: list[LiveTurn] = []
        self.failure: BaseException | None = None
        self._live = live
        self._rng = np.random.default_rng(seed)

    def run(self) -> None:
        try:
            for n in range(40):
                time.sleep(float(self._rng.uniform(0, 0.004)))
                self._deed(n)
                self.heard += drain(self.session)
        except SessionClosed:
            if self.session.ended != "closed":
                self.failure = AssertionError(self.session.ended)
        except BaseException as error:
            self.failure = error

    def _deed(self, n: int) -> None:
        session = self.session
        if self._rng.random() < 0.9:
            session.push_audio(sound(n, 1600), n)
        match int(self._rng.integers(12)):
            case 0:
                session.interrupt()
            case 1 if self.heard:
                session.playback_ack(self.heard[-1].turn.index)
            case 2:
                session.push_text([300 + n], f"op {n // 2}")
            case 3:
                session.at_boundary(lambda inner: inner.fork()).result(10).close()
            case 4:
                assert self._live.resume(session.detach()) is session
            case 5 if n > 30:
                session.close()
            case 6:
                with contextlib.suppress(CapacityError):  # as many as it may have
                    self._live.background(session, (None for _ in range(3)))


@pytest.mark.parametrize("seed", range(N_THREADED))
def test_clients_in_threads_and_a_driver_in_its_own(engine: Engine, seed: int) -> None:
    entries: dict[str, list[Entry]] = {}
    live = LiveEngine(
        engine,
        cost=CostModel(learn=False),
        patience_ms=5,
        journal=lambda name, entry: entries.setdefault(name, []).append(entry),
    )
    with live:
        talkers = [Talker(live, 100 * seed + n) for n in range(3)]
        for talker in talkers:
            talker.start()
        for talker in talkers:
            talker.join(20)
            assert not talker.is_alive()
    for talker in talkers:
        assert talker.failure is None
        talker.heard += drain(talker.session)
        with engine.open_session() as again:
            turns = [(t.index, t.token_ids) for t in replay(again, entries[talker.session.id])]
        told = iter(turns)
        assert all((out.turn.index, out.turn.token_ids) in told for out in talker.heard)
        assert talker.heard
