"""The worker processes of one engine: started, watched, and ended.

Owns processes and the pipes that loading reports through. Does not own what ranks tell each other
while they compute: that goes through shared memory (`csrc/ranks/`). A worker that ends before it
was told to marks the group as failed, and every wait in it ends with RankFailed at once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO, Any

from duplex_engine import _core, errors
from duplex_engine.errors import BackendUnavailable, CapacityError, DuplexError, RankFailed

__all__ = ["Ranks"]

GOODBYE_S = 5.0  # for a worker that was told to end
PACKAGE = Path(__file__).parent.parent


class Ranks:
    """The ranks of one engine beside rank 0, which is this process."""

    def __init__(
        self,
        core: _core.RankLeader,
        request: dict[str, Any],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Starts the workers.

        Args:
            core: the group.
            request: what `worker.py` reads, without the rank.
            progress: called with (bytes done, bytes) of all ranks while they load.

        Raises:
            BackendUnavailable: this system cannot start or watch them.
        """
        self.core = core
        self._owner = os.getpid()  # a fork of it has no workers
        self.weights_hashes = [""] * (core.n_ranks - 1)  # of ranks 1, 2, ..., once they are loaded
        self._show = progress
        self._loading = set(range(1, core.n_ranks))
        self._answers: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self._progress = [(0, 0)] * core.n_ranks
        self._workers: list[subprocess.Popen[bytes]] = []
        self._is_closing = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        self._watcher = threading.Thread(target=self._watch, name="duplex_ranks", daemon=True)
        try:
            for rank in range(1, core.n_ranks):
                socket = core.worker_socket(rank)
                self._workers.append(_start(core.fd, socket, request | {"rank": rank}))
            self._pidfds = [os.pidfd_open(worker.pid) for worker in self._workers]
        except OSError as error:
            for worker in self._workers:
                worker.kill()
                worker.wait()
            os.close(self._wake_read)
            os.close(self._wake_write)
            raise BackendUnavailable(
                f"tensor_parallel: expected {core.n_ranks - 1} worker processes, found: {error}"
            ) from error
        self._watcher.start()

    def report(self, done: int, total: int) -> None:
        """Takes the bytes that rank 0 has loaded, and shows those of all.

        Raises:
            DuplexError: a worker failed, so rank 0 need not go on.
        """
        self._progress[0] = (done, total)
        while not self._answers.empty():
            self._take(*self._answers.get())
        self._show_all()

    def wait_until_loaded(self) -> None:
        """Returns when every worker has its weights.

        Raises:
            DuplexError: one of them failed; the message begins with its rank.
        """
        while self._loading:
            self._take(*self._answers.get())
            self._show_all()

    def raise_what_they_said(self) -> None:
        """Raises the error of a worker that said one; after `close`, when all has been heard."""
        while not self._answers.empty():
            rank, answer = self._answers.get()
            if "error" in answer:
                raise _error(rank, *answer["error"])

    def close(self, patience_s: float = GOODBYE_S) -> None:
        """Ends the workers: those that do not go by themselves are killed. Can be called twice."""
        if self._is_closing.is_set() or os.getpid() != self._owner:
            return
        self._is_closing.set()
        os.write(self._wake_write, b".")
        if self._watcher is not threading.current_thread():
            self._watcher.join()
        self.core.stop()
        for worker in self._workers:
            try:
                worker.wait(patience_s)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()
        for descriptor in (*self._pidfds, self._wake_read, self._wake_write):
            os.close(descriptor)

    @property
    def pids(self) -> list[int]:
        """Process ids of ranks 1, 2, ..."""
        return [worker.pid for worker in self._workers]

    def _show_all(self) -> None:
        if self._show is not None:
            done, total = zip(*self._progress, strict=True)
            self._show(sum(done), sum(total))

    def _take(self, rank: int, answer: dict[str, Any]) -> None:
        if "progress" in answer:
            done, total = answer["progress"]
            self._progress[rank] = (done, total)
        if "loaded" in answer:
            self._loading.discard(rank)
            self.weights_hashes[rank - 1] = answer["loaded"]
        if "error" in answer:
            raise _error(rank, *answer["error"])
        if "ended" in answer:
            raise RankFailed(f"{answer['ended']} while it loaded")

    def _watch(self) -> None:
        """Runs in a thread of its own until `close`: what workers say, and when they end."""
        with DefaultSelector() as selector:
            selector.register(self._wake_read, EVENT_READ, (0, None))
            for rank, (worker, pidfd) in enumerate(
                zip(self._workers, self._pidfds, strict=True), 1
            ):
                assert worker.stdout is not None
                os.set_blocking(worker.stdout.fileno(), False)
                selector.register(worker.stdout, EVENT_READ, (rank, _Lines(worker.stdout)))
                selector.register(pidfd, EVENT_READ, (rank, None))
            while True:
                events = [key for key, _ in selector.select()]
                # What a worker said comes before the news that it has ended.
                for key in sorted(events, key=lambda key: key.data[1] is None):
                    rank, lines = key.data
                    if rank == 0:
                        return
                    if lines is not None:
                        for line in lines.take():
                            self._answers.put((rank, json.loads(line)))
                    if lines is None or lines.is_at_end:
                        selector.unregister(key.fileobj)
                    if lines is None:
                        self._report_end(rank)

    def _report_end(self, rank: int) -> None:
        worker = self._workers[rank - 1]
        status = worker.wait()
        if status < 0:
            how = f"was ended by {_signal_name(-status)}"
        else:
            how = f"ended with status {status}"
        message = f"rank {rank} (process {worker.pid}) {how}"
        self.core.fail(rank, message)
        self._answers.put((rank, {"ended": message}))


class _Lines:
    """Whole lines of a pipe that does not block."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._descriptor = pipe.fileno()
        self._rest = b""
        self.is_at_end = False

    def take(self) -> list[bytes]:
        while True:
            try:
                piece = os.read(self._descriptor, 65536)
            except BlockingIOError:
                break
            if not piece:
                self.is_at_end = True
                break
            self._rest += piece
        *lines, self._rest = self._rest.split(b"\n")
        return lines


def _start(fd: int, socket: int, request: dict[str, Any]) -> subprocess.Popen[bytes]:
    """One worker. In a process group of its own, so that Ctrl-C in a terminal reaches rank 0, which
    decides; without the folder that Python was started in, which may hold any module."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "duplex_engine.parallel.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[fd, socket],
        process_group=0,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert worker.stdin is not None
    try:
        here = {"fd": fd, "socket": socket, "leader": os.getpid()}
        worker.stdin.write(json.dumps(request | here).encode() + b"\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended: the watcher tells how
    return worker


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
