"""The training loop: from a speech bank, or from ready shards, to a checkpoint of the trainee.

Owns the data workers, the optimisers, the schedule, checkpoints and the log. A run stops when its
steps or hours are spent, or cleanly on SIGINT and SIGTERM, and the same command takes it up again.
The network and its losses are in ``model.py``; ``export.py`` makes the result loadable.

    python -m duplex_engine.training.train out/run --bank out/bank --hours 2.3
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from duplex_engine.training.model import SIZES, Batch, Trainee, collate, losses
from duplex_engine.training.rows import N_TURNS, Stream, layout, mask_bins, spoil
from duplex_engine.training.shards import load_shard

__all__ = ["CHECKPOINT", "LOG", "Settings", "load_trainee", "run"]

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
SAVE_EVERY_S = 60.0
LOG_EVERY = 20  # steps
WARM_UP = 200  # steps
WORD_WEIGHT = 0.5  # of the loss of the word head
MAX_GRADIENT = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """One run.

    Attributes:
        out: folder of the checkpoint and the log.
        bank: a speech bank: episodes are composed as the run goes on.
        shards: else a folder of ready episodes.
        size: a name of `model.SIZES`.
        batch: sequences of a step.
        turns: micro-turns of a composed episode.
        hours, steps: the budget; the rate falls to 0 over whichever ends first.
        rate: peak learning rate.
        seed: of weights and data.
        workers: processes that make data.
        device: "cpu" or "cuda".
        autocast: compute matrix products in bfloat16.
    """

    out: Path
    bank: Path | None = None
    shards: Path | None = None
    size: str = "small"
    batch: int = 8
    turns: int = N_TURNS
    hours: float = 2.3
    steps: int = 1_000_000
    rate: float = 2e-3
    seed: int = 0
    workers: int = 1
    device: str = "cpu"
    autocast: bool = False


class _Batches(IterableDataset[Batch]):
    """Endless batches; each worker draws its own."""

    def __init__(self, settings: Settings, first_step: int) -> None:
        self._settings = settings
        self._first_step = first_step
        self._streams: list[Stream] = []
        if settings.shards is not None:
            for path in sorted(settings.shards.glob("*.npz")):
                self._streams += load_shard(path)
            if not self._streams:
                raise FileNotFoundError(f"shards: expected *.npz in {settings.shards}, found none")

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker = 0 if info is None else info.id
        seed = [self._settings.seed, self._first_step, worker]
        rng = np.random.default_rng(seed)
        streams = self._shuffled(rng) if self._streams else self._composed(rng)
        while True:
            drawn = [next(streams) for _ in range(self._settings.batch)]
            for stream in drawn:
                stream.bins = mask_bins(stream.bins, rng)
            yield collate([layout(stream, spoil(stream, rng)) for stream in drawn])

    def _composed(self, rng: np.random.Generator) -> Iterator[Stream]:
        # Here, because composing needs libraries of sound that a machine for shards may lack.
        from duplex_engine.training.episodes import train_streams

        assert self._settings.bank is not None
        seed = int(rng.integers(2**31))
        return train_streams(self._settings.bank, seed, self._settings.turns)

    def _shuffled(self, rng: np.random.Generator) -> Iterator[Stream]:
        while True:
            for number in rng.permutation(len(self._streams)):
                yield self._streams[number].copy()


@dataclass
class _Run:
    """What a checkpoint holds, and the loop around it."""

    settings: Settings
    trainee: Trainee
    optimisers: list[Optimizer]
    step: int = 0
    elapsed_s: float = 0.0
    stopping: bool = False
    newest: dict[str, float] = field(default_factory=dict)  # means of the last log line

    @property
    def spent(self) -> float:
        """Share of the budget that is used."""
        hours = self.elapsed_s / 3600 / self.settings.hours
        return min(max(hours, self.step / self.settings.steps), 1.0)

    def __post_init__(self) -> None:
        self._unlogged: list[dict[str, Tensor]] = []

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        path = self.settings.out / CHECKPOINT
        content = {
            "size": self.settings.size,
            "model": self.trainee.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self) -> None:
        """Goes on from the checkpoint in the folder, if there is one."""
        path = self.settings.out / CHECKPOINT
        if not path.exists():
            return
        content = torch.load(path, map_location=self.settings.device, weights_only=True)
        if content["size"] != self.settings.size:
            raise ValueError(
                f"{path}: expected a model of size {self.settings.size}, found {content['size']}; "
                "choose that size, or another folder"
            )
        self.trainee.load_state_dict(content["model"])
        for optimiser, state in zip(self.optimisers, content["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.elapsed_s = content["step"], content["elapsed_s"]

    def learn(self, batch: Batch) -> None:
        """One step."""
        warm = min((self.step + 1) / WARM_UP, 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.settings.rate * warm * (1.0 - self.spent)
        with torch.autocast(self.settings.device, torch.bfloat16, self.settings.autocast):
            parts = losses(self.trainee, batch)
        loss = parts["token"] + WORD_WEIGHT * parts["word"]
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.trainee.parameters(), MAX_GRADIENT)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        self._unlogged.append({name: value.detach() for name, value in parts.items()})
        if self.step % LOG_EVERY == 0:
            self.log()

    def log(self) -> None:
        """Appends a line to the log: means over the steps since the last one."""
        line: dict[str, Any] = {"step": self.step, "elapsed_s": round(self.elapsed_s, 1)}
        for name in self._unlogged[0]:
            # note: a batch without, say, a spoken word has no share of right ones.
            values = torch.stack([parts[name] for parts in self._unlogged])
            self.newest[name] = round(values.nanmean().item(), 5)
        self._unlogged.clear()
        line |= self.newest
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
        ValueError: not exactly one of `bank` and `shards`, or a checkpoint of another size.
        FileNotFoundError: no bank or no shards there.
    """
    if (settings.bank is None) == (settings.shards is None):
        raise ValueError("data: expected one of bank and shards, found both or none")
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    trainee = Trainee(SIZES[settings.size]).to(settings.device)
    work = _Run(settings, trainee, _optimisers(trainee, settings.rate))
    work.resume()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        work.stopping = True

    before = [(name, signal.signal(name, stop)) for name in (signal.SIGINT, signal.SIGTERM)]
    try:
        _loop(work)
    finally:
        for name, handler in before:
            signal.signal(name, handler)
    work.save()
    return trainee


def _loop(work: _Run) -> None:
    settings = work.settings
    loader = DataLoader(
        _Batches(settings, work.step),
        batch_size=None,
        num_workers=settings.workers,
        prefetch_factor=4 if settings.workers else None,
        worker_init_fn=_ignore_interrupts,
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("waiting for data")
        last = saved = time.monotonic()
        for batch in loader:
            work.learn(batch.to(settings.device))
            now = time.monotonic()
            work.elapsed_s, last = work.elapsed_s + now - last, now
            shown = "  ".join(f"{name} {value:.3f}" for name, value in work.newest.items())
            progress.update(bar, description=f"{work.spent:6.1%}  step {work.step}  {shown}")
            if now - saved > SAVE_EVERY_S:
                work.save()
                saved = now
            if work.stopping or work.spent >= 1.0:
                break


def _ignore_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_trainee(checkpoint: Path) -> Trainee:
    """The trainee of a checkpoint, on the CPU, ready for evaluation."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    trainee = Trainee(SIZES[content["size"]])
    trainee.load_state_dict(content["model"])
    return trainee.eval()


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint and the log.")],
    bank: Annotated[Path | None, typer.Option(help="Speech bank to compose from.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Folder of ready episodes.")] = None,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "small",
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8,
    turns: Annotated[int, typer.Option(help="Micro-turns of an episode.")] = N_TURNS,
    hours: Annotated[float, typer.Option(help="Budget in time.")] = 2.3,
    steps: Annotated[int, typer.Option(help="Budget in steps.")] = 1_000_000,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that make data.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = False,
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = os.cpu_count() or 1,
) -> None:
    """Trains the reference interaction model."""
    torch.set_num_threads(threads)
    run(
        Settings(
            out=out,
            bank=bank,
            shards=shards,
            size=size,
            batch=batch,
            turns=turns,
            hours=hours,
            steps=steps,
            rate=rate,
            seed=seed,
            workers=workers,
            device=device,
            autocast=autocast,
        )
    )


if __name__ == "__main__":
    typer.run(main)
