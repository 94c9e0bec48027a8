"""The prediction as rows of numbers and as tables to print. Everything here is predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from rich.table import Table

from duplex_engine.config import ModelConfig
from duplex_engine.evaluation.machines import MACHINES
from duplex_engine.evaluation.prediction import (
    PARTS,
    Prediction,
    Sessions,
    Setup,
    Variant,
    free_bytes,
    predict,
    sessions,
)
from duplex_engine.evaluation.work import TURNS

__all__ = ["CONTEXTS", "RANKS", "Case", "all_reduce_table", "cases", "split_table", "turn_table"]

CONTEXTS = (1024, 32_768, 262_144)
RANKS = (1, 2, 4, 8)
REDUCED = (8192, 65_536, 327_680, 1 << 20)  # bytes: one row of 4096 to 128 of them


@dataclass(frozen=True, slots=True)
class Case:
    """One model on some GPUs: for every context, what each kind of turn takes, and how many
    sessions are served."""

    setup: Setup
    turns: dict[int, dict[str, Prediction]]
    served: dict[int, dict[str, Sessions]]

    @property
    def name(self) -> str:
        """Of the GPUs."""
        return f"{self.setup.tp} x {self.setup.machine.name}"

    def as_json(self) -> dict[str, object]:
        """Numbers and names only."""
        return {
            "machine": self.setup.machine.name,
            "gpus": self.setup.tp,
            "weights": self.setup.recipe,
            "variant": self.setup.variant,
            "contexts": {
                context: {
                    name: asdict(turn)
                    | {"ms": turn.ms, "sessions": asdict(self.served[context][name])}
                    for name, turn in turns.items()
                }
                for context, turns in self.turns.items()
            },
        }


def cases(
    config: ModelConfig,
    recipe: str,
    variants: Iterable[Variant] = ("design",),
    machines: Iterable[str] = tuple(MACHINES),
    ranks: Iterable[int] = RANKS,
    contexts: Iterable[int] = CONTEXTS,
) -> Iterator[Case]:
    """Wherever the weights fit, one session in a step, and the most sessions in 200 ms."""
    for name, tp, variant in product(machines, ranks, variants):
        setup = Setup(config, MACHINES[name], tp, recipe, variant)
        if free_bytes(setup) > 0:
            yield Case(
                setup,
                {
                    context: {key: predict(setup, turn, 1, context) for key, turn in TURNS.items()}
                    for context in contexts
                },
                {
                    context: {key: sessions(setup, turn, context) for key, turn in TURNS.items()}
                    for context in contexts
                },
            )


def _numbers(table: Table, first: int) -> Table:
    for column in table.columns[first:]:
        column.justify = "right"
    return table


def turn_table(title: str, found: Sequence[Case]) -> Table:
    """At every context: milliseconds of each turn of one session, and the sessions that take a
    silent and a turn of 5 tokens at once; kernels of a silent turn, and what limits the sessions.
    """
    contexts = " / ".join(f"{n // 1024}k" for n in found[0].turns) if found else ""
    table = Table(
        "GPUs",
        "variant",
        *TURNS,
        "kernels",
        "sessions silent",
        "5 tokens",
        "limit",
        title=f"{title}, at {contexts} positions",
        title_justify="left",
    )
    for case in found:
        first = next(iter(case.turns.values()))
        served = {
            turn: " / ".join(str(at[turn].n) for at in case.served.values()) for turn in TURNS
        }
        table.add_row(
            case.name,
            case.setup.variant,
            *(" / ".join(f"{at[turn].ms:.1f}" for at in case.turns.values()) for turn in TURNS),
            str(first["silent"].n_kernels),
            served["silent"],
            served["5 tokens"],
            ", ".join(dict.fromkeys(at["5 tokens"].limit for at in case.served.values())),
        )
    return _numbers(table, 2)


def split_table(title: str, turn: str, context: int, found: Iterable[Case]) -> Table:
    """Where the milliseconds of one kind of turn go."""
    table = Table("GPUs", "variant", *PARTS, "ms", title=title, title_justify="left")
    for case in found:
        prediction = case.turns[context][turn]
        parts = (f"{prediction.parts_ms[part]:.2f}" for part in PARTS)
        table.add_row(case.name, case.setup.variant, *parts, f"{prediction.ms:.2f}")
    return _numbers(table, 2)


def all_reduce_table() -> Table:
    """Microseconds of one all-reduce in a graph, alone."""
    columns = ("8 KB", "64 KB", "320 KB", "1 MB")
    title = "predicted all-reduce, us"
    table = Table("GPUs", *columns, title=title, title_justify="left")
    for machine in MACHINES.values():
        for tp, fit in machine.all_reduce.items():
            table.add_row(f"{tp} x {machine.name}", *(f"{fit.us(n):.1f}" for n in REDUCED))
    return _numbers(table, 1)
