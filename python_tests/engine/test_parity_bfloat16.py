"""What bfloat16 costs: the engine against what transformers itself loses at that precision.

Both are compared with the float32 oracle on the same stored weights. transformers rounds every
intermediate to 8 bits, the residual stream included. The engine rounds the inputs of its matrix
products and the cache of keys and values, and keeps the residual stream, sums, norms, router and
logits in float32: its roundings are some of the oracle's, so it should lose less.

A router's choice can flip when two experts are nearly equal, in either of the two, and then that
row and some behind it are off by far more than rounding. The median over rows does not see a flip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from numpy.typing import NDArray
from parity import (
    MAX_ERROR,
    OracleCheckpoint,
    load,
    logits,
    mixed_prompt,
    oracle_parts,
    relative_error,
)

from duplex_engine import BackendUnavailable

SEED = 1
DENSE = [name for name, c in oracle.CONFIGS.items() if "sparse" not in str(c)]
# Of the root mean square over all mixtures of experts, where flips dominate: as many flips as the
# oracle has, and half as many again, for there are few of them.
FLIP_ALLOWANCE = 1.5


def row_errors(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """Root mean square error of each row of logits, in units of their spread: (n,)."""
    assert found.shape == expected.shape
    difference = found.astype(np.float64) - expected
    return np.sqrt((difference**2).mean(axis=-1)) / expected.std()


def rms(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt((errors**2).mean()))


def losses(
    name: str, oracle_checkpoint: OracleCheckpoint, **options: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row errors of the engine and of the oracle, both in bfloat16, on one mixed prompt."""
    folder, model = oracle_checkpoint(name, dtype="bfloat16")
    prompt = mixed_prompt(model, SEED)
    parts = oracle_parts(model, prompt)
    exact = oracle.logits(model, parts)
    rounded = oracle.logits(oracle.load(folder, torch.bfloat16), parts)
    found = logits(folder, prompt, **options)
    return row_errors(found, exact), row_errors(rounded, exact)


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_engine_loses_less_than_transformers(
    name: str, oracle_checkpoint: OracleCheckpoint
) -> None:
    ours, theirs = losses(name, oracle_checkpoint)
    assert 1e-4 < np.median(theirs) < 0.2, "the oracle must lose something, but not everything"
    assert np.median(ours) < np.median(theirs)
    if name in DENSE:
        assert rms(ours) < rms(theirs)
        assert ours.max() < theirs.max()


def test_routers_flip_no_more_often_than_those_of_transformers(
    oracle_checkpoint: OracleCheckpoint,
) -> None:
    pairs = [losses(name, oracle_checkpoint) for name in oracle.CONFIGS if name not in DENSE]
    ours, theirs = (np.concatenate(errors) for errors in zip(*pairs, strict=True))
    assert rms(ours) < FLIP_ALLOWANCE * rms(theirs)


@pytest.mark.cpu
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512"])
@pytest.mark.parametrize("name", ["odd_sizes_moe", "uneven_heads", "wide_window", "bigger"])
def test_instruction_sets(name: str, isa: str, oracle_checkpoint: OracleCheckpoint) -> None:
    try:
        ours, theirs = losses(name, oracle_checkpoint, isa=isa)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    assert np.median(ours) < np.median(theirs)


@pytest.mark.parametrize("name", ["dense_mixed", "moe_mixed", "odd_sizes"])
def test_float32_engine_reads_bfloat16_files(
    name: str, oracle_checkpoint: OracleCheckpoint
) -> None:
    folder, model = oracle_checkpoint(name, dtype="bfloat16")
    prompt = mixed_prompt(model, SEED)
    expected = oracle.logits(model, oracle_parts(model, prompt))
    assert relative_error(logits(folder, prompt, dtype="float32"), expected) < MAX_ERROR


@pytest.mark.parametrize("name", ["dense_mixed", "wide_mlp"])
def test_bfloat16_engine_rounds_float32_files(
    name: str, oracle_checkpoint: OracleCheckpoint
) -> None:
    folder, model = oracle_checkpoint(name)
    prompt = mixed_prompt(model, SEED)
    parts = oracle_parts(model, prompt)
    exact = oracle.logits(model, parts)
    theirs = row_errors(oracle.logits(oracle.load(folder, torch.bfloat16), parts), exact)
    ours = row_errors(logits(folder, prompt, dtype="bfloat16"), exact)
    assert rms(ours) < rms(theirs)


def test_automatic_type_is_that_of_the_file(oracle_checkpoint: OracleCheckpoint) -> None:
    for dtype in ("float32", "bfloat16"):
        folder: Path = oracle_checkpoint("dense_mixed", dtype=dtype)[0]
        with load(folder) as engine:
            assert engine.dtype == dtype
