"""Time windows: the file, and what counts as said inside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from scripted import ScriptedSession

from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.streams import StreamLog, run_stream
from duplex_engine.evaluation.windows import Window, read_windows, says_in_order, score_windows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", np.zeros(5 * 16_000), 16_000)
    soundfile.write(tmp_path / "b.wav", np.zeros(5 * 16_000), 16_000)
    return tmp_path


def test_csv_and_json_say_the_same(folder: Path) -> None:
    (folder / "w.csv").write_text(
        "audio,start_s,end_s,expect,category\na.wav,1,2.5,breathe in,time\nb.wav,0,1,,\n"
    )
    entries = [
        {"audio": "a.wav", "start_s": 1, "end_s": 2.5, "expect": "breathe in", "category": "time"},
        {"audio": "b.wav", "start_s": 0, "end_s": 1},
    ]
    (folder / "w.json").write_text(json.dumps(entries))
    expected = [
        Window(folder / "a.wav", 1.0, 2.5, "breathe in", "time"),
        Window(folder / "b.wav", 0.0, 1.0, "", "all"),
    ]
    assert read_windows(folder / "w.csv") == read_windows(folder / "w.json") == expected
    for name in ("w.csv", "w.json"):  # as Excel writes UTF-8
        (folder / name).write_text((folder / name).read_text(), encoding="utf-8-sig")
        assert read_windows(folder / name) == expected


def test_right_is_the_right_words_inside(folder: Path) -> None:
    n_runs = 0

    def run(audio: NDArray[np.float32]) -> StreamLog:
        nonlocal n_runs
        n_runs += 1
        # Out a little after 1.2, 1.4 and 3.2 s.
        return run_stream(ScriptedSession({5: "Breathe", 6: " in", 15: " out"}), audio)

    a = folder / "a.wav"
    windows = [
        Window(a, 1.0, 2.0, "breathe in", "time"),
        Window(a, 3.0, 4.0, "in", "time"),
        Window(a, 3.0, 4.0, "", "cue"),
        Window(folder / "b.wav", 4.0, 5.0, "", "cue"),
        Window(folder / "b.wav", 3.0, 3.5, "out", "cue"),
    ]
    score = score_windows(windows, run)
    assert n_runs == 2
    assert score.spoke.value == 4 / 5
    assert score.right.value == 3 / 5
    assert score.by_category["time"].value == 1 / 2
    assert score.by_category["cue"].value == 2 / 3
    assert score.macro_accuracy == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert score.n_outside == 2  # "breathe" and "in" of b.wav


def test_words_in_order() -> None:
    assert says_in_order(["No,", "it", "is", "TWO!"], ["no", "two"])
    assert not says_in_order(["two", "no"], ["no", "two"])
    assert not says_in_order(["no"], ["no", "no"])
    assert says_in_order(["anything"], [])
    assert says_in_order(["No", "two"], ["no", "-", "two", "!"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "expected a CSV or JSON file"),
        ("w.json", "{", "expected a CSV or JSON file"),
        ("w.json", "[3]", "entry 1: expected audio, start_s"),
        ("w.csv", "audio,start_s\na.wav,1\n", "entry 1: expected audio, start_s"),
        ("w.csv", "audio,start_s,end_s\na.wav,2,1\n", r"entry 1: expected 0 <= start_s < end_s"),
        ("w.csv", "audio,start_s,end_s\na.wav,x,1\n", "entry 1: expected audio"),
        ("w.csv", "audio,start_s,end_s\na.wav,1,2\n", "entry 1: expected a sound file, found no"),
        ("w.csv", "audio,start_s,end_s\n", "expected entries, found none"),
        ("w.json", "[]", "expected entries, found none"),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidArgument, match=f"{name}: {message}"):
        read_windows(tmp_path / name)
