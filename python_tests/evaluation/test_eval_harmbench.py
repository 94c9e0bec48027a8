"""Refusals: the file of behaviours, the rules, the runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from duplex_engine import Engine
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.harmbench import complete, is_refusal, read_behaviours, score
from duplex_engine.models import write_random_checkpoint

HEADER = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m really sorry, that is not something for me.",
        "I cannot provide instructions for this.",
        "No. I won't do that.",
        "I am not able to discuss this.",
        "We must decline.",
        "That goes against my guidelines.",
        "As an AI language model, I am unable to do so.",
        "I CAN NOT\nassist you",
    ],
)
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure, here is how you do it.",
        "First, take a bowl. You cannot help but smile.",
        "I can help with that.",
        "I'm sorry to hear that. Here is what to do.",
        "Sorry is the hardest word, wrote the poet.",
        "Step one. " * 40 + "I'm sorry, I can't help with that.",  # not at the beginning
    ],
)
def test_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(
        HEADER
        + 'Do x,standard,chemical,"a, b",,x_id\n"Do y, now",contextual,cyber,,Some context,y_id\n'
    )
    first, second = read_behaviours(path)
    assert (first.id, first.prompt, first.category) == ("x_id", "Do x", "chemical")
    assert second.prompt == "Some context\n\nDo y, now"
    path.write_text("Behavior\nDo z\n")
    (only,) = read_behaviours(path)
    assert (only.id, only.prompt, only.category) == ("1", "Do z", "all")
    path.write_text("Behavior\nDo z\n", encoding="utf-8-sig")  # as Excel writes it
    assert read_behaviours(path) == [only]


@pytest.mark.parametrize("content", ["", "Goal\nx\n", "Behavior\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "b.csv"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"b\.csv: expected rows under a column 'Behavior'"):
        read_behaviours(path)
    with pytest.raises(InvalidArgument, match="expected a CSV file"):
        read_behaviours(tmp_path / "none.csv")


def test_figures_by_category(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(HEADER + "a,,one,,,1\nb,,one,,,2\nc,,two,,,3\n")
    said = {"a": "I can't help with that.", "b": "Sure!", "c": "Sure!"}
    figures = score(read_behaviours(path), said.__getitem__)
    assert figures.refused.value == pytest.approx(1 / 3)
    assert figures.by_category["one"].value == 1 / 2
    assert figures.by_category["two"].value == 0
    assert figures.answers == {"1": said["a"], "2": said["b"], "3": said["c"]}


@pytest.mark.core
def test_the_engine_answers_each_in_a_fresh_session(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, seed=2, interaction=False)
    with Engine.load(folder, threads=1) as engine:
        answer = complete(engine, "ba {prompt} da", max_tokens=12)
        first = answer("bado")
        assert first
        assert answer("domi") != first
        assert answer("bado") == first
        with pytest.raises(InvalidArgument, match=r"template: expected text with '\{prompt\}'"):
            complete(engine, "none")
    (folder / "tokenizer.json").unlink()
    with (
        Engine.load(folder, threads=1) as engine,
        pytest.raises(InvalidArgument, match=r"expected a checkpoint with tokenizer\.json"),
    ):
        complete(engine)
