"""The command line: what it prints for people and for programs, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from PIL import ExifTags, Image
from typer.testing import CliRunner, Result

import duplex_engine
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.cli import app
from duplex_engine.cli.cost import Machine, pass_cost, turn_passes
from duplex_engine.cli.inspect import measure_machine
from duplex_engine.cli.live import level_db
from duplex_engine.cli.output import check_output
from duplex_engine.config import ModelConfig
from duplex_engine.engine import Engine
from duplex_engine.models import write_random_checkpoint
from duplex_engine.progress import progress_bar

KEYS = {
    "index",
    "epoch",
    "token_ids",
    "text",
    "events",
    "timing",
    "memory",
    "input",
    "stopped",
    "drafted",
    "accepted",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second of stereo at a rate that is not the model's."""
    path = tmp_path_factory.mktemp("sound") / "tone.wav"
    time_s = np.arange(22_050) / 22_050
    tone = 0.3 * np.sin(2 * np.pi * 300 * time_s) * (time_s % 0.3)
    soundfile.write(path, np.stack([tone, tone], axis=1), 22_050)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def objects(result: Result) -> list[dict[str, object]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("command", ["demo", "run", "inspect"])
def test_help_teaches_by_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"duplex-engine {command} " in result.stdout
    assert command in invoke("--help").stdout


def test_run_shows_a_line_per_micro_turn(checkpoint: Path, recording: Path) -> None:
    result = invoke("run", recording, "-c", checkpoint)
    assert result.exit_code == 0, result.output
    header, *lines, summary = result.stdout.splitlines()
    assert header.split() == ["turn", "time", "heard", "ms", "memory", "said"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3", "4"]
    assert all(" dB" in line and " MiB" in line for line in lines)
    assert summary.startswith("5 micro-turns of 200 ms: median ")


def test_run_prints_json(checkpoint: Path, recording: Path) -> None:
    turns = objects(invoke("run", recording, "-c", checkpoint, "--json"))
    assert [turn["index"] for turn in turns] == [0, 1, 2, 3, 4]
    for turn in turns:
        assert turn.keys() == KEYS
        assert turn["timing"].keys() == {"encode_us", "append_us", "decode_us", "total_us"}
        assert turn["memory"].keys() == {"sequence_bytes"}
        assert turn["input"].keys() == {"rows", "merged_turns", "missing_ms", "level_db"}
        assert -60 < turn["input"]["level_db"] < 0
    again = objects(invoke("run", recording, "-c", checkpoint, "--json"))
    assert [turn["token_ids"] for turn in again] == [turn["token_ids"] for turn in turns]


def test_without_a_checkpoint_it_is_the_shipped_model(recording: Path) -> None:
    result = invoke("run", recording, "--json")
    shipped = objects(invoke("run", recording, "-c", "reference", "--json"))
    assert [turn["token_ids"] for turn in objects(result)] == [t["token_ids"] for t in shipped]
    assert len(shipped) == 5
    assert "reference" in invoke("inspect", "reference").stdout


def test_pictures_and_text_enter(checkpoint: Path, recording: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.fromarray(np.zeros((16, 40, 3), np.uint8)).save(small)
    Image.fromarray(np.zeros((300, 400), np.uint8)).save(large)
    options = ["--image", small, "--image", large, "--text", "bado", "--json"]
    result = invoke("run", recording, "-c", checkpoint, *options)
    rows = [turn["input"]["rows"] for turn in objects(result)]  # type: ignore[index]
    assert rows[0] > 4 + 3
    assert 5 + 8 < rows[1] <= 5 + 16
    assert rows[2:] == [5, 5, 5]
    assert "large.png: 400x300 made " in result.stderr

    result = invoke("run", recording, "-c", checkpoint, *["--image", small] * 7)
    assert "2 pictures were not shown" in result.stdout


def test_a_picture_stands_as_its_camera_was_held(
    checkpoint: Path, recording: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    Image.fromarray(pixels).save(upright)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned to the right by whoever shows it
    Image.fromarray(np.rot90(pixels)).save(turned, exif=exif)
    seen = [
        [(turn["input"]["rows"], turn["token_ids"]) for turn in objects(result)]  # type: ignore[index]
        for result in (
            invoke("run", recording, "-c", checkpoint, "--json", "--image", path)
            for path in (upright, turned)
        )
    ]
    assert seen[0] == seen[1]


def test_a_short_last_piece_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.wav"
    soundfile.write(path, np.zeros(3200 + 800), 16_000)
    result = invoke("run", path, "-c", checkpoint)
    assert "[150 ms of sound missing]" in result.stdout
    _, last = objects(invoke("run", path, "-c", checkpoint, "--json"))
    assert last["events"] == [{"type": "MissingAudio", "ms": 150.0}]


def test_realtime_keeps_to_the_clock(checkpoint: Path, recording: Path) -> None:
    start = time.monotonic()
    turns = objects(invoke("run", recording, "-c", checkpoint, "--realtime", "--json"))
    assert time.monotonic() - start >= 1.0
    merged = sum(turn["input"]["merged_turns"] for turn in turns)  # type: ignore[index]
    assert len(turns) + merged == 5


def test_demo_plays_the_scene_and_measures_reactions(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    picture = tmp_path / "pictures" / "scene.png"
    result = invoke("demo", "--no-realtime", "--picture", picture)
    assert result.exit_code == 0, result.output
    for expected in ("five", "no four", "delegates: weather paris", "102 micro-turns of 200 ms"):
        assert expected in result.stdout
    assert " reactions, median " in result.stdout
    with Image.open(picture) as drawn:
        assert drawn.width > 1000
    turns = objects(invoke("demo", "--no-realtime", "--json", "--picture", picture))
    assert len(turns) == 102
    captions = [turn["input"].get("caption") for turn in turns]  # type: ignore[attr-defined]
    assert [c for c in captions if c][:5] == ["one", "two", "three", "five", "six"]


def test_demo_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("demo", "--no-realtime", "--picture", tmp_path / "scene.png")
    assert result.exit_code == 0
    assert "no picture: " in result.stdout
    assert "pip install 'duplex_engine[plots]'" in result.stdout


def test_demo_with_a_model_that_does_not_react(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["-c", checkpoint, "--no-realtime", "--picture", tmp_path / "scene.png"]
    result = invoke("demo", *arguments)
    assert result.exit_code == 0, result.output
    assert "none" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "expected a sound file or --mic, found neither"),
        (["run", "RECORDING", "--mic"], "found both"),
        (["run", "nowhere.wav"], "expected a sound file, found: [Errno 2] No such file"),
        (["run", "CHECKPOINT/config.json"], "config.json: expected a sound file"),
        (["run", "RECORDING", "--image", "CHECKPOINT/config.json"], "expected a picture"),
        (["run", "RECORDING", "--image", "nowhere.png"], "nowhere.png: expected a picture"),
        (["run", "RECORDING", "-c", "nowhere"], "nowhere: expected a checkpoint folder"),
        (["inspect", "nowhere"], "nowhere: expected a checkpoint folder"),
        (["inspect", "CHECKPOINT", "--memory", "much"], "memory: expected a number of bytes"),
        (["demo", "-c", "nowhere"], "nowhere: expected a checkpoint folder"),
    ],
)
def test_errors_are_one_line_and_status_2(
    checkpoint: Path, recording: Path, arguments: list[str], message: str
) -> None:
    named = [
        a.replace("RECORDING", str(recording)).replace("CHECKPOINT", str(checkpoint))
        for a in arguments
    ]
    result = invoke(*named)
    assert result.exit_code == 2
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "given", [["nowhere.wav"], ["RECORDING", "--image", "nowhere.png"], ["--mic"]]
)
def test_input_that_cannot_be_read_is_refused_before_the_weights_are_loaded(
    recording: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    monkeypatch.setattr(Engine, "load", None)
    result = invoke("run", *(str(recording) if name == "RECORDING" else name for name in given))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: "), result.stderr


@pytest.mark.parametrize("command", [("demo", "--picture"), ("gpu-check", "--out")])
@pytest.mark.parametrize("place", ["/proc/x/y.png", "FOLDER", "FOLDER/file/y.png"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, command: tuple[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "load", None)
    (tmp_path / "file").touch()
    result = invoke(*command, place.replace("FOLDER", str(tmp_path)))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {command[1]}: expected a file that can be written")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["new/folder/y.png", "y.png"])
def test_the_check_of_a_file_leaves_nothing_behind(tmp_path: Path, place: str) -> None:
    check_output(tmp_path / place, "--out")
    assert list(tmp_path.iterdir()) == []
    check_output(Path("/dev/null"), "--out")


def test_damaged_pictures_are_refused(
    checkpoint: Path, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    raw = path.read_bytes()
    begin = raw.index(b"IDAT")
    path.write_bytes(raw[: begin - 1] + b"\x64" + raw[begin:])  # the length of the chunk
    command = ("run", recording, "-c", checkpoint, "--image", path)
    message = f"error: {path}: expected a picture, found: "
    result = invoke(*command)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    path.write_bytes(raw)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    result = invoke(*command)
    assert f"{message}Image size (1600 pixels) exceeds" in result.stderr


def test_a_sound_file_that_is_damaged_in_the_middle(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "noise.flac"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(32_000), 16_000)
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 2000] = bytes(2000)
    path.write_bytes(raw)
    result = invoke("run", path, "-c", checkpoint)
    assert result.exit_code == 2, result.output
    assert f"error: {path}: expected a whole sound file, found damage behind 0." in result.stderr
    assert " micro-turns of 200 ms" in result.stdout


def test_a_sound_file_whose_name_is_not_unicode(
    checkpoint: Path, recording: Path, tmp_path: Path
) -> None:
    path = shutil.copy(recording, os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav"))
    assert len(objects(invoke("run", path, "-c", checkpoint, "--json"))) == 5


def test_a_terminal_without_unicode(checkpoint: Path, recording: Path) -> None:
    command = ["run", str(recording), "-c", str(checkpoint), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "duplex_engine", *command],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"5 micro-turns of 200 ms" in done.stdout


def test_a_picture_of_another_kind_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Engine, "load", None)
    for name in ("x.foo", "x"):
        result = invoke("demo", "--picture", name)
        assert result.exit_code == 2, result.output
        assert f"--picture: expected a name that ends in .png, found '{name}'" in result.stderr


def test_names_are_not_read_as_markup(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "m[/x]")
    result = invoke("inspect", "m[/x]")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("m[/x]")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("loading [red]m") as show:
        show(1, 2)
    assert "loading [red]m" in capsys.readouterr().err


def test_a_lone_surrogate_is_refused(checkpoint: Path, recording: Path) -> None:
    result = invoke("run", recording, "-c", checkpoint, "--text", "ab\udcff")
    assert result.exit_code == 2
    assert "error: text: expected valid Unicode, found a lone surrogate at index 2" in result.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_is_one_line_and_status_2(
    checkpoint: Path, recording: Path, options: list[str]
) -> None:
    command = ["run", str(recording), "-c", str(checkpoint), "--threads", "1", *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "duplex_engine", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.stderr.splitlines()[-1:] == ["error: No space left on device"]
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_the_microphone_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    result = invoke("run", "--mic")
    assert result.exit_code == 2
    assert "pip install 'duplex_engine[mic]'" in result.stderr


def test_the_microphone_is_heard_until_ctrl_c(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Microphone:
        n_read = 0

        def __init__(self, samplerate: int, channels: int, dtype: str) -> None:
            assert (samplerate, channels, dtype) == (16_000, 1, "float32")

        def __enter__(self) -> Microphone:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def read(self, n: int) -> tuple[NDArray[np.float32], bool]:
            self.n_read += 1
            if self.n_read > 3:
                raise KeyboardInterrupt
            return np.full((n, 1), 0.1, np.float32), False

    stand_in = types.ModuleType("sounddevice")
    stand_in.InputStream = Microphone  # type: ignore[attr-defined]
    stand_in.PortAudioError = OSError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", stand_in)
    result = invoke("run", "--mic", "-c", checkpoint)
    assert result.exit_code == 130
    assert "3 micro-turns of 200 ms" in result.stdout


def test_ctrl_c_ends_cleanly(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "duplex_engine", "demo", "-c", str(checkpoint)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("   1 "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert " micro-turns of 200 ms" in rest
    assert errors == ""


def test_inspect(checkpoint: Path) -> None:
    result = invoke("inspect", checkpoint)
    assert result.exit_code == 0, result.output
    for expected in ("parameters", "memory plan", "floor ms", "GB/s read", "tokens out"):
        assert expected in result.stdout


def test_a_pass_reads_every_weight_once(checkpoint: Path) -> None:
    with Checkpoint.open(checkpoint) as opened:
        layers = sum(
            tensor.data.nbytes
            for tensor in opened.tensors
            if ("layers." in tensor.name and ".llm." in tensor.name and "norm" not in tensor.name)
            and "sconv" not in tensor.name
            and "global_scale" not in tensor.name
        )
        head = next(t.data.nbytes for t in opened.tensors if t.name.endswith("unembed.weight"))
        assert pass_cost(opened.config, 1, 0, 4, 4).n_bytes == layers + head


def test_costs_grow_as_they_should(checkpoint: Path, tmp_path: Path) -> None:
    config = ModelConfig.read(checkpoint / "config.json")
    one, five = pass_cost(config, 1, 100, 2, 2), pass_cost(config, 5, 100, 2, 2)
    assert one.n_bytes == five.n_bytes
    assert five.operations > one.operations
    assert pass_cost(config, 1, 10_000, 2, 2).n_bytes > one.n_bytes
    assert pass_cost(config, 1, 100, 2, 1).n_bytes < one.n_bytes
    assert pass_cost(config, 1, 100, 1.125, 2).n_bytes < one.n_bytes
    assert (one + five).operations == one.operations + five.operations
    assert one.floor_ms(Machine(1e9, 1e18)) == pytest.approx(one.n_bytes / 1e6)
    assert one.floor_ms(Machine(1e18, 1e9)) == pytest.approx(one.operations / 1e6)
    assert turn_passes(config, 3) == [5, 1, 1]

    experts = ModelConfig.read(write_random_checkpoint(tmp_path, "moe") / "config.json")
    few, many = pass_cost(experts, 1, 1, 4, 4), pass_cost(experts, 1000, 1, 4, 4)
    # Together many rows use every expert: each of them is read, once.
    d, n_layers = experts.text.hidden_size, sum(experts.text.is_moe)
    assert many.n_bytes - few.n_bytes == pytest.approx(
        n_layers * (8 - 2) * 3 * d * experts.text.moe_intermediate_size * 4, rel=1e-3
    )


def test_the_machine_is_measured() -> None:
    machine = measure_machine(1)
    assert 1e8 < machine.read_bytes_per_s < 1e13
    assert 1e8 < machine.operations_per_s < 1e15


def test_levels() -> None:
    silence: NDArray[np.float32] = np.zeros(10, np.float32)
    assert level_db(silence) == level_db(silence[:0]) == -120
    assert level_db(silence + 1) == pytest.approx(0)
    assert level_db(silence + np.float32(0.1)) == pytest.approx(-20, abs=1e-3)


def test_sources_without_the_compiled_core_say_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "duplex_engine"
    folder.mkdir()
    for source in Path(duplex_engine.__file__).parent.glob("*.py"):
        shutil.copy(source, folder)
    # -S: without installed packages, of which this one may be one.
    command = [sys.executable, "-S", "-c", "import duplex_engine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert f"found the sources alone in {folder}; install them with `pip install .`" in done.stderr


def test_the_program_starts_with_the_packages_of_the_runtime_alone() -> None:
    """Packages of the extras are imported where they are used, and nowhere else."""
    extras = ("torch", "transformers", "scipy", "matplotlib", "onnxruntime", "openai")
    block = f"import sys; sys.modules |= dict.fromkeys({extras!r}); "
    code = block + "from duplex_engine.cli import app; app(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gpu-check" in done.stdout
