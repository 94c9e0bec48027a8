"""Sound that asks for nothing: that each condition is what it says, and that alarms are counted."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from scripted import ScriptedSession
from toy_bank import toy_bank

from duplex_engine.evaluation import quiet
from duplex_engine.evaluation.quiet import CONDITIONS, quiet_alarms
from duplex_engine.training.stage import Stage

N_TURNS = 40
HELD_BACK = {"music"}  # the toy bank has none


class ScriptedEngine:
    """Opens sessions that say one word in their third micro-turn."""

    def __init__(self) -> None:
        self.sessions: list[ScriptedSession] = []

    def open_session(self) -> Any:
        self.sessions.append(ScriptedSession({2: "no"}))
        return nullcontext(self.sessions[-1])


def test_every_word_is_an_alarm() -> None:
    engine: Any = ScriptedEngine()
    figures = quiet_alarms(engine, toy_bank(), "train", n_streams=2, n_turns=N_TURNS)
    assert list(figures) == [name for name in CONDITIONS if name not in HELD_BACK]
    for alarms in figures.values():
        assert alarms.minutes == pytest.approx(2 * N_TURNS * 0.2 / 60)
        assert alarms.per_minute.n == 2
    rates = {given[0]["sample_rate"] for given in (s.given for s in engine.sessions)}
    assert rates == {16_000, 8_000}
    assert {len(s.given) for s in engine.sessions} == {N_TURNS}
    for session in engine.sessions:
        (n,) = {len(given["audio"]) for given in session.given}
        assert n * 5 == session.given[0]["sample_rate"]


@pytest.mark.parametrize("name", [name for name in CONDITIONS if name not in HELD_BACK])
def test_a_condition_sounds_as_it_says(name: str) -> None:
    stage = Stage(toy_bank(), np.random.default_rng(0), "train")
    (audio,) = quiet._stream(stage, CONDITIONS[name], N_TURNS)
    assert len(audio) == N_TURNS * CONDITIONS[name].sample_rate // 5
    peak = np.abs(audio).max()
    assert (peak < 0.02) == (name == "silence")
    at_peak = np.mean(np.abs(audio) > 0.999 * peak)
    assert (at_peak > 0.05) == (name == "right lists, clipped")


def test_right_lists_have_no_mistake() -> None:
    stage = Stage(toy_bank(), np.random.default_rng(3), "train")
    assert quiet._right_list(stage)
    said = [word for word, _ in stage._word_ends]
    assert said in [list(words) for words in quiet.LISTS] or " ".join(said) in " ".join(
        quiet.phrases.SENTENCES
    )
