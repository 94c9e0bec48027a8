"""The workers of one engine: started or awaited, watched, and ended.

Owns processes, and the pipes or connections that loading reports through. Does not own what ranks
tell each other while they compute: that goes through shared memory, or through torch.distributed
(`csrc/ranks/`). A worker that ends before it was told to marks the group as failed, and every wait
in it ends with RankFailed at once.
"""

from __future__ import annotations

import fcntl
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Protocol

from duplex_engine import _core, errors
from duplex_engine.errors import (
    BackendUnavailable,
    CapacityError,
    CheckpointError,
    DuplexError,
    RankFailed,
)
from duplex_engine.json_input import parse_json_object
from duplex_engine.parallel.lines import Lines, line

__all__ = ["Ranks", "Worker", "start_workers"]

GOODBYE_S = 5.0  # for a worker that was told to end
PACKAGE = Path(__file__).parent.parent


class Worker(Protocol):
    """A rank that is not this process, wherever it runs."""

    answers: int  # descriptor of what it says
    watched: int | None  # a descriptor that can be read once it has ended; None: the end of answers

    def ask(self, request: Mapping[str, Any]) -> None:
        """Sends the one request, which `worker.py` carries out."""

    def how_it_ended(self) -> str:
        """In words. It has ended."""

    def cut(self) -> None:
        """The group is over: it ends by itself."""

    def end(self, patience_s: float) -> None:
        """It was told to end; after so long it is made to."""


class Ranks:
    """The ranks of one engine beside rank 0, which is this process."""

    def __init__(
        self,
        core: _core.RankLeader,
        workers: Sequence[Worker],
        request: Mapping[str, Any],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Sends the workers to work.

        Args:
            core: the group.
            workers: of ranks 1, 2, ...
            request: what `worker.py` reads.
            progress: called with (bytes done, bytes) of all ranks while they load.
        """
        self.core = core
        self._owner = os.getpid()  # a fork of it has no workers
        self.weights_hashes = [""] * (core.n_ranks - 1)  # of ranks 1, 2, ..., once they are loaded
        self._devices: dict[int, str] = {}  # by rank, likewise: device and instruction set
        self._show = progress
        self._loading = set(range(1, core.n_ranks))
        self._answers: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self._progress = [(0, 0)] * core.n_ranks
        self._ready: set[int] = set()
        self._is_connected = False
        self._workers = workers
        self._transport: _core.TorchTransport | None = None
        self._is_closing = threading.Event()
        self._close_lock = threading.RLock()  # a signal may come in the middle, and its handler too
        self._wake_read, self._wake_write = os.pipe()
        self._watcher = threading.Thread(target=self._watch, name="duplex_ranks", daemon=True)
        for worker in workers:
            worker.ask(request)
        self._watcher.start()

    def connect(
        self,
        transport: _core.TorchTransport,
        make_groups: Callable[[], list[Any]],
        limit_s: float,
    ) -> None:
        """Waits until the workers are ready to be connected with, at most so long, and then for
        `make_groups`, which runs in a thread of its own: a worker that ends ends the wait.

        Raises:
            DuplexError: a worker failed or is not ready in time, or `make_groups` raised it.
        """
        self._transport = transport
        deadline = time.monotonic() + limit_s
        while len(self._ready) < len(self._workers):
            try:
                self._take(*self._answers.get(timeout=max(deadline - time.monotonic(), 0)))
            except queue.Empty:
                missing = min(set(range(1, len(self._workers) + 1)) - self._ready)
                raise RankFailed(
                    f"rank {missing} was not ready to be connected with in {limit_s:g} s"
                ) from None

        def run() -> None:
            try:
                groups = make_groups()
                if not self._is_closing.is_set():
                    transport.connect(groups, self._cut)
                self._answers.put((0, {"connected": True}))
            except BaseException as error:  # raised where it is waited for
                self._answers.put((0, {"error": [type(error).__name__, str(error)]}))

        threading.Thread(target=run, name="duplex_connect", daemon=True).start()
        while not self._is_connected:
            self._take(*self._answers.get())

    def report(self, done: int, total: int) -> None:
        """Takes the bytes that rank 0 has loaded, and shows those of all.

        Raises:
            DuplexError: a worker failed, so rank 0 need not go on.
        """
        self._progress[0] = (done, total)
        while not self._answers.empty():
            self._take(*self._answers.get())
        self._show_all()

    def wait_until_loaded(self, device: str) -> None:
        """Returns when every worker has its weights.

        Args:
            device: of rank 0, and its instruction set.

        Raises:
            DuplexError: one of them failed; the message begins with its rank.
            BackendUnavailable: one of them computes with other instructions, or another GPU.
        """
        while self._loading:
            self._take(*self._answers.get())
            self._show_all()
        for rank, theirs in sorted(self._devices.items()):
            if theirs != device:
                raise BackendUnavailable(
                    f"device: expected {device!r}, as rank 0 has, on every rank, found {theirs!r} "
                    f"on rank {rank}: their bits differ; load with an isa that all machines have, "
                    "or with GPUs of one kind"
                )

    def raise_what_they_said(self) -> None:
        """Raises the error of a worker that said one; after `close`, when all has been heard."""
        while not self._answers.empty():
            rank, answer = self._answers.get()
            if "error" in answer:
                raise _error(rank, *answer["error"])

    def close(self, patience_s: float = GOODBYE_S) -> None:
        """Ends the workers: those that do not go by themselves are killed. Can be called twice, by
        two threads at once too: both return when the workers have gone."""
        if os.getpid() != self._owner:
            return
        with self._close_lock:
            if self._is_closing.is_set():
                return
            self._is_closing.set()
            os.write(self._wake_write, b".")
            if self._watcher is not threading.current_thread():
                self._watcher.join()
            self.core.stop()
            deadline = time.monotonic() + patience_s  # of all together
            for worker in self._workers:
                worker.end(max(deadline - time.monotonic(), 0))
            for descriptor in (self._wake_read, self._wake_write):
                os.close(descriptor)
            if self._transport is not None:
                self._transport.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2, ..., of those that this process has started."""
        return [worker.pid for worker in self._workers if isinstance(worker, Process)]

    def _cut(self, _rank: int, _reason: str) -> None:
        """The group is over: workers that do not see it in shared memory end by this."""
        for worker in self._workers:
            worker.cut()

    def _show_all(self) -> None:
        if self._show is not None:
            done, total = zip(*self._progress, strict=True)
            self._show(sum(done), sum(total))

    def _take(self, rank: int, answer: dict[str, Any]) -> None:
        if "progress" in answer:
            done, total = answer["progress"]
            self._progress[rank] = (done, total)
        if "ready" in answer:
            self._ready.add(rank)
        if "connected" in answer:
            self._is_connected = True
        if "loaded" in answer:
            self._loading.discard(rank)
            self.weights_hashes[rank - 1] = answer["loaded"]
            self._devices[rank] = answer["device"]
        if "error" in answer:
            raise _error(rank, *answer["error"])
        if "ended" in answer:
            raise RankFailed(f"{answer['ended']} while it loaded")

    def _watch(self) -> None:
        """Runs in a thread of its own until `close`: what workers say, and when they end."""
        with DefaultSelector() as selector:
            selector.register(self._wake_read, EVENT_READ, (0, None))
            for rank, worker in enumerate(self._workers, 1):
                selector.register(worker.answers, EVENT_READ, (rank, Lines(worker.answers)))
                if worker.watched is not None:
                    selector.register(worker.watched, EVENT_READ, (rank, None))
            while True:
                events = [key for key, _ in selector.select()]
                # What a worker said comes before the news that it has ended.
                for key in sorted(events, key=lambda key: key.data[1] is None):
                    rank, lines = key.data
                    if rank == 0:
                        return
                    if lines is not None:
                        for words in lines.take():
                            self._hear(rank, words)
                    if lines is None or lines.is_at_end:
                        selector.unregister(key.fileobj)
                        if lines is None or self._workers[rank - 1].watched is None:
                            self._report_end(rank)

    def _hear(self, rank: int, words: bytes) -> None:
        try:
            answer = parse_json_object(words, "answer")
        except CheckpointError:  # printed before the worker began, by what Python runs first
            return
        if "failed" in answer:  # what it cannot say in shared memory
            self.core.fail(*answer["failed"])
        if "error" in answer:  # its end is no more than the consequence
            reason = ": ".join(answer["error"]).encode("ascii", "backslashreplace")
            self.core.fail(rank, reason.decode())  # a long one is cut between two bytes
        self._answers.put((rank, answer))

    def _report_end(self, rank: int) -> None:
        message = self._workers[rank - 1].how_it_ended()
        self.core.fail(rank, message)
        self._answers.put((rank, {"ended": message}))


class Process:
    """A worker that this process has started. In a process group of its own, so that Ctrl-C in a
    terminal reaches rank 0, which decides; without the folder that Python was started in, which may
    hold any module."""

    def __init__(self, rank: int, inherited: Mapping[str, int]) -> None:
        """inherited: descriptors, by their names in the request. Raises OSError."""
        with ExitStack() as stack:
            self._start(rank, {name: _copy(fd, stack) for name, fd in inherited.items()})

    def _start(self, rank: int, inherited: Mapping[str, int]) -> None:
        # This very package, but its folder may hold backports of modules of the standard library.
        paths = [sysconfig.get_path("stdlib"), str(PACKAGE.parent)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        self._here = {**inherited, "rank": rank, "leader": os.getpid()}
        self._rank = rank
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "duplex_engine.parallel.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if sys.__stderr__ is None else None,
            pass_fds=list(inherited.values()),
            process_group=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin
        self.pid = self._process.pid
        self.answers = self._process.stdout.fileno()
        try:
            self.watched: int | None = os.pidfd_open(self.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise

    def ask(self, request: Mapping[str, Any]) -> None:
        try:
            self._requests.write(line({**request, **self._here}))
            self._requests.flush()
        except BrokenPipeError:
            pass  # it has ended: the watcher tells how

    def how_it_ended(self) -> str:
        status = self._process.wait()
        if status < 0:
            how = f"was ended by {_signal_name(-status)}"
        else:
            how = f"ended with status {status}"
        return f"rank {self._rank} (process {self.pid}) {how}"

    def cut(self) -> None:
        with suppress(BrokenPipeError):  # it has ended
            self._requests.close()

    def end(self, patience_s: float) -> None:
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.cut()
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self.watched is not None:
            os.close(self.watched)


def start_workers(inherited: Sequence[Mapping[str, int]]) -> list[Process]:
    """Starts ranks 1, 2, ..., each with descriptors of this process, by their names in the request.

    Raises:
        BackendUnavailable: this system cannot start or watch them.
    """
    workers: list[Process] = []
    try:
        for rank, descriptors in enumerate(inherited, 1):
            workers.append(Process(rank, descriptors))
    except BaseException as error:
        for worker in workers:
            worker.end(0)
        if not isinstance(error, OSError):  # Ctrl-C
            raise
        raise BackendUnavailable(
            f"tensor_parallel: expected {len(inherited)} worker processes, found: {error}"
        ) from error
    return workers


def _copy(descriptor: int, stack: ExitStack) -> int:
    """Of a descriptor, until the stack ends: above those of stdin, stdout and stderr, which it may
    have where this process was started without them. The worker has its own there."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    stack.callback(os.close, copy)
    return copy


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _error(rank: int, name: str, message: str) -> DuplexError:
    """The error of a worker as one of this process."""
    kind = getattr(errors, name, None)
    if name == "MemoryError":
        kind = CapacityError
    if not (isinstance(kind, type) and issubclass(kind, DuplexError)):
        return RankFailed(f"rank {rank}: {name}: {message}")
    return kind(f"rank {rank}: {message}")
