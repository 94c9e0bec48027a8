"""A stream through a session: the clock, the words, the way of a result back into the stream."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scripted import ScriptedSession, episode_of

from duplex_engine import Engine
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.streams import read_audio, run_episode, run_stream
from duplex_engine.models import write_random_checkpoint

SECOND = np.zeros(16_000, np.float32)


def test_output_is_dated_at_the_end_of_its_micro_turn() -> None:
    log = run_stream(ScriptedSession({1: "one", 3: " two"}), SECOND)
    assert log.duration_s == pytest.approx(1.0)
    assert [turn.token_ids for turn in log.turns] == [(), (1,), (), (1,), ()]
    one, two = log.words()
    assert (one.text, two.text) == ("one", "two")
    assert 0.4 <= one.start_s < 0.45
    assert 0.8 <= two.start_s < 0.85
    assert one.end_s - one.start_s == pytest.approx(0.2)


def test_an_engine_too_slow_falls_behind() -> None:
    session = ScriptedSession({4: "late"}, listen=lambda *_: time.sleep(0.25))
    log = run_stream(session, SECOND)
    assert log.turns[0].emitted_s >= 0.2 + 0.25
    assert log.turns[4].emitted_s >= 0.2 + 5 * 0.25  # each had to wait for those before
    assert all(turn.compute_s >= 0.25 for turn in log.turns)


def test_realtime_waits_for_the_sound() -> None:
    start = time.perf_counter()
    log = run_stream(ScriptedSession(), SECOND[:6400], realtime=True)
    assert time.perf_counter() - start >= 0.4
    assert log.turns[1].emitted_s >= 0.4


def test_words_share_a_micro_turn_and_cross_its_end() -> None:
    log = run_stream(ScriptedSession({0: "no mon", 1: "day then", 2: " we go"}), SECOND)
    words = log.words()
    assert [w.text for w in words] == ["no", "monday", "then", "we", "go"]
    assert words[1].start_s == pytest.approx(words[0].start_s + 0.1)
    assert words[1].end_s == pytest.approx(words[2].start_s)
    assert log.text == "no monday then we go"


def test_the_last_micro_turn_is_filled_up() -> None:
    session = ScriptedSession()
    run_stream(session, np.ones(3300, np.float32))
    (first, last) = (given["audio"] for given in session.given)
    assert isinstance(first, np.ndarray)
    assert isinstance(last, np.ndarray)
    assert len(first) == len(last) == 3200
    assert last.sum() == 100


def test_what_enters_besides_comes_in_its_micro_turn() -> None:
    session = ScriptedSession()
    picture = np.zeros((40, 39, 3), np.uint8)
    episode = episode_of([], n_turns=4)
    episode.images[1] = picture
    episode.typed[2] = [5, 6]
    episode.results[3] = [7]
    run_episode(session, episode)
    assert [given["image"] is picture for given in session.given] == [False, True, False, False]
    assert [given["text"] for given in session.given] == [None, None, [5, 6], None]
    assert [given["result"] for given in session.given] == [None, None, None, [7]]


def test_an_agents_result_enters_when_it_is_there() -> None:
    asked: list[str] = []

    def agent(request: str) -> str:
        asked.append(request)
        return f"{request} found"

    session = ScriptedSession({0: "delegate: weather", 1: "delegate: price"})
    log = run_stream(session, np.zeros(8 * 3200, np.float32), agent=agent, agent_delay_s=0.3)
    assert asked == ["weather", "price"]
    assert log.turns[0].delegations == ("weather",)
    # Asked a little after 0.2 s, there a little after 0.5 s: micro-turn 3 begins at 0.6 s.
    assert [given["result"] for given in session.given] == [
        *[None] * 3,
        "weather found",
        "price found",
        *[None] * 3,
    ]


@pytest.mark.core
def test_a_real_session_gives_the_same_log_twice(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 10 * 3200).astype(np.float32)
    with Engine.load(write_random_checkpoint(tmp_path, seed=2), threads=1) as engine:
        logs = []
        for _ in range(2):
            with engine.open_session() as session:
                logs.append(run_stream(session, sound))
    first, second = logs
    assert [t.token_ids for t in first.turns] == [t.token_ids for t in second.turns]
    assert first.text == second.text != ""


def test_sound_files_become_16_khz_mono(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full((48_000, 2), 0.25), 48_000)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert samples.shape == (16_000,)
    assert samples[8000] == pytest.approx(0.25, abs=1e-3)
    with pytest.raises(InvalidArgument, match=r"none\.wav: expected a sound file, .*No such file"):
        read_audio(tmp_path / "none.wav")
