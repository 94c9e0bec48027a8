"""Ranks on GPUs, as processes whose kernels run on the host: the bits of the CPU's ranks."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_ops
from both_lanes import check_both_lanes
from presets import GROUPS, SMALL
from random_models import HOP, TURN, sound, words
from remote_worker import worker
from stream_ops import check_goes_on, memory, play

from duplex_engine import BackendUnavailable, Engine, InvalidArgument, RankFailed, Session, _core
from duplex_engine.models.random import Preset, write_random_checkpoint
from duplex_engine.parallel.worker import _load

pytestmark = [
    pytest.mark.core,
    pytest.mark.cpu,
    pytest.mark.skipif(
        "cuda_host" not in _core.backend_names(), reason="only a build with tests has it"
    ),
]

Load = Callable[..., Engine]

# Rows so wide that few of them take two exchanges.
WIDE = Preset(
    vocab_size=320,
    d_model=1024,
    d_ff=16,
    layers="ld",
    heads=(4, 4),
    local_heads=(4, 4),
    d_head=4,
    d_rel=2,
    rel_extent=16,
    window=8,
    patch_size=8,
    vision_layers=1,
)
APART = "torch.distributed"
SAMPLING: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "seed": 5}
CONVERSATION: list[stream_ops.Op] = [
    ("text", 110, 1),
    ("step", TURN, 2, True, 2),
    ("audio", 5 * HOP + 7, True),
    ("fork",),
    ("step", TURN + 9, 0, False, 0),
    ("truncate", 2),
    ("forget", 0, 1),
    ("decode", 5),
    ("feed", 1000, 2, False),
    ("step", 0, 1, False, 1),
]
# Pages of 2 MiB, as every GPU has; with the same ones the CPU's sessions remember as much.
PAGES: dict[str, Any] = {"page": 2**21, "memory": 2**29}
GPU: dict[str, Any] = {"device": "cuda_host", "dtype": "float32", "memory": 2**29}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), SMALL, seed=5, mtp_layers=1)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routed experts are in NVFP4."""
    return write_random_checkpoint(tmp_path_factory.mktemp("groups"), GROUPS, seed=6, dtype="nvfp4")


def run(engine: Engine, ops: list[stream_ops.Op], **options: Any) -> tuple[list[str], list[Any]]:
    """What comes out of a stream, and what rank 0 remembers of it."""
    opened = [engine.open_session(**SAMPLING | options)]
    try:
        end, outputs = play(opened[0], ops, opened)
        return outputs, memory(end)
    finally:
        for session in opened:
            session.close()


@pytest.mark.parametrize(
    ("n", "transport", "found"),
    [
        (2, "auto", "nvls"),
        (4, "p2p", "p2p"),
        (2, APART, APART),
        (4, "shared memory", "shared memory"),
    ],
)
def test_gpus_say_what_the_ranks_of_the_cpu_say(
    load: Load, small: Path, n: int, transport: str, found: str
) -> None:
    options: dict[str, Any] = {"tensor_parallel": n, "dtype": "float32"}
    on_cpu = run(load(small, **options, **PAGES), CONVERSATION)
    assert not any("Error" in line or "Invalid" in line for line in on_cpu[0]), on_cpu[0]
    engine = load(small, **GPU | options, transport=transport)
    assert f"{n} ranks x 1 thread, {found}" in engine.description
    for _ in range(2):  # the second time passes are recorded, where GPUs meet by themselves
        assert run(engine, CONVERSATION) == on_cpu


@pytest.mark.parametrize(
    ("n", "transport"),
    [(1, "auto"), (2, "auto"), (2, "p2p"), (2, "shared memory"), (4, "auto")],
)
def test_with_invariant_sums_any_number_of_gpus_says_what_one_cpu_says(
    load: Load, small: Path, n: int, transport: str
) -> None:
    options: dict[str, Any] = {"reduction": "invariant", "mtp_layers": 1, "dtype": "float32"}
    one = load(small, **options, **PAGES)
    ranks = load(small, **options, **PAGES, tensor_parallel=n)
    engine = load(small, **GPU | options, tensor_parallel=n, transport=transport)
    for guesses in (2, 0, 0):  # without them passes and turns are recorded, then played
        outputs, remembered = run(engine, CONVERSATION, speculate=guesses)
        assert outputs == run(one, CONVERSATION, speculate=guesses)[0]
        assert remembered == run(ranks, CONVERSATION, speculate=guesses)[1]


@pytest.mark.parametrize(
    ("weights", "dtype", "like"),
    [
        ("int4", "float32", {"device": "cpu"}),
        ("mxfp8", "bfloat16", {}),
        ("nvfp4", "bfloat16", {"weights": "auto"}),
    ],
)
def test_parts_in_codes_are_the_same_on_any_number_of_gpus(
    load: Load, groups: Path, weights: str, dtype: str, like: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"reduction": "invariant", "dtype": dtype, "weights": weights}
    kinds: list[dict[str, Any]] = [{"tensor_parallel": n} for n in (1, 2, 4)]
    found = []
    for kind in [*kinds, like]:
        engine = load(groups, **GPU | options | kind)
        assert engine.description.endswith("reduction of 4 parts in order")
        with engine.open_session() as session:
            found.append([session.append(text=words(k), logits="all").tobytes() for k in (40, 3)])
    assert found == 4 * found[:1]


def test_eight_gpus_say_what_one_cpu_says(load: Load, eight: Path) -> None:
    options: dict[str, Any] = {"reduction": "invariant", "dtype": "float32"}
    outputs, _ = run(load(eight, **options), CONVERSATION[:5])
    engine = load(eight, **GPU | options, tensor_parallel=8)
    for _ in range(2):  # the second time turns are recorded
        assert run(engine, CONVERSATION[:5])[0] == outputs


def test_what_rank_0_alone_computes_forgets_no_record_of_a_turn(load: Load, tmp_path: Path) -> None:
    """A first guess takes more scratch than any pass so far, on rank 0."""
    preset = replace(GROUPS, d_model=256, layers="ld gd", moe={})
    path = write_random_checkpoint(tmp_path, preset, seed=7, mtp_layers=1)
    engine = load(path, **GPU, tensor_parallel=2, weights="int4", mtp_layers=1)
    with engine.open_session() as session, engine.open_session(speculate=2) as guessing:
        session.append(text=words(16))
        said = [session.decode(2) for _ in range(4)]
        for _ in range(12):  # rows that are drafted behind in one pass
            guessing.append(text=words(1))
        guessing.decode(6)
        said += [session.decode(2) for _ in range(2)]
    with engine.open_session() as alike:
        alike.append(text=words(16))
        assert alike.decode(12) == [token for tokens in said for token in tokens]


def test_many_wide_rows_take_two_exchanges(load: Load, tmp_path: Path) -> None:
    wide = write_random_checkpoint(tmp_path, WIDE, seed=2)
    logits = []
    for device in ("cpu", "cuda_host"):
        engine = load(wide, **GPU | {"device": device}, tensor_parallel=2)
        with engine.open_session() as session:
            logits.append(session.append(text=words(40), logits="all").tobytes())
            logits.append(session.append(text=words(3), logits="all").tobytes())
    assert logits[:2] == logits[2:]


def test_sessions_go_on_from_snapshots_and_in_other_groups(
    load: Load, small: Path, tmp_path: Path
) -> None:
    kinds: list[dict[str, Any]] = [
        {"transport": "auto"},
        {"transport": APART},
        {"transport": "p2p", "max_batch_rows": 19},
    ]
    engines = [load(small, **GPU | kind, tensor_parallel=2) for kind in kinds]
    opened: list[Session] = []
    try:
        start = engines[0].open_session(**SAMPLING)
        before, after = CONVERSATION[1:6], [("step", TURN, 1, False, 1), ("decode", 4)]
        check_goes_on(start, before, after, opened, tmp_path / "snapshot", engines)
    finally:
        for session in opened:
            session.close()


@pytest.mark.parametrize("transport", ["auto", APART])
def test_both_lanes_at_once_change_no_bit(load: Load, small: Path, transport: str) -> None:
    alone, engine = (
        load(small, **GPU, tensor_parallel=2, transport=t) for t in ("auto", transport)
    )

    def hear(session: Session) -> list[tuple[int, ...]]:
        return [session.step(audio=sound(TURN, t), max_tokens=2).token_ids for t in range(6)]

    def think(session: Session) -> list[int]:
        session.append(text=words(70))
        return session.decode(12)

    check_both_lanes(alone, engine, hear, think)


@pytest.mark.parametrize(
    ("n", "transport", "in_turns"),
    [(2, "auto", True), (4, "auto", False), (4, "p2p", True), (2, APART, False)],
)
def test_a_killed_rank_ends_every_call_and_the_gpus_serve_again(
    small: Path, tmp_path: Path, n: int, transport: str, in_turns: bool
) -> None:
    """In the middle of a long turn, or of passes with sound."""
    options: dict[str, Any] = {**GPU, "tensor_parallel": n, "max_positions": 512}
    engine = Engine.load(small, **options, transport=transport)
    session, background = engine.open_session(), engine.open_session(background=True)
    session.step(audio=sound(TURN), max_tokens=1)
    session.snapshot(tmp_path / "snapshot")
    expected = session.fork().step(audio=sound(TURN, 1), max_tokens=2).token_ids
    ended: list[tuple[BaseException, float]] = []

    def work(call: Callable[[], object]) -> None:
        try:
            while True:
                call()
        except BaseException as error:  # the test looks at it
            ended.append((error, time.monotonic()))

    def call() -> object:
        return session.decode(30) if in_turns else session.step(audio=sound(TURN), max_tokens=1)

    calls = [call, lambda: background.decode(3)]
    background.append(text=words(5))
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert engine._ranks is not None
    victim = engine._ranks.pids[-1]
    killed_s = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for error, ended_s in ended:
        assert isinstance(error, RankFailed), error
        assert f"rank {n - 1} (process {victim}) was ended by SIGKILL" in str(error)
        assert ended_s - killed_s < 5  # how soon: bench/kill_rank.py
    with pytest.raises(RankFailed):
        session.step(audio=sound(TURN))
    engine.close()
    with Engine.load(small, **options) as again, again.restore(tmp_path / "snapshot") as restored:
        assert restored.step(audio=sound(TURN, 1), max_tokens=2).token_ids == expected


def test_a_worker_that_goes_while_gpus_are_connected_is_named(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUPLEX_SIMT_DEVICES", "2")
    with pytest.raises(BackendUnavailable, match=r"^rank [23]: .*expected GPU [23], found 2 GPUs"):
        Engine.load(small, **GPU, tensor_parallel=4)


def test_transports_are_chosen_by_what_the_gpus_can(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUPLEX_SIMT_MULTICAST", "0")
    options: dict[str, Any] = {**GPU, "tensor_parallel": 2}
    with Engine.load(small, **options, gpus=[3, 1]) as engine:
        assert re.search(r"p2p \(no nvls: the GPU of rank 0 has no multicast", engine.description)
    with pytest.raises(BackendUnavailable, match="transport: 'nvls' is not there: the GPU of rank"):
        Engine.load(small, **options, transport="nvls")
    with pytest.raises(BackendUnavailable, match="expected the transport 'nvls', found 'p2p"):
        Engine.load(small, **options, reduction="switch")


def test_sums_in_the_switch_are_those_of_ranks_but_for_their_order(load: Load, small: Path) -> None:
    found = []
    for reduction in ("ranks", "switch"):
        engine = load(small, **GPU, tensor_parallel=4, reduction=reduction)
        assert ("nvls, reduction in the switch" in engine.description) == (reduction == "switch")
        with engine.open_session() as session:
            found.append(session.append(text=words(40), logits="all"))
        engine.close()
    exact, in_switch = found
    assert np.abs(in_switch - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpus": [0]}, InvalidArgument, "gpus: expected 2 different numbers"),
        ({"gpus": [1, 1]}, InvalidArgument, "gpus: expected 2 different numbers"),
        ({"gpus": 3}, InvalidArgument, "gpus: expected 2 different numbers"),
        ({"gpus": [0, -1]}, InvalidArgument, "gpus: expected an integer"),
        ({"gpus": [0, 1], "device": "cpu"}, InvalidArgument, "gpus: expected none on the device"),
        ({"transport": "p2p", "address": "a:1"}, InvalidArgument, "does not reach other machines"),
        ({"address": "a:1", "gpus": [0, 0, 0]}, InvalidArgument, "gpus: expected 2 numbers, one"),
        ({"reduction": "switch", "transport": "p2p"}, InvalidArgument, "found 2 and 'p2p'"),
        ({"tensor_parallel": 2**31}, InvalidArgument, "expected an integer from 1 to 8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    small: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Engine.load(small, **{**GPU, "tensor_parallel": 2} | options)


def test_gpus_of_several_machines_meet_by_torch_distributed(
    load: Load, small: Path, address: str
) -> None:
    options: dict[str, Any] = {**GPU, "tensor_parallel": 2}
    with load(small, **options, transport="auto").open_session() as session:
        expected = session.append(text=words(30), logits="all").tobytes()
    with (
        worker(small, 1, address),  # the first of its machine, and the third of this one
        Engine.load(small, **options, address=address, gpus=[2, 0]) as engine,
        engine.open_session() as session,
    ):
        assert APART in engine.description
        assert session.append(text=words(30), logits="all").tobytes() == expected


def test_a_worker_of_another_machine_may_choose_its_gpu(small: Path, address: str) -> None:
    with (
        worker(small, 1, address, "--gpu", "9"),
        pytest.raises(BackendUnavailable, match=r"^rank 1: .*expected GPU 9, found 8 GPUs"),
    ):
        Engine.load(small, **GPU, tensor_parallel=2, address=address)


def test_a_worker_with_a_gpu_keeps_no_packed_weights() -> None:
    request = {
        "share": {"n_ranks": 2, "n_parts": 2},
        "rank": 1,
        "torch": None,
        "cache": "somewhere",
        "options": {"device": "cuda"},
    }
    with pytest.raises(InvalidArgument, match="cache: expected none on the device 'cuda'"):
        _load(request, lambda **_: None)


def test_one_rank_may_have_any_gpu(small: Path) -> None:
    with Engine.load(small, **GPU, gpus=[5]) as engine:
        assert engine.description.startswith("cuda")
    with pytest.raises(BackendUnavailable, match="expected GPU 8, found 8 GPUs"):
        Engine.load(small, **GPU, gpus=[8])
