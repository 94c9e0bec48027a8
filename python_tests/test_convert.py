"""Folders of packed weights: they load without the checkpoint, and only as what they are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cache import damaged, logits
from typer.testing import CliRunner, Result

from duplex_engine import CheckpointError, Engine, InvalidArgument
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.cli import app
from duplex_engine.convert import FILES, convert
from duplex_engine.models import write_random_checkpoint
from duplex_engine.packed import PACKED_FILE, PackedFile

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


@pytest.fixture(scope="module")
def int8(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion. Change copies only."""
    return convert(checkpoint, tmp_path_factory.mktemp("int8"), weights="int8")


@pytest.fixture
def copy(int8: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int8, tmp_path / "copy"))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def errors(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"weights": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"weights": "int8"}, {"weights": "int8"}),
        ({"weights": "int8", "dtype": "bfloat16"}, {"weights": "int8", "dtype": "bfloat16"}),
        ({"weights": "int4", "dtype": "float32"}, {"weights": "int4", "dtype": "float32"}),
    ],
)
def test_a_conversion_computes_as_the_checkpoint_does(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], same: dict[str, Any]
) -> None:
    expected = logits(checkpoint, **same)
    out = convert(checkpoint, tmp_path / "deep" / "out", **options)
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        PACKED_FILE,
        "tokenizer.json",
    ]
    assert logits(out).tobytes() == expected.tobytes()
    assert logits(out, **same).tobytes() == expected.tobytes()


def test_it_says_what_it_is(int8: Path) -> None:
    with Engine.load(int8, threads=1, memory="64MiB") as engine:
        assert (engine.dtype, engine.weights) == ("float32", "int8")
        assert engine.tokenizer is not None
    with Checkpoint.open(int8) as opened:
        assert opened.packed is not None
        assert opened.tensors == ()


def test_a_checkpoint_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(checkpoint, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    out = convert(bare, tmp_path / "out", weights="int4")
    with Engine.load(out, threads=1, memory="64MiB") as engine:
        assert engine.tokenizer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int4"}, "weights: expected 'auto' or 'int8'"),
        ({"dtype": "bfloat16"}, "dtype: expected 'auto' or 'float32'"),
        ({"device": "cuda"}, "expected the device 'cpu'"),
    ],
)
def test_what_it_does_not_hold(int8: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Engine.load(int8, threads=1, memory="64MiB", **options)


def test_a_cache_of_packed_weights_is_not_made(int8: Path, tmp_path: Path) -> None:
    logits(int8, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "expected packed weights"),
        ("cut in the header", "expected packed weights"),
        ("empty", "expected packed weights"),
        ("flipped bit", "expected the checksum"),
        ("flipped last bit", "the file is damaged"),
        ("another file", "expected packed weights"),
    ],
)
def test_a_damaged_conversion_is_refused(copy: Path, how: str, message: str) -> None:
    raw = (copy / PACKED_FILE).read_bytes()
    (copy / PACKED_FILE).write_bytes(damaged(raw, how))
    with pytest.raises(CheckpointError, match=message):
        logits(copy)


def test_another_version_asks_for_another_conversion(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duplex_engine._core.PACKING_VERSION", 2)
    with pytest.raises(CheckpointError, match=r"version 2 .*found '1'; .*duplex-engine convert"):
        logits(copy)


def test_another_config_is_refused(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    values["text_config"]["rms_norm_eps"] = 1e-3
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"expected the config\.json and"):
        logits(copy)


def test_both_kinds_of_weights_in_one_folder(copy: Path, checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", copy)
    with pytest.raises(CheckpointError, match="found both"):
        logits(copy)


# --- the command --------------------------------------------------------------------------------


def test_help_teaches_by_example() -> None:
    result = invoke("convert", "--help")
    assert result.exit_code == 0
    assert "duplex-engine convert checkpoints/mine checkpoints/mine-int4 --weights int4" in (
        " ".join(result.stdout.replace("│", " ").split())
    )
    assert "convert" in invoke("--help").stdout


def test_the_command_converts_and_inspect_knows_the_result(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = invoke("convert", checkpoint, out, "--weights", "int4", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert "MiB of int4 weights, float32 rows" in result.stdout
    assert logits(out).tobytes() == logits(checkpoint, weights="int4").tobytes()
    shown = invoke("inspect", out)
    assert shown.exit_code == 0, shown.output
    assert "int4 weights and float32 rows, for the CPU" in shown.stdout
    assert "written by duplex-engine convert" in shown.stdout
    assert "parameters" not in shown.stdout


def test_an_earlier_conversion_is_replaced_only_by_force(checkpoint: Path, copy: Path) -> None:
    raw = (copy / PACKED_FILE).read_bytes()
    message = errors("convert", checkpoint, copy, "--weights", "int4")
    assert "expected a new or empty folder" in message
    assert "--force" in message
    assert (copy / PACKED_FILE).read_bytes() == raw
    assert invoke("convert", checkpoint, copy, "--weights", "int4", "--force").exit_code == 0
    assert logits(copy).tobytes() == logits(checkpoint, weights="int4").tobytes()


def test_places_that_force_does_not_take(checkpoint: Path, copy: Path, tmp_path: Path) -> None:
    command = ("convert", checkpoint)
    options = ("--weights", "int4", "--force")
    assert "choose another" in errors(*command, checkpoint, *options)
    (copy / "notes.txt").write_text("mine")
    assert "found notes.txt in it; choose another" in errors(*command, copy, *options)
    (tmp_path / "file").write_text("")
    assert "expected a new or empty folder, found a file" in errors(
        *command, tmp_path / "file", *options
    )
    assert "expected a folder that can be written" in errors(
        *command, tmp_path / "file" / "below", *options
    )


@pytest.mark.parametrize("place", [None, 5, "\0", b"out", "x" * 300])
def test_what_is_no_place(checkpoint: Path, place: Any) -> None:
    with pytest.raises(InvalidArgument, match="expected a"):
        convert(checkpoint, place, weights="int8")


def test_a_place_that_cannot_be_read(
    checkpoint: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:  # root may read any folder
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InvalidArgument, match=r"expected a folder that can be written, .*denied"):
        convert(checkpoint, copy, weights="int8", force=True)


@pytest.mark.parametrize(
    ("where", "name", "left"),
    [(Engine, "write_weights", []), (shutil, "copyfile", [PACKED_FILE])],
    ids=["weights", "config.json"],
)
def test_a_disk_that_is_full(
    checkpoint: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, left: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, name, full)
    with pytest.raises(InvalidArgument, match=r"found: .*No space left"):
        convert(checkpoint, copy, weights="int4", force=True)
    monkeypatch.undo()
    assert [file.name for file in copy.iterdir()] == left
    with pytest.raises(CheckpointError, match=r"expected a config\.json in the folder, found none"):
        logits(copy)
    convert(checkpoint, copy, weights="int4", force=bool(left))


def test_progress_that_is_none(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="progress: expected a callable, found True"):
        convert(checkpoint, tmp_path / "out", weights="int8", progress=True)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_after_a_conversion_that_was_killed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    old, new = (out / f".{PACKED_FILE}.{k}-ff.part" for k in "12")
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    convert(checkpoint, out, weights="int8")
    assert {file.name for file in out.iterdir()} == {*FILES, new.name}
    convert(checkpoint, out, weights="int8", force=True)


def test_a_conversion_that_is_replaced_while_it_loads(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = PackedFile.open

    def and_then_gone(path: Path) -> PackedFile:
        packed = judged(path)
        path.unlink()
        return packed

    monkeypatch.setattr(PackedFile, "open", and_then_gone)
    with pytest.raises(CheckpointError, match="expected the packed weights that were there"):
        logits(copy)


def test_wrong_sources(checkpoint: Path, int8: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--weights", "int4")
    assert "expected a checkpoint folder, found nothing" in errors(
        "convert", tmp_path / "none", out, *options
    )
    assert "found packed int8 weights; convert the checkpoint" in errors(
        "convert", int8, out, *options
    )
    assert "found float32" in errors(
        "convert", checkpoint, out, "--weights", "bfloat16", "--dtype", "float32"
    )
    assert not out.exists()


def test_a_source_that_does_not_load_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    raw = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(raw[:-4])
    with pytest.raises(CheckpointError):
        convert(broken, tmp_path / "out", weights="int8")
    assert not (tmp_path / "out").exists()
