"""The file of a snapshot: written whole or not at all, and refused unless it is whole."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from duplex_engine import (
    AsyncEngine,
    CheckpointError,
    Engine,
    InvalidArgument,
    Session,
    SessionBusy,
    SessionClosed,
    _core,
)
from duplex_engine import snapshot as snapshot_module
from duplex_engine.models import write_random_checkpoint

pytestmark = [pytest.mark.core, pytest.mark.cpu]

TURN = 3200  # samples of a micro-turn


def sound(seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(TURN).astype(np.float32) * 0.1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, memory="64MiB", threads=1, max_positions=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def file(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "session"
    with talked(engine) as session:
        session.snapshot(path)
    return path


def talked(engine: Engine, n_turns: int = 5) -> Session:
    session = engine.open_session()
    for k in range(n_turns):
        session.step(sound(k), text="Hi. " if k == 0 else None)
    session.feed(sound(9)[:700], np.zeros((40, 60, 3), np.uint8), "What is that?", result="A dog.")
    return session


# ---- what is refused


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, float, Any]:
    """(what, where as a fraction of the file, how)."""
    where = draw(st.one_of(st.floats(0, 1), st.floats(0, 0.001), st.floats(0.999, 1)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "zero", "extend"]))
    how = draw(st.integers(1, 255) if kind == "flip" else st.binary(min_size=1, max_size=50))
    return kind, where, how


@pytest.mark.fuzz
@given(damage=damages())
@example(damage=("cut", 0.0, b""))
@example(damage=("extend", 1.0, b"\0"))
def test_a_damaged_file_is_refused(
    engine: Engine, file: Path, tmp_path_factory: pytest.TempPathFactory, damage: Any
) -> None:
    whole = file.read_bytes()
    kind, where, how = damage
    at = min(int(where * len(whole)), len(whole) - 1)
    damaged = {
        "flip": lambda: whole[:at] + bytes([whole[at] ^ how]) + whole[at + 1 :],
        "cut": lambda: whole[:at],
        "insert": lambda: whole[:at] + how + whole[at:],
        "zero": lambda: whole[:at] + bytes(len(how)) + whole[at + len(how) :],
        "extend": lambda: whole + how,
    }[kind]()
    if damaged == whole:
        return
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    before = engine.stats
    with pytest.raises(CheckpointError, match="damaged: "):
        engine.restore(path)
    assert engine.stats == before


@pytest.mark.fuzz
@given(at=st.integers(0, 10**9), n=st.integers(1, 8), value=st.sampled_from([0, 1, 0x7F, 0xFF]))
def test_a_state_that_no_session_has_does_not_crash(
    engine: Engine,
    file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    at: int,
    n: int,
    value: int,
) -> None:
    """A file with valid checksums around a damaged state: refused, or a session that works."""
    whole = bytearray(file.read_bytes())
    magic, version, n_header, n_state, n_blocks, _, blocks_crc = struct.unpack_from(
        "<8sIQQQII", whole
    )
    begin = 48 + n_header
    small = range(begin, begin + 200)  # lengths and counts lie here
    at = small[at % len(small)] if at % 2 else begin + at % n_state
    whole[at : min(at + n, begin + n_state)] = bytes([value] * (min(at + n, begin + n_state) - at))
    crc = zlib.crc32(whole[48 : begin + n_state])
    preamble = struct.pack(
        "<8sIQQQII", magic, version, n_header, n_state, n_blocks, crc, blocks_crc
    )
    whole[:48] = preamble + struct.pack("<I", zlib.crc32(preamble))
    path = tmp_path_factory.getbasetemp() / "odd"
    path.write_bytes(whole)
    before = engine.stats
    try:
        session = engine.restore(path)
    except (CheckpointError, MemoryError, ValueError):
        assert {**engine.stats, "sessions": 0} == {**before, "sessions": 0}
        return
    with session:
        answer = engine.step_many([(session, {"audio": sound(1)})])
        assert len(answer) == 1


def test_a_header_nested_too_deeply_is_refused(engine: Engine, tmp_path: Path) -> None:
    """A file with valid checksums, as one who means harm would write it."""
    header = b'{"model": {}, "carried": ' + b"[" * 200_000
    preamble = struct.pack(
        "<8sIQQQII", b"duplexSN", snapshot_module.VERSION, len(header), 0, 0, zlib.crc32(header), 0
    )
    path = tmp_path / "deep"
    path.write_bytes(preamble + struct.pack("<I", zlib.crc32(preamble)) + header)
    with pytest.raises(CheckpointError, match="deep: header: expected valid JSON, found"):
        engine.restore(path)


@pytest.mark.parametrize("path", ["", "/", "a\0b", "\ud800", b"x", 123, None])
def test_what_is_no_path_is_refused(engine: Engine, path: Any) -> None:
    with talked(engine, 1) as session, pytest.raises(InvalidArgument, match=r"^snapshot: path: "):
        snapshot_module.write_snapshot(path, session._core, engine._model, {})
    if path in ("", "/"):
        return  # there is something to read, though no snapshot
    with (
        pytest.raises(InvalidArgument, match=r"^restore: path: expected a "),
        snapshot_module.open_snapshot(path),
    ):
        pass


class TestForeignFiles:
    def test_no_file(self, engine: Engine, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"expected a snapshot, found: .*No such file"):
            engine.restore(tmp_path / "none")
        with pytest.raises(CheckpointError, match="expected a snapshot, found"):
            engine.restore(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"x", b"duplexSN", bytes(100), b'{"a": 1}' * 99])
    def test_another_file(self, engine: Engine, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(CheckpointError, match="a: expected a snapshot of a session"):
            engine.restore(tmp_path / "a")

    def test_another_version(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with talked(engine, 1) as session:
            monkeypatch.setattr(snapshot_module, "VERSION", 99)
            session.snapshot(tmp_path / "a")
            monkeypatch.undo()
        version = snapshot_module.VERSION
        with pytest.raises(
            CheckpointError, match=rf"expected a snapshot of version {version}, found ver.* 99"
        ):
            engine.restore(tmp_path / "a")

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("dtype", {"dtype": "bfloat16"}),
            ("weights", {"weights": "int8"}),
            ("instruction set", {"isa": "portable"}),
        ],
    )
    def test_an_engine_with_other_options(
        self, checkpoint: Path, file: Path, name: str, options: Any
    ) -> None:
        with Engine.load(checkpoint, memory="32MiB", threads=1, **options) as other:
            if other.description.startswith("cpu portable") and name != "instruction set":
                pytest.skip("this machine has one instruction set")
            with pytest.raises(
                CheckpointError, match=f"session: {name}: expected .*, found .*load"
            ):
                other.restore(file)
            assert other.stats["pages_promised"] == 0

    def test_an_engine_with_other_weights(self, file: Path, tmp_path: Path) -> None:
        folder = write_random_checkpoint(tmp_path / "other", seed=3)
        with (
            Engine.load(folder, memory="32MiB", threads=1) as other,
            pytest.raises(CheckpointError, match=r"packed weights: expected '[0-9a-f]{16}'"),
        ):
            other.restore(file)

    def test_an_engine_of_another_shape(self, file: Path, tmp_path: Path) -> None:
        folder = write_random_checkpoint(tmp_path / "other", "moe")
        with (
            Engine.load(folder, memory="64MiB", threads=1) as other,
            pytest.raises(CheckpointError, match="config: expected"),
        ):
            other.restore(file)


# ---- how it is written


class TestWriting:
    def test_a_failed_write_leaves_the_file_before_it(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a"
        with talked(engine) as session:
            session.snapshot(path)
            before = path.read_bytes()
            session.step(sound(7))

            def full(*_: object) -> None:
                raise OSError(28, "No space left on device")

            for name in ("fsync", "fchmod"):
                monkeypatch.setattr(os, name, full)
                with pytest.raises(OSError, match="No space left"):
                    session.snapshot(path)
                monkeypatch.undo()
                assert path.read_bytes() == before
                assert [p.name for p in tmp_path.iterdir()] == ["a"]
            session.snapshot(path)
            assert path.read_bytes() != before

    def test_it_is_private_unless_the_file_before_it_was_not(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        path = tmp_path / "a"
        with talked(engine, 1) as session:
            session.snapshot(str(path))
            assert path.stat().st_mode & 0o777 == 0o600
            path.chmod(0o644)
            session.snapshot(path)
            assert path.stat().st_mode & 0o777 == 0o644

    def test_what_a_killed_process_left_is_removed_later(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        old, new, foreign = (tmp_path / f".{name}.part" for name in ("a.1-ff", "a.2-ff", "b.1-ff"))
        for other in (old, new, foreign):
            other.touch()
        for other in (old, foreign):
            os.utime(other, (0, 0))
        with talked(engine, 1) as session:
            session.snapshot(tmp_path / "a")
        assert sorted(p.name for p in tmp_path.iterdir()) == [new.name, foreign.name, "a"]

    def test_the_folder_must_be_there(self, engine: Engine, tmp_path: Path) -> None:
        with talked(engine, 1) as session, pytest.raises(FileNotFoundError):
            session.snapshot(tmp_path / "no" / "a")

    def test_a_session_at_work_is_busy(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on = threading.Event(), threading.Event()
        write = _core.write_snapshot

        def slow(*arguments: Any) -> None:
            begun.set()
            assert go_on.wait(30)
            write(*arguments)

        monkeypatch.setattr(_core, "write_snapshot", slow)
        with talked(engine, 1) as session, talked(engine, 1) as other:
            thread = threading.Thread(target=session.snapshot, args=[tmp_path / "a"])
            thread.start()
            assert begun.wait(30)
            for call in (session.step, lambda: session.snapshot(tmp_path / "b")):
                with pytest.raises(SessionBusy):
                    call()
            with pytest.raises(SessionBusy):
                session.migrate(engine)
            other.step(sound(1))  # the others go on
            session.feed(sound(2))
            go_on.set()
            thread.join()
            session.step()
        assert (tmp_path / "a").exists()

    def test_a_session_closed_meanwhile(
        self, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = talked(engine)
        write = _core.write_snapshot

        def closing(core: _core.Session, begin: Any, write_piece: Any) -> None:
            def begin_and_close(*arguments: Any) -> None:
                begin(*arguments)
                session.close()

            write(core, begin_and_close, write_piece)

        monkeypatch.setattr(_core, "write_snapshot", closing)
        with pytest.raises(SessionClosed):
            session.snapshot(tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


def test_half_written_characters_and_requests_survive(engine: Engine, file: Path) -> None:
    """What the reader of the output holds back is taken along, and so are those of the marks."""
    layout = engine.config.interaction
    assert layout is not None
    assert engine.tokenizer is not None
    euro = engine.tokenizer.encode("€")  # three bytes, three tokens
    assert len(euro) > 1
    with talked(engine) as session:
        assert session._reader.read([euro[0]])[0] == ""
        session._reader.read([layout.delegate, *engine.tokenizer.encode("look")])
        session._remember_reader(session.length)
        path = file.with_name("reader")
        session.snapshot(path)
        with engine.restore(path) as other:
            for reader in (other._reader, other._readers[other.length]):
                _, (request,) = reader.copy().read(
                    [*engine.tokenizer.encode(" up"), layout.delegate_end]
                )
                assert request.text == "look up"
            other._reader.read([layout.delegate_end])
            assert other._reader.read(euro[1:])[0] == "€"
            other.truncate(other.marks[-2])


def test_the_asynchronous_twins(checkpoint: Path, tmp_path: Path) -> None:
    async def main() -> list[Any]:
        options = {"memory": "32MiB", "threads": 1, "max_positions": 1024}
        async with (
            await AsyncEngine.load(checkpoint, **options) as one,
            await AsyncEngine.load(checkpoint, **options) as two,
        ):
            session = await one.open_session(temperature=0.9)
            await session.step(sound(1))
            await session.snapshot(tmp_path / "a")
            restored = await two.restore(tmp_path / "a", max_positions=500)
            fork = await session.fork()
            moved = await fork.migrate(two)
            assert fork.sync.closed
            answers = [(await s.step(sound(2))).token_ids for s in (session, restored, moved)]
            await session.close()
            return answers

    answers = asyncio.run(main())
    assert answers[0] == answers[1] == answers[2]
