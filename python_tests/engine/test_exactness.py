"""The same stream gives the same bits, however it is cut, batched, computed or resumed.

Every comparison here is of bytes. `digests` hash what a session remembers (keys, values and the
inputs of the convolutions), so two sessions with equal digests and equal logits for the same next
rows are the same session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from devices import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from random_models import (
    BLOCK,
    HOP,
    MODELS,
    REWIND,
    TURN,
    examples,
    instruction_sets,
    load,
    picture,
    same_bytes,
    sound,
    words,
    write,
)

from duplex_engine import Engine, MicroTurn, Session

pytestmark = pytest.mark.core

Part: TypeAlias = tuple[str, Any]  # ("text", ids), ("audio", samples) or ("image", pixels)
Logits: TypeAlias = NDArray[np.float32]
Loader: TypeAlias = Callable[..., Engine]

ISAS = ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512") if DEVICE == "cpu" else (None,)
BATCH_ROWS = (1, 7, 64, 256)
PROBE = words(3, seed=99)

# 240 rows: longer than every window and extent, and three blocks of the cache. No sound here is a
# whole number of frames, so a part of each waits for the next.
STREAM: list[Part] = [
    ("text", words(70)),
    ("image", picture(20, 30)),
    ("audio", sound(5 * HOP + 123)),
    ("text", words(5, seed=1)),
    ("audio", sound(3 * HOP + 456, seed=1)),
    ("image", picture(1, 1)),
    ("audio", sound(221, seed=2)),
    ("text", words(61, seed=2)),
    ("audio", sound(30 * HOP, seed=3)),
    ("text", words(52, seed=3)),
]


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """load(model, dtype, ...): each engine is made once, and closed with the module.

    "int8" and "int4" stand for such weights, "kv int8" for such keys and values, and bfloat16 for
    the rest.
    """
    folders: dict[str, Path] = {}
    engines: dict[Any, Engine] = {}
    usable: list[str] = []

    def get(model: str, dtype: str = "float32", **options: Any) -> Engine:
        if model not in folders:
            folders[model] = write(tmp_path_factory.mktemp(model), model)
        if options.get("isa") is not None:
            if not usable:
                usable.extend(instruction_sets(folders[model]))
            if options["isa"] not in usable:
                pytest.skip(f"this machine has no {options['isa']}")
        if dtype not in ("float32", "bfloat16"):
            options["kv_dtype" if dtype == "kv int8" else "weights"] = dtype.removeprefix("kv ")
            dtype = "bfloat16"
        key = (model, dtype, *sorted(options.items()))
        if key not in engines:
            engines[key] = load(folders[model], dtype=dtype, **options)
        return engines[key]

    yield get
    for engine in engines.values():
        engine.close()


def append(session: Session, parts: Sequence[Part]) -> Logits:
    """Appends each part with one call; returns the logits of all rows."""
    return np.concatenate([session.append(**{kind: data}, logits="all") for kind, data in parts])


def state(session: Session) -> tuple[Any, bytes]:
    """What a session remembers, as hashes, and what it answers to the same next rows."""
    digests = tuple(session._core.digests())
    answer = session.append(audio=sound(HOP - 1, seed=98), logits="all")
    return digests, answer.tobytes() + session.append(text=PROBE, logits="all").tobytes()


def cut(data: Any, where: Sequence[int]) -> list[Any]:
    """Splits ids or samples at the given places; equal places make empty pieces."""
    edges = [0, *sorted(where), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@st.composite
def chunkings(draw: st.DrawFn, parts: Sequence[Part]) -> list[Part]:
    """The same stream in other pieces, some of them empty or of one sample."""
    pieces: list[Part] = []
    for kind, data in parts:
        if kind == "image":
            pieces.append((kind, data))
            continue
        where = draw(st.lists(st.integers(0, len(data)), max_size=6))
        if where and draw(st.booleans()):
            where.append(min(where[0] + 1, len(data)))  # a piece of one
        pieces += [(kind, piece) for piece in cut(data, where)]
    return pieces


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "kv int8"])
@pytest.mark.parametrize("model", ["dense", "moe"])
class TestChunking:
    def test_the_rows_of_one_pass(
        self, loader: Loader, model: str, dtype: str, isa: str | None
    ) -> None:
        expected = None
        for rows in BATCH_ROWS:
            engine = loader(model, dtype, isa=isa, max_batch_rows=rows)
            with engine.open_session() as session:
                logits = append(session, STREAM)
                found = (logits.tobytes(), state(session))
            assert expected in (None, found), f"max_batch_rows = {rows}"
            expected = found
        assert np.isfinite(logits).all()
        assert len(logits) == 70 + 12 + 5 + 5 + 3 + 1 + 1 + 61 + 30 + 52
        assert len(np.unique(logits.argmax(axis=1))) > 10

    def test_one_row_at_a_time(
        self, loader: Loader, model: str, dtype: str, isa: str | None
    ) -> None:
        engine = loader(model, dtype, isa=isa, max_batch_rows=64)
        with engine.open_session() as whole, engine.open_session() as single:
            expected = append(whole, STREAM)
            pieces: list[Part] = []
            for kind, data in STREAM:
                size = {"text": 1, "audio": HOP, "image": len(data)}[kind]
                pieces += [(kind, piece) for piece in cut(data, range(size, len(data), size))]
            assert same_bytes(append(single, pieces), expected)
            assert state(single) == state(whole)

    @examples(8)
    @given(data=st.data())
    def test_any_cut(
        self, loader: Loader, model: str, dtype: str, isa: str | None, data: st.DataObject
    ) -> None:
        rows = data.draw(st.sampled_from(BATCH_ROWS), label="max_batch_rows")
        pieces = data.draw(chunkings(STREAM))
        with (
            loader(model, dtype, isa=isa, max_batch_rows=256).open_session() as whole,
            loader(model, dtype, isa=isa, max_batch_rows=rows).open_session() as chunked,
        ):
            assert same_bytes(append(chunked, pieces), append(whole, STREAM))
            assert state(chunked) == state(whole)


def test_the_last_logits_are_the_last_of_all(loader: Loader) -> None:
    engine = loader("dense")
    for kind, data in STREAM[:3]:
        with engine.open_session() as one, engine.open_session() as other:
            every = one.append(**{kind: data}, logits="all")
            assert same_bytes(other.append(**{kind: data}, logits="last"), every[-1:])


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "kv int8"])
def test_any_number_of_threads(loader: Loader, model: str, dtype: str) -> None:
    expected = None
    for threads in (1, 2, 3):
        with ExitStack() as stack:
            engine = loader(model, dtype, threads=threads)
            sessions = [stack.enter_context(engine.open_session()) for _ in range(3)]
            logits = append(sessions[0], STREAM).tobytes()
            turns = []
            for k in range(4):
                inputs = [{"audio": sound(TURN, k + i), "text": words(20, i)} for i in range(3)]
                turns += engine.step_many(list(zip(sessions, inputs, strict=True)))
            found = logits, spoken(turns), [state(session) for session in sessions]
        assert expected in (None, found), f"{threads} threads"
        expected = found


# ---- micro-turns


def spoken(turns: Sequence[Any]) -> list[tuple[int, ...]]:
    """The output tokens of micro-turns, none of which failed."""
    assert all(isinstance(turn, MicroTurn) for turn in turns), turns
    return [turn.token_ids for turn in turns]


# Inputs of one micro-turn: usually a turn of sound, sometimes less or more, sometimes the rest too.
turn_inputs = st.fixed_dictionaries(
    {"audio": st.sampled_from([TURN] * 5 + [0, 1, TURN - 1, 2 * TURN + 5]).map(sound)},
    optional={
        "text": st.integers(1, 40).map(words),
        "result": st.integers(1, 12).map(words),
        "image": st.tuples(st.integers(1, 30), st.integers(1, 30)).map(lambda hw: picture(*hw)),
        "max_tokens": st.integers(0, 9),
    },
)
STRAIGHT = {"audio": sound(TURN)}


def test_micro_turns_append_what_they_say(loader: Loader) -> None:
    """A stream of micro-turns is one sequence of rows; appended at once they are the same bits."""
    engine = loader("moe", max_batch_rows=64)
    layout = engine.config.interaction
    assert layout is not None
    samples, text, result, image = sound(12 * TURN), words(9), words(4, seed=1), picture(20, 12)
    rows: list[Part] = []
    with engine.open_session() as live, engine.open_session() as offline:
        for k, piece in enumerate(np.split(samples, 12)):
            extra: dict[str, Any] = {}
            if k % 3 == 1:
                extra = {"text": text, "image": image}
                rows.append(("text", [layout.user_text, *text, layout.user_text_end]))
            if k == 4:
                extra["result"] = result
                rows.insert(-1, ("text", [layout.result, *result, layout.result_end]))
            if "image" in extra:
                rows.append(("image", image))
            turn = live.step(piece, **extra)
            rows += [("audio", piece), ("text", list(turn.token_ids))]
        # The last token waits for the next input; the row behind it has the same logits.
        expected = append(live, [("text", PROBE)])
        assert same_bytes(append(offline, [*rows, ("text", PROBE)])[-len(PROBE) :], expected)
        assert live.length == offline.length
        assert state(live) == state(offline)


def test_late_sound_is_merged_with_a_silent_answer(loader: Loader) -> None:
    engine = loader("dense")
    layout = engine.config.interaction
    assert layout is not None
    samples = sound(3 * TURN)
    with engine.open_session() as late, engine.open_session() as offline:
        turn = late.step(samples, max_tokens=0)
        assert turn.input.merged_turns == 2
        parts: list[Part] = [("audio", samples[:TURN]), ("text", [layout.listen])]
        parts += [("audio", samples[TURN : 2 * TURN]), ("text", [layout.listen])]
        append(offline, [*parts, ("audio", samples[2 * TURN :])])
        assert state(late) == state(offline)


@examples(25)
@given(data=st.data())
def test_alone_or_with_others(loader: Loader, data: st.DataObject) -> None:
    """Up to eight sessions, each with its own input, in drawn company that comes and goes."""
    model = data.draw(st.sampled_from(["dense", "moe"]))
    rows = data.draw(st.sampled_from([16, 64, 256]), label="max_batch_rows of the shared engine")
    streams = data.draw(
        st.lists(st.lists(turn_inputs, min_size=1, max_size=6), min_size=1, max_size=8)
    )
    alone, shared = loader(model), loader(model, max_batch_rows=rows)
    options = [{"temperature": i % 3 * 0.5, "seed": i, "top_k": i % 2 * 5} for i in range(8)]
    expected = []
    for stream, sampling in zip(streams, options, strict=False):
        with alone.open_session(**sampling) as session:
            turns = spoken([session.step(**inputs) for inputs in stream])
            expected.append((turns, state(session)))

    waiting = [list(stream) for stream in streams]
    found: list[Any] = [None] * len(streams)
    turns_of: list[list[Any]] = [[] for _ in streams]
    sessions: dict[int, Session] = {}
    with ExitStack() as stack:
        while any(waiting):
            ready = [i for i, stream in enumerate(waiting) if stream]
            chosen = data.draw(st.sets(st.sampled_from(ready), min_size=1))
            for i in chosen - sessions.keys():
                sessions[i] = stack.enter_context(shared.open_session(**options[i]))
            pairs = [(sessions[i], waiting[i].pop(0)) for i in sorted(chosen)]
            for i, turn in zip(sorted(chosen), shared.step_many(pairs), strict=True):
                turns_of[i].append(turn)
                if not waiting[i]:
                    found[i] = (spoken(turns_of[i]), state(sessions[i]))
                    sessions[i].close()
    assert found == expected


# ---- fork, truncate, forget

# What can happen to a session, and its output as bytes.
actions = st.one_of(
    st.tuples(st.just("text"), st.builds(words, st.integers(1, 70), st.integers(0, 9))),
    st.tuples(st.just("audio"), st.builds(sound, st.sampled_from([0, 1, 799, 800, 2345, 9000]))),
    st.tuples(st.just("image"), st.builds(picture, st.integers(1, 30), st.integers(1, 30))),
    st.tuples(st.just("decode"), st.integers(0, 6)),
    st.tuples(st.just("step"), turn_inputs),
)
histories = st.lists(actions, max_size=7)


def act(session: Session, history: Sequence[tuple[str, Any]]) -> list[Any]:
    """Does one thing after the other; returns all output, comparable."""
    outputs: list[Any] = []
    for kind, data in history:
        if kind == "step":
            outputs.append(session.step(**data).token_ids)
        elif kind == "decode":
            outputs.append(session.decode(data))
        else:
            outputs.append(session.append(**{kind: data}, logits="all").tobytes())
    return outputs


SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7}
START = [("text", words(3))]


@pytest.mark.parametrize("dtype", ["float32", "kv int8"])
@examples(30)
@given(before=histories, after=histories, elsewhere=histories)
def test_a_fork_is_the_original(
    loader: Loader, dtype: str, before: list[Any], after: list[Any], elsewhere: list[Any]
) -> None:
    engine = loader("dense", dtype)
    with engine.open_session(**SAMPLING) as straight:
        act(straight, START + before)
        expected = act(straight, after), state(straight)
    with engine.open_session(**SAMPLING) as original:
        act(original, START + before)
        with original.fork() as fork, original.fork() as other, fork.fork() as grandchild:
            # All four go on in turns, two of them to another place.
            parallel = [
                act(other, elsewhere[:2]),
                act(fork, after[:2]),
                act(original, after[:2]),
                act(other, elsewhere[2:]),
                act(grandchild, after[:2]),
            ]
            assert (parallel[1] + act(fork, after[2:]), state(fork)) == expected
            fork.close()
            assert (parallel[2] + act(original, after[2:]), state(original)) == expected
            original.close()
            assert (parallel[4] + act(grandchild, after[2:]), state(grandchild)) == expected
            with engine.open_session(**SAMPLING) as alone:
                act(alone, START + before)
                assert act(alone, elsewhere) == parallel[0] + parallel[3]
                assert state(alone) == state(other)


@pytest.mark.parametrize("dtype", ["float32", "kv int8"])
@pytest.mark.parametrize("length", [20, BLOCK + 3, 2 * BLOCK + 9, 4 * BLOCK])
def test_taking_back_what_is_shared(loader: Loader, dtype: str, length: int) -> None:
    """Of a session and its fork, either drops rows that both hold and writes others there."""
    engine = loader("dense", dtype)
    with engine.open_session() as straight:
        append(straight, [("text", words(length))])
        expected = state(straight)
    for is_fork in (True, False):
        with engine.open_session() as original:
            append(original, [("text", words(length - 20))])
            append(original, [("text", [i]) for i in words(length)[-20:]])
            with original.fork() as fork:
                moved, kept = (fork, original) if is_fork else (original, fork)
                for length_then in reversed(moved.marks[-20:]):
                    moved.truncate(length_then)
                    append(moved, [("text", words(9, seed=1))])
                    moved.truncate(length_then)
                assert kept.length == length
                assert state(kept) == expected


@pytest.mark.parametrize("dtype", ["float32", "kv int8"])
@examples(40)
@given(before=histories, dropped=histories, after=histories)
def test_truncate_and_append_again(
    loader: Loader, dtype: str, before: list[Any], dropped: list[Any], after: list[Any]
) -> None:
    """What was dropped leaves nothing: sound that waited and the pending token are back too."""
    engine = loader("dense", dtype)
    with engine.open_session(**SAMPLING) as straight, engine.open_session(**SAMPLING) as session:
        act(session, START + before)
        length = session.length
        kept = []  # calls that appended no row drop nothing: a length names the newest state of it
        for action in dropped:
            act(session, [action])
            if session.length == length:
                kept.append(action)
        if length not in session.marks:
            return  # too far back
        session.truncate(length)
        assert session.length == length
        assert session.marks[-1] == length
        act(straight, START + before + kept)
        assert act(session, after) == act(straight, after)
        digests, answer = state(session)
        expected_digests, expected_answer = state(straight)
        assert answer == expected_answer
        assert set(digests) <= set(expected_digests)  # pages of windows went before the truncation


def test_truncate_as_often_as_one_likes(loader: Loader) -> None:
    """Trying one continuation after the other wears no mark out."""
    with loader("dense").open_session() as session:
        append(session, STREAM[:3])
        length = session.length
        expected = None
        for k in range(100):
            found = act(session, [("text", PROBE), ("decode", 2)])
            assert expected in (None, found), k
            expected = found
            session.truncate(length)


LENGTH = 6 * BLOCK + 30
HELD_BACK = MODELS["dense"].window + REWIND


def test_forgetting_behind_every_window_changes_nothing(loader: Loader) -> None:
    """Where all layers are local, nobody would have looked there again."""
    engine = loader("local")
    with engine.open_session() as session, engine.open_session() as other:
        append(session, [("text", words(LENGTH))])
        append(other, [("text", words(LENGTH))])
        assert session.forget(0, LENGTH - HELD_BACK) == (0, (LENGTH - HELD_BACK) // BLOCK * BLOCK)
        assert append(session, STREAM).tobytes() == append(other, STREAM).tobytes()
        assert state(session) == state(other)


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "kv int8"])
@examples(10)
@given(data=st.data())
def test_forgetting_in_any_portions(
    loader: Loader, model: str, dtype: str, data: st.DataObject
) -> None:
    """One call, or several in any order that touch or overlap; and any cut of what follows."""
    last = (LENGTH - HELD_BACK) // BLOCK
    begin = data.draw(st.integers(0, last - 1), label="first block")
    end = data.draw(st.integers(begin + 1, last), label="behind the last block")
    order = data.draw(st.permutations(range(begin, end)))
    pieces = data.draw(chunkings(STREAM))
    before, after = [("text", words(LENGTH))], STREAM
    once = loader(model, dtype)
    often = loader(model, dtype, max_batch_rows=7)
    with once.open_session() as expected, often.open_session() as session:
        append(expected, before)
        append(session, before)
        untouched = session.fork()
        assert expected.forget(begin * BLOCK, end * BLOCK) == (begin * BLOCK, end * BLOCK)
        for block in order:
            hidden = session.forget(block * BLOCK, (block + 1) * BLOCK)
            assert hidden == (block * BLOCK, (block + 1) * BLOCK)
        logits = append(expected, after)
        assert same_bytes(append(session, pieces), logits)
        assert state(session) == state(expected)
        # Forgetting is the session's own affair, and it is no trifle.
        with once.open_session() as straight:
            append(straight, before)
            unforgotten = append(straight, after)
            assert same_bytes(append(untouched, pieces), unforgotten)
            assert state(untouched) == state(straight)
            assert not same_bytes(unforgotten, logits)
        untouched.close()


def test_forgetting_rounds_inward(loader: Loader) -> None:
    with loader("dense").open_session() as session, loader("dense").open_session() as other:
        append(session, [("text", words(LENGTH))])
        append(other, [("text", words(LENGTH))])
        assert session.forget(1, 3 * BLOCK + 9) == (BLOCK, 3 * BLOCK)
        assert other.forget(BLOCK, 3 * BLOCK) == (BLOCK, 3 * BLOCK)
        begin, end = other.forget(BLOCK + 1, 2 * BLOCK + 1)  # no whole block
        assert begin == end
        assert append(session, STREAM).tobytes() == append(other, STREAM).tobytes()
        assert state(session) == state(other)
