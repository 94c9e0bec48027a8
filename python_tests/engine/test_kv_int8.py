"""Keys and values in int8: what they cost in precision, what they save, and the same bits.

How a stream may be cut, batched, forked and rewound is in test_exactness.py, for this format too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from parity import OracleCheckpoint
from random_models import REWIND, load, words, write
from test_parity_bfloat16 import DENSE, losses, rms

from duplex_engine import Engine, InvalidArgument, _core
from duplex_engine.models import write_random_checkpoint

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_it_loses_less_than_transformers_in_bfloat16(
    name: str, oracle_checkpoint: OracleCheckpoint
) -> None:
    """Beside bfloat16 rows, which lose something too; see test_parity_bfloat16.py."""
    ours, theirs = losses(name, oracle_checkpoint, kv_dtype="int8")
    rounded, _ = losses(name, oracle_checkpoint)
    assert np.median(rounded) < np.median(ours) < np.median(theirs)
    if name in DENSE:
        assert rms(ours) < rms(theirs)
        assert ours.max() < theirs.max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rows_have_their_own_type(dtype: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")
    with load(folder, dtype=dtype, kv_dtype="int8") as engine:
        assert (engine.dtype, engine.weights, engine.kv_dtype) == (dtype, dtype, "int8")
    with load(folder, dtype=dtype) as engine:
        assert engine.kv_dtype == dtype
    with load(folder, dtype=dtype, weights="int4", kv_dtype="int8") as engine:
        assert (engine.dtype, engine.weights, engine.kv_dtype) == (dtype, "int4", "int8")


def held(folder: Path, kv_dtype: Any) -> dict[str, int]:
    """Bytes by part of a session of 2000 rows in bfloat16."""
    with (
        Engine.load(folder, dtype="bfloat16", kv_dtype=kv_dtype, threads=1) as engine,
        engine.open_session() as session,
    ):
        session.append(text=[300 + i % 1000 for i in range(2000)])
        return dict(session.memory)


def test_a_session_holds_half_as_much(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, "small")
    wide, narrow = held(folder, "auto"), held(folder, "int8")
    # A head of 64 channels: 66 bytes a key or value instead of 128; pages are whole.
    assert narrow["global_bytes"] < 0.6 * wide["global_bytes"]
    assert narrow["local_bytes"] < 0.6 * wide["local_bytes"]


def test_layers_that_draft_keep_theirs_so_as_well(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense", mtp_layers=2)
    outputs, bytes_held = [], []
    for kv_dtype, speculate in (("int8", 0), ("int8", 3), ("auto", 3)):
        with (
            load(folder, dtype="bfloat16", kv_dtype=kv_dtype, mtp_layers=2) as engine,
            engine.open_session(speculate=speculate, temperature=1.0, seed=3) as session,
        ):
            session.append(text=words(150))
            outputs.append((session.decode(40), session._core.digests()))
            bytes_held.append(session.memory["draft_bytes"])
            assert engine.stats["drafted"] > 0 or speculate == 0
    assert outputs[0] == outputs[1]
    assert 0 == bytes_held[0] < bytes_held[1] <= bytes_held[2]


def test_a_fork_and_a_rewind_within_a_block(tmp_path: Path) -> None:
    """Other rows behind the same ones: nothing of what was taken back is left."""
    with (
        load(write(tmp_path, "dense"), kv_dtype="int8") as engine,
        engine.open_session() as session,
        engine.open_session() as straight,
    ):
        session.append(text=words(70))
        for seed in (1, 2, 3):
            session.append(text=words(REWIND - 3, seed=seed))
            session.truncate(70)
        with session.fork() as fork:
            fork.append(text=words(9, seed=4))
            straight.append(text=words(70))
            expected = straight.append(text=words(80, seed=5), logits="all")
            found = session.append(text=words(80, seed=5), logits="all")
        assert found.tobytes() == expected.tobytes()
        assert session._core.digests() == straight._core.digests()


# ---- on the CUDA backend, whose kernels run on the host here

on_gpu = pytest.mark.skipif(
    "cuda_host" not in _core.backend_names(), reason="only a build with tests has it"
)
ROWS = [9 + i * i % 50 for i in range(150)]  # more than attention takes in one part


def load_smallest(folder: Path, device: str, dtype: Any) -> Engine:
    if not (folder / "config.json").exists():
        write_random_checkpoint(folder, "smallest", seed=3)
    # The pages of a GPU for both: how far back a window is held depends on them.
    return Engine.load(
        folder, dtype=dtype, kv_dtype="int8", memory="64MiB", page="2MiB", device=device
    )


@on_gpu
def test_the_cuda_backend_has_the_memory_of_the_cpu(tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda_host"):
        with load_smallest(tmp_path, device, "float32") as engine, engine.open_session() as session:
            logits = session.append(text=ROWS, logits="all")
            found.append((logits.tobytes(), session.decode(2), session._core.digests()))
    assert found[0] == found[1]


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_forks_and_rewinds_on_the_cuda_backend(dtype: Any, tmp_path: Path) -> None:
    with (
        load_smallest(tmp_path, "cuda_host", dtype) as engine,
        engine.open_session() as session,
        engine.open_session() as straight,
    ):
        session.append(text=ROWS[:130])
        session.append(text=[7, 8, 9])
        session.truncate(130)
        with session.fork() as fork:
            fork.append(text=[10, 11])
            found = session.append(text=ROWS[130:], logits="all")
        for begin in range(0, 130, 26):
            straight.append(text=ROWS[begin : begin + 26])
        expected = [straight.append(text=[row], logits="all") for row in ROWS[130:]]
        assert found.tobytes() == np.concatenate(expected).tobytes()
        assert session._core.digests() == straight._core.digests()


@pytest.mark.parametrize("kv_dtype", ["int4", "bfloat16", "", None, 8])
def test_other_types_are_refused(kv_dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="kv_dtype: expected 'auto' or 'int8', found"):
        Engine.load(tmp_path, kv_dtype=kv_dtype)
