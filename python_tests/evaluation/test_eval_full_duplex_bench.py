"""Full-Duplex-Bench: the formulas on cases worked out by hand, the folders end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from scipy.spatial.distance import jensenshannon
from scripted import ScriptedSession

from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation import fdb_metrics as metrics
from duplex_engine.evaluation import full_duplex_bench as bench
from duplex_engine.evaluation.streams import StreamLog, TimedWord, run_stream

FRAME = 320  # 20 ms


def words(*timed: tuple[str, float, float]) -> list[TimedWord]:
    return [TimedWord(*word) for word in timed]


def loud(audio: NDArray[np.float32]) -> list[tuple[float, float]]:
    """A detector of voice activity for tones: runs of loud frames."""
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME)
    is_loud = np.abs(frames).max(axis=1, initial=0) > 0.05
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_loud, [False]]).astype(int)))
    return [(a * 0.02, b * 0.02) for a, b in edges.reshape(-1, 2).tolist()]


def tone(duration_s: float, *spans: tuple[float, float]) -> NDArray[np.float32]:
    time_s = np.arange(round(duration_s * 16_000)) / 16_000
    sound = np.zeros(len(time_s), np.float32)
    for start, end in spans:
        sound[(time_s >= start) & (time_s < end)] = 0.3
    return sound * np.sin(2 * np.pi * 500 * time_s).astype(np.float32)


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        ([], False),
        ([("mhm", 1.0, 1.4)], False),
        ([("i", 1.0, 1.1), ("see", 1.2, 1.3), ("right", 1.4, 1.99)], False),
        ([("well", 1.0, 2.0)], True),  # 1 s
        ([("a", 1.0, 1.1), ("b", 1.1, 1.2), ("c", 1.2, 1.3), ("d", 1.3, 1.4)], True),
    ],
)
def test_what_a_turn_is(timed: list[tuple[str, float, float]], expected: bool) -> None:
    assert metrics.took_turn(words(*timed)) is expected


def test_words_are_cut_where_the_interruption_ends() -> None:
    said = words(("a", 0.0, 1.0), ("b", 1.0, 2.0), ("c", 2.0, 3.0))
    assert metrics.words_after(said, 1.5) == words(("b", 1.5, 2.0), ("c", 2.0, 3.0))
    assert metrics.words_after(said, 1.0) == words(("b", 1.0, 2.0), ("c", 2.0, 3.0))


def test_segments_are_merged() -> None:
    assert metrics.merged([(2.0, 3.0), (0.0, 1.0), (1.5, 1.8)], 0.5) == [(0.0, 3.0)]
    assert metrics.merged([(0.0, 1.0), (1.5, 1.8)], 0.4) == [(0.0, 1.0), (1.5, 1.8)]
    assert metrics.merged([(0.0, 5.0), (1.0, 2.0)], 0.0) == [(0.0, 5.0)]


def test_backchannels() -> None:
    truth = np.ones(20)
    none = metrics.backchannels([], [], 10.0, truth)
    assert (none.took_turn, none.per_second, none.divergence) == (False, 0, 1)
    two = metrics.backchannels([(1.0, 1.5), (4.0, 4.6)], words(("mhm", 1.0, 1.5)), 10.0, None)
    assert (two.took_turn, two.per_second, two.divergence) == (False, 0.2, None)
    many = words(("a", 1.0, 1.1), ("b", 1.1, 1.2), ("c", 1.2, 1.3))
    assert metrics.backchannels([(1.0, 1.5)], many, 10.0, None).took_turn
    assert not metrics.backchannels([(1.0, 1.5), (4.0, 4.6)], many, 10.0, None).took_turn
    assert metrics.backchannels([(1.0, 2.2)], [], 10.0, None).took_turn
    long = metrics.backchannels([(1.0, 1.5), (4.0, 8.0), (9.0, 9.1)], [], 10.0, None)
    assert (long.took_turn, long.per_second) == (True, 0.1)


def test_divergence_is_scipys() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.random(30), rng.random(30)
    p[3] = 0
    assert metrics.jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q), rel=1e-12)
    assert metrics.jensen_shannon(p, p) == pytest.approx(0, abs=1e-7)


def test_divergence_compares_times() -> None:
    truth = np.full(50, 1e-10)
    truth[5:8] = 1  # 1.0 to 1.6 s of 10
    right = metrics.backchannels([(1.0, 1.5)], [], 10.0, truth).divergence
    wrong = metrics.backchannels([(7.0, 7.5)], [], 10.0, truth).divergence
    assert right is not None
    assert wrong is not None
    assert right < 0.2 < 0.8 < wrong


def test_stop_and_response_latencies() -> None:
    user = [(0.0, 2.0), (5.0, 6.0), (6.4, 7.0)]  # the last two are one
    model = [(2.5, 5.8), (9.0, 10.0)]
    assert metrics.stop_latencies(user, model) == pytest.approx([0.8])
    assert metrics.response_latencies(user, model) == pytest.approx([0.5, 2.0])
    # One start answers the latest end before it.
    assert metrics.response_latencies([(0.0, 1.0), (2.0, 3.0)], [(3.2, 4.0)]) == pytest.approx(
        [0.2]
    )
    assert metrics.stop_latencies([(0.0, 1.0)], [(1.0, 2.0)]) == []
    assert metrics.response_latencies([(0.0, 1.0)], [(1.0, 2.0)]) == []  # strictly later


def test_behaviour_by_rules() -> None:
    clean = words(("one", 1.0, 1.2), ("two", 2.0, 2.2), ("three", 3.0, 3.2), ("four", 4.0, 4.2))
    assert metrics.behaviour(clean, clean, 2.5) == "resume"
    assert metrics.behaviour(clean[:2], clean, 2.5) == "unknown"
    answer = [*clean[:2], *words(("it", 3.0, 3.1), ("is", 3.1, 3.2), ("blue", 3.2, 3.3))]
    assert metrics.behaviour(answer, clean, 2.5) == "respond"
    again = [*clean[:2], *words(("Sorry?", 3.0, 3.3))]
    assert metrics.behaviour(again, clean, 2.5) == "uncertain"


def test_speed() -> None:
    assert metrics.words_per_minute(words(("a", 0, 0.5), ("b", 0.5, 1.0))) == 120
    assert metrics.words_per_minute(words(("a", 0, 0.5))) is None
    assert metrics.words_per_minute(words(("a", 1, 1), ("b", 1, 1))) is None


def add_sample(
    root: Path, name: str, id_: str, sound: NDArray[np.float32], **labels: object
) -> Path:
    folder = root / name / id_
    folder.mkdir(parents=True)
    soundfile.write(folder / "input.wav", sound, 16_000)
    for label, value in labels.items():
        (folder / f"{label}.json").write_text(json.dumps(value))
    return folder


def says(script: dict[int, str]) -> bench.Run:
    def run(audio: NDArray[np.float32]) -> StreamLog:
        return run_stream(ScriptedSession(script), audio)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A sample or two of each kind of set; the user speaks from 1 to 3 s."""
    root = tmp_path / "data"
    sound = tone(8, (1.0, 3.0))
    add_sample(root, "synthetic_pause_handling", "1", sound)
    for id_, end_s in (("1", 3.0), ("2", 7.9)):
        label = [{"text": "[TURN-TAKING]", "timestamp": [end_s, end_s + 1]}]
        add_sample(root, "candor_turn_taking", id_, sound, turn_taking=label)
    interrupt = [{"context": "a", "interrupt": "b", "timestamp": [2.0, 3.0]}]
    add_sample(root, "synthetic_user_interruption", "1", sound, interrupt=interrupt)
    add_sample(root, "icc_backchannel", "1", sound)
    (root / "icc_backchannel" / "icc_gt_distribution.json").write_text(
        json.dumps({"1": [0.1] * 10})
    )
    for name in ("user_interruption", "user_backchannel", "talking_to_other", "background_speech"):
        metadata = {"context_text": "a", "current_turn_text": "b", "timestamps": [1.0, 3.0]}
        folder = add_sample(root, name, "1", tone(8, (1.0, 3.0)), metadata=metadata)
        soundfile.write(folder / "clean_input.wav", tone(8), 16_000)
    (root / "other").mkdir()
    return root


def test_every_set_end_to_end(data: Path, tmp_path: Path) -> None:
    # Speaks from 0.8 s, and on past the user's beginning; answers from 3.4 s.
    script = {k: f" w{k}" for k in (3, 4, 5)} | {k: f" w{k}" for k in range(16, 26)}
    out = tmp_path / "out"
    assert bench.run_bench(data, out, says(script)) == 5 + 4 * 2
    output = json.loads((out / "candor_turn_taking" / "1" / "output.json").read_text())
    assert output["text"].startswith("w3 w4 w5 w16 ")
    assert output["chunks"][0] == {
        "text": "w3",
        "timestamp": pytest.approx([0.8, 1.0], abs=0.05),
    }

    figures = bench.score(data, out, loud)
    assert figures.keys() == set(bench.SETS) - {"candor_pause_handling"}
    assert figures["synthetic_pause_handling"]["take-over rate"].value == 1
    turn_taking = figures["candor_turn_taking"]
    assert (turn_taking["take-over rate"].value, turn_taking["take-over rate"].n) == (1, 2)
    assert turn_taking["latency, s"].value == 0  # began before, which counts as 0
    interruption = figures["synthetic_user_interruption"]
    assert interruption["latency, s"].value == pytest.approx(0.4, abs=0.05)
    assert figures["icc_backchannel"]["back-channels per second"].value == pytest.approx(2 / 8)
    assert 0 < figures["icc_backchannel"]["divergence"].value < 1
    overlap = figures["user_interruption"]
    assert overlap["stop latency median, s"].value == pytest.approx(0.4, abs=0.05)
    assert overlap["response latency median, s"].value == pytest.approx(0.4, abs=0.05)
    assert overlap["resume (rules)"].value == 1  # the clean run says the same
    assert overlap["words per minute after"].value == pytest.approx(300, rel=0.05)
    assert bench.v15_average(figures) == pytest.approx(3 / 4)


def test_silence(data: Path, tmp_path: Path) -> None:
    bench.run_bench(data, tmp_path / "out", says({}))
    figures = bench.score(data, tmp_path / "out", loud)
    assert figures["synthetic_pause_handling"]["take-over rate"].value == 0
    assert figures["candor_turn_taking"]["take-over rate"].value == 0
    assert figures["candor_turn_taking"]["latency, s"].n == 0
    assert figures["icc_backchannel"]["divergence"].value == 1
    assert figures["user_backchannel"]["unknown (rules)"].value == 1
    assert bench.v15_average({"user_backchannel": figures["user_backchannel"]}) is None


def test_a_slower_micro_turn_does_not_cut_what_is_said(data: Path, tmp_path: Path) -> None:
    """4 s of words, each a little later than the last one ended, are a turn."""
    out = tmp_path / "out" / "icc_backchannel" / "1"
    out.mkdir(parents=True)
    spoken = words(*((f"w{k}", 1 + 0.25 * k, 1.2 + 0.25 * k) for k in range(16)))
    bench.write_words(out / "output.json", spoken)
    figures = bench.score_set(data / "icc_backchannel", out.parent, loud)
    assert figures["take-over rate"].value == 1
    assert figures["back-channels per second"].value == 0


def test_a_system_that_speaks_in_sound(data: Path, tmp_path: Path) -> None:
    """output.wav decides when the model speaks; the files may be another system's."""
    out = tmp_path / "out" / "user_interruption" / "1"
    out.mkdir(parents=True)
    chunk = {"text": " four ", "timestamp": [4.0, None]}
    for name in ("output", "clean_output"):
        (out / f"{name}.json").write_text(json.dumps({"text": "four", "chunks": [chunk]}))
    soundfile.write(out / "output.wav", tone(8, (2.0, 2.5), (4.5, 5.0)), 16_000)
    figures = bench.score_set(data / "user_interruption", out.parent, loud)
    assert figures["stop latency median, s"].value == pytest.approx(0.5)
    assert figures["response latency median, s"].value == pytest.approx(1.5)
    assert bench.read_words(out / "output.json") == words(("four", 4.0, 4.0))


def test_damaged_data_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="expected a folder of Full-Duplex-Bench sets"):
        bench.run_bench(data / "other", tmp_path, says({}))
    bench.run_bench(data, tmp_path / "out", says({}))
    (data / "candor_turn_taking" / "2" / "turn_taking.json").write_text("[]")
    with pytest.raises(InvalidArgument, match=r"2/turn_taking\.json: expected 'timestamp'"):
        bench.score(data, tmp_path / "out", loud)
    (tmp_path / "out" / "candor_turn_taking" / "1" / "output.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"1/output\.json: expected 'chunks'"):
        bench.score(data, tmp_path / "out", loud)
    (tmp_path / "out" / "candor_turn_taking" / "1" / "output.json").unlink()
    with pytest.raises(InvalidArgument, match=r"1/output\.json: expected a JSON file"):
        bench.score(data, tmp_path / "out", loud)
