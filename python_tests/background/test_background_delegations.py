"""From a delegation to its result in the stream: when it enters, and every way to end it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from delegating import SILENCE, Clock, Gate, Stream, showcase_chunks, streaming, until

from duplex_engine import AsyncEngine, Delegation, Engine, InvalidArgument
from duplex_engine.background import Delegations, Job, Task, Worker, by_sentence

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def answers(_: Task) -> str:
    return "sunny warm"


async def answers_in_pieces(_: Task) -> AsyncIterator[str]:
    yield "sunny "
    await asyncio.sleep(0)
    yield "warm"


def plain(_: Task) -> str:
    return "sunny warm"


def plain_in_pieces(_: Task) -> Iterator[str]:
    yield "sunny "
    yield "warm"


class Object:
    """A callable object, whose call is a coroutine function."""

    async def __call__(self, _: Task) -> str:
        return "sunny warm"


WORKERS: dict[str, Worker] = {
    "coroutine": answers,
    "asynchronous generator": answers_in_pieces,
    "function": plain,
    "generator": plain_in_pieces,
    "object": Object(),
    "function that returns a coroutine": lambda task: answers(task),
    "function that returns an asynchronous generator": lambda task: answers_in_pieces(task),
}


@pytest.mark.parametrize("worker", WORKERS.values(), ids=WORKERS.keys())
def test_a_result_enters_the_next_micro_turn(reference: Engine, worker: Worker) -> None:
    with streaming(reference, worker) as stream:
        stream.step()
        stream.step("weather paris")
        assert stream.background.wait(10)
        stream.step()
        stream.step()
        assert stream.told == [(2, "sunny warm")]
        (job,) = stream.background.jobs
        assert (job.state, job.request, job.turn) == ("done", "weather paris", 1)
        assert (job.text, job.entered) == ("sunny warm", (2,))
        assert job.asked_s <= (job.began_s or 0) <= (job.ended_s or 0)
        roles = [(e.role, e.text) for e in stream.background.transcript.entries]
        assert roles == [("sound", ""), ("request", "weather paris"), ("result", "sunny warm")]


def test_the_stream_is_that_of_results_fed_by_hand(reference: Engine) -> None:
    """What the background does leaves the bits of the stream alone."""
    with streaming(reference, answers) as stream:
        for turn in range(6):
            stream.step(*["weather paris"] * (turn == 1))
            assert stream.background.wait(10)
        digests = stream.session._core.digests()
    with reference.open_session(max_positions=4096) as session:
        for turn in range(6):
            session.step(SILENCE, result="sunny warm" if turn == 2 else None)
        assert session._core.digests() == digests


def test_one_result_a_micro_turn(reference: Engine) -> None:
    with streaming(reference, lambda task: task.text) as stream:
        stream.step("sunny", "warm", "late")
        assert stream.background.wait(10)
        # One that the program feeds itself has its brackets alone, too.
        stream.background.before_step({"result": "closed"})
        assert stream.results == []
        for _ in range(4):
            stream.step()
        assert [turn for turn, _ in stream.told] == [1, 2, 3]
        assert {text for _, text in stream.told} == {"sunny", "warm", "late"}


def test_a_step_that_failed_keeps_the_result(reference: Engine) -> None:
    with streaming(reference, answers) as stream:
        stream.step("weather paris")
        assert stream.background.wait(10)
        with pytest.raises(InvalidArgument):
            stream.background.step(text=[10**6])
        turn = stream.background.step(audio=SILENCE)
        assert stream.background.jobs[0].entered == (turn.index,)


def test_a_task_knows_the_conversation(reference: Engine) -> None:
    gate, clock = Gate(), Clock()
    with streaming(reference, gate, clock=clock, timeout_s=30.0) as stream:
        stream.step(text="hello")
        stream.step("weather paris")
        until(lambda: bool(gate.tasks))
        (task,) = gate.tasks
        assert (task.id, task.text, task.token_ids) == (1, "weather paris", (1, 2))
        assert task.conversation.splitlines() == [
            "[0.0-0.2 s] user typed: hello",
            "[0.0-0.4 s] (sound)",
            "[0.2-0.4 s] assistant asked the background: weather paris",
        ]
        assert (task.deadline_s, task.remaining_s) == (130.0, 30.0)
        clock.now_s = 120.0
        assert task.remaining_s == 10.0
        assert not task.cancelled
        assert task.session is None


# ---- limits ------------------------------------------------------------------------------------
def test_several_work_at_a_time_and_others_wait(reference: Engine) -> None:
    gate = Gate()
    with streaming(reference, gate, max_running=2, max_waiting=2) as stream:
        stream.step("a sunny", "b warm", "c late", "d closed", "e soon")
        states = [job.state for job in stream.background.jobs]
        assert states == ["running", "running", "waiting", "waiting", "failed"]
        assert stream.background.jobs[4].failure == "too_many"
        stream.step()
        assert stream.told == [(1, "late")]  # the wording of too_many that the model knows
        until(lambda: len(gate.tasks) == 2)
        gate.open()
        assert stream.background.wait(10)
        for _ in range(5):
            stream.step()
        assert {text for _, text in stream.told[1:]} == {"sunny", "warm", "late", "closed"}


def test_a_time_out_is_seen_by_the_clock(reference: Engine) -> None:
    gate, clock = Gate(), Clock()
    options: dict[str, Any] = {"max_running": 1, "timeout_s": 5.0, "clock": clock}
    with streaming(reference, gate, **options) as stream:
        stream.step("weather paris", "weather london")
        clock.now_s += 4.9
        stream.step()
        assert [job.state for job in stream.background.jobs] == ["running", "waiting"]
        clock.now_s += 0.1
        stream.step()
        stream.step()
        assert [job.failure for job in stream.background.jobs] == ["timeout", "timeout"]
        assert stream.told == [(2, "late"), (3, "late")]
        assert stream.background.jobs[0].ended_s == 105.0
        until(lambda: not stream.background._jobs._running)
        assert len(gate.tasks) <= 1  # the one that waited never began


def test_old_jobs_are_forgotten(reference: Engine) -> None:
    with streaming(reference, plain, history=3) as stream:
        for number in range(10):
            stream.step(f"request {number}")
            assert stream.background.wait(10)
        stream.step()
        assert [job.id for job in stream.background.jobs] == [8, 9, 10]


# ---- the user changes course -------------------------------------------------------------------
def test_cancel(reference: Engine) -> None:
    gate = Gate()
    with streaming(reference, gate) as stream:
        stream.step("a sunny", "b warm")
        until(lambda: len(gate.tasks) == 2)
        assert stream.background.cancel(1).state == "cancelled"
        assert gate.tasks[0].cancelled or gate.tasks[1].cancelled
        gate.open()
        assert stream.background.wait(10)
        for _ in range(3):
            stream.step()
        assert stream.told == [(1, "warm")]
        assert stream.background.cancel(2).state == "done"  # too late: it is over
        with pytest.raises(InvalidArgument, match="job: expected one of 1, 2, found 7"):
            stream.background.cancel(7)


def test_cancel_takes_back_what_waits(reference: Engine) -> None:
    with streaming(reference, answers) as stream:
        stream.step("weather paris")
        assert stream.background.wait(10)
        stream.background.cancel(1)
        stream.step()
        stream.step("weather london")
        assert stream.background.wait(10)
        stream.background.cancel_all()
        stream.step()
        assert stream.told == []


def test_replace(reference: Engine) -> None:
    gate = Gate()
    with streaming(reference, gate) as stream:
        stream.step("weather warm")
        job = stream.background.replace(1, "weather sunny")
        gate.open()
        assert stream.background.wait(10)
        stream.step()
        stream.step()
        assert [j.state for j in stream.background.jobs] == ["replaced", "done"]
        assert (job.id, job.turn) == (2, -1)
        assert stream.told == [(1, "sunny")]


@pytest.mark.parametrize("is_late", [False, True])
def test_revise(reference: Engine, is_late: bool) -> None:
    gate = Gate()
    with streaming(reference, gate) as stream:
        stream.step("weather warm")
        if is_late:
            gate.open()
            assert stream.background.wait(10)
            stream.step()
        job = stream.background.revise(1, "rainy cold")
        assert (job.state, job.text) == ("done", "rainy cold")
        stream.step()
        stream.step()
        assert [text for _, text in stream.told] == ["warm", "rainy cold"][not is_late :]


def test_the_model_corrects_itself_after_a_revision(reference: Engine) -> None:
    """The whole way: the recorded scene, the model's own delegation, a result and a better one."""
    said: list[str] = []
    released = threading.Event()

    def worker(task: Task) -> str:
        assert task.text == "weather paris"
        released.wait(10)
        return "sunny warm"

    with streaming(reference, worker) as stream:
        for chunk in showcase_chunks():
            turn = stream.background.step(audio=chunk)
            if turn.index == 85:
                released.set()
                assert stream.background.wait(10)
            elif turn.index == 91:
                stream.background.revise(1, "rainy cold")
            said += turn.text.split()
    assert " ".join(said) == "no four say lazy one moment tuesday sunny warm sorry rainy cold"


def test_the_same_words_again_start_nothing(reference: Engine) -> None:
    gate = Gate()
    with streaming(reference, gate) as stream:
        stream.step("weather paris")
        stream.step(" Weather  paris", "weather london")
        assert [job.request for job in stream.background.jobs] == [
            "weather paris",
            "weather london",
        ]


def test_a_newer_request_on_the_same_matter_replaces(reference: Engine) -> None:
    gate = Gate()

    def topic(request: str) -> str:
        return request.split()[0]

    with streaming(reference, gate, matter=topic) as stream:
        stream.step("weather warm", "price late")
        stream.step("weather sunny")
        gate.open()
        assert stream.background.wait(10)
        for _ in range(3):
            stream.step()
        assert [j.state for j in stream.background.jobs] == ["replaced", "done", "done"]
        assert {text for _, text in stream.told} == {"late", "sunny"}


def test_a_rewind_cancels_what_was_asked_since(reference: Engine) -> None:
    gate = Gate()
    with streaming(reference, gate) as stream:
        stream.step("a sunny")
        length = stream.session.length
        stream.step("b warm")
        stream.session.truncate(length)
        stream.step()
        assert [job.state for job in stream.background.jobs] == ["running", "cancelled"]


def test_ask_starts_a_job_of_the_programs_own(reference: Engine) -> None:
    with streaming(reference, lambda task: task.text) as stream:
        stream.step()
        job = stream.background.ask("sunny")
        assert stream.background.wait(10)
        assert isinstance(job, Job)
        stream.step()
        assert stream.told == [(1, "sunny")]


# ---- pieces and bounds -------------------------------------------------------------------------
def test_a_long_result_may_enter_by_sentence(tiny: Engine) -> None:
    released = threading.Event()

    def worker(_: Task) -> Iterator[str]:
        yield "It is su"
        yield "nny. And wa"
        released.wait(10)
        yield "rm! So"

    with streaming(tiny, worker, split=by_sentence) as stream:
        stream.step("weather")
        until(lambda: bool(stream.background._jobs._parts))
        stream.step()
        assert stream.told == [(1, "It is sunny.")]
        assert stream.background.jobs[0].state == "running"
        released.set()
        assert stream.background.wait(10)
        stream.step()
        stream.step()
        assert stream.told[1:] == [(2, "And warm!"), (3, "So")]
        assert stream.background.jobs[0].entered == (1, 2, 3)
        assert stream.background.jobs[0].text == "It is sunny. And warm! So"


@pytest.mark.parametrize(
    ("text", "sentences", "rest"),
    [
        ("Pi is 3.14, e is 2.7. Is it? No", ["Pi is 3.14, e is 2.7.", "Is it?"], "No"),
        ('See a.b. He said "no!" Then... so', ["See a.b.", 'He said "no!"', "Then..."], "so"),
        (
            "\u597d\u3002\u662f\u3002 3.5 \u3002x",
            ["\u597d\u3002", "\u662f\u3002", "3.5 \u3002"],
            "x",
        ),
        ("." * 60_000, [], "." * 60_000),  # read once: it takes no time
    ],
    ids=["numbers", "quotes", "without spaces", "one stop behind the other"],
)
def test_sentences(text: str, sentences: list[str], rest: str) -> None:
    assert by_sentence(text) == (sentences, rest)


@pytest.mark.parametrize("split", [None, by_sentence])
def test_a_huge_result_is_cut_and_says_so(tiny: Engine, split: Any) -> None:
    def worker(_: Task) -> Iterator[str]:
        while True:  # without an end
            yield "word. " * 5000

    with streaming(tiny, worker, split=split, max_result_tokens=50) as stream:
        stream.step("weather")
        assert stream.background.wait(10)
        for _ in range(60):
            stream.step()
        assert sum(len(ids) for _, ids in stream.results) == 50
        (job,) = stream.background.jobs
        assert job.state == "done"
        assert len(job.text) == 65_536
        assert job.error.startswith("cut: ")


def test_a_result_is_cut_to_the_room_left(tiny: Engine) -> None:
    with (
        tiny.open_session(max_positions=400) as session,
        Delegations(session, lambda _: "a b c d " * 200, max_result_tokens=1000) as background,
    ):
        stream = Stream(session, background)
        stream.step("weather")
        assert background.wait(10)
        stream.step()
        (entered,) = stream.results
        assert len(entered[1]) > 100
        assert "no room" in background.jobs[0].error
        for _ in range(3):  # the stream goes on behind it
            stream.step()
        background.ask("again")
        assert background.wait(10)
        stream.step()
        assert background.jobs[1].entered == ()
        assert "no room" in background.jobs[1].error


def test_control_tokens_never_enter(tiny: Engine) -> None:
    layout = tiny.config.interaction
    assert layout is not None
    ids = [layout.result_end, 300, layout.listen, 301, layout.delegate]
    with streaming(tiny, answers, encode=lambda _: ids) as stream:
        stream.step("weather")
        assert stream.background.wait(10)
        stream.step()
        assert stream.results == [(1, (300, 301))]


def test_words_that_the_vocabulary_lacks_are_left_out(reference: Engine) -> None:
    with streaming(reference, lambda _: "rather sunny, sunny and <|listen|> warm") as stream:
        stream.step("weather")
        assert stream.background.wait(10)
        stream.step()
        assert stream.told == [(1, "sunny and warm")]


@pytest.mark.parametrize("n_back", [1, 3])
def test_a_result_that_waits_goes_with_its_request(tiny: Engine, n_back: int) -> None:
    with streaming(tiny, lambda task: task.text.split()[-1]) as stream:
        stream.step()
        before = stream.session.length
        stream.step("say ba", "say be", "say bi")
        assert stream.background.wait(10)
        for _ in range(n_back - 1):
            stream.step()
        told = list(stream.results)
        assert len(told) == n_back - 1
        stream.session.truncate(before)
        for _ in range(3):
            stream.step()
        assert stream.results == told
        assert {job.state for job in stream.background.jobs} == {"done"}


# ---- asyncio -----------------------------------------------------------------------------------
def test_workers_run_in_the_loop_of_an_asyncio_program(tiny_folder: Any) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def worker(_: Task) -> str:
            assert asyncio.get_running_loop() is loop
            return "sunny"

        async with await AsyncEngine.load(tiny_folder, memory="64MiB", threads=1) as engine:
            session = await engine.open_session()
            async with Delegations(session, worker) as background:
                await background.async_step(SILENCE)
                background.ask("weather")
                while not background.jobs[0].text:
                    await asyncio.sleep(0.001)
                turn = await background.async_step(SILENCE)
                assert background.jobs[0].entered == (turn.index,)
                with pytest.raises(InvalidArgument, match="await aclose"):
                    background.close()
            assert len(asyncio.all_tasks()) == 2  # this one and the engine's
            await session.close()

    asyncio.run(main())


def test_a_cancelled_caller_loses_no_delegation(tiny_folder: Any) -> None:
    async def main() -> None:
        async with await AsyncEngine.load(tiny_folder, memory="64MiB", threads=1) as engine:
            session = await engine.open_session()
            begun, go_on = threading.Event(), threading.Event()
            good = engine.engine.step_many

            def slow(requests: Any) -> Any:
                begun.set()
                assert go_on.wait(10)
                events = (Delegation("weather", (300,)),)
                return [replace(t, events=events if t.index == 0 else ()) for t in good(requests)]

            engine.engine.step_many = slow  # type: ignore[method-assign]
            async with Delegations(session, answers, encode=lambda _: [300]) as background:
                step = asyncio.create_task(background.async_step(SILENCE))
                assert await asyncio.to_thread(begun.wait, 10)
                step.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await step
                following = asyncio.create_task(background.async_step(SILENCE))
                await asyncio.sleep(0)
                go_on.set()
                assert (await following).index == 1
                assert [job.request for job in background.jobs] == ["weather"]
                assert background.jobs[0].turn == 0

    asyncio.run(main())


def test_async_step_needs_an_asynchronous_session(reference: Engine) -> None:
    with (
        streaming(reference, answers) as stream,
        pytest.raises(InvalidArgument, match="async_step"),
    ):
        asyncio.run(stream.background.async_step())
