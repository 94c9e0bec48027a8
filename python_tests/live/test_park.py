"""Parking: sessions whose client is long gone wait in a file, and go on from it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_scene import TURN, Scene, drain, sound, tokens

from duplex_engine import CheckpointError, Engine, Session, SessionBusy, SessionClosed
from duplex_engine.background import Delegations
from duplex_engine.live import CostModel, LiveEngine, Summary, lease, replay

pytestmark = pytest.mark.core


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def test_a_parked_session_goes_on_bit_for_bit(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    session = scene.live.open()
    turns = scene.talk(session, 5)
    token = session.detach()
    scene.run(2100)
    assert session.ended == "lease"
    assert (engine.stats["sessions"], engine.stats["pages_used"]) == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{token}.snapshot"]
    with scene.live.resume(token) as back:
        assert list(tmp_path.iterdir()) == []
        turns += scene.talk(back, 5, seed=1)
        with pytest.raises(SessionClosed):
            scene.live.resume(token)
    with engine.open_session() as offline:
        again = [offline.step(sound(n)).token_ids for n in (*range(5), *range(1000, 1005))]
    assert tokens(turns) == again
    assert scene.live.counters["parked"] == scene.live.counters["restored"] == 1


def test_another_process_finds_the_folder(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    session = scene.live.open()
    scene.talk(session, 3)
    token = session.detach()
    scene.run(2100)
    later = Scene(engine, folder=tmp_path)
    with later.live.resume(token) as back:
        assert len(later.talk(back, 2)) == 2


def test_a_damaged_file_is_refused_and_stays(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    token = scene.live.open().detach()
    scene.run(2100)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=rf"/{token}\.snapshot: expected .* cut short"):
        scene.live.resume(token)
    path.write_bytes(whole)
    scene.live.resume(token).close()


def test_the_number_of_files_is_bounded(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "MAX_PARKED", 2)
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    tokens_ = []
    for _ in range(4):
        tokens_.append(scene.live.open().detach())
        scene.run(2100)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(tokens_[2:])
    with pytest.raises(SessionClosed):
        scene.live.resume(tokens_[0])


def test_a_folder_that_cannot_be_written_ends_the_session(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path / "parked")
    session = scene.live.open()
    session.detach()
    (tmp_path / "parked").rmdir()
    scene.run(2100)
    assert session.ended == "lease"
    assert session.error is not None
    assert drain(session) == []
    assert scene.live.counters["park_failed"] == 1


def test_a_lease_that_ends_by_itself_and_a_disk_that_takes_its_time(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    write = Session.snapshot

    def slowly(session: Session, path: Path) -> None:
        writing.set()
        assert go_on.wait(10)
        write(session, path)

    monkeypatch.setattr(Session, "snapshot", slowly)
    with LiveEngine(engine, cost=CostModel(learn=False), folder=tmp_path) as live:
        gone, other = live.open(lease_s=0.02), live.open()
        token = gone.token
        assert writing.wait(10)
        other.push_audio(sound(0))
        assert other.get(5) is not None  # turns go on while the file is written
        threading.Timer(0.02, go_on.set).start()
        with live.resume(token) as back:  # waits for the file
            assert back.token != token
            back.push_audio(sound(1))
            assert back.get(5) is not None
        assert gone.ended == "lease"
    assert list(tmp_path.iterdir()) == []


def typed(scene: Scene, session_id: str, what: str) -> list[Any]:
    values = [e.value for e in scene.entries.get(session_id, []) if isinstance(e.value, dict)]
    return [value[what] for value in values if value.get(what) is not None]


def test_what_was_queued_is_parked_with_the_session(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    session = scene.live.open()
    turns = scene.talk(session, 3)
    token = session.detach()
    picture = np.full((16, 16, 3), 90, np.uint8)
    pushed = [
        session.push_audio(sound(7, 2 * TURN)),
        session.push_audio(sound(8, TURN // 2)),
        session.push_text([300]),
        session.push_result([310]),
        *[session.push_image(picture) for _ in range(3)],
    ]
    assert [receipt.status for receipt in pushed] == ["queued"] * 7
    scene.run(4100)
    with scene.live.resume(token) as back:
        more = scene.talk(back, 3, seed=2)
        assert more[0].turn.input.merged_turns == 3
        assert typed(scene, session.id, "result") == [[310]]
        assert len(typed(scene, session.id, "image")) == 3
        entries = [*scene.entries[session.id], *scene.entries[back.id]]
        with engine.open_session() as again:
            assert tokens(turns + more) == [turn.token_ids for turn in replay(again, entries)]


def test_nothing_is_queued_while_a_file_is_written(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    session = scene.live.open()
    write, refused = Session.snapshot, []

    def push_and_write(inner: Session, path: Path) -> None:
        for push in (session.push_text, session.push_result):
            with pytest.raises(SessionClosed, match="being parked"):
                push([300])
            refused.append(push)
        write(inner, path)

    monkeypatch.setattr(Session, "snapshot", push_and_write)
    token = session.detach()
    scene.run(2100)
    assert len(refused) == 2
    scene.live.resume(token).close()


def test_a_process_that_began_before_it_was_parked_finds_it(engine: Engine, tmp_path: Path) -> None:
    scene, other = Scene(engine, lease_s=2, folder=tmp_path), Scene(engine, folder=tmp_path)
    token = scene.live.open().detach()
    with pytest.raises(SessionClosed):
        other.live.resume(token)
    scene.run(2100)
    with other.live.resume(token) as back:
        assert len(other.talk(back, 2)) == 2
        for each in (scene, other):  # it is there once
            with pytest.raises(SessionClosed):
                each.live.resume(token)


def test_one_at_a_time_resumes_a_session(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, other = Scene(engine, lease_s=2, folder=tmp_path), Scene(engine, folder=tmp_path)
    token = scene.live.open().detach()
    scene.run(2100)
    restore = Engine.restore

    def and_another(self: Engine, path: Path) -> Session:
        monkeypatch.undo()
        for each in (scene, other):
            with pytest.raises(SessionBusy, match="being resumed at this moment"):
                each.live.resume(token)
        return restore(self, path)

    monkeypatch.setattr(Engine, "restore", and_another)
    scene.live.resume(token).close()
    assert list(tmp_path.iterdir()) == []


def test_a_session_that_is_closed_while_it_is_written_is_gone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_and_close(inner: Session, path: Path) -> None:
        write(inner, path)
        session.close()

    write = Session.snapshot
    monkeypatch.setattr(Session, "snapshot", write_and_close)
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    session = scene.live.open()
    token = session.detach()
    scene.run(2100)
    assert (session.ended, session.error, list(tmp_path.iterdir())) == ("closed", None, [])
    with pytest.raises(SessionClosed):
        scene.live.resume(token)
    assert scene.live.counters["parked"] == scene.live.counters["park_failed"] == 0


def test_what_a_killed_process_was_writing_is_removed(engine: Engine, tmp_path: Path) -> None:
    left, film = tmp_path / f".{'A' * 22}.snapshot.1-ff.part", tmp_path / ".film.part"
    scene = None
    for what in ("a new process", "the next file"):
        for path in (left, film):
            path.touch()
            os.utime(path, (0, 0))
        if scene is None:
            scene = Scene(engine, lease_s=2, folder=tmp_path)
        else:
            token = scene.live.open().detach()
            scene.run(2100)
        assert not left.exists(), what
    assert {path.name for path in tmp_path.iterdir()} == {f"{token}.snapshot", film.name}


def test_a_file_that_goes_while_the_folder_is_read(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    token = scene.live.open().detach()
    scene.run(2100)
    gone = "A" * 22  # listed and not there: as one that another process resumes meanwhile
    (tmp_path / f"{gone}.snapshot").symlink_to(tmp_path / "nothing")
    later = Scene(engine, folder=tmp_path)
    later.live.resume(token).close()


@pytest.mark.parametrize("is_remembered", [True, False], ids=["here", "elsewhere"])
def test_a_parked_session_keeps_its_options(
    engine: Engine, tmp_path: Path, is_remembered: bool
) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    options: dict[str, Any] = {
        "lease_s": 3,
        "summary": Summary(at=480, prompt=[300]),
        "delegations": lambda s: Delegations(s, lambda _: "ba"),
    }
    token = scene.live.open(**options).detach()
    scene.run(3100)
    if is_remembered:
        options = {}
    else:
        scene = Scene(engine, lease_s=2, folder=tmp_path)
    with scene.live.resume(token, **options) as back:
        assert back.lease_s == 3
        assert back._summary == Summary(at=480, prompt=[300])
        assert back.delegations is not None
        back.delegations.ask("weather")
        assert back.delegations.wait(10)
        scene.talk(back, 1)
        assert typed(scene, back.id, "result") == [back._inner._ids("ba", "result")]


def test_a_file_that_cannot_be_deleted_disturbs_nobody(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, **_: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    scene = Scene(engine, lease_s=2, folder=tmp_path)
    token = scene.live.open().detach()
    scene.run(2100)
    monkeypatch.setattr(Path, "unlink", fails)
    with scene.live.resume(token) as back:
        assert len(scene.talk(back, 1)) == 1
        with pytest.raises(SessionClosed):
            scene.live.resume(token)
        with pytest.raises(SessionClosed):
            Scene(engine, folder=tmp_path).live.resume(token)


def test_whatever_writing_raises_nobody_waits_for_ever(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no memory for the header")

    monkeypatch.setattr(Session, "snapshot", fails)
    with LiveEngine(engine, cost=CostModel(learn=False), folder=tmp_path, lease_s=0.02) as live:
        session = live.open()
        token = session.token
        until(lambda: session.ended is not None)
        assert (session.ended, type(session.error)) == ("lease", MemoryError)
        with pytest.raises(SessionClosed):
            live.resume(token)
        assert live.error is None


def test_closing_parks_who_is_away(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detach_and_write(inner: Session, path: Path) -> None:
        with pytest.raises(SessionClosed, match="LiveEngine: it is closed"):
            here.detach()  # too late to be parked
        write(inner, path)

    write = Session.snapshot
    monkeypatch.setattr(Session, "snapshot", detach_and_write)
    scene = Scene(engine, folder=tmp_path)
    here, away = scene.live.open(), scene.live.open()
    turns = scene.talk(away, 3)
    token = away.detach()
    scene.live.close()
    assert (here.ended, away.ended) == ("closed", "closed")
    assert [path.stem for path in tmp_path.iterdir()] == [token]
    with Scene(engine, folder=tmp_path).live.resume(token) as back:
        assert back._inner.length > len(turns)
