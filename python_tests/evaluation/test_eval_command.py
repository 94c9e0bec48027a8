"""`duplex-engine eval`, end to end on a bank of tones and a model that knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scripted import log_of, skip_without_detector
from typer.testing import CliRunner, Result

from duplex_engine import Engine
from duplex_engine.cli import app
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.held_out import Plan, engine_system, held_out_streams, open_bank
from duplex_engine.evaluation.metrics import score_alarms, score_kinds
from duplex_engine.evaluation.streams import StreamLog
from duplex_engine.models import write_random_checkpoint
from duplex_engine.training import phrases
from duplex_engine.training.episodes import MIX, TASKS
from duplex_engine.training.stage import Episode

WORD_S = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One held-out voice that says everything in the same tone, 0.3 s a word."""
    folder = tmp_path_factory.mktemp("bank")
    texts = [*phrases.WORDS, *phrases.PHRASES]
    n_samples = round(max(len(text.split()) for text in texts) * WORD_S * 16_000)
    tone = 8000 * np.sin(2 * np.pi * 300 * np.arange(n_samples) / 16_000)
    tone.astype("<i2").tofile(folder / "audio.i16")
    with (folder / "clips.jsonl").open("w") as index:
        for text in dict.fromkeys(texts):
            words = text.split()
            clip = {
                "text": text,
                "words": [[w, i * WORD_S, (i + 1) * WORD_S] for i, w in enumerate(words)],
                "voice": "tone",
                "group": "held",
                "kind": "word" if text in phrases.WORDS else "phrase",
                "offset": 0,
                "n": round(len(words) * WORD_S * 16_000),
            }
            index.write(json.dumps(clip) + "\n")
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_help_teaches_by_example() -> None:
    assert "duplex-engine eval " in invoke("--help").stdout


def test_held_out_streams_are_run_scored_and_written(bank: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    out = tmp_path / "out"
    options = ["--tasks", "list,see", "--streams", 2, "--turns", 40, "--out", out]
    result = invoke("reference", "--bank", bank, *options)
    assert result.exit_code == 0, result.output
    assert "engine, voices 'held', 4 streams" in result.stdout
    (group,) = json.loads((out / "figures.json").read_text())["held_out"]
    assert (group["system"], group["group"], group["n_streams"]) == ("engine", "held", 4)
    assert {"right", "see"} <= group["kinds"].keys()
    assert group["alarms_by_task"].keys() == {"list", "see"}
    names = {path.name for path in out.glob("*.png")}
    assert names == {"timeline_held_list.png", "timeline_held_see.png", "latency_held.png"}


def test_the_baseline_hears_the_same_streams(bank: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    skip_without_detector()
    options = ["--tasks", "list", "--streams", 1, "--turns", 40, "--out", tmp_path, "--baseline"]
    result = invoke("reference", "--bank", bank, *options, "--augmented", "--grace", 10)
    assert result.exit_code == 0, result.output
    engine, harness = json.loads((tmp_path / "figures.json").read_text())["held_out"]
    assert (engine["system"], harness["system"]) == ("engine", "harness")
    count = {kind: figures["right"]["n"] for kind, figures in engine["kinds"].items()}
    assert count == {kind: figures["right"]["n"] for kind, figures in harness["kinds"].items()}


def test_a_seed_decides_the_streams(checkpoint: Path, bank: Path) -> None:
    with Engine.load(checkpoint, threads=1) as engine:

        def streams(seed: int) -> list[bytes]:
            plan = Plan(("list", "mix"), n_streams=2, n_turns=30, seed=seed)
            found = held_out_streams(engine_system(engine), open_bank(bank), "held", plan)
            return [stream.episode.audio.tobytes() for stream in found]

        first = streams(0)
        assert first == streams(0)
        assert len({*first, *streams(1)}) == 8


def test_the_other_benchmarks_through_the_command(checkpoint: Path, tmp_path: Path) -> None:
    skip_without_detector()
    sample = tmp_path / "fdb" / "synthetic_pause_handling" / "1"
    sample.mkdir(parents=True)
    sound = np.random.default_rng(0).normal(0, 0.1, 32_000)
    soundfile.write(sample / "input.wav", sound, 16_000)
    windows = tmp_path / "windows.csv"
    windows.write_text(f"audio,start_s,end_s\n{sample / 'input.wav'},0.5,1.5\n")
    behaviours = tmp_path / "behaviours.csv"
    behaviours.write_text("Behavior,SemanticCategory\nba do,one\n")
    out = tmp_path / "out"
    result = invoke(
        checkpoint,
        *("--fdb", tmp_path / "fdb", "--windows", windows, "--behaviours", behaviours),
        *("--out", out),
    )
    assert result.exit_code == 0, result.output
    figures = json.loads((out / "figures.json").read_text())
    assert figures["fdb"]["runs"] == 1
    assert figures["fdb"]["sets"]["synthetic_pause_handling"]["take-over rate"]["n"] == 1
    assert figures["windows"]["spoke"]["n"] == 1
    assert figures["behaviours"]["refused"]["value"] == 0
    written = out / "fdb" / "synthetic_pause_handling" / "1" / "output.json"
    assert json.loads(written.read_text()).keys() == {"text", "chunks"}
    assert not (sample / "output.json").exists()  # the data stay as they are


def test_quiet_streams_and_a_choice_of_voices(bank: Path, tmp_path: Path) -> None:
    options = ["--tasks", "list", "--streams", 1, "--turns", 10, "--out", tmp_path]
    result = invoke("reference", "--bank", bank, *options, "--quiet", 1, "--voices", "to*")
    assert result.exit_code == 0, result.output
    assert "sound that asks for nothing" in result.stdout
    quiet = json.loads((tmp_path / "figures.json").read_text())["quiet"]["held"]
    assert {"silence", "noises", "right lists at 8 kHz"} <= quiet.keys()
    assert quiet["silence"]["minutes"] == pytest.approx(10 * 0.2 / 60)
    result = invoke("reference", "--bank", bank, *options, "--voices", "nobody/*")
    assert result.exit_code == 2
    assert "expected voices of group 'held'" in result.stderr


def test_without_matplotlib_there_are_figures_all_the_same(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duplex_engine.cli.eval.find_spec", lambda _: None)
    options = ["--tasks", "list", "--streams", 1, "--turns", 10, "--out", tmp_path]
    result = invoke("reference", "--bank", bank, *options)
    assert result.exit_code == 0, result.output
    assert "no pictures: pip install 'duplex_engine[plots]'" in result.stdout
    assert not list(tmp_path.glob("*.png"))


AGENT = """
TOOLS = {"track": lambda order: "on its way"}
def agent(request, tools):
    return tools.call("track", order=request)
"""


def test_tool_calls_through_the_command(checkpoint: Path, tmp_path: Path) -> None:
    example = tmp_path / "v3" / "1_abc"
    example.mkdir(parents=True)
    soundfile.write(example / "input.wav", np.zeros(16_000), 16_000)
    calls = [{"name": "track", "arguments": {"order": "A1"}}]
    (example / "metadata.json").write_text(json.dumps({"expected_tool_calls": calls}))
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT)
    out = tmp_path / "out"
    result = invoke(checkpoint, "--tools", tmp_path / "v3", "--agent", agent, "--out", out)
    assert result.exit_code == 0, result.output
    assert "selection F1" in result.stdout
    passed = json.loads((out / "figures.json").read_text())["tools"]["pass_at_1"]
    assert (passed["value"], passed["n"]) == (0.0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fdb", "x", "--quiet", 3], "choose streams of --bank, found no --bank"),
        (["--tools", "x"], "expected --tools and --agent together"),
        (["--tools", "x", "--agent", "nowhere.py"], "nowhere.py: expected a Python file that runs"),
    ],
)
def test_options_that_belong_together(
    checkpoint: Path, tmp_path: Path, arguments: list[object], message: str
) -> None:
    result = invoke(checkpoint, *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr


def test_other_tokens_than_those_of_the_streams_are_refused(
    checkpoint: Path, bank: Path, tmp_path: Path
) -> None:
    result = invoke(checkpoint, "--bank", bank, "--out", tmp_path)
    assert result.exit_code == 2
    assert "bank: expected a checkpoint with micro-turns of 200 ms and the 304" in result.stderr


def write_windows(folder: Path) -> Path:
    soundfile.write(folder / "a.wav", np.zeros(16_000), 16_000)
    path = folder / "windows.csv"
    path.write_text("audio,start_s,end_s,category\na.wav,0,1,[cue]\n")
    return path


@pytest.mark.parametrize(
    "wrong",
    [
        ["--behaviours", "nowhere.csv"],
        ["--fdb", "nowhere"],
        ["--tools", "nowhere", "--agent", "nowhere.py"],
        ["--bank", "BANK", "--group", "held", "--group", "human"],
    ],
)
def test_nothing_is_run_before_all_inputs_are_read(
    bank: Path, tmp_path: Path, wrong: list[str]
) -> None:
    named = [option.replace("BANK", str(bank)) for option in wrong]
    result = invoke("reference", "--windows", write_windows(tmp_path), *named, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_a_part_that_fails_leaves_the_figures_of_those_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InvalidArgument("too long")

    monkeypatch.setattr("duplex_engine.evaluation.harmbench.score", fail)
    behaviours = tmp_path / "behaviours.csv"
    behaviours.write_text("Behavior\nba do\n")
    options = ["--windows", write_windows(tmp_path), "--behaviours", behaviours]
    result = invoke(checkpoint, *options, "--out", tmp_path)
    assert result.exit_code == 2
    assert "[cue]" in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["windows"]["spoke"]["n"] == 1


def test_a_model_that_does_what_is_expected_is_perfect(bank: Path) -> None:
    """The composer's targets and the judge's rules agree, for every task and kind of event."""

    def perfect(episode: Episode) -> StreamLog:
        return log_of(episode.outputs, episode.n_turns)

    plan = Plan((*TASKS, MIX), n_streams=4)
    scores = [stream.score for stream in held_out_streams(perfect, open_bank(bank), "held", plan)]
    kinds = score_kinds(scores)
    assert {"correct", "right", "answer", "pause", "stop", "ignore", "delegate", "see"} <= set(
        kinds
    )
    assert {kind: figures.right.value for kind, figures in kinds.items()} == dict.fromkeys(kinds, 1)
    assert score_alarms(scores).per_minute.value == 0


def test_a_model_that_is_silent_misses_everything_and_disturbs_nobody(bank: Path) -> None:
    def silent(episode: Episode) -> StreamLog:
        return log_of({}, episode.n_turns)

    plan = Plan((*TASKS, MIX), n_streams=4)
    streams = list(held_out_streams(silent, open_bank(bank), "held", plan))
    kinds = score_kinds([stream.score for stream in streams])
    said = {event.kind for stream in streams for event in stream.episode.events if event.tokens}
    missed = {kind for kind, figures in kinds.items() if figures.right.value == 0}
    # `ignore`: there was nothing to go on with.
    assert {kind.partition(" (")[0] for kind in missed} == said | {"ignore"}
    assert {"answer (typed)", "ignore (noise)"} <= missed
    assert score_alarms([stream.score for stream in streams]).per_minute.value == 0
    assert any(stream.heard() for stream in streams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected one or more of --bank, --fdb, --windows, --tools, --behaviours, found none"),
        (["--bank", "nowhere"], "expected clips in nowhere/clips.jsonl"),
        (["--bank", "BANK", "--tasks", "list,fly"], "tasks: expected some of list, sentence"),
        (["--bank", "BANK", "--group", "human"], "expected voices of group 'human', found none"),
        (["--windows", "nowhere.csv"], "nowhere.csv: expected a CSV or JSON file"),
        (["--behaviours", "nowhere.csv"], "nowhere.csv: expected a CSV file"),
    ],
)
def test_errors_are_one_line_and_status_2(
    bank: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    named = [option.replace("BANK", str(bank)) for option in options]
    result = invoke("reference", *named, "--out", tmp_path)
    assert result.exit_code == 2
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
