"""Plain misuse of the live classes: an error of the package, at the call that is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_scene import Scene

from duplex_engine import Engine, InvalidArgument, SessionClosed
from duplex_engine.background import Delegations
from duplex_engine.live import CostModel, LiveEngine, LiveTurn

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lease_s": math.inf}, "lease_s: expected more than 0 and less than 1e.09, found inf"),
        ({"patience_ms": math.nan}, "patience_ms: expected more than 0 and less than 1e.09"),
        ({"cost": 3}, "cost: expected a CostModel"),
        ({"clock": 3}, "clock: expected a callable"),
        ({"metrics": 3}, "metrics: expected Metrics"),
        ({"journal": 3}, "journal: expected a callable"),
        ({"folder": 3}, "folder: expected a string"),
        ({"folder": "a\0b"}, "folder: expected a path"),
        ({"folder": __file__}, "folder: expected one that can be made and read"),
    ],
)
def test_a_live_engine_with_wrong_options(
    engine: Engine, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LiveEngine(engine, **({"cost": CostModel(learn=False)} | options))


def test_what_is_no_engine_and_what_is_no_session(engine: Engine) -> None:
    with engine.open_session() as session:
        for wrong in (None, "reference", session):
            with pytest.raises(InvalidArgument, match="LiveEngine: expected an Engine, found"):
                LiveEngine(wrong)  # type: ignore[arg-type]
    live = Scene(engine).live
    for strange in (3, None):
        with pytest.raises(InvalidArgument, match="adopt: expected a Session, found"):
            live.adopt(strange)  # type: ignore[arg-type]
    with pytest.raises(SessionClosed, match="adopt: the session is closed"):
        live.adopt(session)


def test_calls_of_a_session_with_wrong_values(engine: Engine) -> None:
    async def awaited(_: LiveTurn) -> None: ...

    picture = np.zeros((16, 16, 3), np.uint8)
    with Scene(engine).live.open() as live_session:
        session: Any = live_session
        for call, message in (
            (lambda: session.playback_ack(0, np.zeros(3)), "epoch: expected an integer"),
            (lambda: session.push_text("a", op_id=[]), "op_id: expected a string"),
            (lambda: session.push_result("a", op_id=3), "op_id: expected a string"),
            (lambda: session.push_image(picture, op_id={}), "op_id: expected a string"),
            (lambda: session.interrupt(op_id=[]), "op_id: expected a string"),
            (lambda: session.get(math.inf), "timeout_s: expected less than 1e.09 seconds"),
            (lambda: session.get(1e10), "timeout_s: expected less than 1e.09 seconds"),
            (lambda: session.get(math.nan), "timeout_s: expected less than 1e.09 seconds"),
            (lambda: session.get("soon"), "timeout_s: expected a number"),
            (lambda: session.at_boundary(3), "at_boundary: expected a callable"),
            (lambda: session.on_turn(3), "on_turn: expected a callable"),
            (lambda: session.on_turn(awaited), "on_turn: expected a plain function, found"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                call()
        assert session.epoch == 0


def test_delegations_that_are_none(engine: Engine) -> None:
    live = Scene(engine).live
    with pytest.raises(InvalidArgument, match="delegations: expected a callable"):
        live.open(delegations=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="a function that returns Delegations"):
        live.open(delegations=lambda _: None)  # type: ignore[arg-type,return-value]
    with (
        live.open() as session,
        pytest.raises(InvalidArgument, match=r"LiveEngine\.open\(delegations=\)"),
    ):
        Delegations(session, lambda _: "")  # type: ignore[arg-type]


def test_a_cost_that_is_no_number() -> None:
    for name in ("pass_us", "row_us"):
        with pytest.raises(InvalidArgument, match=f"CostModel: {name}: expected a number"):
            CostModel(**{name: "much"})  # type: ignore[arg-type]


def test_a_trace_is_saved_to_a_file(engine: Engine, tmp_path: Path) -> None:
    trace = Scene(engine).live.trace
    with pytest.raises(InvalidArgument, match="trace: path: expected"):
        trace.save(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        trace.save(tmp_path / "no folder" / "trace.json")
