"""Tool calls through a background agent, as Full-Duplex-Bench v3, judged by exact match.

Owns the folder layout, the recording of calls and the figures. The interaction model delegates in
words; an agent (any callable) turns the request into calls of the tools that it is given, and what
it returns enters the stream. No judge model: arguments must be equal, and speech is not rated.

    ROOT/<example>_<speaker>/input.wav
                             metadata.json   {"expected_tool_calls": [{"name", "arguments"}]}

An argument "$RESULT_0.price" stands for that field of the result of the first expected call.
"""

from __future__ import annotations

import json
import logging
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.background.tools import Tools
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.estimates import Estimate, mean, share
from duplex_engine.evaluation.streams import Agent, Audio, StreamLog, read_audio

__all__ = [
    "Expected",
    "Outcome",
    "ToolAgent",
    "ToolBox",
    "ToolCall",
    "ToolScore",
    "load_agent",
    "match_calls",
    "read_examples",
    "run_example",
    "score_tools",
    "speech_end_s",
]

logger = logging.getLogger(__name__)
Arguments: TypeAlias = Mapping[str, Any]
REFERENCE = re.compile(r"\$RESULT_(\d+)((?:\.\w+)*)")
WAIT_S = 10.0  # of silence after the recording, in which calls and answers may still come
LEVEL_FRAME = SAMPLE_RATE // 50  # 20 ms
QUIET_BELOW_PEAK = 10 ** (-35 / 20)  # frames below this part of the loudest are silence


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that was made, and what came back."""

    name: str
    arguments: Arguments
    result: Any = None


class ToolBox:
    """The tools of one conversation; it keeps a record of the calls."""

    def __init__(self, tools: Mapping[str, Callable[..., Any]]) -> None:
        self._tools = Tools(tools)
        self.calls: list[ToolCall] = []

    def call(self, name: str, **arguments: Any) -> Any:
        """Calls a tool; returns its result.

        Raises:
            InvalidArgument: no tool of this name, or arguments that it does not take; besides,
                whatever the tool raises. The attempt is recorded all the same.
        """
        try:
            result = self._tools.bind(name, arguments)()
        except Exception:
            self.calls.append(ToolCall(name, arguments))
            raise
        self.calls.append(ToolCall(name, arguments, result))
        return result


class ToolAgent(Protocol):
    """The background: takes a delegated request, calls tools, returns what to tell the user."""

    def __call__(self, request: str, tools: ToolBox) -> str:
        """Answers one request."""
        ...


@dataclass(frozen=True, slots=True)
class Expected:
    """An example: what is said, and the calls that it asks for."""

    folder: Path
    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened in one example.

    Attributes:
        n_expected, n_called: tool calls.
        n_selected: calls whose tool was expected, each expected one counted once.
        n_right: those whose arguments are all equal too.
        first_response_s: from the end of speech to the first word; None without one.
        tool_call_s: to the first delegation; None without one.
        completion_s: to the last word after the last delegation; None without one.
    """

    n_expected: int
    n_called: int
    n_selected: int
    n_right: int
    first_response_s: float | None = None
    tool_call_s: float | None = None
    completion_s: float | None = None

    @property
    def passed(self) -> bool:
        """All expected calls with the right arguments, and nothing else."""
        return self.n_right == self.n_expected == self.n_called


@dataclass(frozen=True, slots=True)
class ToolScore:
    """Figures of a set; latencies in seconds from the end of the user's speech."""

    selection_f1: float
    argument_accuracy: Estimate
    pass_at_1: Estimate
    turn_take_rate: Estimate
    first_response_s: Estimate
    tool_call_s: Estimate
    completion_s: Estimate


def read_examples(root: Path) -> list[Expected]:
    """The examples below `root`, by name.

    Raises:
        InvalidArgument: there is none, one lacks its sound, or a metadata.json is damaged.
    """
    examples = [
        _read_example(path) for path in sorted(root.glob("*/metadata.json")) if path.is_file()
    ]
    if not examples:
        raise InvalidArgument(f"{root}: expected folders with a metadata.json, found none")
    return examples


def load_agent(file: Path) -> tuple[ToolAgent, Mapping[str, Callable[..., Any]]]:
    """The `agent` and the `TOOLS` of a Python file, which is run.

    Raises:
        InvalidArgument: it is not there, fails, or lacks one of them.
    """
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        raise InvalidArgument(
            f"{file}: expected a Python file that runs, found: {error!r}"
        ) from error
    agent, tools = names.get("agent"), names.get("TOOLS")
    if not callable(agent) or not isinstance(tools, Mapping):
        raise InvalidArgument(
            f"{file}: expected a function `agent(request, tools)` and a dict `TOOLS`, "
            f"found {', '.join(name for name in names if not name.startswith('_')) or 'nothing'}"
        )
    return agent, tools


def run_example(
    example: Expected,
    agent: ToolAgent,
    tools: Mapping[str, Callable[..., Any]],
    run: Callable[[Audio, Agent], StreamLog],
) -> Outcome:
    """Runs one example with a box of tools of its own.

    An agent that raises has no result for that request: the rest of the example counts all the
    same, and the traceback goes to the log.

    Args:
        example: from `read_examples`.
        agent: makes calls from a request.
        tools: by name.
        run: one stream with an agent, in a fresh session.
    """
    audio = read_audio(example.folder / "input.wav")
    box = ToolBox(tools)

    def ask(request: str) -> str | None:
        try:
            return agent(request, box)
        except Exception:
            logger.exception("%s: the agent failed at %r", example.folder, request)
            return None

    log = run(np.pad(audio, (0, round(WAIT_S * SAMPLE_RATE))), ask)
    n_selected, n_right = match_calls(example.calls, box.calls)
    end_s = speech_end_s(audio)
    words = log.words()
    asked = [turn.emitted_s for turn in log.turns if turn.delegations]
    told = [w.end_s for w in words if asked and w.start_s > asked[-1]]
    return Outcome(
        n_expected=len(example.calls),
        n_called=len(box.calls),
        n_selected=n_selected,
        n_right=n_right,
        first_response_s=words[0].start_s - end_s if words else None,
        tool_call_s=asked[0] - end_s if asked else None,
        completion_s=told[-1] - end_s if told else None,
    )


def score_tools(outcomes: Sequence[Outcome]) -> ToolScore:
    """The figures of all examples together."""
    n_expected = sum(o.n_expected for o in outcomes)
    n_called = sum(o.n_called for o in outcomes)
    n_selected = sum(o.n_selected for o in outcomes)

    def latency(values: list[float | None]) -> Estimate:
        return mean([value for value in values if value is not None])

    n_total = n_expected + n_called
    return ToolScore(
        selection_f1=2 * n_selected / n_total if n_total else float("nan"),
        argument_accuracy=share(sum(o.n_right for o in outcomes), n_expected),
        pass_at_1=share(sum(o.passed for o in outcomes), len(outcomes)),
        turn_take_rate=share(sum(o.first_response_s is not None for o in outcomes), len(outcomes)),
        first_response_s=latency([o.first_response_s for o in outcomes]),
        tool_call_s=latency([o.tool_call_s for o in outcomes]),
        completion_s=latency([o.completion_s for o in outcomes]),
    )


def match_calls(expected: Sequence[ToolCall], made: Sequence[ToolCall]) -> tuple[int, int]:
    """How many expected calls were made (right tool), and made exactly (arguments equal too).

    Each call made stands for one expected call at most; exact pairs are found first, so that the
    order of calls to the same tool does not matter.
    """
    left = list(made)
    matched: dict[int, ToolCall] = {}  # expected index -> call made
    n_right = 0
    for is_exact in (True, False):
        for i, call in enumerate(expected):
            if i in matched:
                continue
            for candidate in left:
                if candidate.name != call.name:
                    continue
                if not is_exact or _resolved(call.arguments, matched) == candidate.arguments:
                    left.remove(candidate)
                    matched[i] = candidate
                    n_right += is_exact
                    break
    return len(matched), n_right


def speech_end_s(audio: Audio) -> float:
    """When the last frame of 20 ms ends that is less than 35 dB below the loudest; 0 if silent.

    audio: (n,) samples at 16 kHz, nobody but the user in it.
    """
    n_frames = len(audio) // LEVEL_FRAME
    if n_frames == 0:
        return 0.0
    frames = audio[: n_frames * LEVEL_FRAME].reshape(n_frames, LEVEL_FRAME)
    level = np.sqrt(np.mean(np.square(frames, dtype=np.float64), axis=1))
    loud = np.flatnonzero((level > 0) & (level >= level.max() * QUIET_BELOW_PEAK))
    return float(loud[-1] + 1) * LEVEL_FRAME / SAMPLE_RATE if len(loud) else 0.0


def _resolved(arguments: Arguments, matched: Mapping[int, ToolCall]) -> dict[str, Any]:
    """Arguments with `$RESULT_n.field` replaced by what call n returned."""

    def value(argument: Any) -> Any:
        reference = REFERENCE.fullmatch(argument) if isinstance(argument, str) else None
        if reference is None or int(reference[1]) not in matched:
            return argument
        found = matched[int(reference[1])].result
        for key in reference[2].split(".")[1:]:
            if not isinstance(found, Mapping) or key not in found:
                return argument
            found = found[key]
        return found

    return {name: value(argument) for name, argument in arguments.items()}


def _read_example(path: Path) -> Expected:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["expected_tool_calls"]
        calls = tuple(ToolCall(str(e["name"]), dict(e["arguments"])) for e in entries)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{path}: expected 'expected_tool_calls': [{{'name', 'arguments'}}], found: {error}"
        ) from error
    if not (path.parent / "input.wav").is_file():
        raise InvalidArgument(f"{path.parent}: expected a file input.wav, found none")
    return Expected(path.parent, calls)
