"""`duplex-engine eval`: what a checkpoint says and when, measured through the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from duplex_engine.cli.run import DtypeOption, ThreadsOption, turn_duration_ms
from duplex_engine.engine import Engine
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation import full_duplex_bench, harmbench, report, windows
from duplex_engine.evaluation.held_out import (
    Plan,
    System,
    engine_system,
    harness_system,
    held_out_streams,
    open_bank,
)
from duplex_engine.evaluation.metrics import StreamScore
from duplex_engine.evaluation.plots import plot_latencies, plot_timeline
from duplex_engine.evaluation.silero import SpeechProbability, speech_segments
from duplex_engine.evaluation.streams import Audio, StreamLog, run_stream
from duplex_engine.training.episodes import TASKS

__all__ = ["evaluate"]


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    bank: Annotated[
        Path | None, typer.Option(help="Speech bank: run our own held-out streams.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of these streams, by comma. Default: all.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="Voices: held (default), human or train.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams for each task.")] = 20,
    turns: Annotated[int, typer.Option(min=10, help="Micro-turns of each stream.")] = 128,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also behind a voice-activity detector.")
    ] = False,
    grace: Annotated[
        int, typer.Option(min=0, help="Micro-turns added to the time for a reaction.")
    ] = 0,
    fdb: Annotated[
        Path | None, typer.Option(help="Folder of Full-Duplex-Bench sets, v1 or v1.5.")
    ] = None,
    window_file: Annotated[
        Path | None, typer.Option("--windows", help="CSV or JSON of time windows.")
    ] = None,
    behaviours: Annotated[
        Path | None, typer.Option(help="CSV of behaviours in HarmBench's format.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="Text around a behaviour, as the checkpoint wants to be asked.")
    ] = "{prompt}",
    out: Annotated[Path, typer.Option(help="Folder for figures, plots and outputs.")] = Path(
        "out/eval"
    ),
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Noise, room and codec on our own streams.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the composed streams.")] = 0,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Keep to the clock instead of going on at once.")
    ] = False,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Measure what a checkpoint says and when.

    Everything runs through the engine as a live session does, and latency counts from the moment
    in the sound to the output. Tables are printed; `--out` takes the same as JSON, with plots.

    Examples:

    `duplex-engine eval reference --bank out/bank --group held --group human --baseline`

    `duplex-engine eval checkpoints/mine --bank out/bank --tasks list,question --streams 50`

    `duplex-engine eval checkpoints/mine --fdb full_duplex_bench/v1`

    `duplex-engine eval checkpoints/mine --behaviours harmbench_behaviors_text_all.csv`
    """
    if bank is None and fdb is None and window_file is None and behaviours is None:
        raise InvalidArgument(
            "eval: expected one or more of --bank, --fdb, --windows, --behaviours, found none"
        )
    console = Console(highlight=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"checkpoint": checkpoint.name}
    with Engine.load(checkpoint, dtype=dtype, threads=threads, progress=True) as engine:
        run = _runner(engine, realtime)
        if bank is not None:
            plan = Plan(
                tasks=tuple(tasks.split(",")) if tasks else tuple(TASKS),
                n_streams=streams,
                n_turns=turns,
                seed=seed,
                is_augmented=augmented,
                grace_turns=grace,
            )
            systems = {"engine": engine_system(engine, realtime=realtime)}
            if baseline:
                systems["harness"] = harness_system(engine)
            figures["held_out"] = _held_out(console, systems, bank, group or ["held"], plan, out)
        if fdb is not None:
            detector = SpeechProbability()
            n_runs = full_duplex_bench.run_bench(fdb, out / "fdb", run)
            sets = full_duplex_bench.score(
                fdb, out / "fdb", lambda audio: speech_segments(detector.of(audio))
            )
            report.print_bench(console, sets)
            average = full_duplex_bench.v15_average(sets)
            figures["fdb"] = {"runs": n_runs, "sets": sets, "v1.5 average": average}
        if window_file is not None:
            score = windows.score_windows(windows.read_windows(window_file), run)
            report.print_windows(console, score)
            figures["windows"] = score
        if behaviours is not None:
            listed = harmbench.read_behaviours(behaviours)
            refusals = harmbench.score(listed, harmbench.complete(engine, template))
            report.print_refusals(console, refusals)
            figures["behaviours"] = refusals
    report.write_json(out / "figures.json", figures)
    console.print(f"written to {out}: figures.json and what belongs to it")


def _runner(engine: Engine, realtime: bool) -> Callable[[Audio], StreamLog]:
    turn_s = turn_duration_ms(engine.config) / 1000

    def run(audio: Audio) -> StreamLog:
        with engine.open_session() as session:
            return run_stream(session, audio, realtime=realtime, turn_s=turn_s)

    return run


def _held_out(
    console: Console,
    systems: Mapping[str, System],
    bank_folder: Path,
    groups: Sequence[str],
    plan: Plan,
    out: Path,
) -> list[report.GroupReport]:
    """Runs every system on every group; prints, plots and returns the figures."""
    bank = open_bank(bank_folder)
    reports: list[report.GroupReport] = []
    for group in groups:
        by_system: dict[str, list[StreamScore]] = {}
        for name, system in systems.items():
            by_task: dict[str, list[StreamScore]] = defaultdict(list)
            streams = held_out_streams(system, bank, group, plan)
            for stream in track(
                streams,
                description=f"{name}, {group}",
                total=plan.n_streams * len(plan.tasks),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ):
                if not by_task[stream.task] and name == "engine":
                    plot_timeline(
                        out / f"timeline_{group}_{stream.task}.png",
                        stream.episode.audio,
                        stream.log,
                        stream.score,
                        heard=stream.heard(),
                        due=stream.due(),
                    )
                by_task[stream.task].append(stream.score)
            by_system[name] = [score for scores in by_task.values() for score in scores]
            reports.append(report.group_report(name, group, by_task))
        plot_latencies(out / f"latency_{group}.png", by_system)
    report.print_groups(console, reports)
    return reports
