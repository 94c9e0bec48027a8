"""The tables of the core are complete: every entry has what the documentation promises."""

from __future__ import annotations

import importlib

import pytest

from duplex_engine import _core, errors

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
