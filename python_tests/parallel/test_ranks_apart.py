"""Ranks that share no memory, by torch.distributed: the bits of shared memory, and how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from both_lanes import check_both_lanes
from random_models import TURN, sound, words
from remote_worker import worker
from stream_ops import Op
from test_ranks_exact import CONVERSATION, run

from duplex_engine import BackendUnavailable, CheckpointError, Engine, RankFailed, Session
from duplex_engine.models.random import write_random_checkpoint

pytestmark = [pytest.mark.core, pytest.mark.cpu]

Load = Callable[..., Engine]

APART = "torch.distributed"


def pids(engine: Engine) -> list[int]:
    assert engine._ranks is not None
    return engine._ranks.pids


@pytest.mark.parametrize("reduction", ["ranks", "invariant"])
@pytest.mark.parametrize(("n", "ops"), [(2, CONVERSATION), (4, CONVERSATION[9:16])])
def test_a_conversation_is_that_of_shared_memory(
    load: Load, n: int, ops: list[Op], reduction: str
) -> None:
    shared, apart = (
        load("reference", tensor_parallel=n, reduction=reduction, transport=transport)
        for transport in ("shared memory", APART)
    )
    assert f"{n} ranks x 1 thread, {APART}, reduction" in apart.description
    expected = run(shared, ops)
    assert len(set(expected[0])) > len(ops) // 3
    assert run(apart, ops) == expected


def test_experts_int8_and_drafts_are_those_of_shared_memory(load: Load, larger: Path) -> None:
    options: dict[str, Any] = {"tensor_parallel": 2, "mtp_layers": 2, "kv_dtype": "int8"}
    expected = run(load(larger, **options), CONVERSATION, speculate=3)
    assert run(load(larger, transport=APART, **options), CONVERSATION, speculate=3) == expected


def test_snapshots_go_from_one_transport_to_the_other(load: Load, tmp_path: Path) -> None:
    shared, apart = (load("reference", tensor_parallel=2, transport=t) for t in ("auto", APART))
    heard = []
    for first, second in ((shared, apart), (apart, shared)):
        session = first.open_session()
        session.append(text=words(200))
        session.step(audio=sound(3 * TURN))
        session.snapshot(tmp_path / "snapshot")
        goes_on = [engine.restore(tmp_path / "snapshot") for engine in (first, second)]
        for each in (*goes_on, session.migrate(second)):
            tokens = [each.step(audio=sound(TURN, t)).token_ids for t in range(3)]
            heard.append((tokens, each.append(text=words(9), logits="all").tobytes()))
            each.close()
    assert heard == [heard[0]] * 6


def test_both_lanes_at_once_change_no_bit(load: Load) -> None:
    def hear(session: Session) -> list[tuple[int, ...]]:
        return [session.step(audio=sound(TURN, t)).token_ids for t in range(6)]

    def think(session: Session) -> list[int]:
        session.append(text=words(9))
        return session.decode(25)

    engine = load("reference", tensor_parallel=2, transport=APART)

    def ask_the_core() -> None:
        # Who waits for a lane leaves Python to the calls in it, which need it for their messages.
        assert len(engine._core.embed("text", words(3))) == 3
        assert engine.memory_plan

    alone = load("reference", tensor_parallel=2)
    check_both_lanes(alone, engine, hear, think, ask_the_core)


def test_ctrl_c_comes_between_calls_and_never_breaks_a_meeting_off(load: Load) -> None:
    engine = load("reference", tensor_parallel=2, transport=APART)
    with engine.open_session() as session:
        session.append(text=words(5))
        for k in range(8):
            timer = threading.Timer(0.01 + 0.003 * k, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                while True:
                    session.decode(3)
            timer.join()
        assert len(session.decode(3)) == 3


def test_an_idle_group_costs_less_than_a_hundredth_of_a_core(load: Load) -> None:
    engine = load("reference", tensor_parallel=2, transport=APART)
    with engine.open_session() as session:
        session.step(text=words(5))
        (worker,) = (psutil.Process(pid) for pid in pids(engine))
        time.sleep(0.2)
        before = sum(worker.cpu_times()[:2])
        time.sleep(1.5)
        assert sum(worker.cpu_times()[:2]) - before <= 0.015


def test_a_killed_worker_ends_every_call_and_sessions_go_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tensor_parallel": 4, "transport": APART, "threads": 1, "memory": "128MiB",
    }  # fmt: skip
    engine = Engine.load("reference", **options)
    session, background = engine.open_session(), engine.open_session(background=True)
    session.step(audio=sound(TURN))
    session.snapshot(tmp_path / "snapshot")
    expected = session.fork().step(audio=sound(TURN, 1)).token_ids
    ends: list[tuple[float, BaseException]] = []

    def work(call: Callable[[], object]) -> None:
        try:
            while True:
                call()
        except BaseException as error:  # the test looks at it
            ends.append((time.monotonic(), error))

    calls = [lambda: session.step(audio=sound(TURN)), lambda: background.step(text=words(5))]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    started = pids(engine)
    os.kill(started[1], signal.SIGKILL)
    killed_s = time.monotonic()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for ended_s, error in ends:
        assert isinstance(error, RankFailed)
        assert f"rank 2 (process {started[1]}) was ended by SIGKILL" in str(error)
        assert ended_s - killed_s < 1.5
    with pytest.raises(RankFailed):
        session.step(audio=sound(TURN))
    with pytest.raises(RankFailed):
        engine.open_session()
    engine.close()
    assert not any(psutil.pid_exists(pid) for pid in started)
    with (
        Engine.load("reference", **options | {"transport": "auto"}) as again,
        again.restore(tmp_path / "snapshot") as restored,
    ):
        assert restored.step(audio=sound(TURN, 1)).token_ids == expected


def test_workers_go_when_rank_0_is_killed() -> None:
    program = (
        "import sys; from duplex_engine import Engine\n"
        f"engine = Engine.load('reference', tensor_parallel=2, transport={APART!r}, threads=1)\n"
        "engine.open_session().step(text=[300])\n"
        "print(*engine._ranks.pids, flush=True); sys.stdin.readline()\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    (pid,) = (int(pid) for pid in leader.stdout.readline().split())
    worker = psutil.Process(pid)
    leader.kill()
    leader.communicate(timeout=10)
    end = time.monotonic() + 5
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- workers of other machines, which are this one here


def test_a_worker_of_another_machine_computes_the_same(load: Load, address: str) -> None:
    with load("reference", tensor_parallel=2).open_session() as session:
        expected = session.append(text=words(30), logits="all").tobytes()
    with worker("reference", 1, address) as process:
        with (
            Engine.load(
                "reference", tensor_parallel=2, address=address, threads=2, memory="64MiB"
            ) as engine,
            engine.open_session() as session,
        ):
            assert APART in engine.description
            assert session.append(text=words(30), logits="all").tobytes() == expected
        _, said = process.communicate(timeout=10)
        assert process.returncode == 0, said
    assert f"all ranks have come to {address}" in said
    assert "the engine was closed" in said


def test_ctrl_c_ends_a_worker_of_another_machine(address: str) -> None:
    with worker("reference", 1, address) as process:
        engine = Engine.load("reference", tensor_parallel=2, address=address, threads=2)
        session = engine.open_session()
        session.step(text=words(3))
        process.send_signal(signal.SIGINT)
        killed_s = time.monotonic()
        assert process.wait(5) == -signal.SIGINT
        error = None
        while error is None:
            try:
                session.step(text=words(3))
            except RankFailed as found:
                error = found
        assert re.search(r"rank 1 at 127\.0\.0\.1:\d+ has ended", str(error))
        assert time.monotonic() - killed_s < 1.5
        engine.close()


def test_another_checkpoint_is_refused(tmp_path: Path, address: str) -> None:
    mine = write_random_checkpoint(tmp_path / "mine", seed=1)
    with worker(write_random_checkpoint(tmp_path / "theirs", seed=2), 1, address) as process:
        with pytest.raises(
            CheckpointError, match=r"^rank 1: .*theirs: expected the checkpoint that"
        ):
            Engine.load(mine, tensor_parallel=2, address=address, threads=2, memory="64MiB")
        _, said = process.communicate(timeout=10)
        assert process.returncode == 2
    assert "found another" in said


def test_a_worker_that_never_comes(address: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"workers of ranks 1 to 1 .* within 0\.3 s"):
        Engine.load("reference", tensor_parallel=2, address=address, join_s=0.3)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(BackendUnavailable, match=r"expected one of this machine .*192\.0\.2\.1:5"):
        Engine.load("reference", tensor_parallel=2, address="192.0.2.1:500")


def test_without_torch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'duplex_engine\[distributed\]'"):
        Engine.load("reference", tensor_parallel=2, transport=APART)
