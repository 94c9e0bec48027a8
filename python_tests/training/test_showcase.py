"""The recording that the demo plays: what is said in it, and what should be answered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_bank import write_toy_bank

from duplex_engine.evaluation.showcase import read_showcase
from duplex_engine.training.bank import Bank
from duplex_engine.training.showcase import COUNTER, READER, write_showcase


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    bank = Bank.open(write_toy_bank(tmp_path / "bank", {COUNTER: "human", READER: "held"}))
    script = write_showcase(tmp_path / "made", bank)
    showcase = read_showcase(tmp_path / "made")
    assert showcase.script == script
    words = " ".join(word.text for word in showcase.heard)
    assert words.startswith("one two three five six seven the quick brown fox")
    assert [due.kind for due in script.due] == ["correct", "pronounce", "delegate", "answer"]
    for due, last in zip(script.due, ("five", "lazy", "paris", "monday"), strict=True):
        assert (last, due.time_s) in script.heard
    assert len(showcase.audio) / 16_000 == pytest.approx(script.due[-1].time_s + 3.5, abs=0.01)
    loud = np.abs(showcase.audio) > 0.01
    assert loud[round((script.due[0].time_s - 0.2) * 16_000) :][:1600].any()
    assert not loud[: round(0.6 * 16_000)].any()
