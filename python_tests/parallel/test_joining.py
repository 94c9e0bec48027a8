"""How workers of other machines come to rank 0: who is taken, who is refused, time limits."""

from __future__ import annotations

import fcntl
import json
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from duplex_engine import BackendUnavailable, InvalidArgument, RankFailed
from duplex_engine.parallel import joining
from duplex_engine.parallel.joining import RemoteWorker, gather, join, parse_address

pytestmark = [pytest.mark.core, pytest.mark.cpu]

Joined = tuple[socket.socket, dict[str, Any]]


def free_address() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return ("127.0.0.1", server.getsockname()[1])


@contextmanager
def rank_0(n_ranks: int, limit_s: float = 10.0) -> Iterator[tuple[str, Future[list[RemoteWorker]]]]:
    """Rank 0 waits in a thread: its address, and whom it will have found."""
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(gather, address, n_ranks, limit_s)
        yield f"{address[0]}:{address[1]}", found
        if not found.exception():
            for worker in found.result():
                worker.cut()
                worker.end(0)


def connect(address: str) -> socket.socket:
    """Once rank 0 listens."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection(parse_address(address), 5)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline


def say_hello(address: str, hello: bytes) -> dict[str, Any]:
    """What rank 0 answers."""
    with connect(address) as connection:
        connection.sendall(hello)
        return dict(json.loads(connection.makefile("rb").readline()))


Join = Callable[..., list[Future[Joined]]]


@pytest.fixture
def joins() -> Iterator[Join]:
    """joins(address, rank, ...): workers, each in a thread; their connections are closed."""
    pool = ThreadPoolExecutor(8)
    futures: list[Future[Joined]] = []

    def start(address: str, *ranks: int) -> list[Future[Joined]]:
        started = [pool.submit(join, address, rank, 5) for rank in ranks]
        futures.extend(started)
        return started

    yield start
    for future in futures:
        if not future.exception(5):
            future.result()[0].close()
    pool.shutdown()


def test_all_ranks_come_in_any_order_and_get_the_request(joins: Join) -> None:
    with rank_0(4) as (address, found):
        answers = joins(address, 3, 1, 2)
        workers = found.result()
        for worker in workers:
            worker.ask({"path": "somewhere"})
        assert [answer.result()[1]["rank"] for answer in answers] == [3, 1, 2]
        assert {worker.host for worker in workers} == {"127.0.0.1"}
        for connection in (answer.result()[0] for answer in answers):  # a silent machine
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            found_s = [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options]
            assert found_s == [5, 5, 10_000]
        assert "rank 2 at 127.0.0.1:" in workers[1].how_it_ended()


def test_a_process_of_many_descriptors_waits_for_a_worker_to_end() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this user may have no more than 1,024 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    try:
        here, there = socket.socketpair()
        with here, there:
            high = socket.socket(fileno=fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, 1024))
            there.shutdown(socket.SHUT_RDWR)
            RemoteWorker(1, high, "10.0.0.2:500").end(5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_rank_outside_the_group_is_refused_and_the_wait_goes_on(joins: Join) -> None:
    with rank_0(2) as (address, found):
        for rank in (2, 7):
            with pytest.raises(InvalidArgument, match=f"rank: expected 1 to 1, .*found {rank}"):
                join(address, rank, 5)
        joins(address, 1)
        assert len(found.result()) == 1


def test_the_second_of_two_with_one_rank_is_refused(joins: Join) -> None:
    with rank_0(3) as (address, found):
        both = joins(address, 1, 1)
        done, waiting = wait(both, 5, FIRST_COMPLETED)
        with pytest.raises(InvalidArgument, match="has not come yet, found 1, which came from"):
            done.pop().result()
        joins(address, 2)
        for worker in found.result():
            worker.ask({})
        assert waiting.pop().result(5)[1] == {"rank": 1}


def test_another_build_and_other_programs_are_refused(joins: Join) -> None:
    with rank_0(2) as (address, found):
        answer = say_hello(address, b'{"join": 1, "build": "0123456789abcdef"}\n')
        name, message = answer["refused"]
        assert name == "BackendUnavailable"
        assert "version: expected the code of rank 0" in message
        assert "0123456789abcdef" in message
        nested = b"[" * 50_000 + b"\n"
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"join": null}\n', nested):
            assert "another program" in say_hello(address, hello)["refused"][1]
        joins(address, 1)
        assert len(found.result()) == 1


def test_who_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch, joins: Join) -> None:
    monkeypatch.setattr(joining, "HELLO_S", 0.2)
    with rank_0(2) as (address, found):
        assert "found none" in say_hello(address, b"")["refused"][1]
        joins(address, 1)
        assert len(found.result()) == 1


def test_who_never_ends_a_line_is_heard_no_further(joins: Join) -> None:
    with rank_0(2) as (address, found):
        with connect(address) as stranger, pytest.raises(ConnectionError):
            stranger.sendall(b"x" * 2**26)  # more than fits between the two
        joins(address, 1)
        assert len(found.result()) == 1


def test_who_has_gone_before_the_door_is_opened(
    monkeypatch: pytest.MonkeyPatch, joins: Join
) -> None:
    accept, n_calls = socket.socket.accept, 0

    def once_aborted(self: socket.socket) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            raise ConnectionAbortedError
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", once_aborted)
    with rank_0(2) as (address, found):
        joins(address, 1)
        assert len(found.result()) == 1
    assert n_calls > 1


@contextmanager
def another_program(answer: bytes) -> Iterator[str]:
    """Its address. It says `answer` to the first who comes, and waits for the end."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):
                connection.sendall(answer)
                while connection.recv(4096):
                    pass

        served = pool.submit(serve)
        yield f"127.0.0.1:{server.getsockname()[1]}"
        served.result(5)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"[]\n",
        b"[" * 200_000 + b"\n",
        b'{"refused": ["annotations", "x"]}\n',
        b'{"refused": 5}\n',
        b'{"rank": 2}\n',
        b"\xff\n",
        b"",
    ],
)
def test_the_port_of_another_program(answer: bytes) -> None:
    with (
        another_program(answer) as address,
        pytest.raises(BackendUnavailable, match=f"expected rank 0 at {address}, found another"),
    ):
        join(address, 1, 0.3)


def test_a_worker_that_was_taken_waits_for_the_others(joins: Join) -> None:
    with rank_0(3) as (address, found), ThreadPoolExecutor(1) as pool:
        early = pool.submit(join, address, 1, 0.3)
        time.sleep(0.6)
        joins(address, 2)
        for worker in found.result():
            worker.ask({})
        connection, request = early.result(5)
        connection.close()
        assert request == {"rank": 1}


def test_a_worker_that_went_again_is_awaited_again(joins: Join) -> None:
    with rank_0(3) as (address, found):
        with connect(address) as gone:
            hello = {"join": 1, "build": joining.build_digest()}
            gone.sendall(json.dumps(hello).encode() + b"\n")
            time.sleep(0.1)
        time.sleep(0.1)
        joins(address, 2)
        time.sleep(0.1)
        assert not found.done()
        joins(address, 1)
        assert len(found.result()) == 2


def test_ranks_that_never_come_are_named_with_the_command_that_starts_them(joins: Join) -> None:
    with rank_0(4, limit_s=0.5) as (address, found):
        (early,) = joins(address, 1)
        with pytest.raises(BackendUnavailable) as error:
            found.result()
        assert str(error.value) == (
            f"tensor_parallel: expected workers of ranks 1 to 3 at {address} within 0.5 s, "
            "found 1; start `duplex-engine worker CHECKPOINT --rank 2 "
            f"--address {address}` on its machine"
        )
        with pytest.raises(RankFailed, match="given up waiting"):
            early.result()


def test_a_worker_waits_for_rank_0_as_long_as_it_is_told_to() -> None:
    host, port = free_address()
    began_s = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"expected rank 0 to listen at .* within 0.6 s"):
        join(f"{host}:{port}", 1, 0.6)
    assert 0.3 < time.monotonic() - began_s < 2


@pytest.mark.parametrize("host", ["", "a..b", "x" * 70, "\udcff"])
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(InvalidArgument, match='address: expected "host:port" of rank 0'):
        parse_address(f"{host}:500")


def test_an_address_that_is_not_of_this_machine_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"one of this machine to listen at, found 192\.0"):
        gather(("192.0.2.1", 29500), 2, 1)
