"""Wrong, hostile or excessive input: an error of our own, and nobody else notices.

Beside every test a witness session lives on the same engine. It is half way through its stream
when the test begins, and must give the same bytes as an undisturbed one afterwards; the engine
must hold the same pages, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from random_models import (
    BLOCK,
    FIRST_WORD,
    HOP,
    TURN,
    load,
    picture,
    same_bytes,
    sound,
    words,
    write,
)

from duplex_engine import (
    CapacityError,
    DuplexError,
    Engine,
    InvalidArgument,
    MicroTurn,
    Session,
    SessionBusy,
    SessionClosed,
)

pytestmark = pytest.mark.core

VOCABULARY = 320
HUGE = 2**70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense"), "dense")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with load(folder, memory="64MiB") as engine:
        yield engine


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Without an interaction block, which would limit pictures, and without a tokenizer."""
    folder = write(tmp_path_factory.mktemp("chat"), "moe", interaction=False)
    (folder / "tokenizer.json").unlink()
    with load(folder, memory="64MiB", max_positions=4096) as engine:
        yield engine


def first_half(session: Session) -> None:
    session.append(text=words(70))
    session.step(sound(TURN + 77), picture(9, 9), words(5))


def second_half(session: Session) -> list[bytes]:
    answers = [session.append(audio=sound(3 * HOP, seed=1), logits="all").tobytes()]
    answers.append(bytes(str(session.step(sound(TURN, seed=2)).token_ids), "ascii"))
    return [*answers, session.append(text=words(9, seed=1), logits="all").tobytes()]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[bytes]:
    with load(folder) as engine, engine.open_session() as session:
        first_half(session)
        return second_half(session)


@pytest.fixture(autouse=True)
def witness(engine: Engine, undisturbed: list[bytes]) -> Iterator[None]:
    with engine.open_session() as session:
        first_half(session)
        before = engine.stats
        yield
        after = engine.stats
        for key in ("sessions", "pages_used", "pages_free", "pages_promised"):
            assert after[key] == before[key], key
        assert second_half(session) == undisturbed


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with engine.open_session() as session:
        session.append(text=words(4))
        yield session


def all_of(session: Session) -> Any:
    """What can be seen of a session."""
    state = session.length, session.marks, session.memory, session._core.digests()
    return *state, session._core.turn, session._core.epoch


def refused(
    session: Session, call: Callable[[], object], error: type[DuplexError], match: str
) -> None:
    """The call raises just this error, and leaves the session as it was."""
    before = all_of(session)
    with pytest.raises(error, match=match) as caught:
        call()
    assert type(caught.value) is error
    assert all_of(session) == before


# ---- arrays

EMPTY = np.zeros((0, 5, 3), np.uint8)
WRONG_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"audio": np.array([0, np.nan], np.float32)}, "finite samples, found nan at index 1"),
    "inf": ({"audio": np.array([np.inf], np.float32)}, "finite"),
    "-inf": ({"audio": np.array([-np.inf], np.float64)}, "finite"),
    "beyond float32": ({"audio": np.array([1e300])}, "finite"),
    "int32": ({"audio": np.zeros(800, np.int32)}, "int16 samples, found int32"),
    "complex": ({"audio": np.zeros(800, np.complex64)}, "complex64"),
    "objects": ({"audio": np.array([None] * 8)}, "object"),
    "other byte order": ({"audio": np.zeros(8, np.dtype(np.int16).newbyteorder())}, "int16"),
    "list": ({"audio": [0.0] * 800}, "found list"),
    "bytes": ({"audio": b"\0" * 800}, "found bytes"),
    "channels first": ({"audio": np.zeros((2, 800), np.float32)}, "samples go first"),
    "no dimension": ({"audio": np.float32(0)}, "audio: expected"),
    "three dimensions": ({"audio": np.zeros((8, 1, 1), np.float32)}, "samples go first"),
    "no pixels": ({"image": np.zeros((0, 0, 3), np.uint8)}, r"found \(0, 0, 3\)"),
    "no rows": ({"image": EMPTY}, r"found \(0, 5, 3\)"),
    "no columns": ({"image": EMPTY.swapaxes(0, 1)}, r"found \(5, 0, 3\)"),
    "grey": ({"image": np.zeros((8, 8), np.uint8)}, "RGB"),
    "transparent": ({"image": np.zeros((8, 8, 4), np.uint8)}, "RGB"),
    "float pixels": ({"image": np.zeros((8, 8, 3), np.float32)}, "uint8"),
    "signed pixels": ({"image": np.zeros((8, 8, 3), np.int8)}, "uint8"),
    "long": ({"image": np.zeros((1, 2**20 + 1, 3), np.uint8)}, "at most 1048576 pixels an edge"),
    "too many patches": ({"image": picture(8000, 10)}, "8000x10 is 2000 patches"),
    "negative id": ({"text": [5, -1]}, r"\[0, 320\), found -1"),
    "id beyond": ({"text": [VOCABULARY]}, "found 320"),
    "huge id": ({"text": [HUGE]}, "found 1180591620717411303424"),
    "unsigned id": ({"text": np.array([2**64 - 1], np.uint64)}, "found 18446744073709551615"),
    "float ids": ({"text": [1.0]}, "integer"),
    "float array": ({"text": np.ones(3)}, "float64"),
    "booleans": ({"text": [True]}, "integer"),
    "nested": ({"text": [[1, 2]]}, "integer token ids"),
    "strings": ({"text": ["a"]}, "integer"),
    "a number": ({"text": 7}, "found int"),
    "a rate": ({"audio": sound(9), "sample_rate": 3_999}, "sample_rate: expected"),
    "no rate": ({"audio": sound(9), "sample_rate": "16k"}, "sample_rate: expected"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_input(session: Session, name: str) -> None:
    """append, step and feed refuse alike, before they take anything."""
    inputs, match = WRONG_INPUTS[name]
    refused(session, lambda: session.append(**inputs), InvalidArgument, match)
    refused(session, lambda: session.feed(**{"text": words(3)} | inputs), InvalidArgument, match)
    refused(session, lambda: session.step(**{"text": words(3)} | inputs), InvalidArgument, match)
    assert session.step(sound(TURN)).input.rows == TURN // HOP  # no text was left behind


def test_any_strides_give_the_same_bytes(engine: Engine) -> None:
    """Views that are not contiguous are read as what they show."""
    samples, pixels, ids = sound(2 * TURN), picture(32, 24), np.array(words(40))
    stereo = np.stack([samples, samples], axis=1)
    read_only = samples.copy()
    read_only.flags.writeable = False
    cases: list[tuple[str, NDArray[Any], NDArray[Any]]] = [
        ("audio", samples[::2], samples[::2].copy()),
        ("audio", samples[::-1], samples[::-1].copy()),
        ("audio", np.asfortranarray(stereo), stereo),
        ("audio", stereo[:, 1], samples),
        ("audio", stereo[:, :1], samples),
        ("audio", np.broadcast_to(np.float32(0.1), 1000), np.full(1000, 0.1, np.float32)),
        ("audio", samples.astype(samples.dtype.newbyteorder()), samples),
        ("audio", read_only, samples),
        ("image", pixels[::2, ::-3], pixels[::2, ::-3].copy()),
        ("image", pixels.swapaxes(0, 1), np.ascontiguousarray(pixels.swapaxes(0, 1))),
        ("image", pixels[..., ::-1], pixels[..., ::-1].copy()),
        ("text", ids[::-2], ids[::-2].copy()),
        ("text", ids.astype(np.uint16), ids),
    ]
    for kind, view, copy in cases:
        with engine.open_session() as one, engine.open_session() as other:
            found = one.append(**{kind: view}, logits="all")
            assert len(found) > 0
            assert same_bytes(found, other.append(**{kind: copy}, logits="all"))


# ---- much and little


def test_nothing_at_all(session: Session) -> None:
    for inputs in ({"audio": sound(0)}, {"text": []}, {"audio": np.zeros((0, 2), np.int16)}):
        length = session.length
        assert session.append(**inputs, logits="all").shape == (0, VOCABULARY)
        assert session.length == length
        assert session.decode(0) == []
        assert session.step(**inputs).input.missing_ms == 200  # silence


def test_minutes_at_once(engine: Engine) -> None:
    """What waited for ten minutes is one pass of many rows, and the bits of any other cut."""
    minute = np.resize(sound(10 * 16_000), 60 * 16_000)
    with engine.open_session() as one, engine.open_session() as other:
        for piece in np.array_split(minute, 9):
            other.feed(piece)
        turns = one.step(minute), other.step()
        assert [turn.input.merged_turns for turn in turns] == [299, 299]
        assert turns[0].token_ids == turns[1].token_ids
        assert second_half(one) == second_half(other)
    with engine.open_session(max_positions=16_000) as session:
        turn = session.step(np.tile(minute, 10))
        assert turn.input.rows == 3000 * 4 + 2999
        assert session.length == turn.input.rows + len(turn.token_ids) - 1
        # What waits is bounded: nobody can fill the memory by feeding alone.
        for _ in range(20):
            session.feed(minute)
        with pytest.raises(CapacityError, match="samples wait already"):
            session.feed(minute)


@pytest.mark.parametrize(("height", "width", "n_rows"), [(1, 1, 1), (8000, 10, 2000)])
def test_pictures_of_odd_shapes(chat: Engine, height: int, width: int, n_rows: int) -> None:
    image = picture(height, width)
    with chat.open_session() as one, chat.open_session() as other:
        one.append(image=image)
        assert one.length == n_rows
        other.step(image=image, max_tokens=0)
        expected = one.append(text=words(3), logits="all")
        assert same_bytes(other.append(text=words(3), logits="all"), expected)


# ---- limits


def test_a_full_tape(engine: Engine) -> None:
    with engine.open_session(max_positions=100) as full:
        full.append(text=words(100))
        refused(full, lambda: full.append(text=words(1)), CapacityError, "0 left of max_pos")
        refused(full, lambda: full.append(audio=sound(HOP)), CapacityError, "max_positions")
        refused(full, lambda: full.append(image=picture(1, 1)), CapacityError, "max_positions")
        refused(full, lambda: full.step(sound(TURN)), CapacityError, "truncate")
        # What needs no room goes on: sound that fills no frame, and a token that waits.
        full.append(audio=sound(HOP - 1))
        (token,) = full.decode(1)
        refused(full, lambda: full.decode(1), CapacityError, "1 rows wanted, 0 left")
        refused(full, lambda: full.append(audio=sound(1)), CapacityError, "2 rows wanted")
        # In a longer fork both find their room.
        with full.fork(max_positions=102) as longer, engine.open_session() as other:
            found = longer.append(audio=sound(1), logits="all")
            assert longer.length == 102
            other.append(text=[*words(100), token])
            frame = np.concatenate([sound(HOP - 1), sound(1)])
            assert same_bytes(other.append(audio=frame, logits="all"), found)
            refused(longer, lambda: longer.append(text=words(1)), CapacityError, "0 left")


def test_rows_that_do_not_fit_are_not_begun(engine: Engine) -> None:
    """A refused step of many keeps its input; the other sessions take their turn."""
    with engine.open_session(max_positions=8) as small, engine.open_session() as large:
        answers = engine.step_many([(small, {"text": words(9)}), (large, {"text": words(9)})])
        assert type(answers[0]) is CapacityError
        assert isinstance(answers[1], MicroTurn)
        assert small.length == 0


def test_too_little_memory(folder: Path, engine: Engine) -> None:
    with pytest.raises(CapacityError, match="room for one session"):
        load(folder, memory=4096)
    with pytest.raises(CapacityError, match=r"max_positions <= \d+ would fit"):
        engine.open_session(max_positions=10**6)
    for n in (2**41, 2**62, 2**63 - 1):
        with pytest.raises(CapacityError, match="addresses"):
            engine.open_session(max_positions=n)


@pytest.mark.cpu
def test_a_full_pool(folder: Path) -> None:
    with load(folder, memory="1MiB", max_batch_rows=16) as engine:
        with engine.open_session(max_positions=512) as session:
            session.append(text=words(300))
            held = [session.fork(), session.fork()]
            before, stats = all_of(session), engine.stats
            for call in (session.fork, engine.open_session):
                with pytest.raises(CapacityError, match=r"would fit|close a session"):
                    call()
            assert engine.stats == stats
            assert all_of(session) == before
            # Everyone has what was promised.
            for one in (session, *held):
                one.append(text=words(200))
            for one in held:
                one.close()
        assert engine.stats["pages_used"] == engine.stats["pages_promised"] == 0


# ---- arguments

WRONG_CALLS: dict[str, tuple[Callable[[Session], object], str]] = {
    "nothing": (lambda s: s.append(), "expected one of"),
    "two kinds": (lambda s: s.append(text=[1], audio=sound(1)), "text and audio"),
    "unknown logits": (lambda s: s.append(text=[1], logits="first"), "logits: expected"),  # type: ignore[call-overload]
    "empty logits": (lambda s: s.append(text=[1], logits=""), "logits: expected"),  # type: ignore[call-overload]
    "logits by number": (lambda s: s.append(text=[1], logits=1), "logits: expected"),  # type: ignore[call-overload]
    "negative tokens": (lambda s: s.step(max_tokens=-1), "max_tokens: expected"),
    "float tokens": (lambda s: s.step(max_tokens=1.5), "max_tokens: expected"),  # type: ignore[arg-type]
    "bool tokens": (lambda s: s.step(max_tokens=True), "max_tokens: expected"),
    "huge tokens": (lambda s: s.step(max_tokens=2**40), "max_tokens: expected"),
    "negative decode": (lambda s: s.decode(-1), "decode: n"),
    "huge decode": (lambda s: s.decode(2**40), "decode: n"),
    "decode a string": (lambda s: s.decode("3"), "decode: n"),  # type: ignore[arg-type]
    "stop beyond": (lambda s: s.decode(1, [VOCABULARY]), "stop: expected"),
    "no mark": (lambda s: s.truncate(3), "truncate: expected the end of an earlier call"),
    "ahead": (lambda s: s.truncate(5), "truncate: expected the end of an earlier call"),
    "negative mark": (lambda s: s.truncate(-1), "truncate: length"),
    "huge mark": (lambda s: s.truncate(HUGE), "truncate: length"),
    "float mark": (lambda s: s.truncate(4.0), "truncate: length"),  # type: ignore[arg-type]
    "recent": (lambda s: s.forget(0, 4), "forget: expected"),
    "backwards": (lambda s: s.forget(3, 2), "forget: expected"),
    "negative range": (lambda s: s.forget(-64, 0), "forget: begin"),
    "huge range": (lambda s: s.forget(0, HUGE), "forget: end"),
    "fork of nothing": (lambda s: s.fork(0), "max_positions: expected"),
    "fork too short": (lambda s: s.fork(3), "at least the 4 positions"),
    "fork by name": (lambda s: s.fork("long"), "max_positions: expected"),  # type: ignore[arg-type]
    "cold": (lambda s: s.set_sampling(temperature=-0.1), "temperature: expected"),
    "not a temperature": (lambda s: s.set_sampling(temperature=np.nan), "temperature"),
    "hot": (lambda s: s.set_sampling(temperature=1e300), "temperature: expected"),
    "temperature by name": (lambda s: s.set_sampling(temperature="hot"), "temperature"),  # type: ignore[arg-type]
    "negative top_k": (lambda s: s.set_sampling(top_k=-1), "top_k: expected"),
    "huge top_k": (lambda s: s.set_sampling(top_k=HUGE), "top_k: expected"),
    "no top_p": (lambda s: s.set_sampling(top_p=0.0), "top_p: expected"),
    "top_p above 1": (lambda s: s.set_sampling(top_p=1.01), "top_p: expected"),
    "negative seed": (lambda s: s.set_sampling(seed=-1), "seed: expected"),
    "huge seed": (lambda s: s.set_sampling(seed=2**64), "seed: expected"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(session: Session, name: str) -> None:
    call, match = WRONG_CALLS[name]
    refused(session, lambda: call(session), InvalidArgument, match)


def test_what_is_still_needed_cannot_be_forgotten(session: Session) -> None:
    session.append(text=words(4 * BLOCK))
    limit = session.length - 24 - 32
    message = f"end <= {limit} "
    refused(session, lambda: session.forget(0, limit + 1), InvalidArgument, message)
    assert session.forget(0, limit) == (0, limit // BLOCK * BLOCK)


def test_text_needs_a_tokenizer(chat: Engine) -> None:
    with chat.open_session() as session:
        for call in (session.append, session.step, session.feed):
            with pytest.raises(InvalidArgument, match=r"no\s+tokenizer\.json"):
                call(text="bado")
        assert session.length == 0


def test_the_rate_of_a_stream_is_fixed(session: Session) -> None:
    session.append(audio=sound(441 * 4), sample_rate=44_100)
    for rate in (None, 16_000, 48_000):
        for call in (session.append, session.step, session.feed):
            refused(
                session,
                lambda call=call, rate=rate: call(audio=sound(80), sample_rate=rate),  # type: ignore[misc]
                InvalidArgument,
                "expected 44100 Hz as in the sound before",
            )
    assert session.append(audio=sound(44_100), sample_rate=44_100, logits="all").shape[0] == 20


# ---- sessions


def test_closed_sessions(engine: Engine) -> None:
    closed = engine.open_session()
    closed.append(text=words(3))
    fork = closed.fork()
    closed.close()
    calls: list[Callable[[], object]] = [
        lambda: closed.append(text=[1]),
        lambda: closed.step(sound(TURN)),
        lambda: closed.feed(text=[1]),
        lambda: closed.decode(0),
        lambda: closed.truncate(0),
        lambda: closed.forget(0, 0),
        lambda: closed.fork(),
        lambda: closed.set_sampling(),
        lambda: closed.length,
        lambda: closed.marks,
        lambda: closed.memory,
    ]
    for call in calls:
        with pytest.raises(SessionClosed):
            call()
    assert closed.closed
    assert fork.append(text=words(3), logits="all").shape == (3, VOCABULARY)
    # Closed while others step: its place holds the error, theirs their turns.
    answers = engine.step_many([(closed, {}), (fork, {"audio": sound(TURN)})])
    assert type(answers[0]) is SessionClosed
    assert isinstance(answers[1], MicroTurn)
    fork.close()


def test_a_closed_engine(folder: Path) -> None:
    engine = load(folder)
    session = engine.open_session()
    session.append(text=words(3))
    engine.close()
    engine.close()
    assert session.closed
    calls: list[Callable[[], object]] = [
        lambda: engine.open_session(),
        lambda: engine.step_many([]),
        lambda: session.append(text=[1]),
        lambda: session.step(sound(TURN)),
        lambda: session.fork(),
    ]
    for call in calls:
        with pytest.raises(SessionClosed):
            call()
    assert engine.stats["pages_used"] == engine.stats["sessions"] == 0
    session.close()


def test_the_same_session_twice(engine: Engine, session: Session) -> None:
    pairs: list[Any] = [(session, {"text": words(3)}), (session, {"text": words(3)})]
    refused(session, lambda: engine.step_many(pairs), InvalidArgument, "twice")
    assert session.step(sound(TURN)).input.rows == 4  # nothing was fed


def test_sessions_of_another_engine(engine: Engine, chat: Engine, session: Session) -> None:
    with chat.open_session() as stranger:
        pairs: list[Any] = [(session, {"text": words(3)}), (stranger, {"text": words(3)})]
        refused(session, lambda: engine.step_many(pairs), InvalidArgument, "another's|another eng")
        assert stranger.length == 0
    assert session.step(sound(TURN)).input.rows == 4  # nothing was fed


def test_two_threads_on_one_session(engine: Engine) -> None:
    """Every call either works or raises SessionBusy, and what worked is a proper stream."""
    with engine.open_session() as session:
        outcomes: list[Any] = []
        start = threading.Barrier(2)

        def work(token: int) -> None:
            start.wait()
            for _ in range(10):
                try:
                    session.append(text=[token] * 100)
                except SessionBusy as error:
                    outcomes.append(error)
                else:
                    outcomes.append(token)

        threads = [threading.Thread(target=work, args=(FIRST_WORD + i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = [token for token in outcomes if isinstance(token, int)]
        assert len(outcomes) == 20
        assert session.length == 100 * len(done)
        answer = session.append(text=words(2), logits="all")
        with engine.open_session() as again:
            for token in done:
                again.append(text=[token] * 100)
            assert same_bytes(again.append(text=words(2), logits="all"), answer)


def test_feeding_while_another_thread_steps(chat: Engine) -> None:
    """`feed` may come at any time: each id enters the stream once, in the turn that says so."""
    with chat.open_session() as session:
        ids = words(2000)
        thread = threading.Thread(target=lambda: [session.feed(text=[i]) for i in ids])
        thread.start()
        while session.length < len(ids):
            length = session.length
            turn = session.step(max_tokens=0)
            assert session.length == length + turn.input.rows
        thread.join()
        answer = session.append(text=words(2), logits="all")
        with chat.open_session() as again:
            again.append(text=ids)
            assert same_bytes(again.append(text=words(2), logits="all"), answer)
