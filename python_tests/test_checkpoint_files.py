"""Checkpoint folders: every byte where the header says, and no hostile file gets past."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from duplex_engine.checkpoint import Checkpoint, _locate_tensors
from duplex_engine.errors import CheckpointError, InvalidArgument

ARRAYS: dict[str, np.ndarray] = {
    "model.llm.embed.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "model.llm.norm.weight": np.arange(6, dtype=np.float16),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path)


def write_checkpoint(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "inkling_mm_model", "text_config": {}}')
    save_file(ARRAYS, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, weight_map: object, **shards: dict[str, np.ndarray]) -> Path:
    """Replaces the single file by shards `<keyword>.safetensors` and an index."""
    (folder / "model.safetensors").unlink()
    for name, arrays in shards.items():
        save_file(arrays, folder / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    n_bytes = len(header) if length is None else length
    replace_weights(folder, n_bytes.to_bytes(8, "little") + header + data)


def replace_weights(folder: Path, raw: bytes) -> None:
    """Puts a new file in place: the one before may still be mapped, and must keep its bytes."""
    (folder / "new").write_bytes(raw)
    (folder / "new").rename(folder / "model.safetensors")


def problem(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


# --- what is read -------------------------------------------------------------------------------


def test_tensors_are_the_bytes_of_the_file(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        entries = {entry.name: entry for entry in checkpoint.tensors}
        assert entries.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            entry = entries[name]
            assert entry.shape == array.shape
            assert entry.data.dtype == np.uint8
            assert entry.data.ndim == 1
            assert not entry.data.flags.writeable
            assert entry.data.tobytes() == array.tobytes()
        assert {entry.dtype for entry in entries.values()} == {"F32", "F16", "I64"}
        assert checkpoint.path == folder
        assert checkpoint.config.text.hidden_size == 6144


def test_bfloat16_and_metadata(folder: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
    }
    write_raw(folder, json.dumps(header).encode(), b"\x80\x3f\x00\x40")
    (entry,) = Checkpoint.open(folder).tensors
    assert (entry.name, entry.dtype, entry.shape) == ("w", "BF16", (2,))
    assert entry.data.tobytes() == b"\x80\x3f\x00\x40"


def test_data_outlives_close(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        entry = next(e for e in checkpoint.tensors if e.name == "model.llm.embed.weight")
    with pytest.raises(InvalidArgument, match="found a closed one"):
        _ = checkpoint.tensors
    gc.collect()
    assert entry.data.tobytes() == ARRAYS[entry.name].tobytes()


def test_tokenizer_is_optional(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tokenizer_path is None
    (folder / "tokenizer.json").write_text("{}")
    assert checkpoint.tokenizer_path == folder / "tokenizer.json"


def test_shards_follow_each_other(folder: Path) -> None:
    first = {"b": np.ones(3, np.float32)}
    second = {"a": np.zeros(2, np.float32), "c": np.full(4, 2, np.float32)}
    weight_map = {"a": "s2.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    write_shards(folder, weight_map, s1=first, s2=second)
    checkpoint = Checkpoint.open(str(folder))
    assert [entry.name for entry in checkpoint.tensors] == ["b", "a", "c"]


# --- folders that are not checkpoints -----------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    assert "expected a checkpoint folder, found nothing there" in problem(tmp_path / "none")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert "pass the folder that holds config.json" in problem(folder / "model.safetensors")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "expected a config.json in the folder, found none" in problem(folder)


def test_bad_config_names_its_key(folder: Path) -> None:
    values = {"model_type": "inkling_mm_model", "text_config": {"d_rel": 0}}
    (folder / "config.json").write_text(json.dumps(values))
    assert "config.json: text_config.d_rel: expected a positive integer" in problem(folder)


def test_towers_that_the_core_has_not_are_refused_before_any_tensor_is_read(folder: Path) -> None:
    audio, vision = {"n_mel_bins": 801}, {"num_channels": 1}
    values = {"model_type": "inkling_mm_model", "text_config": {}}
    values |= {"audio_config": audio, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").unlink()
    message = problem(folder)
    assert "audio_config.n_mel_bins: expected an integer from 1 to 800, found 801" in message
    assert "vision_config.num_channels: expected 3 (red, green and blue), found 1" in message


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        (None, "the folder has no weights"),
        ("pytorch_model.bin", "convert its PyTorch weights to safetensors"),
        ("model-00001-of-00002.safetensors", "an index called model.safetensors.index.json"),
    ],
)
def test_no_weights(folder: Path, file: str | None, advice: str) -> None:
    (folder / "model.safetensors").unlink()
    if file is not None:
        (folder / file).touch()
    assert advice in problem(folder)


def test_single_file_and_index_together(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "found both; remove the one that is stale" in problem(folder)


def test_a_path_the_system_refuses(folder: Path) -> None:
    assert "cannot be read" in problem(folder / ("x" * 300))


# --- shards that disagree with their index ------------------------------------------------------

ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({}, "weight_map: expected an object"),
        ([], "weight_map: expected an object"),
        ({"a": 3}, "weight_map: 'a': expected the name of a .safetensors file"),
        ({"a": "../s1.safetensors"}, "in the same folder, found '../s1.safetensors'"),
        ({"a": "/s1.safetensors"}, "in the same folder, found '/s1.safetensors'"),
        ({"a": "sub/s1.safetensors"}, "in the same folder, found 'sub/s1.safetensors'"),
        ({"a": "s1.safetensors\0"}, "in the same folder, found 's1.safetensors\\x00'"),
        ({"a": "s1.bin"}, "in the same folder, found 's1.bin'"),
        (
            {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s3.safetensors"},
            "found no s3.safetensors; the download may be incomplete",
        ),
        (
            {"a": "s1.safetensors", "b": "s2.safetensors", "z": "s2.safetensors"},
            "s2.safetensors: expected the tensor 'z'",
        ),
        ({"a": "s2.safetensors", "b": "s1.safetensors"}, "s1.safetensors: expected the tensor 'b'"),
        ({"a": "s1.safetensors"}, None),
        ({"b": "s2.safetensors"}, None),
    ],
)
def test_index_and_shards_disagree(folder: Path, weight_map: object, expected: str | None) -> None:
    write_shards(folder, weight_map, s1={"a": ONE}, s2={"b": ONE})
    if expected is None:  # a shard that the index leaves out is nobody's business
        assert len(Checkpoint.open(folder).tensors) == 1
    else:
        assert expected in problem(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    weight_map = {"a": "s1.safetensors", "b": "s2.safetensors"}
    write_shards(folder, weight_map, s1={"a": ONE}, s2={"a": ONE, "b": ONE})
    assert "found 'a', which it puts into 's1.safetensors'" in problem(folder)


def test_tensor_without_an_entry_in_the_index(folder: Path) -> None:
    write_shards(folder, {"a": "s1.safetensors"}, s1={"a": ONE, "b": ONE})
    assert "found 'b', which it puts into no file" in problem(folder)


# --- headers that lie ---------------------------------------------------------------------------


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize("n_bytes", [0, 1, 7])
def test_file_shorter_than_its_length_field(folder: Path, n_bytes: int) -> None:
    (folder / "model.safetensors").write_bytes(bytes(n_bytes))
    assert f"model.safetensors: expected a safetensors file, found only {n_bytes} bytes" in problem(
        folder
    )


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(folder: Path, length: int) -> None:
    write_raw(folder, b"{}", length=length)
    assert f"found one of {length}" in problem(folder)


def test_header_longer_than_any_real_one(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)  # sparse: takes no space on the disk
    assert "found one of 1073741824" in problem(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"\xff{}",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' * 100_000,
        json.dumps({"a": 3}).encode(),
        json.dumps({"a": tensor(dtype="F33")}).encode(),
        json.dumps({"a": tensor(dtype="F4", shape=[16])}).encode(),
        json.dumps({"a": tensor(shape=[-2])}).encode(),
        json.dumps({"a": tensor(shape=[2.0])}).encode(),
        json.dumps({"a": tensor(shape=[3])}).encode(),
        json.dumps({"a": tensor(shape=[2**62, 2**62])}).encode(),
        json.dumps({"a": tensor(data_offsets=[-8, 0])}).encode(),
        json.dumps({"a": tensor(data_offsets=[8, 0])}).encode(),
        json.dumps({"a": tensor(data_offsets=[0, 16], shape=[4])}).encode(),
        json.dumps({"a": tensor(data_offsets=[0])}).encode(),
        json.dumps({"a": tensor(), "b": tensor()}).encode(),
        json.dumps({"a": tensor(shape=[1], data_offsets=[4, 8])}).encode(),
        json.dumps({"a": tensor(shape=[1], data_offsets=[0, 4])}).encode(),
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"k":3}}',
        b"{}",
    ],
)
def test_bad_header_is_refused_with_the_file_name(folder: Path, header: bytes) -> None:
    write_raw(folder, header, bytes(8))
    assert "model.safetensors: " in problem(folder)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": 3}, "'a': expected dtype, shape and data_offsets, found 3"),
        ({"a": tensor(dtype="F33")}, "'a': expected a dtype of BOOL, U8, "),
        ({"a": tensor(shape=[True])}, "'a': expected a shape of non-negative integers"),
        ({"a": tensor(data_offsets=[8, 16])}, "'a': expected data_offsets around the bytes of F32"),
        ({"a": tensor(shape=[3])}, "'a': expected data_offsets around the bytes of F32 [3]"),
        ({"a": tensor(), "b": tensor()}, "'b': expected to begin where the tensor before it ends"),
        ({"a": tensor(shape=[1], data_offsets=[4, 8])}, "ends, at byte 0, found 4"),
        ({}, "expected 0 bytes of tensors, found 8 bytes of data"),
    ],
)
def test_own_checks_stand_without_the_format_s_reader(
    header: dict[str, Any], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        _locate_tensors("file", header, np.zeros(8, np.uint8))


def mutated(raw: bytes, data: st.DataObject) -> bytes:
    """A damaged copy of `raw`: bytes replaced, cut off, inserted, or a number changed."""
    result = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(result) - 1, 0)))
        match data.draw(st.sampled_from(["replace", "cut", "insert", "length"])):
            case "replace":
                result[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del result[at:]
            case "insert":
                result[at:at] = data.draw(
                    st.sampled_from([b"0", b"-", b"[", b'"', b"9" * 25, b"\x00", b"{}"])
                )
            case "length":
                result[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(result)


def open_or_refuse(folder: Path) -> None:
    """Opens `folder`; either it is refused as it should be, or every tensor is all there."""
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:
        return
    for entry in checkpoint.tensors:
        assert len(entry.data.tobytes()) == entry.data.nbytes


fuzzed: Callable[[Any], Any] = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.fuzz
@fuzzed
@given(data=st.data())
def test_damaged_files_never_crash(shared_folder: Path, data: st.DataObject) -> None:
    replace_weights(shared_folder, mutated(save(ARRAYS), data))
    open_or_refuse(shared_folder)


@pytest.mark.fuzz
@fuzzed
@given(header=st.binary(max_size=80), body=st.binary(max_size=16))
def test_random_headers_never_crash(shared_folder: Path, header: bytes, body: bytes) -> None:
    write_raw(shared_folder, header, body)
    open_or_refuse(shared_folder)


offsets = st.integers(-9, 24) | st.integers(-(2**70), 2**70)
descriptions = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "BF16", "U8", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "", "f32"]
        ),
        "shape": st.lists(offsets, max_size=3),
        "data_offsets": st.lists(offsets, min_size=2, max_size=2),
    }
)


@pytest.mark.fuzz
@fuzzed
@given(header=st.dictionaries(st.text(max_size=3), descriptions, max_size=3))
def test_random_descriptions_never_crash(shared_folder: Path, header: dict[str, Any]) -> None:
    write_raw(shared_folder, json.dumps(header).encode(), bytes(16))
    open_or_refuse(shared_folder)
