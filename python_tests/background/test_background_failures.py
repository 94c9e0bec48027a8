"""Workers and sessions that fail in every way: the stream goes on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from delegating import SILENCE, Stream, streaming, until

from duplex_engine import Engine, InvalidArgument, SessionClosed
from duplex_engine.background import Delegations, Task, Worker
from duplex_engine.background import jobs as jobs_module

pytestmark = pytest.mark.usefixtures("nothing_is_left")

TOLD = "closed"  # the wording of an error that the reference model knows


async def raises(_: Task) -> str:
    raise ValueError("out of luck")


async def answers_at_once(_: Task) -> str:
    return "sunny"


def raises_plainly(_: Task) -> str:
    raise ValueError("out of luck")


async def raises_in_mid_stream(_: Task) -> AsyncIterator[str]:
    yield "sunny"
    raise OSError("line cut")


def raises_in_mid_generator(_: Task) -> Iterator[str]:
    yield "sunny"
    raise OSError("line cut")


async def exits(_: Task) -> str:
    sys.exit(3)


def exits_plainly(_: Task) -> str:
    sys.exit(3)


async def interrupts(_: Task) -> str:
    raise KeyboardInterrupt


async def cancels_itself(_: Task) -> str:
    raise asyncio.CancelledError


def returning(value: object) -> Callable[[Task], Any]:
    return lambda _: value


async def yields_nonsense(_: Task) -> AsyncIterator[Any]:
    yield "sunny"
    yield {"warm": 1}


BAD: dict[str, tuple[Worker, str]] = {
    "error": (raises, "ValueError: out of luck"),
    "error in a thread": (raises_plainly, "ValueError: out of luck"),
    "error in mid-stream": (raises_in_mid_stream, "OSError: line cut"),
    "error in a generator": (raises_in_mid_generator, "OSError: line cut"),
    "exit": (exits, "SystemExit: 3"),
    "exit in a thread": (exits_plainly, "SystemExit: 3"),
    "interrupt": (interrupts, "KeyboardInterrupt: "),
    "cancels itself": (cancels_itself, "CancelledError: "),
    "None": (returning(None), "expected text, found NoneType: None"),
    "nan": (returning(float("nan")), "expected text, found float: nan"),
    "bytes": (returning(b"sunny"), "expected text, found bytes"),
    "list": (returning(["sunny"]), "expected text, found list"),
    "nonsense in mid-stream": (yields_nonsense, "expected text, found dict"),
    "takes no task": (lambda: "sunny", "TypeError: "),  # type: ignore[misc]
    "unknown words": (returning("magnificent"), "expected words that the model's vocabulary has"),
    "half a character": (returning("\ud800"), "expected words that the model's vocabulary has"),
}


@pytest.mark.parametrize(("worker", "message"), BAD.values(), ids=BAD.keys())
def test_a_failing_worker_becomes_something_to_say(
    reference: Engine, worker: Worker, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with streaming(reference, worker) as stream:
        stream.step("weather paris")
        assert stream.background.wait(10)
        stream.step()
        stream.step()
        (job,) = stream.background.jobs
        assert (job.state, job.failure) == ("failed", "error")
        assert message in job.error
        assert stream.told == [(1, TOLD)]
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "weather paris" in record.getMessage()


@pytest.mark.parametrize("text", ["", "  \n "])
def test_nothing_to_say_is_no_failure(reference: Engine, text: str) -> None:
    with streaming(reference, returning(text)) as stream:
        stream.step("weather")
        assert stream.background.wait(10)
        stream.step()
        assert stream.background.jobs[0].state == "done"
        assert stream.results == []


def test_junk_that_is_text_enters_as_text(tiny: Engine) -> None:
    with streaming(tiny, returning("a\0b\n\tc \ud800 <|result_end|>")) as stream:
        stream.step("weather")
        assert stream.background.wait(10)
        stream.step()
        assert stream.told == [(1, "a\0b c ? <|result_end|>")]


def test_ids_that_the_vocabulary_does_not_have(tiny: Engine) -> None:
    def encode(text: str) -> list[int]:
        return [300, 10**7] if text == "sunny" else [301]

    with streaming(tiny, returning("sunny"), encode=encode) as stream:
        stream.step("weather")
        assert stream.background.wait(10)
        stream.step()
        assert "expected token ids in [0, 640)" in stream.background.jobs[0].error
        assert stream.results == [(1, (301,))]


def failing(*_: object) -> Any:
    raise RuntimeError("the program's own function is broken")


@pytest.mark.parametrize(
    "options",
    [{"matter": failing}, {"split": failing}, {"encode": failing}, {"wording": {}}],
    ids=lambda options: next(iter(options)),
)
def test_functions_of_the_program_that_fail(reference: Engine, options: dict[str, Any]) -> None:
    with streaming(reference, lambda task: task.text.split()[-1], **options) as stream:
        stream.step("a sunny", "b warm")
        assert stream.background.wait(10)
        for _ in range(3):
            stream.step()
        if "matter" in options:
            assert {text for _, text in stream.told} == {"sunny", "warm"}
        elif "split" in options:
            assert [text for _, text in stream.told] == [TOLD, TOLD]
        elif "encode" in options:
            assert stream.told == []  # not even the wording can be encoded
        else:
            assert {job.state for job in stream.background.jobs} == {"done"}


def test_wording_is_configurable(reference: Engine) -> None:
    wording = {"error": ("words it lacks", "not known either", "tomorrow")}
    with streaming(reference, raises, wording=wording) as stream:
        stream.step("weather")
        assert stream.background.wait(10)
        stream.step()
        assert stream.told == [(1, "tomorrow")]


def test_no_loop_can_be_made(reference: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> asyncio.AbstractEventLoop:
        raise OSError(24, "Too many open files")

    with streaming(reference, answers_at_once) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.events, "new_event_loop", fails)
            stream.step("weather")
        (job,) = stream.background.jobs
        assert (job.state, job.failure) == ("failed", "error")
        assert "Too many open files" in job.error
        stream.step("weather tomorrow")  # there are some again
        assert stream.background.wait(10)
        assert stream.background.jobs[-1].state == "done"


# ---- the session or the engine goes -------------------------------------------------------------
async def sleeps(_: Task) -> str:
    await asyncio.sleep(600)
    return "sunny"


def works_in_a_thread(task: Task) -> str:
    while not task.cancelled:
        time.sleep(0.002)
    return "sunny"


def yields_for_ever(_: Task) -> Iterator[str]:
    while True:
        time.sleep(0.002)
        yield ""


ENDLESS: dict[str, Worker] = {
    "coroutine": sleeps,
    "thread": works_in_a_thread,
    "generator": yields_for_ever,
}


@pytest.mark.parametrize("worker", ENDLESS.values(), ids=ENDLESS.keys())
@pytest.mark.parametrize("what", ["session", "engine", "background"])
def test_closing_ends_the_work(tiny: Engine, worker: Worker, what: str) -> None:
    """Whatever is closed, and whoever forgets to close the rest."""
    session = tiny.open_session()
    background = Delegations(session, worker)
    stream = Stream(session, background)
    stream.step("one")
    stream.step("two")
    assert [job.state for job in background.jobs] == ["running", "running"]
    {"session": session, "engine": tiny, "background": background}[what].close()
    until(lambda: not background._jobs._running)
    if what != "background":
        background.before_step()
        with pytest.raises(SessionClosed):
            session.step(SILENCE)
    assert {job.state for job in background.jobs} == {"cancelled"}
    background.close()
    background.close()
    if what == "background":
        stream.step("three")
        assert background.jobs[-1].state == "cancelled"
        session.close()


def test_a_function_that_does_not_look_is_left_behind(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs_module, "GRACE_S", 0.05)
    released = threading.Event()
    with tiny.open_session() as session:
        background = Delegations(session, lambda _: str(released.wait(10)), max_running=1)
        stream = Stream(session, background)
        stream.step("one", "two")
        background.cancel(1)
        assert [job.state for job in background.jobs] == [
            "cancelled",
            "waiting",
        ]  # its place is taken
        background.close()
        assert "1 background workers did not end" in caplog.text
        released.set()
        until(lambda: not background._jobs._running)
        assert stream.results == []


def test_results_of_the_dead_do_not_enter(reference: Engine) -> None:
    """A worker that answers after its cancellation, in every form, is not heard."""
    gate = threading.Event()

    def stubborn(_: Task) -> Iterator[str]:
        gate.wait(10)
        yield "sunny"
        yield "warm"

    with streaming(reference, stubborn) as stream:
        stream.step("weather")
        stream.background.cancel(1)
        gate.set()
        until(lambda: not stream.background._jobs._running)
        stream.step()
        assert stream.results == []
        assert stream.background.jobs[0].text == ""


def test_an_event_loop_that_ends_takes_its_workers_along(tiny: Engine) -> None:
    kept: list[Delegations] = []
    with tiny.open_session() as session:

        async def main() -> None:
            kept.append(Delegations(session, sleeps))
            Stream(session, kept[0]).step("one")
            await asyncio.sleep(0.01)

        asyncio.run(main())
        (background,) = kept
        assert background.jobs[0].state == "cancelled"
        job = background.ask("two")  # the loop is gone: it fails, and says why
        assert (job.state, job.failure) == ("failed", "error")
        assert "closed" in background.jobs[1].error
        background.close()


def test_no_fork_no_work(tiny: Engine) -> None:
    """A worker whose fork finds no memory fails like any other."""

    def worker(_: Task) -> str:
        raise AssertionError("it must not be called")

    worker.fork_positions = 10**9  # type: ignore[attr-defined]
    with streaming(tiny, worker) as stream:
        stream.step("weather")
        (job,) = stream.background.jobs
        assert (job.state, job.failure) == ("failed", "error")
        stream.step()
        assert stream.told == [(1, "the background work failed")]


def test_a_program_that_ends_in_the_middle_of_work(tmp_path: Any) -> None:
    """Python's exit neither hangs nor crashes while workers are at it."""
    script = tmp_path / "program.py"
    script.write_text(
        "from duplex_engine import Engine\n"
        "from duplex_engine.background import Delegations, EngineWorker\n"
        "engine = Engine.load('reference', threads=1)\n"
        "async def sleeps(task):\n"
        "    import asyncio; await asyncio.sleep(600)\n"
        "busy = EngineWorker(engine, lambda task: 'count to twenty', max_tokens=10**6)\n"
        "kept = [Delegations(engine.open_session(), w) for w in (sleeps, busy, busy)]\n"
        "for background in kept: background.ask('weather')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("worker", [sleeps, works_in_a_thread])
def test_no_thread_no_work(tiny: Engine, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with streaming(tiny, worker) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            stream.step("one", "two")
        assert [job.error for job in stream.background.jobs] == [
            "RuntimeError: can't start new thread"
        ] * 2
        stream.step()
        assert stream.told == [(1, "the background work failed")]
        stream.step("three")  # there are threads again
        assert stream.background.jobs[-1].state == "running"


# ---- arguments ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, "timeout_s: expected more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s: expected more than 0"),
        ({"timeout_s": "soon"}, "timeout_s: expected a number"),
        ({"max_running": 0}, "max_running"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"max_result_tokens": 0}, "max_result_tokens"),
        ({"history": 1.5}, "history"),
        ({"worker": 3}, "worker: expected a callable, found 3"),
    ],
)
def test_wrong_arguments(reference: Engine, options: dict[str, Any], message: str) -> None:
    worker = options.pop("worker", raises)
    with reference.open_session() as session, pytest.raises(InvalidArgument, match=message):
        Delegations(session, worker, **options)


def test_wrong_calls(reference: Engine) -> None:
    with streaming(reference, sleeps) as stream:
        stream.background.ask("weather")
        for call in (
            lambda: stream.background.ask(3),  # type: ignore[arg-type]
            lambda: stream.background.replace(1, None),  # type: ignore[arg-type]
            lambda: stream.background.replace(2, "weather"),
            lambda: stream.background.revise(1, b"x"),  # type: ignore[arg-type]
            lambda: stream.background.revise("1", "x"),  # type: ignore[arg-type]
        ):
            with pytest.raises(InvalidArgument, match="expected"):
                call()
        assert [job.state for job in stream.background.jobs] == ["running"]


def test_a_checkpoint_that_cannot_delegate(tmp_path: Any) -> None:
    import json

    from duplex_engine.models import write_random_checkpoint

    folder = write_random_checkpoint(tmp_path, seed=1)
    config = json.loads((folder / "config.json").read_text())
    del config["interaction"]
    (folder / "config.json").write_text(json.dumps(config))
    with (
        Engine.load(folder, threads=1, memory="64MiB") as engine,
        engine.open_session() as session,
        pytest.raises(InvalidArgument, match="cannot delegate"),
    ):
        Delegations(session, raises)
