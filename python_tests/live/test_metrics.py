"""What can be seen from outside: Prometheus' counters, and a trace that Perfetto opens."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from live_scene import Scene, sound
from prometheus_client import CollectorRegistry, generate_latest

from duplex_engine import Engine, InvalidArgument
from duplex_engine.live import Metrics
from duplex_engine.live.delegating import note_request
from duplex_engine.live.trace import MAX_EVENTS, Trace
from duplex_engine.types import MicroTurn

pytestmark = pytest.mark.core


def values(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_counts_are_those_of_what_happened(engine: Engine) -> None:
    registry = CollectorRegistry()
    scene = Scene(engine, metrics=Metrics(registry))
    session = scene.live.open()
    out = scene.talk(session, 4)
    session.push_audio(sound(0), 1)
    session.push_audio(sound(0), 1)
    scene.run(500)
    session.interrupt()
    seen = values(registry)
    counters = scene.live.counters
    assert seen["duplex_turns_total"] == counters["turns"] >= 6
    assert seen["duplex_tokens_total"] >= sum(len(o.turn.token_ids) for o in out)
    assert seen["duplex_turn_seconds_count"] == seen["duplex_late_seconds_count"]
    assert seen["duplex_turn_seconds_count"] == counters["turns"]
    assert seen["duplex_filled_milliseconds_total"] == counters["filled_ms"] >= 200
    assert seen['duplex_refused_total{kind="repeated"}'] == 1
    assert seen["duplex_interrupts_total"] == seen["duplex_sessions"] == 1
    assert 0 < seen["duplex_pages_used"] <= seen["duplex_pages_promised"]
    session.close()
    seen = values(registry)
    assert (seen["duplex_sessions"], seen["duplex_pages_used"]) == (0, 0)
    assert seen['duplex_ended_total{kind="closed"}'] == 1


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidArgument, match=r"pip install duplex_engine\[metrics\]"):
        Metrics()


def test_a_registry_shows_one_live_engine() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    with pytest.raises(InvalidArgument, match=r"found: Duplicated .*; give each Metrics a Coll"):
        Metrics(registry)
    Metrics(CollectorRegistry())


def test_the_trace_nests_stages_in_turns(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine)

    def task() -> Any:
        scene.now_us += 2000
        yield

    with scene.live.open() as session, scene.live.open() as other:
        scene.live.background(other, task())
        for n in range(3):
            session.push_audio(sound(n))
            scene.run(200)
        note_request(session)
        scene.now_us += 1000
        session.push_result([300])
    scene.live.trace.save(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())
    events = saved["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    turns = [e for e in events if e["name"].startswith("turn ")]
    assert {names[e["pid"], e["tid"]] for e in turns} == {session.id, other.id}
    mine = [e for e in turns if names[e["pid"], e["tid"]] == session.id]
    assert [e["name"] for e in mine] == ["turn 0", "turn 1", "turn 2"]
    for turn in mine:
        inside = [
            e
            for e in events
            if e["name"] in ("encode", "append", "decode")
            and e["tid"] == turn["tid"]
            and turn["ts"] <= e["ts"] <= e["ts"] + e["dur"] <= turn["ts"] + turn["dur"]
        ]
        assert [e["name"] for e in inside] == ["encode", "append", "decode"]
        assert sum(e["dur"] for e in inside) == turn["dur"]
    begin, end = (e for e in events if e["name"] == "delegation")
    assert (begin["ph"], end["ph"], end["ts"] - begin["ts"]) == ("b", "e", 1000)
    assert begin["id"] == end["id"]
    (piece,) = (e for e in events if e["name"] == "task" and e["dur"])
    assert (names[piece["pid"], piece["tid"]], piece["dur"]) == (other.id, 2000)
    lanes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert (lanes[piece["pid"]], lanes[begin["pid"]]) == ("background", "background")
    assert lanes[mine[0]["pid"]] == "interaction"


def test_the_trace_is_bounded(engine: Engine) -> None:
    with engine.open_session() as session:
        turn: MicroTurn = session.step(sound(0))
    trace = Trace()
    for n in range(MAX_EVENTS):
        trace.turn(f"s{n}", n, turn, 0)
    assert len(trace._events) == MAX_EVENTS
