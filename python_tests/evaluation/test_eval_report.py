"""Tables, JSON and pictures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scripted import episode_of, log_of

from duplex_engine.errors import BackendUnavailable
from duplex_engine.evaluation import report
from duplex_engine.evaluation.estimates import Estimate, mean, share
from duplex_engine.evaluation.harmbench import RefusalScore
from duplex_engine.evaluation.metrics import StreamScore, score_stream
from duplex_engine.evaluation.plots import plot_latencies, plot_timeline
from duplex_engine.evaluation.streams import TimedWord
from duplex_engine.evaluation.windows import WindowScore
from duplex_engine.training.stage import Event

CORRECT = Event("correct", 2.1, 10, (3, 4), 4)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=160, highlight=False)


@pytest.fixture
def scores() -> list[StreamScore]:
    said = [{10: [3, 4]}, {12: [3, 4], 30: [5]}, {10: [5]}]
    return [score_stream(log_of(tokens), episode_of([CORRECT], {})) for tokens in said]


def test_groups(console: Console, scores: list[StreamScore]) -> None:
    group = report.group_report("engine", "held", {"list": scores[:2], "see": scores[2:]})
    assert group.n_streams == 3
    assert group.alarms.per_minute.n == group.alarms_by_task["list"].per_minute.n == 1
    assert group.alarms_by_task["see"].per_minute.n == 0
    report.print_groups(console, [group])
    text = console.export_text()
    assert "engine, voices 'held', 3 streams" in text
    assert "66.7 [20.8, 93.9]" in text  # Wilson's interval of 2 of 3
    assert "false alarms: 1 in 0.5 minutes to be quiet" in text


def test_the_other_tables(console: Console) -> None:
    half = share(1, 2)
    alone = mean([0.25])
    report.print_bench(console, {"icc_backchannel": {"divergence": half, "latency, s": alone}})
    report.print_windows(console, WindowScore(half, half, {"cue": half}, 0.5, 3))
    report.print_refusals(console, RefusalScore(half, {"cyber": half}, {}))
    text = console.export_text()
    for expected in ("icc_backchannel", "0.500 [", "macro accuracy 50.0 %", "3 words outside"):
        assert expected in text
    assert "cyber" in text
    assert "0.250" in text
    assert "nan" not in text


def test_json_has_no_nan(tmp_path: Path, scores: list[StreamScore]) -> None:
    path = tmp_path / "f.json"
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    group = report.group_report("engine", "held", {"list": scores})
    report.write_json(path, {"a": nothing, "groups": [group], "n": 3})
    values = json.loads(path.read_text())
    assert values["a"] == {"value": None, "low": None, "high": None, "n": 0}
    assert values["n"] == 3
    assert values["groups"][0]["kinds"]["correct"]["right"]["n"] == 3


def test_pictures(tmp_path: Path, scores: list[StreamScore]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    plot_latencies(tmp_path / "latency.png", {"engine": scores, "harness": []})
    sound = np.sin(np.arange(10 * 16_000) * 0.1).astype(np.float32)
    log = log_of({10: [3, 4]})
    words = [TimedWord("three", 2.1, 2.1)]
    plot_timeline(tmp_path / "stream.png", sound, log, alarms_s=[3.0], heard=words, due=words)
    plot_timeline(tmp_path / "short.png", sound[:100], log)
    for name in ("latency.png", "stream.png", "short.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
            assert len(set(picture.convert("L").tobytes())) > 10  # something is drawn


def test_pictures_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'duplex_engine\[plots\]'"):
        plot_latencies(tmp_path / "latency.png", {})
