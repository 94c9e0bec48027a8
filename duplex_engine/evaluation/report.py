"""What was measured, as tables for people and JSON for programs.

Owns the look and the keys. Does not own the figures (`metrics.py` and the benchmarks) nor the
pictures (`plots.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from duplex_engine.evaluation.estimates import Estimate
from duplex_engine.evaluation.full_duplex_bench import Figures
from duplex_engine.evaluation.harmbench import RefusalScore
from duplex_engine.evaluation.metrics import (
    Alarms,
    KindScore,
    StreamScore,
    score_alarms,
    score_kinds,
    score_synthesisers,
)
from duplex_engine.evaluation.tools import ToolScore
from duplex_engine.evaluation.windows import WindowScore

__all__ = [
    "GroupReport",
    "group_report",
    "print_bench",
    "print_groups",
    "print_quiet",
    "print_refusals",
    "print_tools",
    "print_windows",
    "write_json",
]


@dataclass(frozen=True, slots=True)
class GroupReport:
    """Figures of one system on the streams of one group of voices.

    Attributes:
        system: "engine", or the name of a baseline.
        group: of voices.
        n_streams: how many streams were run.
        kinds: figures by kind of event.
        synthesisers: share of right ones by kind of event and by what made the voice.
        alarms: false alarms, in all streams and by task.
    """

    system: str
    group: str
    n_streams: int
    kinds: Mapping[str, KindScore]
    synthesisers: Mapping[str, Mapping[str, Estimate]]
    alarms: Alarms
    alarms_by_task: Mapping[str, Alarms]


def group_report(
    system: str, group: str, by_task: Mapping[str, Sequence[StreamScore]]
) -> GroupReport:
    """The figures of all streams of a group; `by_task` holds those of each task."""
    streams = [stream for scores in by_task.values() for stream in scores]
    return GroupReport(
        system=system,
        group=group,
        n_streams=len(streams),
        kinds=score_kinds(streams),
        synthesisers=score_synthesisers(streams),
        alarms=score_alarms(streams),
        alarms_by_task={task: score_alarms(scores) for task, scores in by_task.items()},
    )


def print_groups(out: Console, reports: Sequence[GroupReport]) -> None:
    """One table of events and one line of false alarms for each system and group."""
    for report in reports:
        table = Table(
            "event",
            "n",
            "right %",
            "early %",
            "wrong %",
            "median ms",
            "p95 ms",
            title=f"{report.system}, voices '{report.group}', {report.n_streams} streams",
            title_justify="left",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for kind, score in report.kinds.items():
            table.add_row(
                kind,
                str(score.right.n),
                _interval(score.right, 100, ".1f"),
                _value(score.early, 100, ".1f"),
                _value(score.wrong, 100, ".1f"),
                _interval(score.latency_median_s, 1000, ".0f"),
                _value(score.latency_p95_s, 1000, ".0f"),
            )
        out.print(table)
        _print_synthesisers(out, report)
        alarms = report.alarms
        out.print(
            f"false alarms: {alarms.per_minute.n} in {alarms.minutes:.1f} minutes to be quiet, "
            f"{_interval(alarms.per_minute, 1, '.2f')} a minute; "
            f"{alarms.per_speech_minute.n} in {alarms.speech_minutes:.1f} minutes of correct "
            f"speech, {_interval(alarms.per_speech_minute, 1, '.2f')} a minute"
        )


def _print_synthesisers(out: Console, report: GroupReport) -> None:
    """The share of right ones and their count, a column for each source of voices."""
    names = sorted({name for shares in report.synthesisers.values() for name in shares})
    if len(names) < 2:
        return
    table = Table("right % (n)", *names, title="by synthesiser", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, shares in report.synthesisers.items():
        cells = [
            f"{100 * shares[name].value:.1f} ({shares[name].n})" if name in shares else ""
            for name in names
        ]
        table.add_row(kind, *cells)
    out.print(table)


def print_quiet(out: Console, figures: Mapping[str, Mapping[str, Alarms]]) -> None:
    """False alarms on sound that asks for nothing: a row for each condition of each group."""
    table = Table(
        "voices",
        "sound",
        "minutes",
        "alarms",
        "a minute",
        title="sound that asks for nothing",
        title_justify="left",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for group, by_condition in figures.items():
        for name, alarms in by_condition.items():
            table.add_row(
                group,
                name,
                f"{alarms.minutes:.1f}",
                str(alarms.per_minute.n),
                _interval(alarms.per_minute, 1, ".2f"),
            )
    out.print(table)


def print_bench(out: Console, figures: Mapping[str, Figures]) -> None:
    """Full-Duplex-Bench: a row for each figure of each set."""
    table = Table("set", "figure", "n", "value", title="Full-Duplex-Bench", title_justify="left")
    table.columns[2].justify = table.columns[3].justify = "right"
    for name, of_set in figures.items():
        for label, estimate in of_set.items():
            table.add_row(name, label, str(estimate.n), _interval(estimate, 1, ".3f"))
    out.print(table)


def print_windows(out: Console, score: WindowScore) -> None:
    """Time windows: the share of right ones, by category."""
    table = Table("category", "n", "right %", title="time windows", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, estimate in score.by_category.items():
        table.add_row(name, str(estimate.n), _interval(estimate, 100, ".1f"))
    out.print(table)
    out.print(
        f"macro accuracy {100 * score.macro_accuracy:.1f} %; spoke inside the window: "
        f"{_interval(score.spoke, 100, '.1f')} %; {score.n_outside} words outside any window"
    )


def print_tools(out: Console, score: ToolScore) -> None:
    """Tool calls: a row for each figure."""
    table = Table("figure", "n", "value", title="tool calls", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    table.add_row("selection F1", "", f"{score.selection_f1:.3f}")
    for name, unit, scale in (
        ("argument_accuracy", "%", 100),
        ("pass_at_1", "%", 100),
        ("turn_take_rate", "%", 100),
        ("first_response_s", "s", 1),
        ("tool_call_s", "s", 1),
        ("completion_s", "s", 1),
    ):
        estimate: Estimate = getattr(score, name)
        label = f"{name.removesuffix('_s').replace('_', ' ')}, {unit}"
        table.add_row(label, str(estimate.n), _interval(estimate, scale, ".2f"))
    out.print(table)


def print_refusals(out: Console, score: RefusalScore) -> None:
    """Behaviours: the share of refusals, by category."""
    table = Table("category", "n", "refused %", title="refusals, by rules", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, estimate in [*score.by_category.items(), ("all", score.refused)]:
        table.add_row(name, str(estimate.n), _interval(estimate, 100, ".1f"))
    out.print(table)


def write_json(path: Path, values: Any) -> None:
    """Writes figures (dataclasses, mappings, sequences, numbers); what is not a number is null."""
    path.write_text(json.dumps(_plain(values), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _value(estimate: Estimate, scale: float, form: str) -> str:
    return "" if math.isnan(estimate.value) else format(estimate.value * scale, form)


def _interval(estimate: Estimate, scale: float, form: str) -> str:
    """The figure and its 95 % interval, where it has one; nothing where there were no cases."""
    if math.isnan(estimate.low):
        return _value(estimate, scale, form)
    value, low, high = (
        format(number * scale, form) for number in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"
