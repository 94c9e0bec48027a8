"""Tool calls through a background agent, judged by exact match."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from scripted import ScriptedSession

from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.streams import Agent, StreamLog, run_stream
from duplex_engine.evaluation.tools import (
    Outcome,
    ToolBox,
    ToolCall,
    match_calls,
    read_examples,
    run_example,
    score_tools,
    speech_end_s,
)

TRACK = ToolCall("track_order", {"order": "A1"})
ADD = ToolCall("add_to_cart", {"item": "$RESULT_0.item.id", "n": 2})


def write_example(root: Path, name: str, calls: list[ToolCall]) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    sound = np.zeros(4 * 16_000)
    sound[8_000:24_000] = 0.5 * np.sin(np.arange(16_000) * 0.2)  # 0.5 to 1.5 s
    soundfile.write(folder / "input.wav", np.repeat(sound, 3), 48_000)
    entries = [{"name": call.name, "arguments": call.arguments} for call in calls]
    (folder / "metadata.json").write_text(
        json.dumps({"scenario": "s", "expected_tool_calls": entries})
    )


def agent(request: str, tools: ToolBox) -> str:
    """Tracks the order that is asked for and puts two of its item into the cart."""
    found = tools.call("track_order", order=request.split()[-1])
    if "two" in request:
        tools.call("add_to_cart", item=found["item"]["id"], n=2)
    return "done"


TOOLS = {
    "track_order": lambda order: {"item": {"id": f"item of {order}"}},
    "add_to_cart": lambda item, n: f"{n} of {item}",
}


def run_with(script: dict[int, str], given: list[dict[str, object]]) -> object:
    def run(audio: NDArray[np.float32], ask: Agent) -> StreamLog:
        session = ScriptedSession(script, given=given)
        return run_stream(session, audio, agent=ask)

    return run


def test_a_delegation_becomes_calls_and_its_result_is_told(tmp_path: Path) -> None:
    write_example(tmp_path, "1_abc", [TRACK, ADD])
    (example,) = read_examples(tmp_path)
    given: list[dict[str, object]] = []
    script = {8: "delegate: add two of A1", 9: "one moment", 12: " done"}
    outcome = run_example(example, agent, TOOLS, run_with(script, given))  # type: ignore[arg-type]
    assert outcome.passed
    assert (outcome.n_expected, outcome.n_called, outcome.n_right) == (2, 2, 2)
    assert given[10]["result"] == "done"
    # Speech ends at 1.5 s; the delegation is out at 1.8, "one" at 2.0, "done" from 2.6 to 2.8.
    assert outcome.tool_call_s == pytest.approx(0.3, abs=0.05)
    assert outcome.first_response_s == pytest.approx(0.5, abs=0.05)
    assert outcome.completion_s == pytest.approx(1.3, abs=0.05)


def test_an_answer_may_come_after_the_recording(tmp_path: Path) -> None:
    write_example(tmp_path, "1_abc", [TRACK])  # 4 s
    (example,) = read_examples(tmp_path)
    script = {22: "delegate: track A1", 40: "done"}
    outcome = run_example(example, agent, TOOLS, run_with(script, []))  # type: ignore[arg-type]
    assert outcome.passed
    assert outcome.completion_s == pytest.approx(8.4 - 1.5, abs=0.05)


def test_arguments_must_be_equal(tmp_path: Path) -> None:
    write_example(tmp_path, "1_abc", [TRACK])
    (example,) = read_examples(tmp_path)
    wrong = run_example(
        example,
        agent,
        TOOLS,
        run_with({8: "delegate: where is A2"}, []),  # type: ignore[arg-type]
    )
    assert (wrong.n_selected, wrong.n_right, wrong.passed) == (1, 0, False)
    extra = run_example(
        example,
        agent,
        TOOLS,
        run_with({8: "delegate: two of A1"}, []),  # type: ignore[arg-type]
    )
    assert (extra.n_selected, extra.n_right, extra.passed) == (1, 1, False)
    silent = run_example(example, agent, TOOLS, run_with({}, []))  # type: ignore[arg-type]
    assert silent == Outcome(1, 0, 0, 0)


def test_calls_are_matched_whatever_their_order() -> None:
    one, two = ToolCall("f", {"x": 1}), ToolCall("f", {"x": 2})
    assert match_calls([one, two], [two, one]) == (2, 2)
    assert match_calls([one, two], [two]) == (1, 1)
    assert match_calls([one], [two, one]) == (1, 1)
    assert match_calls([one, one], [one]) == (1, 1)
    assert match_calls([one], [ToolCall("g", {"x": 1})]) == (0, 0)
    assert match_calls([], []) == (0, 0)


def test_a_reference_is_the_result_of_an_earlier_call() -> None:
    made = [
        ToolCall("track_order", {"order": "A1"}, {"item": {"id": "i7"}}),
        ToolCall("add_to_cart", {"item": "i7", "n": 2}),
    ]
    assert match_calls([TRACK, ADD], made) == (2, 2)
    assert match_calls(
        [TRACK, ADD], [made[0], ToolCall("add_to_cart", {"item": "i8", "n": 2})]
    ) == (
        2,
        1,
    )


def test_figures() -> None:
    outcomes = [
        Outcome(2, 2, 2, 2, first_response_s=0.5, tool_call_s=0.2, completion_s=2.0),
        Outcome(1, 2, 1, 0, first_response_s=1.5, tool_call_s=0.4),
        Outcome(1, 0, 0, 0),
    ]
    score = score_tools(outcomes)
    assert score.selection_f1 == pytest.approx(2 * 3 / (4 + 4))
    assert score.argument_accuracy.value == 2 / 4
    assert score.pass_at_1.value == pytest.approx(1 / 3)
    assert score.turn_take_rate.value == pytest.approx(2 / 3)
    assert score.first_response_s.value == pytest.approx(1.0)
    assert score.completion_s.n == 1


def test_an_unknown_tool_is_refused_and_counted() -> None:
    box = ToolBox(TOOLS)
    with pytest.raises(InvalidArgument, match="expected one of add_to_cart, track_order"):
        box.call("fly", to="moon")
    assert box.calls == [ToolCall("fly", {"to": "moon"})]


def test_a_tool_that_raises_was_called() -> None:
    def sold_out(item: str) -> None:
        raise LookupError(item)

    box = ToolBox({"buy": sold_out})
    with pytest.raises(LookupError):
        box.call("buy", item="i7")
    assert box.calls == [ToolCall("buy", {"item": "i7"})]


def test_an_agent_that_fails_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_example(tmp_path, "1_abc", [TRACK])
    (example,) = read_examples(tmp_path)
    given: list[dict[str, object]] = []
    script = {8: "delegate: ", 9: "one moment", 10: "delegate: track A1"}  # the first has no order
    outcome = run_example(example, agent, TOOLS, run_with(script, given))  # type: ignore[arg-type]
    assert outcome.passed
    assert [step["result"] for step in given if step["result"]] == ["done"]
    assert "1_abc: the agent failed at ''" in caplog.text


def test_the_end_of_speech() -> None:
    sound = np.zeros(16_000, np.float32)
    assert speech_end_s(sound) == speech_end_s(sound[:0]) == 0
    sound[1_600:8_000] = 0.5
    sound[8_000:] = 0.001  # 54 dB lower
    assert speech_end_s(sound) == pytest.approx(0.5)


@pytest.mark.parametrize("content", ["{", "{}", '{"expected_tool_calls": [{"name": "x"}]}', "[]"])
def test_damaged_metadata_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidArgument, match=r"expected folders with a metadata\.json"):
        read_examples(tmp_path)
    (tmp_path / "1_a").mkdir()
    metadata = tmp_path / "1_a" / "metadata.json"
    metadata.write_text('{"expected_tool_calls": []}')
    with pytest.raises(InvalidArgument, match=r"1_a: expected a file input\.wav, found none"):
        read_examples(tmp_path)
    metadata.write_text(content)
    with pytest.raises(InvalidArgument, match=r"metadata\.json: expected 'expected_tool_calls'"):
        read_examples(tmp_path)
