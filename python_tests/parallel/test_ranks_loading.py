"""Loading with several ranks: what is refused, what a worker's error becomes, the cache."""

from __future__ import annotations

import os
import queue
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from random_models import words
from safetensors.numpy import load_file, save_file

from duplex_engine import BackendUnavailable, CheckpointError, Engine, InvalidArgument, loading
from duplex_engine.convert import convert
from duplex_engine.models.random import write_random_checkpoint
from duplex_engine.parallel.lines import line
from duplex_engine.parallel.ranks import Process, Ranks
from duplex_engine.parallel.transports import TRANSPORTS, choose_group

pytestmark = [pytest.mark.core, pytest.mark.cpu]

Load = Callable[..., Engine]


def test_the_description_says_ranks_threads_transport_and_order(load: Load) -> None:
    engine = load("reference", tensor_parallel=2, threads=5)
    assert re.fullmatch(
        r"cpu \w+, 2 ranks x 2 threads, shared memory, reduction in rank order", engine.description
    )
    assert load("reference", reduction="invariant").description.endswith(
        ", 1 thread, reduction of 4 parts in order"
    )


def test_memory_and_weights_are_shared_out(load: Load) -> None:
    plans = [dict(load("reference", tensor_parallel=n, memory=2**26).memory_plan) for n in (1, 2)]
    assert plans[1]["page_pool"] <= plans[0]["page_pool"] / 2
    assert plans[1]["weights"] < 0.75 * plans[0]["weights"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tensor_parallel": 0}, InvalidArgument, "tensor_parallel: expected an integer"),
        ({"tensor_parallel": 3}, InvalidArgument, "expected a divisor of 4 heads, found 3"),
        ({"tensor_parallel": 8}, InvalidArgument, "1, 2 or 4 fit"),
        ({"reduction": "sum"}, InvalidArgument, "reduction: expected one of 'ranks'"),
        (
            {"reduction": "switch"},
            BackendUnavailable,
            "takes ranks on GPUs, found the device",
        ),
        ({"transport": "smoke"}, InvalidArgument, "transport: expected one of 'auto'"),
        ({"transport": "nvls"}, BackendUnavailable, "connects ranks on cuda"),
        ({"address": "10.0.0.1:29500"}, InvalidArgument, "address: expected tensor_parallel of 2"),
        ({"tensor_parallel": 2, "address": "29500"}, InvalidArgument, 'expected "host:port"'),
        ({"tensor_parallel": 2, "address": "a:99999"}, InvalidArgument, "port 1 to 65535"),
        (
            {"tensor_parallel": 2, "address": "localhost:29500", "transport": "shared memory"},
            InvalidArgument,
            "expected 'torch.distributed' with an address",
        ),
        ({"tensor_parallel": 2, "join_s": -1}, InvalidArgument, "join_s: expected more than 0"),
        ({"tensor_parallel": 2, "device": "tpu"}, BackendUnavailable, "no transport connects"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Engine.load("reference", **options)


def test_every_transport_connects_ranks_or_says_what_it_needs() -> None:
    for transport in TRANSPORTS:
        for device in ("cpu", "cuda"):
            group = partial(choose_group, 2, transport.name, None, 1.0, None, device)
            if device in transport.devices:
                assert group().transport == transport.name
            else:
                with pytest.raises(BackendUnavailable, match=re.escape(transport.needs)):
                    group()


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("cpu avx512", "cpu avx2"), ("cuda NVIDIA H100 80GB HBM3", "cuda NVIDIA B200")],
)
def test_ranks_whose_bits_differ_are_refused(mine: str, theirs: str) -> None:
    loaded: Any = SimpleNamespace(_loading=set(), _devices={1: mine, 2: theirs})
    with pytest.raises(BackendUnavailable) as error:
        Ranks.wait_until_loaded(loaded, mine)
    assert str(error.value) == (
        f"device: expected '{mine}', as rank 0 has, on every rank, found '{theirs}' on rank 2: "
        "their bits differ; load with an isa that all machines have, or with GPUs of one kind"
    )


def test_engines_of_ranks_stand_beside_no_other(load: Load) -> None:
    for one, other in ((1, 2), (2, 1)):
        with pytest.raises(InvalidArgument, match="beside: expected two engines"):
            Engine.load(
                "reference", tensor_parallel=other, beside=load("reference", tensor_parallel=one)
            )


def test_a_snapshot_needs_the_ranks_it_was_made_with(load: Load, tmp_path: Path) -> None:
    engine = load("reference", tensor_parallel=2)
    with engine.open_session() as session:
        session.append(text=words(9))
        session.snapshot(tmp_path / "snapshot")
    for options, name in (
        ({"tensor_parallel": 1}, "tensor_parallel: expected 1"),
        ({"tensor_parallel": 2, "reduction": "invariant"}, "reduction: expected 'invariant'"),
    ):
        with pytest.raises(CheckpointError, match=name):
            load("reference", **options).restore(tmp_path / "snapshot")
        with engine.open_session() as session, pytest.raises(CheckpointError, match=name):
            session.migrate(load("reference", **options))


def test_packed_weights_of_one_rank_are_refused(load: Load, larger: Path, tmp_path: Path) -> None:
    packed = convert(larger, tmp_path / "packed", weights="bfloat16")
    with pytest.raises(InvalidArgument, match="packed for one rank"):
        Engine.load(packed, tensor_parallel=2)
    with pytest.raises(InvalidArgument, match="write_weights: expected an engine with"):
        load(larger, tensor_parallel=2).write_weights(tmp_path / "arena")


def test_each_rank_keeps_its_own_packed_weights(larger: Path, tmp_path: Path) -> None:
    shares: list[tuple[int, int]] = []

    def run(**options: Any) -> bytes:
        with (
            Engine.load(
                larger, tensor_parallel=2, threads=1, max_positions=512, cache=tmp_path, **options
            ) as engine,
            engine.open_session() as session,
        ):
            return session.append(text=words(9), logits="all").tobytes()

    packed = run(progress=lambda done, total: shares.append((done, total)))
    files = sorted(tmp_path.iterdir())
    assert [path.name.rsplit("-", 1)[1] for path in files] == [
        "0of2x2.safetensors",
        "1of2x2.safetensors",
    ]
    assert shares[-1][0] == shares[-1][1] > sum(path.stat().st_size for path in files) / 2
    written = [path.stat().st_mtime_ns for path in files]
    assert run() == packed
    assert [path.stat().st_mtime_ns for path in files] == written


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_in_the_share_of_one_rank_is_reported_with_its_number(
    rank: int, larger: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(larger, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if "wq" in name and "layers.0." in name)
    heads = tensors[name].copy()
    heads[-1 if rank == 1 else 0, 0] = np.nan
    save_file(tensors | {name: heads}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name) as found:
        Engine.load(folder, tensor_parallel=2, threads=1, memory="32MiB")
    assert str(found.value).startswith("rank 1: ") == (rank == 1)


def test_a_checkpoint_that_is_replaced_while_ranks_load_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = (write_random_checkpoint(tmp_path / f"{seed}", seed=seed) for seed in (1, 2))
    start = loading.start_workers

    def start_later(*arguments: Any) -> list[Process]:
        os.replace(other / "model.safetensors", folder / "model.safetensors")  # noqa: PTH105
        return start(*arguments)

    monkeypatch.setattr(loading, "start_workers", start_later)
    with pytest.raises(CheckpointError, match=r"^rank 1: .*expected the checkpoint that"):
        Engine.load(folder, tensor_parallel=2, threads=1, memory="64MiB")


def test_the_error_of_a_worker_that_was_loaded_is_the_reason() -> None:
    heard: list[tuple[int, str]] = []
    core = SimpleNamespace(fail=lambda *what: heard.append(what))
    ranks: Any = SimpleNamespace(core=core, _answers=queue.SimpleQueue())
    Ranks._hear(ranks, 3, line({"error": ["MemoryError", "no room in /tmp/\u00e4"]}))
    assert heard == [(3, "MemoryError: no room in /tmp/\\xe4")]
