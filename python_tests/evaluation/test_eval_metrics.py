"""How outputs are judged against what an episode expects, case by case."""

from __future__ import annotations

import pytest
from scripted import COMPUTE_S, episode_of, log_of

from duplex_engine.evaluation.metrics import (
    StreamScore,
    score_alarms,
    score_kinds,
    score_stream,
)
from duplex_engine.training.stage import Event

NO, TWO, SIX, RED = 10, 11, 12, 13
CORRECT = Event("correct", 2.1, 10, (NO, TWO), 4)  # due in micro-turn 10, which ends at 2.2 s


def outcomes(score: StreamScore) -> list[str]:
    return [event.outcome for event in score.events]


def test_a_hit_is_dated_by_its_first_token() -> None:
    score = score_stream(log_of({10: [NO, TWO]}), episode_of([CORRECT]))
    (event,) = score.events
    assert (event.kind, event.outcome) == ("correct", "right")
    assert event.latency_s == pytest.approx(2.2 + COMPUTE_S - 2.1)
    assert score.alarms_s == ()


def test_a_hit_may_come_late_and_in_two_micro_turns() -> None:
    score = score_stream(log_of({13: [NO], 14: [TWO]}), episode_of([CORRECT]))
    assert outcomes(score) == ["right"]
    assert score.events[0].latency_s == pytest.approx(0.7 + COMPUTE_S)
    assert score.alarms_s == ()


@pytest.mark.parametrize(
    ("said", "outcome", "n_alarms"),
    [
        ({}, "missed", 0),
        ({10: [NO, SIX]}, "wrong", 0),
        ({14: [NO, TWO]}, "missed", 1),  # after its window
        ({30: [NO, TWO]}, "missed", 1),
        ({7: [NO, TWO]}, "early", 0),
        ({2: [RED], 3: [RED], 10: [NO, TWO]}, "right", 1),  # adjacent ones are one alarm
        ({2: [RED], 5: [RED], 10: [NO, TWO]}, "right", 2),
        ({10: [NO, TWO], 12: [NO, TWO]}, "right", 1),  # said twice: one too many
    ],
)
def test_outcomes(said: dict[int, list[int]], outcome: str, n_alarms: int) -> None:
    outputs: dict[int, list[int]] = {}  # so that only the event accounts for tokens
    score = score_stream(log_of(said), episode_of([CORRECT], outputs))
    assert outcomes(score) == [outcome]
    assert len(score.alarms_s) == n_alarms


def test_grace_forgives_being_late_and_nothing_else() -> None:
    late = log_of({20: [NO, TWO]})
    assert outcomes(score_stream(late, episode_of([CORRECT]))) == ["missed"]
    score = score_stream(late, episode_of([CORRECT]), grace_turns=10)
    assert outcomes(score) == ["right"]
    assert score.events[0].latency_s == pytest.approx(2.1 + COMPUTE_S)
    wrong = score_stream(log_of({20: [NO, SIX]}), episode_of([CORRECT]), grace_turns=10)
    assert outcomes(wrong) == ["wrong"]


def test_adjacent_mistakes_are_told_apart() -> None:
    second = Event("correct", 2.5, 12, (NO, SIX), 4)
    score = score_stream(log_of({10: [NO, TWO], 12: [NO, SIX]}), episode_of([CORRECT, second]))
    assert outcomes(score) == ["right", "right"]
    score = score_stream(log_of({12: [NO, SIX]}), episode_of([CORRECT, second]))
    assert outcomes(score) == ["missed", "right"]


def test_a_right_word_wants_silence() -> None:
    right = Event("right", 1.0, 5, (), 2)
    assert outcomes(score_stream(log_of({}), episode_of([right]))) == ["right"]
    score = score_stream(log_of({6: [NO, TWO]}), episode_of([right]))
    assert outcomes(score) == ["wrong"]
    assert score.alarms_s == pytest.approx([1.4 + COMPUTE_S])
    # What belongs to another event does not disturb it.
    near = Event("correct", 1.2, 6, (NO, TWO), 4)
    assert outcomes(score_stream(log_of({6: [NO, TWO]}), episode_of([right, near]))) == [
        "right",
        "right",
    ]


def test_an_answer_in_the_pause_is_early() -> None:
    pause = Event("pause", 1.4, 7, (), 3)
    answer = Event("answer", 2.6, 13, (TWO,), 4)
    score = score_stream(log_of({8: [TWO]}), episode_of([pause, answer]))
    assert outcomes(score) == ["wrong", "early"]
    assert score.alarms_s == ()
    assert outcomes(score_stream(log_of({13: [TWO]}), episode_of([pause, answer]))) == [
        "right",
        "right",
    ]


RECITED = {turn: [turn] for turn in range(10, 20)}
START = Event("start", 1.94, 10, (10,), 4)


def test_a_long_answer_is_expected_as_a_whole() -> None:
    score = score_stream(log_of(RECITED), episode_of([START], RECITED))
    assert outcomes(score) == ["right"]
    assert score.alarms_s == ()
    late = {turn + 1: tokens for turn, tokens in RECITED.items()}
    assert score_stream(log_of(late), episode_of([START], RECITED)).alarms_s == ()


def test_a_murmur_must_not_stop_it() -> None:
    ignore = Event("ignore", 2.9, 14, (), 2)
    assert outcomes(score_stream(log_of(RECITED), episode_of([START, ignore], RECITED))) == [
        "right",
        "right",
    ]
    stopped = {turn: tokens for turn, tokens in RECITED.items() if turn < 14}
    assert outcomes(score_stream(log_of(stopped), episode_of([START, ignore], RECITED))) == [
        "right",
        "missed",
    ]


def test_a_stop_is_heard_within_400_ms() -> None:
    expected = {turn: tokens for turn, tokens in RECITED.items() if turn < 15}
    stop = Event("stop", 2.9, 15, (), 4)  # the first silent micro-turn ends at 3.2 s
    episode = episode_of([START, stop], expected)

    def stopped(last: int) -> StreamScore:
        return score_stream(
            log_of({turn: tokens for turn, tokens in RECITED.items() if turn <= last}), episode
        )

    at_once = stopped(14)
    assert outcomes(at_once) == ["right", "right"]
    assert at_once.events[1].latency_s == 0
    assert outcomes(stopped(15)) == ["right", "right"]
    assert stopped(15).events[1].latency_s == pytest.approx(0.3 + COMPUTE_S)
    assert outcomes(stopped(16)) == ["right", "wrong"]
    assert outcomes(stopped(19)) == ["right", "wrong"]
    assert stopped(16).alarms_s == ()  # counted once


def test_time_to_be_quiet_leaves_out_the_windows() -> None:
    assert score_stream(log_of({}), episode_of([CORRECT])).quiet_s == pytest.approx(46 * 0.2)
    assert score_stream(log_of({}), episode_of([START], RECITED)).quiet_s == pytest.approx(8.0)


def test_alarms_in_correct_speech_are_counted_apart() -> None:
    episode = episode_of([CORRECT])
    episode.labels[4 * 20 : 4 * 20 + 4] = 5  # a word ended before micro-turn 20
    episode.labels[4 * 8] = 5  # the windows of events are left out
    score = score_stream(log_of({20: [RED], 40: [RED]}), episode)
    assert score.speech_s == pytest.approx((5 + 4) * 0.2)  # 18 to 22, 6 to 9
    assert (len(score.alarms_s), score.n_alarms_in_speech) == (2, 1)
    alarms = score_alarms([score])
    assert alarms.per_speech_minute.value == pytest.approx(60 / 1.8)
    assert alarms.speech_minutes == pytest.approx(1.8 / 60)


def test_figures_by_kind() -> None:
    streams = [
        score_stream(log_of({10: [NO, TWO]}), episode_of([CORRECT, Event("right", 1, 5, (), 2)])),
        score_stream(log_of({11: [NO, TWO], 30: [RED]}), episode_of([CORRECT])),
        score_stream(log_of({10: [NO, SIX]}), episode_of([CORRECT], {})),
        score_stream(log_of({}), episode_of([CORRECT])),
    ]
    kinds = score_kinds(streams)
    assert kinds.keys() == {"correct", "right"}
    correct = kinds["correct"]
    assert (correct.right.value, correct.wrong.value, correct.right.n) == (0.5, 0.25, 4)
    assert correct.latency_median_s.value == pytest.approx(0.2 + COMPUTE_S)
    assert correct.latency_median_s.n == 2
    assert kinds["right"].right.n == 1
    alarms = score_alarms(streams)
    assert alarms.minutes == pytest.approx(4 * 46 * 0.2 / 60)
    assert alarms.per_minute.n == 1
    assert alarms.per_minute.value == pytest.approx(1 / alarms.minutes)
