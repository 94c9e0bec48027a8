"""`duplex-engine eval`: what a checkpoint says and when, measured through the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from duplex_engine.cli.output import check_output
from duplex_engine.cli.run import (
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    KvDtypeOption,
    TensorParallelOption,
    ThreadsOption,
    WeightsOption,
    turn_duration_ms,
)
from duplex_engine.engine import Engine
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation import full_duplex_bench, harmbench, report, windows
from duplex_engine.evaluation.held_out import (
    Plan,
    System,
    check_fit,
    engine_system,
    harness_system,
    held_out_streams,
    open_bank,
)
from duplex_engine.evaluation.metrics import Alarms, StreamScore
from duplex_engine.evaluation.plots import plot_latencies, plot_timeline
from duplex_engine.evaluation.quiet import quiet_alarms
from duplex_engine.evaluation.silero import SpeechProbability, speech_segments
from duplex_engine.evaluation.streams import Agent, Audio, StreamLog, run_stream
from duplex_engine.evaluation.tools import (
    Expected,
    ToolAgent,
    ToolScore,
    load_agent,
    read_examples,
    run_example,
    score_tools,
)
from duplex_engine.training.bank import Bank
from duplex_engine.training.episodes import TASKS

__all__ = ["evaluate"]

FIGURES = "figures.json"  # in the folder of --out


def evaluate(
    checkpoint: CheckpointArgument,
    bank: Annotated[
        Path | None, typer.Option(help="Speech bank: run our own held-out streams.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of these streams, by comma. Default: all.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="Voices: held (default), human or train.")
    ] = None,
    voices: Annotated[
        str, typer.Option(help="Pattern of the names of these voices, e.g. 'piper/*'.")
    ] = "*",
    streams: Annotated[int, typer.Option(min=1, help="Streams for each task.")] = 20,
    turns: Annotated[int, typer.Option(min=10, help="Micro-turns of each stream.")] = 128,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also behind a voice-activity detector.")
    ] = False,
    quiet: Annotated[
        int,
        typer.Option(min=0, help="Streams of each kind of sound that asks for nothing, of --bank."),
    ] = 0,
    grace: Annotated[
        int, typer.Option(min=0, help="Micro-turns added to the time for a reaction.")
    ] = 0,
    fdb: Annotated[
        Path | None, typer.Option(help="Folder of Full-Duplex-Bench sets, v1 or v1.5.")
    ] = None,
    window_file: Annotated[
        Path | None, typer.Option("--windows", help="CSV or JSON of time windows.")
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="Folder of examples with expected tool calls.")
    ] = None,
    agent: Annotated[
        Path | None,
        typer.Option(help="Python file of --tools: `agent(request, tools)` and a dict TOOLS."),
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
    weights: WeightsOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    threads: ThreadsOption = None,
    tensor_parallel: TensorParallelOption = 1,
    device: DeviceOption = "cpu",
) -> None:
    """Measure what a checkpoint says and when.

    Everything runs through the engine as a live session does, and latency counts from the moment
    in the sound to the output. Tables are printed; `--out` takes the same as JSON, with plots.

    Examples:

    `duplex-engine eval reference --bank out/bank --group held --group human --quiet 10 --baseline`

    `duplex-engine eval checkpoints/mine --bank out/bank --tasks list,question --streams 50`

    `duplex-engine eval checkpoints/mine --fdb full_duplex_bench/v1`

    `duplex-engine eval reference --bank out/bank --voices 'piper/*' --streams 100`

    `duplex-engine eval checkpoints/mine --tools full_duplex_bench/v3 --agent my_agent.py`

    `duplex-engine eval checkpoints/mine --behaviours harmbench_behaviors_text_all.csv`
    """
    sources = (bank, fdb, window_file, tools, behaviours)
    if all(source is None for source in sources):
        raise InvalidArgument(
            "eval: expected one or more of --bank, --fdb, --windows, --tools, --behaviours, "
            "found none"
        )
    if bank is None and (tasks or group or baseline or quiet or voices != "*"):
        raise InvalidArgument(
            "eval: --tasks, --group, --voices, --quiet and --baseline choose streams of --bank, "
            "found no --bank"
        )
    if (tools is None) != (agent is None):
        raise InvalidArgument("eval: expected --tools and --agent together, found one of them")
    check_output(out / FIGURES, "--out")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"checkpoint": Path(checkpoint).name}
    # All inputs are read before the first part runs, and what a part found is written at once: an
    # error must not cost the figures of hours.
    parts: dict[str, Callable[[], Any]] = {}
    with Engine.load(
        checkpoint,
        device=device,
        dtype=dtype,
        weights=weights,
        kv_dtype=kv_dtype,
        threads=threads,
        tensor_parallel=tensor_parallel,
        progress=True,
    ) as engine:
        run = _runner(engine, realtime)
        if bank is not None:
            check_fit(engine)
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
            groups = group or ["held"]
            opened = open_bank(bank, groups, voices)
            parts["held_out"] = partial(_held_out, console, systems, opened, groups, plan, out)
            if quiet:
                parts["quiet"] = partial(_quiet, console, engine, opened, groups, quiet, plan)
        if fdb is not None:
            full_duplex_bench.find_sets(fdb)
            parts["fdb"] = partial(_fdb, console, run, SpeechProbability(), fdb, out / "fdb")
        if window_file is not None:
            listed = windows.read_windows(window_file)
            parts["windows"] = partial(_windows, console, run, listed)
        if tools is not None and agent is not None:
            loaded = load_agent(agent)
            parts["tools"] = partial(_tools, console, run, read_examples(tools), *loaded)
        if behaviours is not None:
            asked = harmbench.read_behaviours(behaviours)
            answer = harmbench.complete(engine, template)
            parts["behaviours"] = partial(_behaviours, console, answer, asked)
        for name, part in parts.items():
            figures[name] = part()
            report.write_json(out / FIGURES, figures)
    console.print(f"written to {out}: {FIGURES} and what belongs to it")


def _runner(engine: Engine, realtime: bool) -> Callable[..., StreamLog]:
    """run(audio, agent=None): one stream in a fresh session."""
    turn_s = turn_duration_ms(engine.config) / 1000

    def run(audio: Audio, agent: Agent | None = None) -> StreamLog:
        with engine.open_session() as session:
            return run_stream(session, audio, agent=agent, realtime=realtime, turn_s=turn_s)

    return run


def _quiet(
    console: Console, engine: Engine, bank: Bank, groups: Sequence[str], n_streams: int, plan: Plan
) -> dict[str, dict[str, Alarms]]:
    """False alarms on sound that asks for nothing; prints and returns them."""
    figures = {
        group: quiet_alarms(
            engine, bank, group, n_streams=n_streams, n_turns=plan.n_turns, seed=plan.seed
        )
        for group in groups
    }
    report.print_quiet(console, figures)
    return figures


def _fdb(
    console: Console,
    run: Callable[[Audio], StreamLog],
    detector: SpeechProbability,
    root: Path,
    out: Path,
) -> dict[str, Any]:
    """Runs and scores Full-Duplex-Bench; prints and returns the figures."""
    n_runs = full_duplex_bench.run_bench(root, out, run)
    sets = full_duplex_bench.score(root, out, lambda audio: speech_segments(detector.of(audio)))
    report.print_bench(console, sets)
    average = full_duplex_bench.v15_average(sets)
    return {"runs": n_runs, "sets": sets, "v1.5 average": average}


def _windows(
    console: Console, run: Callable[[Audio], StreamLog], listed: Sequence[windows.Window]
) -> windows.WindowScore:
    """Runs the recordings with time windows; prints and returns the figures."""
    score = windows.score_windows(listed, run)
    report.print_windows(console, score)
    return score


def _tools(
    console: Console,
    run: Callable[[Audio, Agent], StreamLog],
    examples: Sequence[Expected],
    agent: ToolAgent,
    tools: Mapping[str, Callable[..., Any]],
) -> ToolScore:
    """Runs the examples with an agent; prints and returns the figures."""
    score = score_tools([run_example(e, agent, tools, run) for e in examples])
    report.print_tools(console, score)
    return score


def _behaviours(
    console: Console, answer: Callable[[str], str], listed: Sequence[harmbench.Behaviour]
) -> harmbench.RefusalScore:
    """Asks for every behaviour; prints and returns the figures."""
    score = harmbench.score(listed, answer)
    report.print_refusals(console, score)
    return score


def _held_out(
    console: Console,
    systems: Mapping[str, System],
    bank: Bank,
    groups: Sequence[str],
    plan: Plan,
    out: Path,
) -> list[report.GroupReport]:
    """Runs every system on every group; prints, plots and returns the figures."""
    reports: list[report.GroupReport] = []
    draws = find_spec("matplotlib") is not None
    if not draws:
        console.print("no pictures: pip install 'duplex_engine[plots]'", style="yellow")
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
                if draws and not by_task[stream.task] and name == "engine":
                    plot_timeline(
                        out / f"timeline_{group}_{stream.task}.png",
                        stream.episode.audio,
                        stream.log,
                        alarms_s=stream.score.alarms_s,
                        heard=stream.heard(),
                        due=stream.due(),
                    )
                by_task[stream.task].append(stream.score)
            by_system[name] = [score for scores in by_task.values() for score in scores]
            reports.append(report.group_report(name, group, by_task))
            report.print_groups(console, reports[-1:])
        if draws:
            plot_latencies(out / f"latency_{group}.png", by_system)
    return reports
