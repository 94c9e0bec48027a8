"""Plain misuse of the background: an error of the package, at the call that is wrong."""

from __future__ import annotations

import math
import os
import signal
import threading
from typing import Any

import numpy as np
import pytest
from delegating import answer, streaming, weather

from duplex_engine import Engine, InvalidArgument
from duplex_engine.background import Delegations, EngineWorker, ForkWorker, Task, Tools

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def sunny(_: Task) -> str:
    return "sunny"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matter": 3}, "matter: expected a callable, found 3"),
        ({"split": 3}, "split: expected a callable, found 3"),
        ({"encode": 3}, "encode: expected a callable, found 3"),
        ({"clock": 3}, "clock: expected a callable, found 3"),
        ({"wording": 3}, "wording: expected a mapping"),
        ({"wording": {"error": "it failed"}}, "wording: expected a list of texts for 'error'"),
        ({"wording": {"error": [3]}}, "wording: expected a list of texts for 'error'"),
        ({"transcript": 3}, "transcript: expected a Transcript"),
        ({"timeout_s": math.inf}, "timeout_s: expected more than 0 and less than 1e.09"),
    ],
)
def test_delegations_with_wrong_options(
    reference: Engine, options: dict[str, Any], message: str
) -> None:
    with reference.open_session() as session, pytest.raises(InvalidArgument, match=message):
        Delegations(session, sunny, **options)


def test_delegations_of_what_is_no_session(reference: Engine) -> None:
    for wrong in (None, 3, reference):
        with pytest.raises(InvalidArgument, match="session: expected a Session"):
            Delegations(wrong, sunny)  # type: ignore[arg-type]


def test_calls_with_wrong_values(reference: Engine) -> None:
    with streaming(reference, sunny) as stream:
        background: Any = stream.background
        for job_id in ([], {}, 1.0, True, 7):
            with pytest.raises(InvalidArgument, match="job: expected"):
                background.cancel(job_id)
        for timeout_s in (math.inf, 1e10, math.nan, None):
            with pytest.raises(InvalidArgument, match="timeout_s: expected"):
                background.wait(timeout_s)


def test_a_fork_of_the_process_waits_for_no_worker(reference: Engine) -> None:
    """When it closes what it inherited, as its end does, whatever its parent was just doing."""
    go_on = threading.Event()
    holds = threading.Event()

    def work(_: Task) -> str:
        go_on.wait()
        return "sunny"

    with streaming(reference, work) as stream:
        stream.step("weather paris")

        def hold() -> None:
            with stream.background._jobs.lock:
                holds.set()
                go_on.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        holds.wait()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(4)  # less than a close waits for its workers
            stream.background.close()
            os._exit(0)
        go_on.set()
        holder.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_prompt_that_is_always_the_same(reference: Engine) -> None:
    assert reference.tokenizer is not None
    asked = "what comes after monday"
    ids = reference.tokenizer.encode(asked)
    for prompt in (asked, ids, np.array(ids)):
        assert answer(reference, ForkWorker(prompt)) == "tuesday"  # type: ignore[arg-type]
    assert answer(reference, EngineWorker(reference, asked)) == "tuesday"


@pytest.mark.parametrize("prompt", [None, 3, "", [], [1.5], b"what", {"a": 1}])
def test_a_prompt_that_is_none(reference: Engine, prompt: Any) -> None:
    with pytest.raises(InvalidArgument, match="prompt: expected a function from a task"):
        ForkWorker(prompt)
    with pytest.raises(InvalidArgument, match="prompt: expected a function from a task"):
        EngineWorker(reference, prompt)


def test_workers_with_wrong_options(reference: Engine) -> None:
    with pytest.raises(InvalidArgument, match="EngineWorker: expected an Engine"):
        EngineWorker(None)  # type: ignore[arg-type]
    for stop in (3, ["x"]):
        with pytest.raises(InvalidArgument, match="stop: expected"):
            ForkWorker(stop=stop)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="stop: expected"):
            EngineWorker(reference, stop=stop)  # type: ignore[arg-type]


def test_tools_with_wrong_values() -> None:
    for wrong in (3, None, weather):
        with pytest.raises(InvalidArgument, match="tools: expected functions"):
            Tools(wrong)  # type: ignore[arg-type]
    tools = Tools([weather])
    for arguments in (3, None, ["paris"]):
        with pytest.raises(InvalidArgument, match="tool 'weather': expected arguments by name"):
            tools.bind("weather", arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="tool: expected a string"):
        tools.bind([], {})  # type: ignore[arg-type]
