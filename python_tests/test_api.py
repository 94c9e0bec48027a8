"""The Python surface, on the real engine: what a call takes, gives back, and refuses."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from duplex_engine import (
    BackendUnavailable,
    CapacityError,
    CheckpointError,
    DuplexError,
    Engine,
    InvalidArgument,
    MergedTurns,
    MicroTurn,
    MissingAudio,
    Session,
    SessionBusy,
    SessionClosed,
)
from duplex_engine.arguments import parse_bytes
from duplex_engine.models import write_random_checkpoint
from duplex_engine.reference import dmel, inkling

pytestmark = pytest.mark.core

TURN = 3200  # samples of a micro-turn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, memory="256MiB") as engine:
        yield engine


@pytest.fixture(scope="module")
def chat_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("chat"), interaction=False)
    (folder / "tokenizer.json").unlink()
    with Engine.load(folder, memory="256MiB") as engine:
        yield engine


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with engine.open_session() as session:
        yield session


def sound(n_turns: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise whose loudness changes: (n_turns * TURN,)."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0.01, 0.5, n_turns * 4), TURN // 4)
    return (loudness * rng.standard_normal(n_turns * TURN)).astype(np.float32)


def run(session: Session, samples: NDArray[Any], **options: Any) -> list[MicroTurn]:
    return [session.step(piece, **options) for piece in np.split(samples, len(samples) // TURN)]


def outputs(turns: list[MicroTurn]) -> list[tuple[tuple[int, ...], str]]:
    return [(turn.token_ids, turn.text) for turn in turns]


def test_a_stream_of_micro_turns(engine: Engine, session: Session) -> None:
    layout = engine.config.interaction
    assert layout is not None
    turns = run(session, sound(12))
    assert [turn.index for turn in turns] == list(range(12))
    assert {turn.stopped for turn in turns} >= {"listen"}
    assert any(turn.text for turn in turns)
    for turn in turns:
        assert 1 <= len(turn.token_ids) <= layout.max_output_tokens
        assert (turn.token_ids[-1] == layout.listen) == (turn.stopped == "listen")
        assert turn.events == ()
        assert turn.input.missing_ms == 0
        timing = turn.timing
        stages = timing.encode_us + timing.append_us + timing.decode_us
        assert 0 < stages <= timing.total_us
        assert turn.memory.sequence_bytes > 0
    # Four frames, and the last token of the turn before.
    assert [turn.input.rows for turn in turns] == [4] + [5] * 11
    # What is in the sequence: every row, and every token but the one that waits.
    n_tokens = sum(len(turn.token_ids) for turn in turns)
    assert session.length == 12 * 4 + n_tokens - 1
    assert engine.tokenizer is not None
    joined = engine.tokenizer.decode([i for turn in turns for i in turn.token_ids])
    assert "".join(turn.text for turn in turns) == joined


def test_the_same_stream_gives_the_same_output_however_it_comes(engine: Engine) -> None:
    samples = sound(8)
    as_int16 = np.round(samples * 20_000).astype(np.int16)
    with engine.open_session() as session:
        expected = outputs(run(session, as_int16))
    as_float = as_int16.astype(np.float32) / 32_768
    stereo = np.stack([as_float, as_float], axis=1)
    for samples in (as_float, stereo, as_float.astype(np.float64)):
        with engine.open_session() as session:
            assert outputs(run(session, samples)) == expected
    with engine.open_session() as session:  # fed in pieces
        turns = []
        for piece in np.split(as_float, 8):
            for part in np.split(piece, [1, 800, 1777]):
                session.feed(part)
            turns.append(session.step())
        assert outputs(turns) == expected


def test_missing_and_late_sound_is_reported(session: Session) -> None:
    turn = session.step(sound(1)[:2400])
    assert turn.events == (MissingAudio(50.0),)
    assert turn.input.missing_ms == 50.0
    assert session.step().events == (MissingAudio(200.0),)
    turn = session.step(sound(3))
    assert turn.events == (MergedTurns(2),)
    assert turn.input.merged_turns == 2
    assert turn.index == 4


def test_pictures_text_and_results_enter_the_micro_turn(engine: Engine, session: Session) -> None:
    picture = np.zeros((16, 40, 3), np.uint8)
    turn = session.step(sound(1), picture, "bado")
    n_text = len(engine.tokenizer.encode("bado"))  # type: ignore[union-attr]
    assert turn.input.rows == 4 + 3 + (n_text + 2)
    before = len(turn.token_ids) > 0
    turn = session.step(sound(1), result=[300, 301, 302])
    assert turn.input.rows == 4 + (3 + 2) + before


def test_refused_input_changes_nothing(engine: Engine) -> None:
    with engine.open_session() as one, engine.open_session() as other:
        expected = outputs(run(one, sound(3)))
        nan = sound(1)
        nan[7] = np.nan
        big = np.zeros((400, 400, 3), np.uint8)
        refused: list[dict[str, Any]] = [
            {"audio": nan, "text": "bado"},
            {"audio": sound(1), "image": big, "text": "bado"},
            {"audio": sound(1), "text": [10**6]},
            {"audio": sound(1), "text": "bado", "max_tokens": -1},
            {"audio": sound(1), "result": [0.5]},
            {"audio": sound(1), "sample_rate": 5},
        ]
        turns = []
        for k, piece in enumerate(np.split(sound(3), 3)):
            for inputs in refused:
                with pytest.raises(InvalidArgument):
                    other.step(**inputs)
            if k:
                with pytest.raises(InvalidArgument, match="expected 16000 Hz as in the sound"):
                    other.step(sound(1), sample_rate=48_000)
            turns.append(other.step(piece))
        assert outputs(turns) == expected


def test_other_sample_rates_are_resampled_without_gaps(session: Session) -> None:
    rate = 44_100
    samples = np.sin(np.arange(rate) / 20).astype(np.float32)
    for piece in np.split(samples, 5):
        assert session.step(piece, sample_rate=rate).events == ()
    with pytest.raises(InvalidArgument, match="sample_rate: expected 44100 Hz"):
        session.step(samples)


def test_max_tokens(session: Session) -> None:
    assert session.step(sound(1), max_tokens=0).token_ids == ()
    assert all(len(turn.token_ids) <= 2 for turn in run(session, sound(5), max_tokens=2))


def test_a_checkpoint_without_interaction_writes_up_to_the_limit(chat_engine: Engine) -> None:
    assert not chat_engine.interaction
    with chat_engine.open_session() as session:
        turn = session.step(text=[100, 101, 102], max_tokens=5)
        assert turn.stopped in ("limit", "eos")
        assert len(turn.token_ids) == 5 or turn.stopped == "eos"
        assert turn.text == ""  # no tokenizer
        turn = session.step(sound(1)[:2000])  # whole frames only: 2 of 2.5
        assert turn.input.rows == 1 + 2
        assert turn.events == ()
        with pytest.raises(InvalidArgument, match=r"no tokenizer\.json"):
            session.step(text="bado")
        with pytest.raises(InvalidArgument, match="cannot delegate"):
            session.step(result=[1])


def test_append_gives_the_reference_logits(checkpoint: Path, engine: Engine) -> None:
    ids = [100, 20, 300, 8]
    samples = sound(1)
    with engine.open_session() as session:
        assert session.append(text=ids[:1]) is None
        rows = [session.append(text=np.array(ids[1:]), logits="all")]
        rows.append(session.append(audio=samples, logits="all"))
        last = session.append(text=[9], logits="last")
        assert session.length == 4 + 4 + 1
    weights, config = inkling.load(checkpoint)
    text = {"rms_norm_eps": 1e-6, "conv_kernel_size": 4} | config["text_config"]
    expected = inkling.forward(
        np.concatenate(
            [
                inkling.embed_text(ids, weights, text),
                inkling.embed_audio(dmel.dmel_bins(samples), weights),
                inkling.embed_text([9], weights, text),
            ]
        ),
        weights,
        text,
    )
    found = np.concatenate([*rows, last])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[1:], atol=1e-4 * np.abs(expected).max())


def test_append_takes_one_kind_at_a_time(session: Session) -> None:
    with pytest.raises(InvalidArgument, match="expected one of text, audio, image, found none"):
        session.append()
    with pytest.raises(InvalidArgument, match="found text and audio"):
        session.append(text=[1], audio=sound(1))
    session.append(audio=sound(1)[:1000])
    assert session.length == 1
    session.append(audio=sound(1)[:0], end_of_audio=True)
    assert session.length == 2
    session.append(image=np.zeros((8, 8, 3), np.uint8))
    assert session.length == 3


def test_decode_is_greedy_over_the_logits(engine: Engine) -> None:
    with engine.open_session() as one, engine.open_session() as other:
        one.append(text=[100, 200])
        ids = one.decode(6)
        assert len(ids) == 6
        prompt = [100, 200]
        for expected in ids:
            logits = other.append(text=prompt, logits="last")
            assert int(logits.argmax()) == expected
            prompt = [expected]
        with engine.open_session() as third:
            third.append(text=[100, 200])
            assert third.decode(6, stop=[ids[2]]) == ids[: ids.index(ids[2]) + 1]


def test_truncate_takes_text_and_state_back(engine: Engine) -> None:
    samples = sound(10)
    with engine.open_session() as session:
        turns = run(session, samples[: 8 * TURN])
        length = session.length
        assert length in session.marks
        first = outputs(run(session, samples[8 * TURN :]))
        session.truncate(length)
        assert session.length == length
        again = run(session, samples[8 * TURN :])
        assert outputs(again) == first
        assert again[0].index == 8
        assert again[0].epoch > turns[0].epoch
        with pytest.raises(InvalidArgument, match="truncate"):
            session.truncate(10**6)


def test_fork_goes_on_alone(engine: Engine) -> None:
    samples = sound(8)
    with engine.open_session() as session:
        run(session, samples[: 4 * TURN])
        expected = None
        for _ in range(2):
            with session.fork() as fork:
                run(fork, sound(3, seed=9))
            with session.fork() as fork:
                found = outputs(run(fork, samples[4 * TURN :]))
                assert expected in (None, found)
                expected = found
        assert outputs(run(session, samples[4 * TURN :])) == expected


def test_forget_returns_what_it_hid(engine: Engine) -> None:
    with engine.open_session() as session:
        session.append(text=list(range(100, 100 + 300)))
        begin, end = session.forget(10, 170)
        assert 10 <= begin <= end <= 170
        assert end - begin >= 64
        assert session.length == 300
        session.append(text=[5], logits="last")


def test_sampling_depends_on_the_seed_alone(engine: Engine) -> None:
    def said(**options: Any) -> list[tuple[tuple[int, ...], str]]:
        with engine.open_session(**options) as session:
            return outputs(run(session, sound(6)))

    greedy = said()
    assert said(temperature=1.0, top_k=1) == greedy
    drawn = said(temperature=1.0, seed=1)
    assert drawn != greedy
    assert said(temperature=1.0, seed=1) == drawn
    assert said(temperature=1.0, seed=2) != drawn
    with engine.open_session() as session:
        session.set_sampling(temperature=1.0, seed=1)
        assert outputs(run(session, sound(6))) == drawn
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(InvalidArgument):
            engine.open_session(**wrong)


def test_step_many_is_each_alone(engine: Engine) -> None:
    samples = [sound(5, seed) for seed in range(3)]
    expected = []
    for s in samples:
        with engine.open_session() as session:
            expected.append(outputs(run(session, s)))
    sessions = [engine.open_session() for _ in samples]
    before = engine.stats["passes"]
    found: list[list[Any]] = [[], [], []]
    for k in range(5):
        requests: dict[Session, Any] = {
            session: {"audio": s[k * TURN : (k + 1) * TURN]}
            for session, s in zip(sessions, samples, strict=True)
        }
        for turns, turn in zip(found, engine.step_many(requests), strict=True):
            turns.append(turn)
    assert [outputs(turns) for turns in found] == expected
    longest = sum(max(len(turns[k].token_ids) for turns in found) for k in range(5))
    assert engine.stats["passes"] - before <= longest + 1
    for session in sessions:
        session.close()


def test_step_many_keeps_errors_apart(engine: Engine) -> None:
    closed = engine.open_session()
    closed.close()
    with engine.open_session() as good, engine.open_session() as other:
        requests: list[Any] = [
            (closed, {}),
            (good, {"audio": sound(1)}),
            (other, {"audio": sound(1), "text": [10**6]}),
        ]
        answers = engine.step_many(requests)
        assert [type(answer) for answer in answers] == [SessionClosed, MicroTurn, InvalidArgument]
        (answer,) = engine.step_many([(good, {"sound": sound(1)})])  # type: ignore[list-item]
        assert isinstance(answer, InvalidArgument)
        with pytest.raises(InvalidArgument, match="twice"):
            engine.step_many([(good, {}), (good, {})])
        assert engine.step_many([]) == []
        for wrong in (5, None, [good, other], [(good, {}, 1)], "good"):
            with pytest.raises(InvalidArgument, match=r"step_many: expected \{session: StepInput"):
                engine.step_many(wrong)  # type: ignore[arg-type]


def test_a_full_session_says_so_and_stays_whole(engine: Engine) -> None:
    with engine.open_session(max_positions=64) as full, engine.open_session() as other:
        answers = [engine.step_many([(full, {"audio": sound(1)})])[0] for _ in range(20)]
        assert isinstance(answers[0], MicroTurn)
        assert isinstance(answers[-1], CapacityError)
        length = full.length
        answers = engine.step_many([(full, {}), (other, {"audio": sound(1)})])
        assert isinstance(answers[0], CapacityError)
        assert isinstance(answers[1], MicroTurn)
        assert full.length == length <= 64
        with pytest.raises(CapacityError, match="64"):
            full.step()


def test_one_call_at_a_time(engine: Engine) -> None:
    """Two threads step one session: each call works, or says that the session is busy."""
    with engine.open_session() as session:
        outcomes: list[object] = []
        pieces = np.split(sound(40), 40)

        def work(own: list[NDArray[np.float32]]) -> None:
            for piece in own:
                try:
                    outcomes.append(session.step(piece))
                except SessionBusy as error:
                    outcomes.append(error)

        threads = [threading.Thread(target=work, args=(pieces[i::2],)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        turns = [outcome for outcome in outcomes if isinstance(outcome, MicroTurn)]
        assert len(outcomes) == 40
        assert len({turn.index for turn in turns}) == len(turns)


def test_closed_sessions_and_engines(checkpoint: Path) -> None:
    engine = Engine.load(checkpoint, memory="64MiB")
    session, other = engine.open_session(), engine.open_session()
    session.step(sound(1))
    session.close()
    session.close()
    assert session.closed
    calls: list[Callable[[], object]] = [
        lambda: session.step(sound(1)),
        lambda: session.feed(sound(1)),
        lambda: session.append(text=[1]),
        lambda: session.decode(1),
        lambda: session.truncate(0),
        lambda: session.fork(),
        lambda: session.length,
        lambda: session.memory,
    ]
    for call in calls:
        with pytest.raises(SessionClosed):
            call()
    other.step(sound(1))
    engine.close()
    with pytest.raises(SessionClosed):
        other.step(sound(1))
    with pytest.raises(SessionClosed):
        engine.open_session()


def test_closing_gives_memory_back(engine: Engine) -> None:
    before = engine.stats
    with engine.open_session() as session:
        run(session, sound(4))
        assert engine.stats["sessions"] == before["sessions"] + 1
        assert sum(session.memory.values()) > 0
    after = engine.stats
    for key in ("sessions", "pages_used", "pages_promised"):
        assert after[key] == before[key], key
    with pytest.raises(CapacityError):
        engine.open_session(max_positions=10**9)


@pytest.mark.cpu
def test_engine_options(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    with Engine.load(checkpoint, dtype="bfloat16", threads=1, progress=progress) as engine:
        assert engine.dtype == "bfloat16"
        assert engine.description
        assert all(n_bytes >= 0 for _, n_bytes in engine.memory_plan)
        assert Engine.sample_rate == 16_000
    assert seen
    assert all(0 <= done <= total for done, total in seen)
    assert seen == sorted(seen)

    rounded = write_random_checkpoint(tmp_path / "bf16", dtype="bfloat16")
    with Engine.load(rounded, threads=1) as engine:
        assert engine.dtype == "bfloat16"
    with Engine.load(rounded, dtype="float32", threads=1) as engine:
        assert engine.dtype == "float32"

    with pytest.raises(BackendUnavailable, match="cuda"):
        Engine.load(checkpoint, device="cuda")
    with pytest.raises(DuplexError, match="sparc"):
        Engine.load(checkpoint, isa="sparc")
    with pytest.raises(CheckpointError):
        Engine.load(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="tokenizer"):
        Engine.load(broken)


def test_an_error_in_progress_reaches_the_caller(checkpoint: Path) -> None:
    def progress(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine.load(checkpoint, progress=progress)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (1, 1),
        ("7", 7),
        ("2KiB", 2048),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 2**29),
        ("1 GiB", 2**30),
    ],
)
def test_bytes(text: int | str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", [0, -1, "", "GiB", "1 XB", "1e9", "-1GiB", 1.5, None])
def test_other_bytes_are_refused(text: Any) -> None:
    with pytest.raises(InvalidArgument, match="memory: expected a number of bytes"):
        parse_bytes(text)
