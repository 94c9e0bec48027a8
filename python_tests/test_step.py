"""Steps that are refused before there is a pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from duplex_engine import Engine, InvalidArgument
from duplex_engine.models import write_random_checkpoint
from duplex_engine.step import step_together

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_random_checkpoint(tmp_path_factory.mktemp("smallest"), "smallest")
    with Engine.load(folder, memory="64MiB", threads=1) as engine:
        yield engine


@pytest.mark.parametrize("requests", ["text", ["session"], [()], [({}, {}, {})]])
def test_what_is_no_pair_is_refused(engine: Engine, requests: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^step_many: expected \{session: StepInput"):
        engine.step_many(requests)


def test_where_all_are_refused_nobody_waits_for_a_pass_at_work(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AtWork:
        closed = False

        def step_many(self, *_: object) -> None:
            raise AssertionError("would wait")

    core: Any = AtWork()
    with engine.open_session() as session:
        monkeypatch.setattr(session, "_engine", core)
        (answer,) = step_together(core, [(session, {"audio": "sound"})])
        assert isinstance(answer, InvalidArgument)
