"""The training loop: from a speech bank, or from ready shards, to a checkpoint of the trainee.

Owns the processes, the optimisers, the schedule, checkpoints and the log. On a CPU each process
composes and learns its own share of a batch on one core, and gradients are averaged. A run stops
when its steps or hours are spent, or cleanly on SIGINT and SIGTERM, and the same command goes on
with it. The data are in ``batches.py``, the network and its losses in ``model.py``; ``export.py``
makes the result loadable.

    python -m duplex_engine.training.train out/run --bank out/bank
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import torch.distributed
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.multiprocessing import get_context
from torch.optim import AdamW, Muon, Optimizer

from duplex_engine.errors import InvalidArgument
from duplex_engine.training.bank import Bank
from duplex_engine.training.batches import batches, validation
from duplex_engine.training.command import run_command
from duplex_engine.training.model import SIZES, Batch, Trainee, losses
from duplex_engine.training.rows import N_TURNS
from duplex_engine.training.settings import Settings
from duplex_engine.training.vocabulary import TOKENS, other_tokens
from duplex_engine.whole_file import whole_file

__all__ = ["CHECKPOINT", "LOG", "Settings", "load_trainee", "run"]

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
SAVE_EVERY_S = 60.0
LOG_EVERY = 20  # steps
VALIDATE_EVERY = 500  # steps
N_VALIDATION, N_DRILLS = 24, 8  # episodes: mixed ones, and drills in hearing
WARM_UP = 200  # steps
WORD_WEIGHT, EXPECTED_WEIGHT = 1.0, 0.7  # of the losses of the heads that only training has
CONTENT_WEIGHT = 1.0  # of the loss of what is said where something is
# Shares of the budget between which the losses of what is said and expected come in: what is not
# yet heard cannot be answered, and their gradients would drown those of hearing.
RAMP = (0.12, 0.37)
MAX_GRADIENT = 1.0
MUON_FACTOR = 2.5  # of the rate


@dataclass
class _Run:
    """What a checkpoint holds, and the loop around it."""

    settings: Settings
    trainee: Trainee
    optimisers: list[Optimizer]
    rank: int = 0
    step: int = 0
    elapsed_s: float = 0.0
    stopping: bool = False
    asked_to_stop: bool = False  # by a signal to this process
    newest: dict[str, float] = field(default_factory=dict)  # means of the last log line

    @property
    def spent(self) -> float:
        """Share of the budget that is used."""
        settings = self.settings
        used = ((self.elapsed_s / 3600, settings.hours), (self.step, settings.steps))
        return min(max(n / budget for n, budget in used if budget is not None), 1.0)

    @property
    def ramp(self) -> float:
        """Share of their weight that the later losses have; a second part has them all."""
        if self.settings.after is not None:
            return 1.0
        begin, end = RAMP
        return min(max((self.spent - begin) / (end - begin), 0.0), 1.0)

    def __post_init__(self) -> None:
        self._unlogged: list[dict[str, Tensor]] = []
        self._began_s = 0.0

    def start_clock(self) -> None:
        """From now on time counts."""
        self._began_s = time.monotonic() - self.elapsed_s

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all.

        Raises RuntimeError for weights that are not finite: those of before are worth more.
        """
        if self.rank != 0:
            return
        path = self.settings.out / CHECKPOINT
        for name, weight in self.trainee.named_parameters():
            if not weight.isfinite().all():
                raise RuntimeError(
                    f"step {self.step}: expected finite weights, found others in {name}; {path} "
                    "is left as it was: go on with a lower rate"
                )
        content = {
            "size": self.settings.size,
            "tokens": TOKENS,
            "model": self.trainee.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        with whole_file(path) as unfinished:
            torch.save(content, unfinished)

    def resume(self) -> None:
        """Goes on from the checkpoint in the folder, if there is one, or begins after another.

        Or after an exported one, a folder: the heads of training then begin anew.
        """
        own = self.settings.out / CHECKPOINT
        path = own if own.exists() else self.settings.after
        if path is None:
            return
        if path.is_dir():
            self.trainee.adopt(path)
            return
        content = _read(path, self.settings.device)
        if content["size"] != self.settings.size:
            raise InvalidArgument(
                f"{path}: expected a model of size {self.settings.size}, found {content['size']}; "
                "choose that size, or another folder"
            )
        self.trainee.load_state_dict(content["model"])
        if path is own:
            for optimiser, state in zip(self.optimisers, content["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            self.step, self.elapsed_s = content["step"], content["elapsed_s"]

    def learn(self, batch: Batch) -> None:
        """One step."""
        with torch.autocast(self.settings.device, torch.bfloat16, self.settings.autocast):
            parts = losses(self.trainee, batch)
        later = CONTENT_WEIGHT * parts["content"] + EXPECTED_WEIGHT * parts["expected"]
        loss = parts["token"] + WORD_WEIGHT * parts["word"] + self.ramp * later
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._agree()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), MAX_GRADIENT)
        rate = self.settings.rate * min((self.step + 1) / WARM_UP, 1.0) * (1.0 - self.spent)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * (MUON_FACTOR if isinstance(optimiser, Muon) else 1.0)
            optimiser.step()
        self.step += 1
        self._unlogged.append({name: value.detach() for name, value in parts.items()})
        if self.step % LOG_EVERY == 0:
            self.log()

    def _agree(self) -> None:
        """Averages gradients; all processes take the first one's clock and wish to stop.

        Whatever decides the rate or the end comes from here, so all decide alike.
        """
        clock_s = time.monotonic() - self._began_s
        parameters = list(self.trainee.parameters())
        for parameter in parameters:
            if parameter.grad is None:  # a batch without pictures
                parameter.grad = torch.zeros_like(parameter)
        if self.settings.processes == 1:
            self.elapsed_s, self.stopping = clock_s, self.asked_to_stop
            return
        word = torch.zeros(2, dtype=torch.float64)  # float32 would round the clock
        if self.rank == 0:
            word += torch.tensor([clock_s, float(self.asked_to_stop)])
        gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
        torch.distributed.all_reduce(word)
        torch.distributed.all_reduce(gradients)
        self.elapsed_s, self.stopping = word[0].item(), word[1].item() > 0
        shares = torch.split(gradients, [parameter.numel() for parameter in parameters])
        for parameter, share in zip(parameters, shares, strict=True):
            parameter.grad = share.view_as(parameter) / self.settings.processes

    @torch.no_grad()
    def validate(self, mixed: list[Batch], drills: list[Batch]) -> None:
        """Adds the means over the held-out episodes to the log, and the words heard in drills."""
        if not mixed:
            return
        means = {f"held_{name}": value for name, value in self._means(mixed).items()}
        self._write(means | {"drill_heard": self._means(drills)["heard"]})

    def _means(self, batches: list[Batch]) -> dict[str, float]:
        with torch.autocast(self.settings.device, torch.bfloat16, self.settings.autocast):
            parts = [losses(self.trainee, batch.to(self.settings.device)) for batch in batches]
        return {
            name: torch.stack([values[name] for values in parts]).nanmean().item()
            for name in parts[0]
        }

    def log(self) -> None:
        """Appends a line to the log: means over the steps since the last one."""
        for name in self._unlogged[0]:
            # note: a batch without, say, a spoken word has no share of right ones.
            values = torch.stack([parts[name] for parts in self._unlogged])
            self.newest[name] = values.nanmean().item()
        self._unlogged.clear()
        self._write(self.newest)

    def _write(self, values: dict[str, float]) -> None:
        if self.rank != 0:
            return
        line = {"step": self.step, "elapsed_s": round(self.elapsed_s, 1)}
        line |= {name: round(value, 5) for name, value in values.items()}
        with (self.settings.out / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _optimisers(trainee: Trainee, rate: float) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for tables, heads, norms and convolutions."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in trainee.named_parameters():
        is_matrix = parameter.ndim == 2 and name.endswith("_proj.weight")
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def run(settings: Settings) -> Trainee:
    """Trains until the budget is spent or a signal comes; returns the trainee.

    Raises:
        InvalidArgument: settings that contradict each other, or a checkpoint of another size.
        FileNotFoundError: no bank or no shards there.
    """
    settings.check()
    # Here, where one process tells it.
    if settings.bank is not None:
        Bank.open(settings.bank)
    after, is_begun = settings.after, (settings.out / CHECKPOINT).exists()
    if after is not None and not is_begun and not after.exists():
        raise InvalidArgument(f"after: expected a checkpoint or a folder, found no {after}")
    settings.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting_point:
        # Spawned, not forked: torch's own threads do not survive a fork.
        others = [
            get_context("spawn").Process(
                target=_train, args=(settings, rank, meeting_point), daemon=True
            )
            for rank in range(1, settings.processes)
        ]
        for process in others:
            process.start()
        trainee = _train(settings, 0, meeting_point)
        for process in others:
            process.join()
    return trainee


def _train(settings: Settings, rank: int, meeting_point: str) -> Trainee:
    """One process of a run."""
    if settings.processes > 1:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{meeting_point}/ranks",
            rank=rank,
            world_size=settings.processes,
        )
    torch.manual_seed(settings.seed)
    trainee = Trainee(SIZES[settings.size], compiled=settings.compiled).to(settings.device)
    work = _Run(settings, trainee, _optimisers(trainee, settings.rate), rank)
    work.resume()
    try:
        with _signals(work):
            _loop(work)
        if settings.processes > 1:
            _check_alike(trainee)
    finally:
        if settings.processes > 1:
            torch.distributed.destroy_process_group()
    work.save()
    return trainee


def _check_alike(trainee: Trainee) -> None:
    """Raises RuntimeError unless all processes hold the same weights."""
    digest = torch.stack([value.double().abs().sum() for value in trainee.parameters()])
    least, most = digest.clone(), digest.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    if not torch.equal(least, most):
        raise RuntimeError("processes: expected the same weights in all of them, found others")


@contextmanager
def _signals(work: _Run) -> Iterator[None]:
    """SIGINT and SIGTERM stop the run cleanly; processes beyond the first wait to be told."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        work.asked_to_stop = True

    before = [(name, signal.signal(name, stop)) for name in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for name, handler in before:
            signal.signal(name, handler)


def _loop(work: _Run) -> None:
    settings = work.settings
    mixed, drills = (
        validation(settings, n, p_drill) if work.rank == 0 else []
        for n, p_drill in ((N_VALIDATION, 0.0), (N_DRILLS, 1.0))
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, disable=work.rank != 0) as progress:
        bar = progress.add_task("waiting for data")
        saved = time.monotonic()
        work.start_clock()
        for batch in batches(settings, work.rank, work.step):
            work.learn(batch.to(settings.device))
            shown = "  ".join(f"{name} {value:.3f}" for name, value in work.newest.items())
            progress.update(bar, description=f"{work.spent:6.1%}  step {work.step}  {shown}")
            if work.step % VALIDATE_EVERY == 0:
                work.validate(mixed, drills)
            if time.monotonic() - saved > SAVE_EVERY_S:
                work.save()
                saved = time.monotonic()
            if work.stopping or work.spent >= 1.0:
                break


def _read(checkpoint: Path, device: str) -> dict[str, Any]:
    """What a checkpoint holds. Raises InvalidArgument where its tokens are others than now."""
    content: dict[str, Any] = torch.load(checkpoint, map_location=device, weights_only=True)
    if content.get("tokens", TOKENS) != TOKENS:  # early ones do not tell
        raise other_tokens(checkpoint)
    return content


def load_trainee(checkpoint: Path) -> Trainee:
    """The trainee of a checkpoint, on the CPU, ready for evaluation."""
    content = _read(checkpoint, "cpu")
    trainee = Trainee(SIZES[content["size"]])
    trainee.load_state_dict(content["model"])
    return trainee.eval()


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint and the log.")],
    bank: Annotated[Path | None, typer.Option(help="Speech bank to compose from.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Folder of ready episodes.")] = None,
    after: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the weights of a finished run's checkpoint, or of an exported folder."
        ),
    ] = None,
    drills: Annotated[
        float, typer.Option(help="Share of scenes, 0 to 1, that are drills in hearing.")
    ] = 0.0,
    replays: Annotated[int, typer.Option(help="How often an episode is learnt again.")] = 1,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "small",
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    turns: Annotated[int, typer.Option(help="Micro-turns of an episode.")] = N_TURNS,
    hours: Annotated[
        float | None, typer.Option(help="Budget in time. Default: 1.65, with --steps none.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in steps.")] = None,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    processes: Annotated[
        int | None,
        typer.Option(help="Each with a core and its share of a batch. Default: as many as fit."),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that compose beside each of these; for a GPU, many.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = True,
    compiled: Annotated[bool, typer.Option(help="Compile parts of the network first.")] = True,
) -> None:
    """Trains the reference interaction model."""
    n_cores = len(os.sched_getaffinity(0)) if device == "cpu" else 1
    fitting = max(n for n in range(1, max(batch, 1) + 1) if n <= n_cores and batch % n == 0)
    run(
        Settings(
            out=out,
            bank=bank,
            shards=shards,
            after=after,
            p_drill=drills,
            replays=replays,
            size=size,
            batch=batch,
            turns=turns,
            hours=1.65 if hours is None and steps is None else hours,
            steps=steps,
            rate=rate,
            seed=seed,
            processes=processes or fitting,
            workers=workers,
            device=device,
            autocast=autocast,
            compiled=compiled,
        )
    )


if __name__ == "__main__":
    run_command(main)
