"""The engine: one checkpoint in memory, ready to serve sessions.

Owns the way from a checkpoint folder to the C++ core (which takes plain values and raw tensors) and
the micro-turns of several sessions in one pass. Read `session.py` next; the work itself is done in
`csrc/engine/micro_turn.cpp`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from duplex_engine import _core
from duplex_engine.arguments import (
    MAX_INT32,
    check_callable,
    found,
    integer,
    output_path,
    parse_bytes,
    position_limit,
    sampling_options,
    text,
)
from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.cache import cache_folder
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.config import ModelConfig
from duplex_engine.core_config import core_config
from duplex_engine.errors import CheckpointError, InvalidArgument, SessionClosed
from duplex_engine.loading import load_engine, row_and_matrix_formats
from duplex_engine.packed import Dtype, Weights, layout_digest, write_packed
from duplex_engine.parallel.ranks import Ranks
from duplex_engine.parallel.transports import MAX_RANKS, check_reduction, choose_group
from duplex_engine.progress import progress_bar
from duplex_engine.session import Session
from duplex_engine.snapshot import ModelIdentity, open_snapshot
from duplex_engine.step import step_together
from duplex_engine.text import Tokenizer
from duplex_engine.types import MicroTurn, StepInput, Window

__all__ = ["Engine"]

DEFAULT_MEMORY = 2**30
Progress: TypeAlias = bool | Callable[[int, int], None] | None
KvDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]


class Engine:
    """One model, loaded. Make it with `Engine.load`; use it as a context manager or `close` it.

    Threads may share an engine; one session takes one call at a time. A fork of the process
    (`os.fork`) may not use it: there its calls raise InvalidArgument.
    """

    sample_rate = SAMPLE_RATE  # Hz, of sound given without a `sample_rate`

    def __init__(
        self,
        core: _core.Engine,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        sizes: dict[str, Any],
        options: dict[str, Any],
        ranks: Ranks | None,
    ) -> None:
        """For `load`; `sizes` and `options` are those of the core."""
        self._core = core
        self._ranks = ranks
        self._reduction: str = options["reduction"]
        self._device: str = options["device"]
        self._rewind_rows: int = options["rewind_rows"]
        self._dtype: Dtype = options["dtype"]
        self._weights: Weights = options["weights"]
        self._kv_dtype: KvDtype = options["kv_dtype"]
        self._config = config
        self._tokenizer = tokenizer
        self._sizes = sizes
        names = ("dtype", "weights", "kv_dtype", "mtp_layers", "reduction")
        identity: dict[str, str | int] = {name: options[name] for name in names}
        hashes = [] if ranks is None else ranks.weights_hashes
        self._model = ModelIdentity(core, sizes, identity, hashes)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        weights: Literal["auto", "int8", "int4", "mxfp8", "nvfp4"] = "auto",
        kv_dtype: Literal["auto", "int8"] = "auto",
        mtp_layers: int = 0,
        threads: int | None = None,
        memory: int | str | None = None,
        page: int | str | None = None,
        max_positions: int = 32_768,
        max_batch_rows: int = 256,
        rewind_rows: int = 64,
        isa: str | None = None,
        cache: bool | str | Path = False,
        beside: Engine | None = None,
        tensor_parallel: int = 1,
        reduction: Literal["ranks", "invariant", "switch"] = "ranks",
        transport: str = "auto",
        address: str | None = None,
        join_s: float = 300.0,
        gpus: Sequence[int] | None = None,
        progress: Progress = None,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            path: the folder that holds config.json, the weights, perhaps tokenizer.json; or
                "reference", the small interaction model that comes with the package. A folder
                that `duplex-engine convert` wrote has weights of one format, for the CPU.
            device: "cpu", or "cuda" where the build has CUDA and the machine a GPU of compute
                capability 9.0 or newer (docs/GPU.md).
            dtype: type of the rows and, unless `weights` and `kv_dtype` say otherwise, of the
                weights and of the cache of keys and values; "auto" is bfloat16 for a bfloat16
                checkpoint, else float32.
            weights: "int8" or "int4" quantise the layers' matrices and the head while loading:
                groups of 64 or 32 inputs share a scale, 8.25 or 4.5 bits a weight. "mxfp8" keeps
                them in MXFP8, for `device="cuda"` and bfloat16 rows (docs/CHECKPOINT.md). "nvfp4",
                for the same, keeps those that the checkpoint has in NVFP4 as they are, 4.5 bits a
                weight, with the bits of bfloat16; "auto" does so there by itself.
            kv_dtype: "int8" keeps keys and values in 8 bits, a scale for each position and head:
                half the memory of bfloat16, and on the CPU less time the longer the context.
            mtp_layers: of the checkpoint's multi-token-prediction layers, how many to load: each
                guesses one token more, for sessions opened with `speculate`. 0 loads none.
            threads: worker threads of the CPU; None takes one per processor core that the process
                may use, with `address` on every machine.
            memory: bytes for the sequences of all sessions, or a string like "512MiB". Weights are
                not counted. None takes 1 GiB, or with `beside` the memory of that engine, for both
                together.
            page: least bytes of a page of that memory, for an engine that shares it with one of a
                larger model, which says what it needs.
            max_positions: the longest sequence of a session that does not say its own.
            max_batch_rows: most rows of one pass; longer input takes several.
            rewind_rows: how far back `Session.truncate` can always go, in rows. Every session pays
                for them in memory.
            isa: instruction set of the CPU ("avx512", with VNNI and BF16, "avx512_vnni", without
                BF16, "avx2_vnni", "avx2", "portable"); None takes the best one.
            cache: keep the packed weights in a file, and load that file as long as the checkpoint
                is the same (CPU only). True takes the folder duplex_engine in $XDG_CACHE_HOME or
                ~/.cache; or name a folder. docs/CHECKPOINT.md says what "the same" sees.
            beside: another engine, whose threads this one shares and to which it gives way: all
                its sessions compute as that one's `background` sessions do. Leave out `device`,
                `threads` and `isa`, which are the other's.
            tensor_parallel: how many ranks compute together, each with a share of the weights and
                of `memory`: this process and so many workers less one (docs/PARALLEL.md). `threads`
                are divided among them.
            reduction: how ranks add what they have computed. "ranks": a partial sum for each, in
                rank order, so that the bits depend on their number. "invariant": as many partial
                sums with any number of ranks, so that they do not; slower. "switch": inside an
                NVLink switch, in its own order: bits may differ from run to run.
            transport: how ranks meet; "auto" takes the best that is there. "torch.distributed"
                needs no common memory, but torch (`pip install 'duplex_engine[distributed]'`).
                With it and with "shared memory" GPUs meet by way of their hosts.
            address: "host:port" of this machine, where the workers come to: each is started on its
                machine by `duplex-engine worker`. None starts them here.
            join_s: how many seconds they may take to come.
            gpus: with `device="cuda"`, the number of each rank's GPU, rank 0's first. None takes
                0, 1, ..., and with one rank, or with `address` on every machine, the GPU that is
                the process's current one.
            progress: True shows a bar on stderr; a function is called with (bytes done, bytes).

        Raises:
            CheckpointError: a file is missing or damaged, or asks for what the engine cannot run.
            InvalidArgument: one of the options is wrong.
            BackendUnavailable: the device, instruction set or transport is not there.
            CapacityError: the memory is not there.
            RankFailed: a worker process ended while it loaded.
            SessionClosed: the engine `beside` this one is closed.
        """
        if dtype not in ("auto", "float32", "bfloat16"):
            raise InvalidArgument(
                f"dtype: expected 'auto', 'float32' or 'bfloat16', found {found(dtype)}"
            )
        if weights not in ("auto", "int8", "int4", "mxfp8", "nvfp4"):
            raise InvalidArgument(
                "weights: expected 'auto', 'int8', 'int4', 'mxfp8' or 'nvfp4', "
                f"found {found(weights)}"
            )
        if kv_dtype not in ("auto", "int8"):
            raise InvalidArgument(f"kv_dtype: expected 'auto' or 'int8', found {found(kv_dtype)}")
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise InvalidArgument(
                f"progress: expected True, a function or None, found {found(progress)}"
            )
        if beside is not None:
            if not isinstance(beside, Engine):
                raise InvalidArgument(f"beside: expected an Engine, found {found(beside)}")
            if beside.closed:
                raise SessionClosed("beside: the engine is closed; load it again")
            theirs = (threads, isa) == (None, None) and gpus is None
            if device not in ("cpu", beside._device) or not theirs:
                raise InvalidArgument(
                    "beside: expected no device, gpus, threads and isa: they are the other engine's"
                )
            device = beside._device
        mtp_layers = integer(mtp_layers, "mtp_layers", high=MAX_INT32)
        n_ranks = integer(tensor_parallel, "tensor_parallel", 1, MAX_RANKS)
        check_reduction(text(reduction, "reduction"), text(device, "device"))
        group = choose_group(n_ranks, transport, address, join_s, gpus, device, reduction)
        if beside is not None and (n_ranks > 1 or beside._ranks is not None):
            raise InvalidArgument(
                "beside: expected two engines with tensor_parallel=1; engines of several ranks "
                "share no threads and no memory, so load this one without beside"
            )
        options: dict[str, Any] = {
            "device": device,
            "gpu": group.gpus[0],
            "n_threads": _threads(threads, n_ranks, address is not None),
            "isa": "" if isa is None else text(isa, "isa"),
            "memory_bytes": _memory(memory, beside) // n_ranks,
            "page_bytes": 0 if page is None else parse_bytes(page, "page"),
            "max_batch_rows": integer(max_batch_rows, "max_batch_rows", 1, MAX_INT32),
            "max_positions": integer(max_positions, "max_positions", 1),
            "rewind_rows": integer(rewind_rows, "rewind_rows", high=MAX_INT32),
            "mtp_layers": mtp_layers,
            "n_ranks": n_ranks,
            "reduction": reduction,
            "transport": group.transport,
        }
        folder = cache_folder(cache)
        if folder is not None and device != "cpu":
            raise InvalidArgument(f"cache: expected False on the device {device!r}, found {cache}")
        with Checkpoint.open(path) as checkpoint, ExitStack() as stack:
            config = checkpoint.config
            if mtp_layers > len(config.mtp_is_local):
                raise CheckpointError(
                    f"{checkpoint.path}: config.json: mtp_config: expected {mtp_layers} or more "
                    f"num_nextn_predict_layers, as mtp_layers asks for, "
                    f"found {len(config.mtp_is_local)}; ask for fewer"
                )
            row_dtype, matrices = row_and_matrix_formats(checkpoint, dtype, weights, device)
            if progress is True:
                progress = stack.enter_context(progress_bar(f"loading {checkpoint.path.name}"))
            tokenizer = None
            if checkpoint.tokenizer_path is not None:
                tokenizer = Tokenizer.from_file(checkpoint.tokenizer_path)
            sizes = core_config(config, mtp_layers)
            held: KvDtype = row_dtype if kv_dtype == "auto" else kv_dtype
            options |= {"dtype": row_dtype, "weights": matrices, "kv_dtype": held}
            core, ranks = load_engine(
                checkpoint,
                sizes,
                options,
                folder=folder,
                group=group,
                beside=None if beside is None else beside._core,
                progress=progress or None,
            )
        return cls(core, config, tokenizer, sizes, options, ranks)

    def write_weights(
        self, path: str | Path, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Writes the packed weights to a file, as `duplex-engine convert` does (CPU only).

        Raises:
            InvalidArgument: the weights are those of one rank of several, or cut into parts.
            OSError: the file cannot be written.
        """
        if progress is not None:
            check_callable(progress, "progress")
        if self._ranks is not None or self._reduction != "ranks":
            raise InvalidArgument(
                "write_weights: expected an engine with tensor_parallel=1 and reduction='ranks'; "
                "load with cache=True to keep the packed weights of ranks"
            )
        write_packed(
            output_path(path, "write_weights: path"),
            self._core,
            dtype=self._dtype,
            weights=self._weights,
            layout=layout_digest(self._sizes),
            source="",
            progress=progress,
        )

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's validated `config.json`."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None: then text goes in and comes out as token ids."""
        return self._tokenizer

    @property
    def dtype(self) -> Dtype:
        """Type of the rows: "float32" or "bfloat16"."""
        return self._dtype

    @property
    def kv_dtype(self) -> KvDtype:
        """Type of the cache of keys and values: `dtype` or "int8"."""
        return self._kv_dtype

    @property
    def weights(self) -> Weights:
        """Format of the layers' matrices and the head: `dtype`, "int8", "int4", "mxfp8" or
        "nvfp4": NVFP4 where the checkpoint has it, bfloat16 elsewhere."""
        return self._weights

    @property
    def rewind_rows(self) -> int:
        """How far back `Session.truncate` can always go, in rows."""
        return self._rewind_rows

    @property
    def interaction(self) -> bool:
        """Whether this is an interaction checkpoint: one that ends its own output with `listen`."""
        return self._config.interaction is not None

    def open_session(
        self,
        *,
        max_positions: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        speculate: int = 0,
        background: bool = False,
        endless: Window | Literal["auto"] | None = "auto",
    ) -> Session:
        """Opens a session: one user's stream.

        Args:
            max_positions: most positions that its sequence can hold; their memory is promised here,
                so that no other session can take it away. None takes the engine's. A model without
                global layers, like the reference model, has no such limit: it is never full.
            temperature: 0 is greedy.
            top_k: sample among the k most likely tokens; 0 among all.
            top_p: sample among the most likely tokens that reach this probability together.
            seed: of the session's random numbers.
            speculate: most tokens to guess in one pass, from what followed the same words earlier
                in the session, else from the layers loaded by `mtp_layers`; 0 is off. A guess that
                the model does not make itself is dropped: the output is the same, sooner where
                text repeats or the layers guess well. `MicroTurn.accepted` tells whether it pays.
            background: compute this session on the background lane: its calls stand still while a
                call of an interaction session computes, and go on behind it. The bits are the same.
                `step_many` takes sessions of one lane.
            endless: what to keep when all positions are taken: the oldest of the rest is forgotten,
                and `MicroTurn.events` says so (`Forgot`). "auto" keeps an eighth at the beginning
                and the newest half in sessions of interaction checkpoints that have 384 positions
                or more and where half is no less than the longest window and `rewind_rows`;
                `Session.endless` tells. None: the session ends with a CapacityError.

        Raises:
            CapacityError: the memory left cannot hold such a session.
            InvalidArgument: one of the options is wrong.
        """
        core = self._core.open_session(
            max_positions=position_limit(max_positions),
            speculate=integer(speculate, "speculate", high=MAX_INT32),
            background=bool(background),
            endless=self._endless(endless),
            **sampling_options(temperature, top_k, top_p, seed),
        )
        return Session(core, self._core, self._config, self._tokenizer, self._model)

    def restore(self, path: str | Path, *, max_positions: int | None = None) -> Session:
        """Opens a session that goes on bit for bit where `Session.snapshot` was called.

        Args:
            path: a file that `Session.snapshot` wrote, here or elsewhere.
            max_positions: most positions that its sequence can hold; None takes the snapshot's.

        Raises:
            CheckpointError: no such file, another file, a damaged one, or one of another model,
                other options of `load`, or another kind of machine; the message says which.
            CapacityError: the memory left cannot hold the session; the message says what would fit.
            InvalidArgument: `max_positions` is less than the snapshot holds.
        """
        limit = position_limit(max_positions)
        with open_snapshot(path) as snapshot:
            self._model.check(snapshot.model, str(path))
            core = _core.read_snapshot(self._core, snapshot.state, snapshot.read, limit)
            try:
                snapshot.check_at_end()
                return self._adopt(core, snapshot.carried)
            except (KeyError, TypeError, ValueError) as error:
                core.close()
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(
                    f"{path}: expected a snapshot's header, found: {error!r}"
                ) from error

    def _endless(self, endless: object) -> bool | tuple[int, int] | None:
        """The policy in the core's words."""
        if isinstance(endless, str) and endless == "auto":
            return self.interaction
        if endless is None:
            return None
        if not isinstance(endless, Window):
            raise InvalidArgument(
                f"endless: expected a Window, 'auto' or None, found {found(endless)}"
            )
        return integer(endless.head, "endless: head"), integer(endless.recent, "endless: recent")

    def _adopt(self, core: _core.Session, carried: dict[str, Any]) -> Session:
        """The session of a core's session that goes on from another."""
        session = Session(core, self._core, self._config, self._tokenizer, self._model)
        session._resume(carried)
        return session

    def step_many(
        self,
        requests: Mapping[Session, StepInput] | Iterable[tuple[Session, StepInput]],
    ) -> list[MicroTurn | Exception]:
        """Runs one micro-turn of several sessions in one pass over the weights.

        Each session computes the same bits as it would alone. An error of one session does not
        touch the others: it is returned in that session's place, and its state is as it was.

        Args:
            requests: for each session the arguments of `Session.step`, as a dict.

        Returns:
            For each request, in order, its micro-turn or the error that `Session.step` would raise.
        """
        pairs = requests.items() if isinstance(requests, Mapping) else requests
        if not isinstance(pairs, Iterable):
            raise InvalidArgument(
                f"step_many: expected {{session: StepInput(...)}} or pairs, found {found(pairs)}"
            )
        return step_together(self._core, list(pairs))

    @property
    def stats(self) -> dict[str, int]:
        """Counters: sessions, pages of memory (total, used, free, promised), passes and their rows,
        tokens drafted and accepted; on a GPU, kernels and records that were launched and how often
        the host waited for it."""
        return dict(self._core.stats())

    @property
    def memory_plan(self) -> list[tuple[str, int]]:
        """What the engine reserved: (name, bytes), in order."""
        return list(self._core.memory_plan())

    @property
    def description(self) -> str:
        """Model, device, instruction set, threads: a few lines for a log."""
        return self._core.description()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._core.closed

    def close(self) -> None:
        """Closes every session, frees the weights and ends the workers."""
        self._core.close()
        if self._ranks is not None:
            self._ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _memory(memory: int | str | None, beside: Engine | None) -> int:
    """Bytes of the engine's own memory; 0 for that of the engine beside it."""
    if memory is None:
        return DEFAULT_MEMORY if beside is None else 0
    return parse_bytes(memory)


def _threads(threads: int | None, n_ranks: int, is_remote: bool) -> int:
    """Worker threads of one rank; 0 for one per processor core, of each machine."""
    n = 0 if threads is None else integer(threads, "threads", high=MAX_INT32)
    return (
        n
        if n_ranks == 1 or (is_remote and n == 0)
        else max((n or len(os.sched_getaffinity(0))) // n_ranks, 1)
    )
