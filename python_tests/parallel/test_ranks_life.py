"""The lives of worker processes: how they start, what they cost, and that none is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from random_models import TURN, sound, words

from duplex_engine import Engine, RankFailed, SessionClosed, _core
from duplex_engine.live import CostModel, LiveEngine
from duplex_engine.live.simulation import Simulation, drain

pytestmark = [pytest.mark.core, pytest.mark.cpu]

Load = Callable[..., Engine]

ROOT = Path(__file__).parents[2]


def start(**options: object) -> Engine:
    defaults = {"tensor_parallel": 2, "threads": 1, "memory": "96MiB", "rewind_rows": 32}
    return Engine.load("reference", **defaults | options)  # type: ignore[arg-type]


def workers(engine: Engine) -> list[int]:
    assert engine._ranks is not None
    return engine._ranks.pids


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # nobody may wait for orphans
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while any(runs(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "2>&-"])
def test_a_process_without_the_standard_streams_has_workers(closed: str) -> None:
    """Its next descriptors are 0, 1 and 2, which a worker has for itself."""
    code = (
        "from duplex_engine import Engine\n"
        "with Engine.load('reference', tensor_parallel=2, threads=1, memory='96MiB') as engine:\n"
        "    engine.open_session().step(text=[300])\n"
    )
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def in_a_folder_of_packages(tmp_path: Path, name: str, code: str, **variables: str) -> str:
    """What an engine says of itself whose package lies in one folder with another module."""
    package = tmp_path / "duplex_engine"
    package.mkdir()
    for path in (*(ROOT / "duplex_engine").iterdir(), *Path(_core.__file__).parent.glob("*.so")):
        (package / path.name).unlink(missing_ok=True)
        (package / path.name).symlink_to(path)
    (tmp_path / f"{name}.py").write_text(code)
    program = (
        "import dataclasses, sys; sys.path.insert(0, sys.argv[1]); sys.meta_path[:] = "
        "[m for m in sys.meta_path if 'editable' not in type(m).__module__]\n"
        "from duplex_engine import Engine\n"
        "with Engine.load('reference', tensor_parallel=2, threads=1, memory='96MiB') as engine:\n"
        "    print(engine.description)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | variables
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_modules_of_the_standard_library_come_from_there(tmp_path: Path) -> None:
    backport = "raise ImportError('a dataclasses for Python 3.6')"
    assert "2 ranks" in in_a_folder_of_packages(tmp_path, "dataclasses", backport)


def test_what_is_printed_before_a_worker_begins_is_not_its_answer(tmp_path: Path) -> None:
    said = in_a_folder_of_packages(
        tmp_path, "sitecustomize", "print('{}\\nhello', end='')", PYTHONUNBUFFERED="1"
    )
    assert "2 ranks" in said


def test_close_ends_the_workers_and_later_calls_say_so() -> None:
    engine = start(tensor_parallel=4)
    pids = workers(engine)
    assert len(pids) == 3
    session = engine.open_session()
    session.step(text=words(3))
    engine.close()
    assert gone(pids, 0)  # close waits for them
    with pytest.raises(SessionClosed):
        session.step(text=words(3))
    with pytest.raises(SessionClosed):
        engine.open_session()
    engine.close()


def test_two_threads_that_close_both_wait_for_the_workers() -> None:
    engine = start()
    pids = workers(engine)
    both = threading.Barrier(2)

    def close(_: int) -> bool:
        both.wait()
        engine.close()
        return gone(pids, 0)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(close, range(2))) == [True, True]


def test_workers_that_hang_are_waited_for_together() -> None:
    engine = start(tensor_parallel=4)
    assert engine._ranks is not None
    for pid in workers(engine):
        os.kill(pid, signal.SIGSTOP)
    began_s = time.monotonic()
    engine._ranks.close(patience_s=0.8)
    assert time.monotonic() - began_s < 2.0
    assert gone(workers(engine), 0)
    engine.close()


def test_an_engine_that_is_dropped_takes_its_workers_along() -> None:
    engine = start()
    pids = workers(engine)
    del engine
    assert gone(pids, 10)


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_workers_go_when_rank_0_goes(end: str) -> None:
    program = (
        "import sys, threading; from duplex_engine import Engine\n"
        "loaded = []\n"
        # The thread that started them has ended long before.
        "t = threading.Thread(target=lambda: loaded.append(Engine.load('reference', "
        "tensor_parallel=2, threads=1, memory='64MiB')))\n"
        "t.start(); t.join(); loaded[0].open_session().step(text=[300])\n"
        "print(*loaded[0]._ranks.pids, flush=True); sys.stdin.readline()\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    pids = [int(pid) for pid in leader.stdout.readline().split()]
    assert len(pids) == 1
    assert psutil.pid_exists(pids[0])
    if end == "kill":
        leader.kill()
    leader.communicate("\n", timeout=10)
    assert leader.returncode == (-signal.SIGKILL if end == "kill" else 0)
    assert gone(pids, 10)


def test_a_worker_that_finds_rank_0_gone_ends_without_a_word() -> None:
    command = [sys.executable, "-m", "duplex_engine.parallel.worker"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_idle_group_costs_less_than_a_hundredth_of_a_core(load: Load) -> None:
    engine = load("reference", tensor_parallel=2)
    with engine.open_session() as session:
        session.step(text=words(5))
        processes = [psutil.Process(), *(psutil.Process(pid) for pid in workers(engine))]
        time.sleep(0.2)  # spinning ends

        def used_s() -> float:
            return sum(p.cpu_times().user + p.cpu_times().system for p in processes[1:])

        before = used_s()
        time.sleep(2)
        assert used_s() - before <= 0.02


def test_a_live_engine_runs_on_ranks(load: Load) -> None:
    engine = load("reference", tensor_parallel=2)
    with engine.open_session() as offline:
        stepped = [offline.step(audio=sound(TURN, t)).token_ids for t in range(6)]
    scene = Simulation(engine)
    turns = []
    with scene.live.open() as session:
        for t in range(6):
            session.push_audio(sound(TURN, t))
            scene.run(200)
            turns += drain(session)
    assert [out.turn.token_ids for out in turns] == stepped
    scene.live.close()


def test_a_killed_worker_ends_every_call(tmp_path: Path) -> None:
    rng = random.Random(4)
    engine = start(tensor_parallel=4)
    session, background = engine.open_session(), engine.open_session(background=True)
    session.step(audio=sound(TURN))
    path = tmp_path / "snapshot"
    session.snapshot(path)
    expected = [session.fork().step(audio=sound(TURN, 1)).token_ids]
    errors: list[BaseException] = []

    def work(call: Callable[[], object]) -> None:
        try:
            while True:
                call()
        except BaseException as error:  # the test looks at it
            errors.append(error)

    calls = [lambda: session.step(audio=sound(TURN)), lambda: background.step(text=words(5))]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(rng.uniform(0.05, 0.2))
    pids = workers(engine)
    victim = rng.randrange(len(pids))
    os.kill(pids[victim], signal.SIGKILL)
    for thread in threads:
        thread.join(5)  # how soon: bench/kill_rank.py
        assert not thread.is_alive()
    for error in errors:
        assert isinstance(error, RankFailed)
        assert f"rank {victim + 1} (process {pids[victim]}) was ended by SIGKILL" in str(error)
    with pytest.raises(RankFailed):
        session.step(audio=sound(TURN))
    with pytest.raises(RankFailed):
        engine.open_session()
    engine.close()
    assert gone(pids, 0)
    with start(tensor_parallel=4) as again, again.restore(path) as restored:
        assert [restored.step(audio=sound(TURN, 1)).token_ids] == expected


def test_sessions_go_on_in_new_groups_after_random_kills() -> None:
    command = [sys.executable, "-m", "bench.kill_rank", "--kills", "3", "--limit", "5"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    counts = dict(line.rsplit(": ", 1) for line in answer.stdout.splitlines())
    assert counts["kills"] == "3"
    assert counts["hangs"] == counts["turns that differ"] == counts["processes left"] == "0"


def test_ctrl_c_in_a_terminal_reaches_rank_0_alone() -> None:
    with start() as engine:
        (pid,) = workers(engine)
        assert os.getpgid(pid) == pid != os.getpgrp()


def test_a_signal_to_every_process_of_a_service_is_left_to_rank_0() -> None:
    with start() as engine, engine.open_session() as session:
        session.step(text=words(3))
        os.kill(workers(engine)[0], signal.SIGTERM)
        time.sleep(0.1)
        session.step(text=words(3))


def test_a_live_session_says_why_it_ended() -> None:
    with start() as engine, LiveEngine(engine, cost=CostModel(learn=False)) as live:
        session = live.open()
        os.kill(workers(engine)[0], signal.SIGKILL)
        end = time.monotonic() + 5
        while session.ended is None and time.monotonic() < end:
            session.push_audio(sound(TURN))
            time.sleep(0.02)
        assert isinstance(session.error, RankFailed)
