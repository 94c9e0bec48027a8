"""Workers of other machines: how they come to rank 0, and what it can see of them.

A worker connects to the address of rank 0, says who it is in a line of JSON, and gets the request
that `worker.py` carries out, or the reason why it is not taken. The connection stays: what the
worker says comes through it, and its end is the worker's end. Owns those connections.
"""

from __future__ import annotations

import hashlib
import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from duplex_engine import _core, errors
from duplex_engine.errors import (
    BackendUnavailable,
    CheckpointError,
    DuplexError,
    InvalidArgument,
    RankFailed,
)
from duplex_engine.json_input import found, parse_json_object
from duplex_engine.parallel.lines import Lines, line

__all__ = ["RemoteWorker", "gather", "join", "listen", "parse_address"]

PACKAGE = Path(__file__).parent.parent
HELLO_S = 10.0  # for a line of a connection that was just made
HELLO_BYTES = 64 * 1024  # far above any such line; bounds what another program sends
RETRY_S = 0.2
POLL_S = 0.2
# A machine that is gone without a word is noticed after so many seconds of silence, and as many
# questions without an answer, one a second.
KEEPALIVE_S = 5


def parse_address(address: object) -> tuple[str, int]:
    """Host and port of "host:port".

    Raises:
        InvalidArgument: of another form.
    """
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    try:
        host.encode("idna")  # as the system's resolver is asked
    except UnicodeError:
        host = ""
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidArgument(
            f'address: expected "host:port" of rank 0, port 1 to 65535, found {found(address)}'
        )
    return host.strip("[]"), int(port)


@cache
def build_digest() -> str:
    """Names the code of this package: ranks agree to the bit in what they all compute, so all run
    the same."""
    digest = hashlib.sha256(Path(_core.__file__).read_bytes())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class RemoteWorker:
    """A worker of another machine, seen by rank 0."""

    watched: int | None = None  # its connection says when it ends

    def __init__(self, rank: int, connection: socket.socket, peer: str) -> None:
        self._rank = rank
        self._connection = connection
        self._peer = peer
        self.answers = connection.fileno()

    @property
    def host(self) -> str:
        """Of rank 0, as this worker reaches it."""
        return str(self._connection.getsockname()[0])

    def ask(self, request: Mapping[str, Any]) -> None:
        """Sends the one request."""
        self._connection.settimeout(HELLO_S)
        with suppress(OSError):  # it has ended: whoever watches it tells how
            self._connection.sendall(line({**request, "rank": self._rank}))

    def how_it_ended(self) -> str:
        return f"rank {self._rank} at {self._peer} has ended, or cannot be reached"

    def cut(self) -> None:
        """It ends without a word."""
        _shut_down(self._connection)

    def end(self, patience_s: float) -> None:
        """It was told to end."""
        deadline = time.monotonic() + patience_s
        lines = Lines(self.answers)
        poll = select.poll()  # descriptors may be many
        poll.register(self.answers, select.POLLIN)
        while not lines.is_at_end and (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1000)
            lines.take()
        self.cut()
        self._connection.close()


def gather(address: tuple[str, int], n_ranks: int, limit_s: float) -> list[RemoteWorker]:
    """Waits for the workers of ranks 1, 2, ... at rank 0's address; those that do not fit are told
    why, and the wait goes on.

    Raises:
        BackendUnavailable: the address cannot be listened at, or not all came in `limit_s`.
    """
    with listen(address) as listener, DefaultSelector() as selector:
        entrance = _Entrance(listener, selector, n_ranks)
        deadline = time.monotonic() + limit_s
        try:
            while len(entrance.joined) < n_ranks - 1:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _missing(address, n_ranks, list(entrance.joined), limit_s)
                for key, _ in selector.select(min(left, POLL_S)):
                    entrance.handle(key.data)
                entrance.drop_silent(HELLO_S)
        except BaseException:
            entrance.refuse_all(f"rank 0 at {_text(address)} has given up waiting for all ranks")
            raise
        entrance.drop_silent(0.0)
        return [entrance.joined[rank].worker for rank in range(1, n_ranks)]


def _missing(
    address: tuple[str, int], n_ranks: int, joined: list[int], limit_s: float
) -> BackendUnavailable:
    came = "none" if not joined else ", ".join(map(str, sorted(joined)))
    missing = min(set(range(1, n_ranks)) - set(joined))
    return BackendUnavailable(
        f"tensor_parallel: expected workers of ranks 1 to {n_ranks - 1} at {_text(address)} within "
        f"{limit_s:g} s, found {came}; start `duplex-engine worker CHECKPOINT --rank {missing} "
        f"--address {_text(address)}` on its machine"
    )


@dataclass(eq=False)
class _Guest:
    """A connection that was made, and who it is once it has said so."""

    connection: socket.socket
    peer: str
    lines: Lines
    since_s: float = field(default_factory=time.monotonic)
    rank: int = 0

    @property
    def worker(self) -> RemoteWorker:
        return RemoteWorker(self.rank, self.connection, self.peer)


class _Entrance:
    """Who has come while rank 0 waits."""

    def __init__(self, listener: socket.socket, selector: DefaultSelector, n_ranks: int) -> None:
        self._listener = listener
        self._selector = selector
        self._n_ranks = n_ranks
        self._guests: set[_Guest] = set()
        self.joined: dict[int, _Guest] = {}
        listener.setblocking(False)  # who has knocked may be gone before the door is opened
        selector.register(listener, EVENT_READ, None)

    def handle(self, guest: _Guest | None) -> None:
        if guest is None:
            try:
                connection, address = self._listener.accept()
            except OSError:  # the guest has gone, or this process has no descriptor left for it
                time.sleep(POLL_S)
                return
            _keep_alive(connection)
            lines = Lines(connection.fileno(), HELLO_BYTES)
            guest = _Guest(connection, _text(address), lines)
            self._guests.add(guest)
            self._selector.register(connection, EVENT_READ, guest)
            return
        for hello in guest.lines.take():
            refusal = self._judge(guest, hello)
            if refusal is not None:
                self._send_away(guest, refusal)
                return
        if guest.lines.is_at_end:  # it may come again
            self._forget(guest)

    def _judge(self, guest: _Guest, hello: bytes) -> DuplexError | None:
        """Takes in who says the right thing; else why not."""
        try:
            values = parse_json_object(hello, "hello")
            rank, build = values["join"], values["build"]
        except (CheckpointError, KeyError):
            return InvalidArgument("expected a worker of duplex_engine, found another program")
        if build != build_digest():
            return BackendUnavailable(
                f"version: expected the code of rank 0 (build {build_digest()}) on every rank, "
                f"found build {found(build)}; install the same duplex_engine on both machines"
            )
        if not isinstance(rank, int) or not 0 < rank < self._n_ranks:
            return InvalidArgument(
                f"rank: expected 1 to {self._n_ranks - 1}, as rank 0 was loaded with "
                f"tensor_parallel={self._n_ranks}, found {found(rank)}"
            )
        if guest.rank or rank in self.joined:
            return InvalidArgument(
                f"rank: expected one that has not come yet, found {rank}, which came from "
                f"{self.joined.get(rank, guest).peer}; give every worker a rank of its own"
            )
        guest.rank = rank
        self.joined[rank] = guest
        self._say(guest, {"rank": rank})
        return None

    def drop_silent(self, after_s: float) -> None:
        """Those that have said nothing for so long."""
        for guest in list(self._guests):
            if not guest.rank and time.monotonic() - guest.since_s >= after_s:
                self._send_away(guest, InvalidArgument("expected a worker's rank, found none"))

    def refuse_all(self, reason: str) -> None:
        for guest in list(self._guests):
            self._send_away(guest, RankFailed(reason))

    def _send_away(self, guest: _Guest, why: DuplexError) -> None:
        self._say(guest, {"refused": [type(why).__name__, str(why)]})
        self._forget(guest)

    def _say(self, guest: _Guest, message: dict[str, Any]) -> None:
        with suppress(OSError):  # it has gone by itself
            guest.connection.send(line(message))

    def _forget(self, guest: _Guest) -> None:
        self._selector.unregister(guest.connection)
        self._guests.discard(guest)
        if self.joined.get(guest.rank) is guest:
            del self.joined[guest.rank]
        guest.connection.close()


def join(address: str, rank: int, limit_s: float) -> tuple[socket.socket, dict[str, Any]]:
    """A worker's side: the connection to rank 0, and what it asks for, once all ranks have come.

    Raises:
        BackendUnavailable: nobody listens at the address within `limit_s`, or another program.
        DuplexError: rank 0 does not take this worker.
    """
    place = parse_address(address)
    deadline = time.monotonic() + limit_s
    while True:
        try:
            connection = socket.create_connection(place, timeout=HELLO_S)
            break
        except OSError as error:  # rank 0 may be started later
            if time.monotonic() + RETRY_S > deadline:
                raise BackendUnavailable(
                    f"address: expected rank 0 to listen at {address} within {limit_s:g} s, "
                    f"found: {error}; load there with address={address!r}"
                ) from error
            time.sleep(RETRY_S)
    try:
        _keep_alive(connection)
        connection.settimeout(min(HELLO_S, limit_s))
        connection.sendall(line({"join": rank, "build": build_digest()}))
        with connection.makefile("rb") as lines:
            _understood(lines.readline(HELLO_BYTES), address, rank)
            connection.settimeout(None)  # rank 0 knows how long it waits for the others
            return connection, _understood(lines.readline(), address, rank)
    except TimeoutError as error:
        connection.close()
        raise _stranger(address, "nothing") from error
    except OSError as error:
        connection.close()
        raise RankFailed(f"rank 0 at {address} cannot be reached any more: {error}") from error
    except BaseException:
        connection.close()
        raise


def _understood(answer: bytes, address: str, rank: int) -> dict[str, Any]:
    """What rank 0 says to a worker: its rank once it is taken, its rank and the request in the end.

    Raises:
        RankFailed: it said nothing and has ended.
        BackendUnavailable: it is no rank 0.
        DuplexError: it refuses this worker.
    """
    if not answer:
        raise RankFailed(f"rank 0 at {address} ended before all ranks had come")
    try:
        values = parse_json_object(answer, address)
    except CheckpointError:
        raise _stranger(address, found(answer)) from None
    match values.get("refused"):
        case [str(name), str(message)] if name in errors.__all__:
            raise getattr(errors, name)(f"rank 0 at {address} refuses this worker: {message}")
    if values.get("rank") != rank:
        raise _stranger(address, found(answer))
    return values


def _stranger(address: str, answer: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"address: expected rank 0 at {address}, found another program, which answered {answer}; "
        "give the port that rank 0 was loaded with"
    )


def _keep_alive(connection: socket.socket) -> None:
    """So that a machine without power, or behind a broken cable, is noticed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_S)
    # The same where words are on their way to it, after which nobody asks.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000 * KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # it is cut already
        connection.shutdown(socket.SHUT_RDWR)


def listen(address: tuple[str, int]) -> socket.socket:
    """A socket that listens there; raises BackendUnavailable."""
    try:
        return socket.create_server(address, family=_family(address))
    except OSError as error:
        raise BackendUnavailable(
            f"address: expected one of this machine to listen at, found {_text(address)}: {error}"
        ) from error


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    """IPv4 or IPv6, whichever the host has first."""
    return socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]


def _text(address: Any) -> str:
    return f"{address[0]}:{address[1]}"
