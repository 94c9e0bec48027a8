"""From a checkpoint on disk to weights in the core, in this process alone or in several ranks.

Owns which of three sources is read (a packed checkpoint, the cache, the tensors), and that all
ranks read the same. Does not own the options (`engine.py`), nor what a rank takes of each tensor
(`csrc/model/`).
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from duplex_engine import _core
from duplex_engine.cache import fingerprint, load_cached
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.errors import CheckpointError, InvalidArgument, RankFailed
from duplex_engine.packed import Dtype, HasArena, PackedFile, Weights, layout_digest
from duplex_engine.parallel.joining import gather
from duplex_engine.parallel.ranks import Ranks, Worker, start_workers
from duplex_engine.parallel.transports import REMOTE, Group

__all__ = ["RankShare", "load_core", "load_engine", "row_and_matrix_formats"]

LOOPBACK = "127.0.0.1"

Core = TypeVar("Core", bound=HasArena)


@dataclass(frozen=True, slots=True)
class RankShare:
    """Whose share of the weights is loaded.

    Attributes:
        rank: of `n_ranks`.
        n_parts: how many partial sums all ranks make together.
    """

    rank: int
    n_ranks: int
    n_parts: int

    @property
    def is_all(self) -> bool:
        """Whether these are the weights of an engine without ranks."""
        return self.n_ranks == self.n_parts == 1


def load_engine(
    checkpoint: Checkpoint,
    sizes: dict[str, Any],
    options: dict[str, Any],
    *,
    folder: Path | None,
    group: Group,
    beside: _core.Engine | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[_core.Engine, Ranks | None]:
    """An engine of the core, and its workers where it has several ranks.

    Args:
        sizes, options, folder: as in `load_core`.
        progress: called with (bytes done, bytes) of all ranks.

    Raises:
        DuplexError: as `Engine.load`; no worker is left.
    """
    share = RankShare(0, group.n_ranks, _core.n_parts(sizes, options))
    if group.n_ranks == 1:
        make = partial(_core.Engine, beside=beside, progress=progress)
        return load_core(checkpoint, sizes, options, make, folder=folder, share=share), None
    check_not_packed(checkpoint)
    if options["device"] != "cpu":
        # Ranks wait for each other inside kernels: none may be loaded by the driver meanwhile, and
        # no lane may stand in a queue behind another.
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    request = {
        "path": str(checkpoint.path.resolve()),
        "cache": None if folder is None else str(folder.resolve()),
        "share": asdict(share),
        "gpus": group.gpus,
        "options": options,
        "torch": None,
        "checkpoint": fingerprint(checkpoint, layout_digest(sizes), of_machine=False),
    }
    if group.transport == REMOTE:
        leader, ranks = _ranks_apart(group, sizes, options, request, progress)
    else:
        leader = _core.RankLeader(sizes, options)
        workers = start_workers(
            [
                {"fd": leader.fd, "socket": leader.worker_socket(rank)}
                for rank in range(1, group.n_ranks)
            ]
        )
        ranks = Ranks(leader, workers, request, progress)
    try:
        make = partial(_core.Engine, ranks=leader, progress=ranks.report)
        core = load_core(checkpoint, sizes, options, make, folder=folder, share=share)
        ranks.wait_until_loaded(core.description().partition(",")[0])
    except BaseException as error:
        ranks.close(patience_s=0)  # they may be in the middle of loading
        if isinstance(error, RankFailed):
            ranks.raise_what_they_said()
        raise
    # Workers end with the engine, closed or not.
    weakref.finalize(core, ranks.close)
    return core, ranks


def _ranks_apart(
    group: Group,
    sizes: dict[str, Any],
    options: dict[str, Any],
    request: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> tuple[_core.RankLeader, Ranks]:
    """Ranks that share no memory, connected."""
    from duplex_engine.parallel import distributed  # torch takes seconds

    transport = distributed.transport(0, group.n_ranks)
    leader = _core.RankLeader(sizes, options, transport)
    workers: Sequence[Worker]
    if group.address is None:
        host, store = LOOPBACK, distributed.open_store(LOOPBACK)
        workers = start_workers([{}] * (group.n_ranks - 1))
    else:
        workers = came = gather(group.address, group.n_ranks, group.join_s)
        host = came[0].host  # where the address is that of every interface
        store = distributed.open_store(group.address[0])
    place = {
        "store": [host, store.port],
        "host": host,
        "n_channels": leader.n_channels,
    }
    ranks = Ranks(leader, workers, request | {"torch": place}, progress)
    try:
        ranks.connect(
            transport,
            lambda: distributed.process_groups(store, host, 0, group.n_ranks, leader.n_channels),
            group.join_s,
        )
    except BaseException:
        ranks.close(patience_s=0)
        raise
    return leader, ranks


def check_not_packed(checkpoint: Checkpoint) -> None:
    """Raises InvalidArgument for weights that were packed for one rank."""
    if checkpoint.packed is not None:
        raise InvalidArgument(
            f"tensor_parallel: {checkpoint.path} holds weights that were packed for one rank; "
            "load the checkpoint that they were made of, with cache=True if it should be fast"
        )


def load_core(
    checkpoint: Checkpoint,
    sizes: dict[str, Any],
    options: dict[str, Any],
    make: Callable[..., Core],
    *,
    folder: Path | None,
    share: RankShare,
) -> Core:
    """Loads the weights by calling `make(sizes, tensors, options, packed=...)`.

    Args:
        sizes: `core_config` of the checkpoint.
        options: the core's, with final `dtype` and `weights`.
        folder: of the cache; None: no cache.

    Raises:
        CheckpointError, CapacityError: as `Engine.load`.
    """
    layout = layout_digest(sizes if share.is_all else {**sizes, "share": asdict(share)})

    def from_tensors() -> Core:
        tensors = [(t.name, t.dtype, t.shape, t.data) for t in checkpoint.tensors]
        return make(sizes, tensors, options)

    def from_packed(packed: PackedFile) -> Core:
        with packed.reader() as reader:
            return make(sizes, [], options, packed=reader)

    if checkpoint.packed is not None:
        if not share.is_all:
            check_not_packed(checkpoint)
        if checkpoint.packed.layout != layout:
            raise CheckpointError(
                f"{checkpoint.path}: expected the config.json and the mtp_layers that its "
                "weights were packed for, found others; convert the checkpoint again"
            )
        return from_packed(checkpoint.packed)
    if folder is None:
        return from_tensors()
    return load_cached(
        folder,
        checkpoint,
        dtype=options["dtype"],
        weights=options["weights"],
        layout=layout,
        share="" if share.is_all else f"{share.rank}of{share.n_ranks}x{share.n_parts}",
        from_packed=from_packed,
        from_tensors=from_tensors,
    )


def row_and_matrix_formats(
    checkpoint: Checkpoint, dtype: str, weights: str, device: str
) -> tuple[Dtype, Weights]:
    """The types of rows and matrices that the options ask for.

    Raises:
        InvalidArgument: packed weights are of other types, or for another device; NVFP4 is asked
            of a checkpoint that has none.
    """
    packed = checkpoint.packed
    if packed is None:
        if dtype == "auto":
            dtype = checkpoint.config.dtype or _commonest_dtype(checkpoint)
        rows: Dtype = "bfloat16" if dtype == "bfloat16" else "float32"
        if weights == "auto":
            keeps_nvfp4 = device != "cpu" and rows == "bfloat16" and _has_nvfp4(checkpoint)
            return rows, "nvfp4" if keeps_nvfp4 else rows
        if weights == "nvfp4" and not _has_nvfp4(checkpoint):
            raise InvalidArgument(
                f"weights: expected a checkpoint with NVFP4 weights for 'nvfp4', found none in "
                f"{checkpoint.path}; ask for 'auto', or for 'mxfp8' or 'int4' to quantise"
            )
        return rows, cast(Weights, weights)
    if device != "cpu":
        raise InvalidArgument(
            f"{checkpoint.path}: expected the device 'cpu' for weights packed for it, "
            f"found {device!r}; load the checkpoint that they were made of"
        )
    for name, asked, held in (("dtype", dtype, packed.dtype), ("weights", weights, packed.weights)):
        if asked not in ("auto", held):
            raise InvalidArgument(
                f"{name}: expected 'auto' or {held!r}, which the packed weights in "
                f"{checkpoint.path} are, found {asked!r}; convert the checkpoint again for that"
            )
    return packed.dtype, packed.weights


def _has_nvfp4(checkpoint: Checkpoint) -> bool:
    """Whether some weights are NVFP4: no other format has E4M3 scales."""
    return any(t.dtype == "F8_E4M3" and t.name.endswith("scale") for t in checkpoint.tensors)


def _commonest_dtype(checkpoint: Checkpoint) -> str:
    """The type that most bytes of plain weights have, for a config.json that does not say it."""
    n_bytes: Counter[str] = Counter()
    for tensor in checkpoint.tensors:
        if tensor.dtype in ("F32", "F16", "BF16"):
            n_bytes[tensor.dtype] += tensor.data.nbytes
    return (
        "bfloat16" if max(n_bytes, key=n_bytes.__getitem__, default="F32") == "BF16" else "float32"
    )
