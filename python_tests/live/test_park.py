"""Parking: sessions whose client is long gone wait in a file, and go on from it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from live_scene import Scene, drain, sound, tokens

from duplex_engine import Engine, Session, SessionClosed
from duplex_engine.live import CostModel, LiveEngine, lease

pytestmark = pytest.mark.core


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
    with pytest.raises(ValueError, match="snapshot"):
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
