"""Packed weights on disk: the same bytes of logits as from the checkpoint, or packed again."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from duplex_engine import CheckpointError, Engine, InvalidArgument, _core
from duplex_engine.cache import SAMPLE_BYTES, SAMPLES, fingerprint
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.models import write_random_checkpoint
from duplex_engine.packed import HEADER_BYTES, PackedFile

pytestmark = pytest.mark.cpu

FORMATS: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "weights": "int8"},
    {"dtype": "float32", "weights": "int4"},
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "tiny", seed=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by "tensors" or "packed" with each way in which an engine is loaded."""
    ways: list[str] = []
    engine = _core.Engine

    def spy(config: Any, tensors: Any, *args: Any, **options: Any) -> Any:
        ways.append("tensors" if tensors else "packed")
        return engine(config, tensors, *args, **options)

    monkeypatch.setattr(_core, "Engine", spy)
    return ways


def logits(path: Path, **options: Any) -> NDArray[np.float32]:
    """Logits of a few words, a sound and a picture."""
    rng = np.random.default_rng(0)
    with (
        Engine.load(path, threads=1, memory="64MiB", **options) as engine,
        engine.open_session() as session,
    ):
        parts = [
            session.append(text=[270, 280, 290], logits="all"),
            session.append(audio=rng.standard_normal(3200).astype(np.float32), logits="all"),
            session.append(image=rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), logits="all"),
        ]
        return np.concatenate(parts)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


@pytest.mark.parametrize("options", FORMATS)
def test_the_same_bytes_from_the_cache(
    checkpoint: Path, folder: Path, packs: list[str], options: dict[str, Any]
) -> None:
    expected = logits(checkpoint, **options)
    first = logits(checkpoint, cache=folder, **options)
    second = logits(checkpoint, cache=str(folder), **options)
    assert packs == ["tensors", "tensors", "packed"]
    assert first.tobytes() == second.tobytes() == expected.tobytes()


def test_each_format_has_its_file(checkpoint: Path, folder: Path, packs: list[str]) -> None:
    for _ in range(2):
        for options in FORMATS:
            logits(checkpoint, cache=folder, **options)
    assert packs == ["tensors"] * 4 + ["packed"] * 4
    assert len(list(folder.iterdir())) == 4


def test_true_is_the_folder_of_the_user(
    checkpoint: Path, tmp_path: Path, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    logits(checkpoint, cache=True)
    logits(checkpoint, cache=True)
    logits(checkpoint, cache=False)
    assert packs == ["tensors", "packed", "tensors"]
    assert only_file(tmp_path / "xdg" / "duplex_engine").name.startswith("tiny-")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    logits(checkpoint, cache=True)
    assert only_file(tmp_path / ".cache" / "duplex_engine").is_file()


def test_the_arena_begins_at_a_page_of_a_safetensors_file(checkpoint: Path, folder: Path) -> None:
    logits(checkpoint, cache=folder)
    path = only_file(folder)
    packed = PackedFile.open(path)
    assert packed.data_begin == HEADER_BYTES
    arena = load_file(path)["arena"]
    assert arena.nbytes == packed.n_bytes
    assert zlib.crc32(arena.tobytes()) == packed.crc32


def test_progress_ends_at_the_end(checkpoint: Path, folder: Path) -> None:
    for _ in range(2):
        calls: list[tuple[int, int]] = []
        logits(checkpoint, cache=folder, progress=lambda *call, to=calls: to.append(call))
        assert calls
        assert calls[-1][0] == calls[-1][1]
        assert calls == sorted(calls)


# --- what is not used ---------------------------------------------------------------------------


def change_a_weight(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    name = "model.llm.layers.0.attn.wq_du.weight"
    save_file(tensors | {name: tensors[name] * 2}, path / "new")
    (path / "new").replace(path / "model.safetensors")


def touch(path: Path) -> None:
    file = path / "model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))


def edit_in_place_keeping_the_time(path: Path) -> None:
    """One byte, where a sample is taken."""
    file = path / "model.safetensors"
    status = file.stat()
    with file.open("r+b") as raw:
        begin = (status.st_size - SAMPLE_BYTES) * 20 // (SAMPLES - 1)
        raw.seek(begin + 1)
        byte = raw.read(1)[0]
        raw.seek(begin + 1)
        raw.write(bytes([byte ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_a_size(path: Path) -> None:
    values = json.loads((path / "config.json").read_text())
    values["text_config"]["rms_norm_eps"] = 1e-3
    (path / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change", [change_a_weight, touch, edit_in_place_keeping_the_time, change_a_size]
)
def test_a_changed_checkpoint_is_packed_again(
    checkpoint: Path, folder: Path, packs: list[str], change: Callable[[Path], None]
) -> None:
    logits(checkpoint, cache=folder)
    change(checkpoint)
    found = logits(checkpoint, cache=folder)
    assert packs == ["tensors", "tensors"]
    again = logits(checkpoint, cache=folder)
    assert packs[2:] == ["packed"]
    assert found.tobytes() == again.tobytes() == logits(checkpoint).tobytes()
    assert len(list(folder.iterdir())) == 1


def test_what_no_weight_depends_on_may_change(
    checkpoint: Path, folder: Path, packs: list[str]
) -> None:
    logits(checkpoint, cache=folder)
    values = json.loads((checkpoint / "config.json").read_text())
    values["interaction"]["max_output_tokens"] += 1
    (checkpoint / "config.json").write_text(json.dumps(values))
    logits(checkpoint, cache=folder)
    assert packs == ["tensors", "packed"]


def test_the_file_of_another_checkpoint(
    checkpoint: Path, folder: Path, tmp_path: Path, packs: list[str]
) -> None:
    """Under the right name, with the right sizes."""
    logits(checkpoint, cache=folder)
    other = write_random_checkpoint(tmp_path / "other", seed=3)
    logits(other, cache=tmp_path / "elsewhere")
    shutil.copy(only_file(tmp_path / "elsewhere"), only_file(folder))
    expected = logits(checkpoint)
    assert logits(checkpoint, cache=folder).tobytes() == expected.tobytes()
    assert packs == ["tensors"] * 4


def damaged(raw: bytes, how: str) -> bytes:
    match how:
        case "cut":
            return raw[:-1]
        case "cut in the header":
            return raw[:100]
        case "empty":
            return b""
        case "flipped bit":
            return raw[:HEADER_BYTES] + bytes([raw[HEADER_BYTES] ^ 1]) + raw[HEADER_BYTES + 1 :]
        case "flipped last bit":
            return raw[:-1] + bytes([raw[-1] ^ 128])
        case "another version":
            return raw.replace(b'"packing": "', b'"packing": "9', 1)[: len(raw)]
        case "another file":
            return b"x" * len(raw)
    raise AssertionError(how)


HOW = [
    "cut",
    "cut in the header",
    "empty",
    "flipped bit",
    "flipped last bit",
    "another version",
    "another file",
]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_file_is_packed_again(checkpoint: Path, folder: Path, how: str) -> None:
    expected = logits(checkpoint, cache=folder)
    path = only_file(folder)
    raw = path.read_bytes()
    path.write_bytes(damaged(raw, how))
    assert logits(checkpoint, cache=folder).tobytes() == expected.tobytes()
    assert only_file(folder).read_bytes() == raw


@pytest.mark.parametrize("how", HOW[:5] + HOW[6:])
def test_a_damaged_file_is_named(checkpoint: Path, folder: Path, how: str) -> None:
    logits(checkpoint, cache=folder)
    path = only_file(folder)
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(CheckpointError, match=f"{path.name}: expected"):  # noqa: PT012
        packed = PackedFile.open(path)
        with packed.reader() as (n_bytes, read):
            read(memoryview(bytearray(n_bytes)))


@pytest.mark.fuzz
@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(at=st.integers(0, HEADER_BYTES - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damaged_headers_never_crash(
    checkpoint: Path, folder: Path, at: int, byte: int, cut: bool
) -> None:
    if not folder.exists():
        logits(checkpoint, cache=folder)
    path = folder.parent / "damaged.safetensors"
    raw = bytearray(only_file(folder).read_bytes())
    raw[at] = byte
    path.write_bytes(raw[:at] if cut else raw)
    try:
        packed = PackedFile.open(path)
    except CheckpointError:
        return
    assert packed.data_begin + packed.n_bytes == path.stat().st_size


# --- folders that do not do what they should ----------------------------------------------------


def test_a_folder_that_cannot_be_written(checkpoint: Path, folder: Path, packs: list[str]) -> None:
    folder.write_text("")
    with pytest.raises(InvalidArgument, match="cache: expected True, False or a folder"):
        logits(checkpoint, cache=folder)
    with pytest.warns(RuntimeWarning, match="cache: .*expected a folder that can be written"):
        found = logits(checkpoint, cache=folder / "below a file")
    assert found.tobytes() == logits(checkpoint).tobytes()
    assert packs == ["tensors", "tensors"]


def test_a_read_only_folder_is_read(
    checkpoint: Path, folder: Path, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(checkpoint, cache=folder)

    def refuse(*_: Any, **__: Any) -> Any:  # root may write anywhere, so the folder itself cannot
        raise PermissionError("read-only")

    monkeypatch.setattr("duplex_engine.cache.write_packed", refuse)
    logits(checkpoint, cache=folder)
    touch(checkpoint)
    with pytest.warns(RuntimeWarning, match="read-only"):
        logits(checkpoint, cache=folder)
    assert packs == ["tensors", "packed", "tensors"]


def test_a_full_disk_leaves_nothing_behind(
    checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("duplex_engine.packed._header", fail)
    with pytest.warns(RuntimeWarning, match="No space left"):
        logits(checkpoint, cache=folder)
    assert list(folder.iterdir()) == []


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(
    checkpoint: Path, folder: Path
) -> None:
    logits(checkpoint, cache=folder, progress=lambda *_: touch(checkpoint))
    assert not folder.exists()


def test_a_user_without_a_home(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    logits(checkpoint)
    with pytest.raises(InvalidArgument, match=r"cache: expected a user with a home folder, .*XDG"):
        logits(checkpoint, cache=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    logits(checkpoint, cache=True)


def test_names_that_no_folder_can_have(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cache: expected a path that a file can have"):
        logits(checkpoint, cache="\0x")
    with pytest.warns(RuntimeWarning, match="cache: .*expected a folder that can be written"):
        logits(checkpoint, cache=tmp_path / ("x" * 300))


def test_a_folder_whose_name_is_not_unicode(
    checkpoint: Path, folder: Path, packs: list[str]
) -> None:
    checkpoint = checkpoint.rename(os.fsdecode(os.fsencode(checkpoint) + b"\xff"))
    assert logits(checkpoint, cache=folder).tobytes() == logits(checkpoint).tobytes()
    logits(checkpoint, cache=folder)
    assert packs == ["tensors", "tensors", "packed"]


def test_what_a_killed_process_left_is_removed(checkpoint: Path, folder: Path) -> None:
    logits(checkpoint, cache=folder)
    path = only_file(folder)
    old, new, foreign = (
        folder / f".{name}.part" for name in (f"{path.name}.1-ff", f"{path.name}.2-ff", "other.1-f")
    )
    for file in (old, new, foreign):
        file.touch()
    for file in (old, foreign):
        os.utime(file, (0, 0))
    logits(checkpoint, cache=folder)
    assert set(folder.iterdir()) == {path, new, foreign}


def test_the_cache_is_the_cpu_s(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="cache: expected False on the device 'cuda'"):
        logits(checkpoint, cache=folder, device="cuda")
    for wrong in (1, None, ""):
        with pytest.raises(InvalidArgument, match="cache: expected True, False or a folder"):
            logits(checkpoint, cache=wrong)


def test_several_writers_at_once(checkpoint: Path, folder: Path) -> None:
    expected = logits(checkpoint).tobytes()
    found: list[bytes] = []

    def work() -> None:
        for _ in range(3):
            found.append(logits(checkpoint, cache=folder).tobytes())
            touch(checkpoint)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 12
    assert not [file for file in folder.iterdir() if file.suffix == ".part"]


def test_fingerprints_tell_contents_apart_not_places(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copy2)
    names = []
    for path in (checkpoint, tmp_path / "copy"):
        with Checkpoint.open(path) as opened:
            names.append(fingerprint(opened, "layout"))
            assert fingerprint(opened, "another layout") != names[-1]
    assert names[0] == names[1]
