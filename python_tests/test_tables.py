"""The tables of the core are complete: every entry has what the documentation promises."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import duplex_engine
from duplex_engine import Engine, MicroTurn, Session, _core, errors
from duplex_engine.config import InteractionConfig

DOCS = Path(__file__).parent.parent / "docs"

pytestmark = pytest.mark.core


def test_every_encoder_has_a_readable_twin() -> None:
    names = _core.encoder_names()
    assert names
    for name in names:
        module = importlib.import_module(f"duplex_engine.reference.{name}")
        assert module.__doc__
        assert f"{name}.cpp" in (module.__doc__ or "")


def test_backends_are_the_documented_ones() -> None:
    # The last one comes with the tests alone.
    assert _core.backend_names() in (["cpu", "cuda"], ["cpu", "cuda", "cuda_host"])


def test_errors_are_one_family() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.DuplexError)
        assert error.__doc__


def test_the_page_of_the_interface_names_all_of_it() -> None:
    text = (DOCS / "API.md").read_text()
    page = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", text))))
    public = {*duplex_engine.__all__, *MicroTurn.__dataclass_fields__}
    for owner in (Engine, Session):
        public |= {name for name, _ in inspect.getmembers(owner) if not name.startswith("_")}
    for call in (Engine.load, Engine.open_session, Session.set_sampling):
        public |= set(inspect.signature(call).parameters) - {"self"}
    assert public - page == set()


def test_the_page_of_checkpoints_has_the_whole_interaction_block() -> None:
    section = (DOCS / "CHECKPOINT.md").read_text().partition("## The interaction block")[2]
    rows = section.partition("\n## ")[0].splitlines()
    keys = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows if row[:1] == "|"))
    assert set(keys) == set(InteractionConfig.model_fields)
