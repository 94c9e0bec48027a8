"""A showcase on disk, and what became of everything due in it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.showcase import RECORDING, SCRIPT, react, read_showcase
from duplex_engine.evaluation.streams import StreamLog, TurnLog

SCRIPT_VALUES = {
    "source": "nobody",
    "heard": [["five", 2.1], ["paris", 4.0]],
    "due": [
        {"kind": "correct", "why": "five", "time_s": 2.1, "say": "no four"},
        {"kind": "delegate", "why": "paris", "time_s": 4.0, "say": "weather paris"},
    ],
    "background": {"weather paris": "sunny"},
    "background_s": 1.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / RECORDING, np.zeros(16_000 * 6, np.float32), 16_000)
    (tmp_path / SCRIPT).write_text(json.dumps(SCRIPT_VALUES))
    return tmp_path


def log_of(said: dict[int, str], asked: dict[int, str]) -> StreamLog:
    turns = [
        TurnLog(k, 0.2 * (k + 1), 0.0, (), said.get(k, ""), (asked[k],) if k in asked else ())
        for k in range(30)
    ]
    return StreamLog(tuple(turns), 6.0)


@pytest.mark.parametrize(
    ("said", "asked", "results", "expected"),
    [
        ({11: "no four"}, {20: "weather paris"}, {}, [0.3, 0.2]),
        ({11: "no", 12: " four"}, {}, {}, [0.3, None]),  # in two micro-turns
        ({9: "no four"}, {20: "weather rome"}, {}, [None, None]),  # before its moment; wrong
        ({18: "no four"}, {}, {}, [None, None]),  # too late
        ({25: "sunny"}, {}, {25: "sunny"}, [None, None, 0.2]),
    ],
)
def test_reactions(
    folder: Path,
    said: dict[int, str],
    asked: dict[int, str],
    results: dict[int, str],
    expected: list[float | None],
) -> None:
    reactions = react(read_showcase(folder), log_of(said, asked), results)
    assert [r.latency_s and round(r.latency_s, 6) for r in reactions] == expected


def test_heard_words_have_their_ends(folder: Path) -> None:
    assert [(word.text, word.end_s) for word in read_showcase(folder).heard] == [
        ("five", 2.1),
        ("paris", 4.0),
    ]


def test_damaged_showcases_are_refused(folder: Path) -> None:
    (folder / SCRIPT).write_text(json.dumps(SCRIPT_VALUES | {"background_s": "soon"}))
    with pytest.raises(InvalidArgument, match=r"showcase\.json: expected the script of a showcase"):
        read_showcase(folder)
    (folder / SCRIPT).unlink()
    with pytest.raises(InvalidArgument, match="expected the script of a showcase"):
        read_showcase(folder)
    (folder / SCRIPT).write_text(json.dumps(SCRIPT_VALUES))
    (folder / RECORDING).unlink()
    with pytest.raises(InvalidArgument, match="expected a sound file"):
        read_showcase(folder)
