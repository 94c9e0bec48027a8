"""The harness with a voice-activity detector, and the detector itself."""

from __future__ import annotations

from importlib.resources import as_file, files
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scripted import ScriptedSession, skip_without_detector

from duplex_engine.errors import BackendUnavailable
from duplex_engine.evaluation.silero import (
    WINDOW_S,
    SpeechProbability,
    VadOptions,
    speech_segments,
)
from duplex_engine.evaluation.streams import Audio, read_audio
from duplex_engine.evaluation.vad_baseline import (
    HarnessOptions,
    UserTurn,
    run_turn_by_turn,
    user_turns,
)

LATE = HarnessOptions(min_speech_s=0.1, end_silence_s=0.6, lead_s=0.2)


def probabilities(duration_s: float, *spans: tuple[float, float]) -> NDArray[np.float32]:
    """1 in the windows that lie in a span, else 0."""
    start_s = np.arange(round(duration_s / WINDOW_S)) * WINDOW_S
    return np.any([(start_s >= a) & (start_s + WINDOW_S <= b) for a, b in spans], axis=0).astype(
        np.float32
    )


def test_segments_of_speech() -> None:
    found = speech_segments(probabilities(6, (1, 2), (2.05, 3), (4, 4.1)), VadOptions(pad_s=0))
    ((start, end),) = found  # the gap is too short, and so is the last one
    assert (start, end) == pytest.approx((1, 3), abs=2 * WINDOW_S)
    two = speech_segments(probabilities(6, (1, 2), (2.5, 6)))
    assert two[0] == pytest.approx((0.97, 2.03), abs=2 * WINDOW_S)
    assert two[1] == pytest.approx((2.47, 6), abs=2 * WINDOW_S)
    assert speech_segments(probabilities(6, (9, 10))) == []


def test_between_the_thresholds_speech_goes_on() -> None:
    values = probabilities(4, (1, 2), (2.5, 3))
    values[values == 0] = 0.4
    ((_, end),) = speech_segments(values)
    assert end == pytest.approx(4, abs=2 * WINDOW_S)


def test_segments_are_those_of_the_package() -> None:
    skip_without_detector()
    package = pytest.importorskip("silero_vad.utils_vad", reason="the extra `eval` lacks torch")
    rng = np.random.default_rng(0)
    for _ in range(200):
        pieces = [np.full(rng.integers(1, 12), rng.random(), np.float32) for _ in range(12)]
        values = np.concatenate(pieces)
        expected = package.get_speech_timestamps_from_probs(values.tolist())
        found = [(start * 16_000, end * 16_000) for start, end in speech_segments(values)]
        assert found == [pytest.approx((s["start"], s["end"]), abs=1) for s in expected]


def test_turns_of_the_user() -> None:
    (turn,) = user_turns(probabilities(6, (1, 2), (2.4, 3)), LATE)
    assert turn.start_s == pytest.approx(0.8, abs=2 * WINDOW_S)
    assert turn.noticed_s == pytest.approx(1.1, abs=2 * WINDOW_S)
    assert turn.end_s == pytest.approx(3.6, abs=2 * WINDOW_S)
    first, second = user_turns(probabilities(6, (1, 2), (3, 6)), LATE)
    assert first.end_s < second.noticed_s
    assert second.end_s == pytest.approx(6, abs=2 * WINDOW_S)  # cut off by the end
    assert user_turns(probabilities(6, (1, 1.05)), LATE) == []


def test_turns_depend_on_the_past_only() -> None:
    values = probabilities(8, (1, 2), (3, 4), (6, 7))
    whole = user_turns(values, LATE)
    for n in range(0, len(values), 20):
        ended = [turn for turn in user_turns(values[:n], LATE) if turn.end_s < n * WINDOW_S]
        assert ended == whole[: len(ended)]


AUDIO: Audio = np.arange(20 * 3200, dtype=np.float32)  # 4 s, every sample its own number
TURN = UserTurn(0.4, 0.7, 1.6)  # six micro-turns of sound


def test_the_answer_is_heard_after_the_decision() -> None:
    # It speaks in the middle of the user's turn and after it; both are heard only from 1.6 s on.
    session = ScriptedSession({2: "no", 6: " two", 7: " three"})
    log = run_turn_by_turn(session, AUDIO, [TURN])
    assert [w.text for w in log.words()] == ["no", "two", "three"]
    assert [turn.emitted_s for turn in log.turns] == pytest.approx([1.6, 1.8, 2.0], abs=0.05)
    assert all(b.emitted_s - a.emitted_s >= 0.2 - 1e-9 for a, b in pairwise(log.turns))
    assert log.duration_s == pytest.approx(4.0)
    # It heard just the turn, then silence until it had finished.
    heard = np.concatenate([given["audio"] for given in session.given])  # type: ignore[arg-type]
    np.testing.assert_array_equal(heard[: 6 * 3200], AUDIO[2 * 3200 : 8 * 3200])
    assert not heard[6 * 3200 :].any()
    assert len(session.given) == 9


def test_it_waits_for_an_answer_and_gives_up() -> None:
    session = ScriptedSession({9: "slow"})
    assert run_turn_by_turn(session, AUDIO, [TURN]).text == "slow"
    silent = ScriptedSession()
    assert run_turn_by_turn(silent, AUDIO, [TURN]).turns == ()
    assert len(silent.given) == 6 + HarnessOptions().answer_turns
    endless = ScriptedSession(dict.fromkeys(range(1000), "a"))
    run_turn_by_turn(endless, AUDIO, [TURN], options=HarnessOptions(max_answer_turns=8))
    assert len(endless.given) == 6 + 8


def test_the_user_cuts_the_answer_off() -> None:
    session = ScriptedSession({k: f" {k}" for k in range(6, 16)})
    turns = [TURN, UserTurn(2.2, 2.35, 3.0)]
    words = [w.text for w in run_turn_by_turn(session, AUDIO, turns).words()]
    # At 1.6, 1.8, 2.0 and 2.2 s; noticed at 2.35 s.
    assert words[:4] == ["6", "7", "8", "9"]
    assert len(words) < 10


def test_what_enters_besides_waits_for_a_turn() -> None:
    session = ScriptedSession()
    early, late = np.zeros((40, 39, 3), np.uint8), np.ones((40, 39, 3), np.uint8)
    run_turn_by_turn(
        session,
        AUDIO,
        [TURN],
        images={0: early, 1: late, 5: early, 19: late},
        typed={1: [7], 2: [8]},
        results={19: [9]},
    )
    # The turn begins in micro-turn 2 of the recording.
    assert session.given[0]["image"] is late
    assert session.given[3]["image"] is early
    assert [given["text"] for given in session.given[:3]] == [[7], [8], None]
    assert all(given["result"] is None for given in session.given)  # it came after the turn


def test_the_detector_hears_a_voice_and_nothing_in_noise() -> None:
    skip_without_detector()
    detector = SpeechProbability()
    with as_file(files("duplex_engine") / "examples" / "speech.flac") as path:
        speech = read_audio(path)
    silence = np.zeros(16_000, np.float32)
    segments = speech_segments(detector.of(np.concatenate([silence, speech, silence])))
    assert segments
    assert segments[0][0] > 0.8
    assert segments[-1][1] < 2.2 + len(speech) / 16_000
    assert sum(end - start for start, end in segments) > 0.5 * len(speech) / 16_000
    noise = np.random.default_rng(0).normal(0, 0.05, 32_000).astype(np.float32)
    assert speech_segments(detector.of(noise)) == []
    np.testing.assert_array_equal(detector.of(speech), detector.of(speech))


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'duplex_engine\[eval\]'"):
        SpeechProbability()
