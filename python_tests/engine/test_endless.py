"""Sessions that are full forget their oldest middle and go on: what, when, and what is left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devices import DEVICE
from random_models import BLOCK, REWIND, TURN, load, picture, same_bytes, sound, words, write
from stream_ops import memory

from duplex_engine import (
    CapacityError,
    Engine,
    Forgot,
    InvalidArgument,
    MergedTurns,
    MicroTurn,
    Session,
    Window,
)

pytestmark = pytest.mark.core

HEAD, RECENT, LIMIT = 100, 150, 500
HEAD_END = 2 * BLOCK  # rounded up
WINDOW = Window(HEAD, RECENT)
LONGEST = 24 + REWIND  # the model's window, and what can be taken back
LARGE_PAGES = {"page": "4MiB", "memory": "64MiB"}


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    folders: dict[tuple[str, bool], Path] = {}
    engines: dict[str, Engine] = {}

    def get(model: str = "dense", interaction: bool = True, **options: Any) -> Engine:
        name = (model, interaction)
        if name not in folders:
            folders[name] = write(
                tmp_path_factory.mktemp(model), model, interaction=interaction, mtp_layers=8
            )
        key = json.dumps([name, options])
        if key not in engines:
            engines[key] = load(folders[name], **options)
        return engines[key]

    yield get
    for engine in engines.values():
        engine.close()


def live(session: Session, n_turns: int, first: int = 0) -> list[MicroTurn]:
    return [
        session.step(sound(TURN, k), text=words(3, k) if k % 4 == 0 else None)
        for k in range(first, first + n_turns)
    ]


def ids(turns: list[MicroTurn]) -> list[tuple[int, ...]]:
    return [turn.token_ids for turn in turns]


def forgot(turns: list[MicroTurn]) -> list[Forgot]:
    return [event for turn in turns for event in turn.events if isinstance(event, Forgot)]


def test_a_full_session_forgets_its_oldest_middle(engine_of: Callable[..., Engine]) -> None:
    with engine_of().open_session(max_positions=LIMIT, endless=WINDOW) as session:
        end = HEAD_END
        for k in range(400):
            before, holes = session.length, session.forgotten
            (turn,) = live(session, 1, k)
            assert len(forgot([turn])) == (session.forgotten != holes)
            for event in forgot([turn]):
                assert (event.begin, event.end % BLOCK) == (end, 0)
                end = event.end
                assert RECENT <= before - end < RECENT + BLOCK
                assert session.forgotten == [(HEAD_END, end)]
            assert session.length - (end - HEAD_END) <= LIMIT
        assert session.length > 5 * LIMIT
        assert session.endless == WINDOW


def test_memory_is_what_was_promised(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    with engine.open_session(max_positions=LIMIT, endless=WINDOW) as session:
        page = engine.stats["page_bytes"]
        rooms, most = set(), 0
        for k in range(0, 300, 10):
            live(session, 10, k)
            held = session.memory["global_bytes"] // page
            rooms.add(engine.stats["pages_promised"] + held)
            most = max(most, held)
        assert len(rooms) == 1
        # Pages of two blocks: those of the positions, and one at each edge of the hole.
        assert most <= -(-LIMIT // (2 * BLOCK)) + 2


def test_it_is_a_session_that_forgets_by_hand(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    with (
        engine.open_session(max_positions=LIMIT, endless=WINDOW, temperature=0.9) as session,
        engine.open_session(max_positions=4000, endless=None, temperature=0.9) as other,
    ):
        for k in range(250):
            (turn,) = live(session, 1, k)
            for event in forgot([turn]):
                assert other.forget(event.begin, event.end) == (event.begin, event.end)
            assert live(other, 1, k)[0].token_ids == turn.token_ids
        assert memory(session) == memory(other)


def test_neither_pages_nor_passes_nor_threads_matter(engine_of: Callable[..., Engine]) -> None:
    """Nor do layers that guess, which need larger pages on the CPU."""
    outputs = []
    page_bytes = set()
    for options in ({}, {"max_batch_rows": 7}, {"threads": 3}, {"mtp_layers": 8}, LARGE_PAGES):
        engine = engine_of(**options)
        page_bytes.add(engine.stats["page_bytes"])
        with engine.open_session(max_positions=LIMIT, endless=WINDOW) as session:
            turns = live(session, 200)
            outputs.append((ids(turns), forgot(turns)))
    assert all(output == outputs[0] for output in outputs)
    assert len(page_bytes) == (3 if DEVICE == "cpu" else 2)


def test_together_as_alone(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    with engine.open_session(max_positions=LIMIT, endless=WINDOW) as session:
        expected = ids(live(session, 150))
    with (
        engine.open_session(max_positions=LIMIT, endless=WINDOW) as one,
        engine.open_session(max_positions=700, endless=Window(0, 300)) as two,
    ):
        found = []
        for k in range(150):
            text = words(3, k) if k % 4 == 0 else None
            answers = engine.step_many(
                {one: {"audio": sound(TURN, k), "text": text}, two: {"audio": sound(2 * TURN, k)}}
            )
            assert isinstance(answers[0], MicroTurn)
            found.append(answers[0].token_ids)
        assert found == expected


class TestOtherCalls:
    def test_append_and_decode_make_room_too(self, engine_of: Callable[..., Engine]) -> None:
        with engine_of().open_session(max_positions=LIMIT, endless=WINDOW) as session:
            for k in range(12):
                session.append(text=words(90, k))
                session.append(audio=sound(9000, k))
                session.append(image=picture(30, 30, k))
                assert len(session.decode(40)) == 40
            ((begin, end),) = session.forgotten
            assert begin == HEAD_END
            assert session.length - (end - begin) <= LIMIT

    def test_a_call_with_many_rows_keeps_fewer_of_the_newest(
        self, engine_of: Callable[..., Engine]
    ) -> None:
        with engine_of().open_session(max_positions=LIMIT, endless=WINDOW) as session:
            session.append(text=words(LIMIT))
            session.append(text=words(250))
            assert session.forgotten == [(HEAD_END, 6 * BLOCK)]

    def test_more_rows_than_there_is_room_for(self, engine_of: Callable[..., Engine]) -> None:
        with engine_of().open_session(max_positions=LIMIT, endless=WINDOW) as session:
            session.append(text=words(LIMIT))
            with pytest.raises(CapacityError, match=r"(\d+) can be had of max_positions = 500"):
                session.append(text=words(LIMIT))
            assert session.forgotten == []
            session.append(text=words(LIMIT - HEAD_END - LONGEST - BLOCK))

    def test_rewinding_stays_possible(self, engine_of: Callable[..., Engine]) -> None:
        with engine_of().open_session(max_positions=LIMIT, endless=WINDOW) as session:
            live(session, 90)
            for k in range(60):
                live(session, 1, 90 + k)
                reach = [mark for mark in session.marks if mark >= session.length - REWIND]
                with session.fork() as fork:
                    assert fork.endless == WINDOW
                    fork.truncate(reach[0])
                    live(fork, 3)

    def test_holes_of_the_caller_merge(self, engine_of: Callable[..., Engine]) -> None:
        with engine_of().open_session(max_positions=1200, endless=Window(64, 300)) as session:
            session.append(text=words(1190))
            for k in range(1, 8):
                session.forget(2 * k * BLOCK, (2 * k + 1) * BLOCK)
            with pytest.raises(InvalidArgument, match="at most 7 separate holes in an endless"):
                session.forget(16 * BLOCK, 17 * BLOCK)
            session.append(text=words(20))
            assert session.forgotten == [(BLOCK, 13 * BLOCK), (14 * BLOCK, 15 * BLOCK)]

    def test_a_speculating_session_says_the_same(self, engine_of: Callable[..., Engine]) -> None:
        engine = engine_of()
        outputs = []
        for speculate in (0, 4):
            with engine.open_session(
                max_positions=LIMIT, endless=WINDOW, speculate=speculate
            ) as session:
                turns = live(session, 150)
                outputs.append((ids(turns), forgot(turns)))
        assert outputs[0] == outputs[1]


class TestChoosing:
    def test_the_default(self, engine_of: Callable[..., Engine]) -> None:
        with engine_of().open_session(max_positions=1000) as session:
            assert session.endless == Window(125, 500)
            live(session, 150)
            assert session.length > 1000
            with session.fork(2000) as fork:
                assert fork.endless == Window(250, 1000)
            with session.fork() as fork:
                assert fork.endless == Window(125, 500)
        with engine_of().open_session(max_positions=2 * LONGEST - 1) as session:
            assert session.endless is None
        with engine_of(interaction=False).open_session(max_positions=1000) as session:
            assert session.endless is None
        with engine_of().open_session(max_positions=60, endless=None) as session:
            session.append(text=words(60))
            with pytest.raises(CapacityError):
                session.step(sound(TURN))

    @pytest.mark.parametrize(
        ("endless", "message"),
        [
            (Window(0, LONGEST - 1), f"recent: expected at least {LONGEST} positions"),
            (Window(300, 200), "expected head . recent of at most 372 with max_positions = 500"),
            (Window(10**18, 200), "expected head . recent of at most 372"),
            (Window(-1, 200), "head: expected an integer"),
            (Window("x", 200), "head: expected an integer"),  # type: ignore[arg-type]
            ((1, 2), "expected a Window, 'auto' or None, found"),
            ("window", "expected a Window, 'auto' or None, found"),
        ],
    )
    def test_what_cannot_work(
        self, engine_of: Callable[..., Engine], endless: Any, message: str
    ) -> None:
        engine = engine_of()
        with pytest.raises(InvalidArgument, match=message):
            engine.open_session(max_positions=LIMIT, endless=endless)
        assert engine.stats["pages_promised"] == 0

    def test_a_fork_must_have_room_for_it(self, engine_of: Callable[..., Engine]) -> None:
        with (
            engine_of().open_session(max_positions=LIMIT, endless=WINDOW) as session,
            pytest.raises(InvalidArgument, match=r"endless: expected head . recent of at most"),
        ):
            session.fork(300)


def test_snapshots_keep_it(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    engine = engine_of()
    with engine.open_session(max_positions=LIMIT, endless=WINDOW) as session:
        live(session, 95)
        session.snapshot(tmp_path / "a")
        expected = live(session, 100, 95)
        assert len(forgot(expected)) > 1
        with engine.restore(tmp_path / "a") as other:
            found = live(other, 100, 95)
            assert other.endless == WINDOW
            assert (ids(found), forgot(found)) == (ids(expected), forgot(expected))
            assert memory(other) == memory(session)
            logits = [s.append(text=words(9), logits="all") for s in (session, other)]
            assert same_bytes(*logits)
        with engine.restore(tmp_path / "a", max_positions=1000) as other:
            live(other, 100, 95)
            assert len(other.forgotten) == 1
        with pytest.raises(InvalidArgument, match="endless"):
            engine.restore(tmp_path / "a", max_positions=LIMIT - 150)


def test_late_sound_is_merged_in_a_full_session(engine_of: Callable[..., Engine]) -> None:
    with engine_of().open_session(max_positions=LIMIT, endless=WINDOW) as session:
        session.append(text=words(LIMIT - 2))
        turn = session.step(sound(20 * TURN))
        assert [type(event) for event in turn.events][:2] == [Forgot, MergedTurns]
