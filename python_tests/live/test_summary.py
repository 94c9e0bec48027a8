"""Sessions without end: a summary takes the place of the middle, or the middle goes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from live_scene import Scene, tokens

from duplex_engine import Engine, InvalidArgument, Session
from duplex_engine.live import Summarised, Summary, SummaryFailed

pytestmark = pytest.mark.core

# Of the fixture's engine, 64 + 200 positions always stay.
AT = 480


def test_a_session_goes_on_for_ever_in_constant_memory(engine: Engine) -> None:
    scene = Scene(engine)
    policy = Summary(at=AT, keep_head=64, prompt=[300, 301, 302], max_tokens=5)
    with scene.live.open(max_positions=700, summary=policy) as session:
        turns = scene.talk(session, 300)
        assert session.ended is None
        done = [event for out in turns for event in out.events if isinstance(event, Summarised)]
        failed = [e for out in turns for e in out.events if isinstance(e, SummaryFailed)]
        assert len(done) + len(failed) >= 4
        assert done
        assert all(event.begin == 64 for event in done)
        assert all(1 <= event.n_tokens <= 5 for event in done)
        held = [out.turn.memory.sequence_bytes for out in turns]
        assert max(held[150:]) <= max(held[:150])
        # The summary is what a fork says to the prompt, and enters with the next micro-turn.
        first = next(n for n, e in enumerate(scene.entries[session.id]) if e.call == "forget")
        assert scene.entries[session.id][first + 1].value["result"] is not None
        assert tokens(turns) == scene.tokens_again(session.id)
    assert scene.live.counters["summaries"] == len(done)


def test_a_summary_of_one_s_own(engine: Engine) -> None:
    scene = Scene(engine)
    lengths: list[int] = []

    def write(fork: Session) -> Iterator[list[int] | None]:
        lengths.append(fork.length)
        yield None
        yield [310, 311]
        yield [312]

    with scene.live.open(summary=Summary(at=AT, write=write)) as session:
        turns = scene.talk(session, 80)
        (done,) = [e for out in turns for e in out.events if isinstance(e, Summarised)]
        assert (done.begin, done.n_tokens) == (0, 3)
        assert lengths[0] >= AT
        given = [e.value["result"] for e in scene.entries[session.id] if e.call == "step"]
        assert [ids for ids in given if ids] == [[310, 311, 312]]
        assert tokens(turns) == scene.tokens_again(session.id)


def test_a_failing_summary_forgets_all_the_same(engine: Engine) -> None:
    scene = Scene(engine)

    def write(_: Session) -> Iterator[list[int]]:
        yield [310]
        raise ConnectionError("the summariser is down")

    with scene.live.open(max_positions=600, summary=Summary(at=AT, write=write)) as session:
        turns = scene.talk(session, 200)
        assert session.ended is None
        failed = [e for out in turns for e in out.events if isinstance(e, SummaryFailed)]
        assert len(failed) >= 2
        assert failed[0].error == "the summariser is down"
        assert failed[0].end > failed[0].begin
        assert tokens(turns) == scene.tokens_again(session.id)


def test_an_empty_summary_and_one_too_long_are_failures(engine: Engine) -> None:
    scene = Scene(engine)
    parts: list[list[int]] = [[], [300] * 4000]
    policy = Summary(at=AT, write=lambda _: iter([parts.pop(0)]))
    with scene.live.open(summary=policy) as session:
        turns = []
        while parts:
            turns += scene.talk(session, 10, seed=len(turns))
        turns += scene.talk(session, 2, seed=999)
        errors = [e.error for out in turns for e in out.events if isinstance(e, SummaryFailed)]
        assert errors == [
            "summary: expected text, found none",
            "summary: 4000 tokens do not fit beside the input",
        ]


def test_no_memory_for_a_fork_forgets_without_a_summary(engine: Engine) -> None:
    scene = Scene(engine)
    policy = Summary(at=AT, prompt=[300], max_tokens=10**6)
    with scene.live.open(summary=policy) as session:
        turns = scene.talk(session, 90)
        failed = [e for out in turns for e in out.events if isinstance(e, SummaryFailed)]
        assert failed
        assert failed[0].end > failed[0].begin
        assert session.ended is None


def test_closing_while_a_summary_is_written(engine: Engine) -> None:
    scene = Scene(engine)

    def write(_: Session) -> Iterator[None]:
        while True:
            scene.now_us += 1000
            yield None

    session = scene.live.open(summary=Summary(at=AT, write=write))
    scene.talk(session, 90)
    assert engine.stats["sessions"] == 2
    session.close()
    scene.live.poll()
    assert engine.stats["sessions"] == 0


def test_a_policy_that_leaves_nothing_to_forget_is_refused(engine: Engine) -> None:
    scene = Scene(engine)
    for policy in (Summary(at=300), Summary(at=AT, keep_head=100)):
        with pytest.raises(InvalidArgument, match="264 recent"):
            scene.live.open(summary=policy)


@pytest.mark.parametrize(
    "wrong",
    [
        {"at": "x"},
        {"at": 400.0},
        {"at": 0},
        {"keep_head": -1},
        {"keep_recent": None},
        {"max_tokens": "x"},
        {"max_tokens": -5},
        {"max_tokens": 2**31},
        {"prompt": 5},
        {"prompt": [1.5]},
        {"prompt": None},
        {"write": "a summary"},
    ],
)
def test_a_wrong_field_is_refused_at_once(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidArgument, match=f"Summary: {name}: expected"):
        Summary(**{"at": AT, **wrong})


def test_a_wrong_prompt_is_refused_when_the_session_opens(engine: Engine) -> None:
    scene = Scene(engine)
    for prompt in ("\ud800", [10**6]):
        with pytest.raises(InvalidArgument, match=r"expected (token ids in|valid Unicode)"):
            scene.live.open(summary=Summary(at=AT, prompt=prompt))
    for wrong in ("x", 3, {"at": AT}):
        with pytest.raises(InvalidArgument, match="summary: expected a Summary"):
            scene.live.open(summary=wrong)  # type: ignore[arg-type]


def test_whatever_a_summary_raises_its_session_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(engine)

    def leaves(_: Session) -> Iterator[list[int]]:
        raise SystemExit("the summariser")

    def breaks(*_: object, **__: object) -> Session:
        raise TypeError("the fork")

    with scene.live.open(summary=Summary(at=AT, write=leaves)) as session:
        turns = scene.talk(session, 80)
        monkeypatch.setattr(Session, "fork", breaks)
        turns += scene.talk(session, 80, seed=1)
        errors = [e.error for out in turns for e in out.events if isinstance(e, SummaryFailed)]
        assert list(dict.fromkeys(errors)) == ["the summariser", "the fork"]
        assert session.ended is None
