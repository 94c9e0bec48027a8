"""
The C++ core of duplex_engine.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import types
import typing
__all__: list[str] = ['Action', 'BackendUnavailable', 'CapacityError', 'CheckpointError', 'DuplexError', 'Engine', 'InvalidArgument', 'PACKING_VERSION', 'RankFailed', 'RankLeader', 'RankWorker', 'Session', 'SessionBusy', 'SessionClosed', 'TorchTransport', 'Turn', 'backend_names', 'copy_session', 'dmel_bins', 'encoder_names', 'n_parts', 'next_action', 'read_snapshot', 'weights_hash', 'write_snapshot']
class DuplexError(Exception):
    """
    Base of everything that duplex_engine raises on purpose.
    """
class InvalidArgument(DuplexError, ValueError):
    """
    An argument that cannot be used; the message says what was expected.
    """
class CheckpointError(DuplexError, ValueError):
    """
    A checkpoint that cannot be used; the message names file and tensor.
    """
class CapacityError(DuplexError, MemoryError):
    """
    No room for a session, a row or a page; nothing was changed.
    """
class BackendUnavailable(DuplexError, RuntimeError):
    """
    The device or instruction set is not there.
    """
class RankFailed(DuplexError, RuntimeError):
    """
    A rank of a tensor-parallel group is gone; restore its sessions on a new one.
    """
class SessionClosed(DuplexError, RuntimeError):
    """
    The session or its engine has been closed.
    """
class SessionBusy(DuplexError, RuntimeError):
    """
    Another thread is in a call on the same session.
    """
class TorchTransport:
    """
    Ranks that share no memory, by process groups of torch.distributed.
    """
    def __init__(self, torch: types.ModuleType, *, rank: typing.SupportsInt | typing.SupportsIndex, n_ranks: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def close(self) -> None:
        """
        Lets go of them. No call may be in progress.
        """
    def connect(self, groups: collections.abc.Sequence[typing.Any], give_up: collections.abc.Callable[[int, str], None]) -> None:
        """
        groups: a ProcessGroupGloo for each channel. give_up(rank, reason): the group is over.
        """
    def exchange(self, channel: typing.SupportsInt | typing.SupportsIndex, slabs: collections.abc.Sequence[numpy.ndarray]) -> None:
        """
        One meeting, for measurements.
        """
class Turn:
    """
    What one session's micro-turn did.
    """
    @property
    def append_us(self) -> int:
        ...
    @property
    def decode_us(self) -> int:
        ...
    @property
    def encode_us(self) -> int:
        ...
    @property
    def epoch(self) -> int:
        ...
    @property
    def forgotten(self) -> tuple[int, int]:
        ...
    @property
    def kv_bytes(self) -> int:
        ...
    @property
    def merged_turns(self) -> int:
        ...
    @property
    def missing_samples(self) -> int:
        ...
    @property
    def n_accepted(self) -> int:
        ...
    @property
    def n_drafted(self) -> int:
        ...
    @property
    def n_rows(self) -> int:
        ...
    @property
    def position(self) -> int:
        ...
    @property
    def stopped(self) -> str:
        ...
    @property
    def token_ids(self) -> list[int]:
        ...
    @property
    def total_us(self) -> int:
        ...
    @property
    def turn(self) -> int:
        ...
class Session:
    """
    One user's stream.
    """
    def append(self, kind: str, data: typing.Any, *, logits: str = 'none', end_of_audio: bool = False) -> typing.Any:
        ...
    def close(self) -> None:
        ...
    def decode(self, n: typing.SupportsInt | typing.SupportsIndex, stop: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> list[int]:
        ...
    def digests(self) -> list[tuple[int, int, int]]:
        """
        (tape, block, hash) of every whole block that is held and committed.
        """
    def draft_logits(self) -> numpy.typing.NDArray[numpy.float32]:
        """
        Logits of each multi-token-prediction layer behind the token that waits, for tests.
        """
    def feed_audio(self, samples: numpy.ndarray) -> None:
        ...
    def feed_image(self, image: numpy.ndarray) -> None:
        ...
    def feed_result(self, ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    def feed_text(self, ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    def forget(self, begin: typing.SupportsInt | typing.SupportsIndex, end: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, int]:
        ...
    def forgotten(self) -> list[tuple[int, int]]:
        ...
    def fork(self, max_positions: typing.SupportsInt | typing.SupportsIndex, background: bool) -> Session:
        """
        max_positions: 0 for those of this session.
        """
    def interrupt(self) -> None:
        ...
    def marks(self) -> list[int]:
        ...
    def memory(self) -> dict[str, int]:
        ...
    def set_sampling(self, *, seed: typing.SupportsInt | typing.SupportsIndex, temperature: typing.SupportsFloat | typing.SupportsIndex, top_k: typing.SupportsInt | typing.SupportsIndex, top_p: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    def truncate(self, length: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def background(self) -> bool:
        ...
    @property
    def closed(self) -> bool:
        ...
    @property
    def endless(self) -> tuple[int, int, bool] | None:
        """
        (head, recent) in positions, and whether they follow from max_positions
        """
    @property
    def epoch(self) -> int:
        ...
    @property
    def length(self) -> int:
        ...
    @property
    def max_positions(self) -> int:
        ...
    @property
    def turn(self) -> int:
        ...
class Engine:
    """
    One checkpoint, loaded.
    """
    def __init__(self, config: dict[str, typing.Any], tensors: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], numpy.ndarray]], options: dict[str, typing.Any], *, packed: tuple[typing.SupportsInt | typing.SupportsIndex, collections.abc.Callable[[memoryview], None]] | None = None, progress: typing.Any = None, beside: Engine | None = None, ranks: RankLeader | None = None) -> None:
        ...
    def close(self) -> None:
        ...
    def description(self) -> str:
        ...
    def embed(self, kind: str, data: typing.Any) -> numpy.typing.NDArray[numpy.float32]:
        ...
    def memory_plan(self) -> list[tuple[str, int]]:
        ...
    def open_session(self, *, max_positions: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex, temperature: typing.SupportsFloat | typing.SupportsIndex, top_k: typing.SupportsInt | typing.SupportsIndex, top_p: typing.SupportsFloat | typing.SupportsIndex, speculate: typing.SupportsInt | typing.SupportsIndex, background: bool, endless: bool | tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex] | None) -> Session:
        """
        max_positions: 0 for the engine's. endless: None, True for parts that suit most, or (head, recent) in positions.
        """
    def stats(self) -> dict[str, int]:
        ...
    def step_many(self, sessions: collections.abc.Sequence[Session], max_tokens: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> list[typing.Any]:
        ...
    def write_arena(self, write: collections.abc.Callable[[memoryview], None]) -> None:
        """
        Hands the packed weights to a function, piece by piece.
        """
    @property
    def arena_bytes(self) -> int:
        ...
    @property
    def closed(self) -> bool:
        ...
class RankLeader:
    """
    A group, seen by rank 0.
    """
    def __init__(self, config: dict[str, typing.Any], options: dict[str, typing.Any], torch: TorchTransport | None = None) -> None:
        ...
    def fail(self, rank: typing.SupportsInt | typing.SupportsIndex, reason: str) -> None:
        ...
    def stop(self) -> None:
        ...
    def worker_socket(self, rank: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        The end that the worker inherits of the socket between it and this process.
        """
    @property
    def fd(self) -> int:
        """
        Of the memory that the ranks share; a worker inherits it.
        """
    @property
    def n_channels(self) -> int:
        """
        Lanes, and page memory.
        """
    @property
    def n_ranks(self) -> int:
        ...
class RankWorker:
    """
    A rank that is not rank 0, loaded.
    """
    def __init__(self, config: dict[str, typing.Any], tensors: collections.abc.Sequence[tuple[str, str, collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], numpy.ndarray]], options: dict[str, typing.Any], *, packed: tuple[typing.SupportsInt | typing.SupportsIndex, collections.abc.Callable[[memoryview], None]] | None = None, progress: typing.Any = None, rank: typing.SupportsInt | typing.SupportsIndex, fd: typing.SupportsInt | typing.SupportsIndex = -1, socket: typing.SupportsInt | typing.SupportsIndex = -1, torch: TorchTransport | None = None) -> None:
        """
        fd: of the memory that the ranks share; or torch, where they share none.
        """
    def serve(self) -> None:
        """
        Does what rank 0 asks for until it says stop.
        """
    def weights_hash(self) -> int:
        ...
    def write_arena(self, write: collections.abc.Callable[[memoryview], None]) -> None:
        ...
    @property
    def arena_bytes(self) -> int:
        ...
    @property
    def description(self) -> str:
        ...
class Action:
    """
    What to do next.
    """
    @property
    def is_forced(self) -> bool:
        ...
    @property
    def kind(self) -> str:
        """
        "turns", "background" or "wait".
        """
    @property
    def task(self) -> int:
        ...
    @property
    def turns(self) -> list[tuple[int, int]]:
        """
        (session, micro-turns to append), of one pass.
        """
    @property
    def until_us(self) -> int | None:
        """
        None: until something new comes.
        """
def backend_names() -> list[str]:
    """
    Devices that this build knows.
    """
def copy_session(session: Session, engine: Engine) -> Session:
    """
    A session of `engine` that goes on where another engine's session is.
    """
def dmel_bins(samples: numpy.ndarray, n_mels: typing.SupportsInt | typing.SupportsIndex = 80) -> numpy.typing.NDArray[numpy.uint8]:
    """
    dMel bins of a whole 16 kHz recording: (frames, n_mels) uint8.
    """
def encoder_names() -> list[str]:
    """
    Encoders that turn raw input into rows.
    """
def n_parts(config: dict[str, typing.Any], options: dict[str, typing.Any]) -> int:
    """
    Partial sums of all ranks together; raises where they do not fit.
    """
def next_action(now_us: typing.SupportsInt | typing.SupportsIndex, sessions: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]], tasks: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]], *, period_us: typing.SupportsInt | typing.SupportsIndex, patience_us: typing.SupportsInt | typing.SupportsIndex, pass_us: typing.SupportsInt | typing.SupportsIndex, row_ns: typing.SupportsInt | typing.SupportsIndex, max_wait_us: typing.SupportsInt | typing.SupportsIndex, forced_us: typing.SupportsInt | typing.SupportsIndex) -> Action:
    """
    What an engine's driver does next: csrc/engine/scheduler.h. A session is (id, due_us, whole micro-turns, rows), a task (id, waits_since_us, slice_us).
    """
def read_snapshot(engine: Engine, state: bytes, read: collections.abc.Callable[[memoryview], None], max_positions: typing.SupportsInt | typing.SupportsIndex) -> Session:
    """
    A session from its state and a function that fills buffers with the blocks' bytes. max_positions: 0 for those of the state.
    """
def weights_hash(engine: Engine) -> int:
    ...
def write_snapshot(session: Session, begin: collections.abc.Callable[[bytes, int], None], write: collections.abc.Callable[[memoryview], None]) -> None:
    """
    Calls begin(state, bytes of blocks), then write with those bytes, piece by piece.
    """
PACKING_VERSION: int = 1
