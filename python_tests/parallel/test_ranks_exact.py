"""Several ranks compute what one computes, to the bit, whatever a session does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import stream_ops
from both_lanes import check_both_lanes
from hypothesis import given
from hypothesis import strategies as st
from random_models import TURN, examples, sound, words
from stream_ops import OPS, check_goes_on, memory, play

import duplex_engine
from duplex_engine import Engine, Session, Window

pytestmark = [pytest.mark.core, pytest.mark.cpu]

Load = Callable[..., Engine]

SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "seed": 5}
# A conversation with all that there is: bursts of sound, text, pictures, results, forks, rewinds,
# forgotten ranges, tokens asked for one by one.
CONVERSATION: list[stream_ops.Op] = [
    ("text", 150, 1),
    *[("step", TURN + 9 * k, k % 3, k % 5 == 0, k % 2) for k in range(8)],
    ("audio", 20 * 800 + 7, True),
    ("step", 3 * TURN, 2, False, 4),
    ("fork",),
    ("truncate", 2),
    ("step", TURN, 0, True, 0),
    ("forget", 0, 1),
    ("image", 30, 20),
    ("feed", 1000, 2, True),
    ("decode", 9),
    *[("step", TURN, k % 2, False, k % 3) for k in range(6)],
    ("fork",),
    ("audio", 5000, False),
    ("text", 64, 3),
    ("truncate", 3),
    ("step", 0, 2, False, 2),
]


def run(engine: Engine, ops: list[stream_ops.Op], **options: Any) -> tuple[list[str], list[Any]]:
    """What comes out of a stream, and what rank 0 remembers of it."""
    opened = [engine.open_session(**SAMPLING | options)]
    try:
        end, outputs = play(opened[0], ops, opened)
        return outputs, memory(end)
    finally:
        for session in opened:
            session.close()


def test_a_recorded_conversation_is_the_same_on_1_2_and_4_ranks(load: Load) -> None:
    path = Path(duplex_engine.__file__).parent / "examples" / "showcase.flac"
    samples, rate = soundfile.read(path, dtype="float32")
    heard = []
    for n in (1, 2, 4):
        engine = load("reference", tensor_parallel=n, reduction="invariant")
        with engine.open_session() as session:
            turns = [
                session.step(audio=samples[at : at + rate // 5], sample_rate=rate)
                for at in range(0, min(len(samples), 25 * rate), rate // 5)
            ]
            last = session.append(text=words(1), logits="last")
        heard.append(
            ([turn.text for turn in turns], [turn.events for turn in turns], last.tobytes())
        )
    assert "one moment tuesday" in " ".join("".join(heard[0][0]).split())
    assert heard[1] == heard[2] == heard[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_model_says_the_same_on_1_2_and_4_ranks(load: Load, dtype: str) -> None:
    one, *others = (
        run(load("reference", tensor_parallel=n, reduction="invariant", dtype=dtype), CONVERSATION)
        for n in (1, 2, 4)
    )
    assert len(set(one[0])) > len(CONVERSATION) // 3
    for other in others:
        assert other[0] == one[0]
        assert other[1][:3] == one[1][:3]  # turn, epoch, marks; a rank holds its own heads


def test_a_larger_model_says_the_same_on_1_2_and_4_ranks(load: Load, larger: Path) -> None:
    options: dict[str, Any] = {"reduction": "invariant", "mtp_layers": 2, "kv_dtype": "int8"}
    one, *others = (
        run(load(larger, tensor_parallel=n, **options), CONVERSATION, speculate=3)
        for n in (1, 2, 4)
    )
    assert any("truncate: None" in line for line in one[0])
    for other in others:
        assert other[0] == one[0]


def test_eight_ranks_say_what_one_says(load: Load, eight: Path) -> None:
    one, many = (
        run(load(eight, tensor_parallel=n, reduction="invariant"), CONVERSATION)[0] for n in (1, 8)
    )
    assert not any("Error" in line or "Invalid" in line for line in one), one
    assert many == one


@examples(12)
@given(
    before=st.lists(OPS, max_size=15),
    after=st.lists(OPS, max_size=8),
    max_positions=st.sampled_from([None, 400]),  # 400 are soon full: the session forgets
    speculate=st.sampled_from([0, 3]),
)
def test_any_stream_is_the_same_in_any_pass_and_goes_on_anywhere(
    load: Load, larger: Path, tmp_path: Path, before: Any, after: Any, max_positions: int | None,
    speculate: int,
) -> None:  # fmt: skip
    pair = [
        load(larger, tensor_parallel=2, mtp_layers=2, threads=n, max_batch_rows=rows)
        for n, rows in ((1, 256), (4, 19))
    ]
    opened: list[Session] = []
    try:
        start = pair[0].open_session(max_positions=max_positions, speculate=speculate, **SAMPLING)
        check_goes_on(start, before, after, opened, tmp_path / "snapshot", pair)
    finally:
        for session in opened:
            session.close()
    for engine in pair:
        assert engine.stats["pages_used"] == engine.stats["pages_promised"] == 0


@pytest.mark.parametrize("max_batch_rows", [256, 4])  # 4: fewer than there are rows
def test_sessions_of_one_pass_compute_what_each_computes_alone(
    load: Load, max_batch_rows: int
) -> None:
    engine = load("reference", tensor_parallel=2, max_batch_rows=max_batch_rows)
    alone = []
    for k in range(3):
        with engine.open_session() as session:
            alone.append([session.step(audio=sound(TURN, 10 * k + t)).token_ids for t in range(5)])
    sessions = [engine.open_session() for _ in range(3)]
    for t in range(5):
        turns = engine.step_many(
            {session: {"audio": sound(TURN, 10 * k + t)} for k, session in enumerate(sessions)}
        )
        assert [turn.token_ids for turn in turns] == [heard[t] for heard in alone]
    for session in sessions:
        session.close()


def test_a_long_stream_through_a_window_wraps_its_range_of_addresses(load: Load) -> None:
    """Windowed tapes move to the beginning of their range again and again, on every rank."""
    options: dict[str, Any] = {"reduction": "invariant", "max_batch_rows": 64, "rewind_rows": 4}
    outputs = []
    for n in (1, 2):
        engine = load("reference", tensor_parallel=n, **options)
        with engine.open_session(max_positions=700, endless=Window(64, 400)) as session:
            outputs.append(
                [session.append(text=words(64, k), logits="last").tobytes() for k in range(60)]
            )
            assert session.length == 60 * 64
    assert outputs[0] == outputs[1]


def test_background_and_interaction_at_once_change_no_bit(load: Load) -> None:
    engine = load("reference", tensor_parallel=2)

    def hear(session: Session) -> list[tuple[int, ...]]:
        return [session.step(audio=sound(TURN, t)).token_ids for t in range(10)]

    def think(session: Session) -> list[int]:
        session.append(text=words(9))
        return session.decode(60)

    check_both_lanes(engine, engine, hear, think)


def test_what_sessions_hold_can_be_read_from_every_rank(load: Load, tmp_path: Path) -> None:
    """With invariant sums the heads of all ranks together are those of one."""
    sizes = []
    for n in (1, 2):
        engine = load("reference", tensor_parallel=n, reduction="invariant")
        with engine.open_session() as session:
            session.append(text=words(100))
            session.snapshot(tmp_path / str(n))
        sizes.append((tmp_path / str(n)).stat().st_size)
    assert sizes[1] > 1.2 * sizes[0]  # each has all convolutions of the residual stream
