"""A live session's background workers: results enter like all input, and trouble stays outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from live_scene import Scene, drain, sound, tokens

from duplex_engine import Delegation, Engine, Session
from duplex_engine.background import Delegations, ForkWorker, Task
from duplex_engine.live import LiveSession, Summarised

pytestmark = pytest.mark.core


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


class Asking(Scene):
    """A scene whose model delegates what the test says, at the end of the next micro-turn."""

    requests: tuple[str, ...] = ()

    def __init__(self, engine: Engine, **options: Any) -> None:
        super().__init__(engine, **options)
        good = self.step_many

        def ask(requests: Any) -> Any:
            events = tuple(Delegation(text, (300,)) for text in self.requests)
            self.requests = ()
            return [replace(turn, events=events) for turn in good(requests)]

        self.step_many = ask

    def answered(self, session: LiveSession) -> Delegations:
        """Waits for the workers, which have a clock of their own."""
        assert session.delegations is not None
        assert session.delegations.wait(10)
        return session.delegations


def results(scene: Scene, session: LiveSession) -> list[list[int]]:
    steps = [e.value for e in scene.entries[session.id] if e.call == "step"]
    return [value["result"] for value in steps if value["result"]]


def test_nobody_waits_while_delegations_are_made(engine: Engine) -> None:
    def make(session: Session) -> Delegations:
        pusher = threading.Thread(target=other.push_text, args=[[300]], daemon=True)
        pusher.start()
        pusher.join(5)
        assert not pusher.is_alive()
        return Delegations(session, lambda _: "ba")

    live = Scene(engine).live
    with live.open() as other, live.open(delegations=make):
        assert other._mailbox.n_ids == 1


def test_a_result_enters_the_stream_and_the_journal(engine: Engine) -> None:
    scene = Asking(engine)
    session = scene.live.open(delegations=lambda s: Delegations(s, lambda _: "ba be bi"))
    with session:
        scene.requests = ("weather",)
        turns = scene.talk(session, 1)
        background = scene.answered(session)
        turns += scene.talk(session, 2, seed=1)
        assert results(scene, session) == [session._inner._ids("ba be bi", "result")]
        assert background.jobs[0].entered == (1,)
        assert str(background.transcript).count("ba be bi") == 1
        assert tokens(turns) == scene.tokens_again(session.id)
        events = [event for _, event in scene.live.trace._events if event["name"] == "delegation"]
        assert [event["ph"] for event in events] == ["b", "e"]


def test_one_result_a_micro_turn_and_clients_results_first(engine: Engine) -> None:
    scene = Asking(engine)
    session = scene.live.open(delegations=lambda s: Delegations(s, lambda task: task.text))
    with session:
        scene.requests = ("ba", "be")
        scene.talk(session, 1)
        scene.answered(session)
        session.push_result([310])
        turns = scene.talk(session, 4, seed=1)
        assert [len(ids) for ids in results(scene, session)] == [1, 1, 1]
        assert results(scene, session)[0] == [310]
        assert tokens(turns) == scene.tokens_again(session.id)[1:]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_clients_result_that_comes_while_a_workers_is_let_in_waits(
    engine: Engine, when: str
) -> None:
    """It stays the client's, also when an interruption takes back what the worker was asked."""

    class Pushing(Delegations):
        is_due = False

        def before_step(self, inputs: Mapping[str, Any] | None = None) -> None:
            is_due, self.is_due = self.is_due, False
            if is_due and when == "before":
                session.push_result([310])
            super().before_step(inputs)
            if is_due and when == "after":
                session.push_result([310])

    scene = Asking(engine)
    session = scene.live.open(delegations=lambda s: Pushing(s, lambda _: "ba"))
    with session:
        turns = scene.talk(session, 5)
        spoke = [out.turn.index for out in turns if len(out.turn.token_ids) > 1]
        scene.requests = ("weather",)
        turns += scene.talk(session, 1, seed=1)
        background = scene.answered(session)
        background.is_due = True  # type: ignore[attr-defined]
        turns += scene.talk(session, 1, seed=2)
        workers = session._inner._ids("ba", "result")
        assert results(scene, session) == [workers]
        assert background.jobs[0].entered == (turns[-1].turn.index,)
        assert session.playback_ack(spoke[0])
        assert spoke[-1] > spoke[0]
        session.interrupt()
        turns += scene.talk(session, 2, seed=3)
        assert results(scene, session) == [workers, [310]]
        assert tokens(turns) == scene.tokens_again(session.id)


def test_what_was_asked_unheard_is_cancelled(engine: Engine) -> None:
    scene = Asking(engine)
    go_on = threading.Event()

    def worker(task: Task) -> str:
        while not (go_on.is_set() or task.cancelled):
            time.sleep(0.002)
        return "ba"

    session = scene.live.open(delegations=lambda s: Delegations(s, worker))
    with session:
        turns = scene.talk(session, 5)
        spoke = [out.turn.index for out in turns if len(out.turn.token_ids) > 1]
        scene.requests = ("weather",)
        turns += scene.talk(session, 1, seed=1)
        assert session.playback_ack(spoke[0])
        assert spoke[-1] > spoke[0]
        session.interrupt()
        turns += scene.talk(session, 1, seed=2)
        assert session.delegations is not None
        assert [job.state for job in session.delegations.jobs] == ["cancelled"]
        go_on.set()
        turns += scene.talk(session, 2, seed=3)
        assert results(scene, session) == []
        assert tokens(turns) == scene.tokens_again(session.id)


def test_a_failing_worker_and_a_closed_session_disturb_nobody(engine: Engine) -> None:
    scene = Asking(engine)

    def fails(_: Task) -> str:
        raise OSError("no network")

    session = scene.live.open(delegations=lambda s: Delegations(s, fails))
    with scene.live.open() as other:
        scene.requests = ("weather",)
        for n in range(4):
            session.push_audio(sound(n))
            other.push_audio(sound(n))
            scene.run(200)
            if n == 0:
                (job,) = scene.answered(session).jobs
                assert (job.state, job.failure) == ("failed", "error")
        session.close()
        other.push_audio(sound(9))
        scene.run(0)
        assert tokens(drain(other)) == scene.tokens_again(other.id)


def test_a_fork_of_the_session_answers_on_the_background_lane(engine: Engine) -> None:
    scene = Asking(engine)
    lanes: list[bool] = []

    class Fork(ForkWorker):
        def __call__(self, task: Task) -> Any:
            assert task.session is not None
            lanes.append(task.session.background)
            return super().__call__(task)

    worker = Fork(lambda _: [300, 301], fork_positions=64, max_tokens=4)
    session = scene.live.open(delegations=lambda s: Delegations(s, worker))
    with session:
        scene.requests = ("weather",)
        turns = scene.talk(session, 1)
        scene.answered(session)
        turns += scene.talk(session, 2, seed=1)
        assert lanes == [True]
        assert tokens(turns) == scene.tokens_again(session.id)


def test_closing_stops_the_workers(engine: Engine) -> None:
    scene = Asking(engine)
    tasks: list[Task] = []

    def worker(task: Task) -> str:
        tasks.append(task)
        while not task.cancelled:
            time.sleep(0.002)
        return "ba"

    session = scene.live.open(delegations=lambda s: Delegations(s, worker))
    scene.requests = ("weather",)
    scene.talk(session, 1)
    until(lambda: len(tasks) == 1)
    session.close()
    assert session.delegations is not None
    assert [job.state for job in session.delegations.jobs] == ["cancelled"]
    assert tasks[0].cancelled
    session.delegations.close()


def test_summaries_and_results_share_the_mailbox(engine: Engine) -> None:
    from duplex_engine.live import Summary

    scene = Asking(engine)
    policy = Summary(at=480, write=lambda _: iter([[310, 311]]))
    session = scene.live.open(
        summary=policy, delegations=lambda s: Delegations(s, lambda task: task.text)
    )
    with session:
        turns = []
        for n in range(80):
            scene.requests = ("ba",) if n % 10 == 0 else ()
            turns += scene.talk(session, 1, seed=n)
            scene.answered(session)
        assert [e for out in turns for e in out.events if isinstance(e, Summarised)]
        assert [310, 311] in results(scene, session)
        assert tokens(turns) == scene.tokens_again(session.id)


def test_a_clock_that_raises_ends_its_session_alone(engine: Engine) -> None:
    scene = Asking(engine)
    calls = [0.0] * 3

    def clock() -> float:
        return calls.pop()

    session = scene.live.open(delegations=lambda s: Delegations(s, lambda _: "ba", clock=clock))
    with scene.live.open() as other:
        for n in range(5):
            if session.ended is None:
                session.push_audio(sound(n))
            other.push_audio(sound(n))
            scene.requests = ("weather",)
            scene.run(200)
        assert (session.ended, type(session.error)) == ("error", IndexError)
        assert len(drain(other)) == 5
    assert session.delegations is not None
    session.delegations.close()
    assert not any(job.is_open for job in session.delegations.jobs)


@pytest.mark.parametrize("name", ["fork_positions", "__code__"])
def test_a_worker_whose_properties_raise_has_failed(engine: Engine, name: str) -> None:
    class Worker:
        def __getattribute__(self, asked: str) -> Any:
            if asked == name:
                raise RuntimeError("boom")
            return object.__getattribute__(self, asked)

        def __call__(self, _: Task) -> str:
            return "ba"

    scene = Asking(engine)
    with scene.live.open(delegations=lambda s: Delegations(s, Worker())) as session:
        scene.requests = ("weather",)
        assert len(scene.talk(session, 2)) == 2
        (job,) = scene.answered(session).jobs
        assert (job.state, job.failure, job.error) == ("failed", "error", "RuntimeError: boom")
        assert session.delegations is not None
        assert not session.delegations._jobs._running


def after_rewind(scene: Scene, session: LiveSession) -> list[list[int]]:
    entries = scene.entries[session.id]
    at = max(n for n, entry in enumerate(entries) if entry.call == "truncate")
    return [e.value["result"] for e in entries[at:] if e.call == "step" and e.value["result"]]


def test_a_result_goes_with_the_request_that_was_taken_back(engine: Engine) -> None:
    """Done jobs too: whether their results have entered, or wait to."""
    scene = Asking(engine)
    session = scene.live.open(delegations=lambda s: Delegations(s, lambda task: task.text))
    with session:
        scene.requests = ("ba",)  # heard: its result stays
        turns = scene.talk(session, 1)
        scene.answered(session)
        session.push_result([310])  # goes first
        while not turns or not spoke_after(turns, 0):
            turns += scene.talk(session, 1, seed=len(turns))
        scene.requests = ("be", "bi", "bo")  # unheard
        turns += scene.talk(session, 1, seed=50)
        scene.answered(session)
        turns += scene.talk(session, 2, seed=51)
        kept = [[310], session._inner._ids("ba", "result")]
        assert results(scene, session)[:2] == kept
        assert len(results(scene, session)) >= 3
        assert session.playback_ack(0)
        session.interrupt()
        turns += scene.talk(session, 6, seed=60)
        again = after_rewind(scene, session)
        assert again
        assert again == kept[-len(again) :]
        assert tokens(turns) == scene.tokens_again(session.id)
        entries = scene.answered(session).transcript.entries
        told = [entry.text for entry in entries if entry.role in ("request", "result")]
        assert not {"be", "bi", "bo"}.intersection(told)
        assert told.count("ba") == 2  # the request and its result


def spoke_after(turns: list[Any], heard: int) -> bool:
    return any(len(o.turn.token_ids) > 1 for o in turns if o.turn.index > heard)


def test_results_of_clients_have_brackets_of_their_own(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        assert [session.push_result([300 + n]).status for n in range(3)] == ["queued"] * 3
        scene.talk(session, 4)
        assert results(scene, session) == [[300], [301], [302]]
