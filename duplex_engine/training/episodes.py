"""Episodes: streams of many scenes with what the model should put out in each micro-turn.

Owns the mix of tasks. The scenes are in ``tasks_*.py``, the clock and the sound in ``stage.py``,
the order of the rows in ``rows.py``. Training composes episodes as it goes on, or reads files of
ready ones (``shards.py``), which this command writes:

    python -m duplex_engine.training.episodes out/shards --bank out/bank --episodes 5000
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count
from os import cpu_count
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from duplex_engine import _core
from duplex_engine.errors import InvalidArgument
from duplex_engine.training import tasks_lists, tasks_seeing, tasks_talk
from duplex_engine.training.augment import augment, babble_track
from duplex_engine.training.bank import Bank
from duplex_engine.training.command import run_command
from duplex_engine.training.rows import N_TURNS, Stream
from duplex_engine.training.shards import save_shard
from duplex_engine.training.stage import Episode, Event, Samples, Stage

__all__ = ["MIX", "N_TURNS", "TASKS", "Episode", "Event", "compose", "to_stream", "train_streams"]

# task -> (scene, how often it comes in a mixed episode)
TASKS: dict[str, tuple[Callable[[Stage], None], float]] = {
    "list": (tasks_lists.list_scene, 0.22),
    "sentence": (tasks_lists.sentence_scene, 0.24),
    "unordered": (tasks_lists.unordered_scene, 0.05),
    "running": (tasks_lists.running_scene, 0.1),
    "question": (tasks_talk.question_scene, 0.18),
    "long": (tasks_talk.long_answer_scene, 0.09),
    "delegate": (tasks_talk.delegation_scene, 0.09),
    "see": (tasks_seeing.seeing_scene, 0.05),
    "quiet": (tasks_talk.quiet_scene, 0.05),
}
MIX = "mix"
SHARD_EPISODES = 500
MAX_CASTS = 8  # voices tried for a scene
TEMPO = (0.86, 1.16)
BABBLE_S = 20.0  # of a track of voices in the background
BABBLE_EPISODES = 50  # for which one such track is used
P_SAME_VOICE = 0.7  # that the next scene has the same speaker
P_TYPED_FIRST = 0.08  # that a training stream begins with a typed question

Treat = Callable[[Samples, np.random.Generator], Samples]


def compose(
    task: str,
    bank: Bank,
    rng: np.random.Generator,
    group: str = "train",
    n_turns: int = N_TURNS,
    *,
    tempo: tuple[float, float] = (1.0, 1.0),
    treat: Treat | None = None,
    p_drill: float = 0.0,
    p_typed_first: float = 0.0,
) -> Episode:
    """One episode of `n_turns` micro-turns: scenes of one task, or of all tasks ("mix").

    Args:
        bank: speech.
        rng: every choice comes from it.
        group: which voices speak.
        tempo: range of the factor by which a voice is played faster and higher.
        treat: adds noise, room, codec to the finished sound.
        p_drill: that a scene is a drill in hearing instead, see `tasks_lists.drill_scene`.
        p_typed_first: that its first micro-turn brings a typed question.

    Raises:
        InvalidArgument: no such task.
    """
    if task != MIX and task not in TASKS:
        raise InvalidArgument(f"task: expected {MIX} or one of {', '.join(TASKS)}, found {task!r}")
    stage = Stage(bank, rng, group, tempo)
    # Without drills, or typed beginnings, nothing is drawn for them: evaluation keeps its streams.
    if p_typed_first > 0.0 and stage.chance(p_typed_first):
        tasks_talk.typed_question(stage)
    stage.wait(0.1, 1.2)
    names = list(TASKS)
    shares = np.array([share for _, share in TASKS.values()])
    while stage.time_s < n_turns * 0.2:
        name = str(rng.choice(names, p=shares / shares.sum())) if task == MIX else task
        is_drill = p_drill > 0.0 and stage.chance(p_drill)
        _play(stage, tasks_lists.drill_scene if is_drill else TASKS[name][0])
        if not stage.chance(P_SAME_VOICE):
            stage.change_voice()
    return stage.episode(n_turns, treat)


def _play(stage: Stage, scene: Callable[[Stage], None]) -> None:
    """One scene, by another voice where the present one lacks its words."""
    for _ in range(MAX_CASTS):
        before = len(stage.events)
        scene(stage)
        if len(stage.events) > before:
            return
        stage.change_voice()
    stage.wait(0.5, 1.0)


def to_stream(episode: Episode) -> Stream:
    """The episode as training reads it: sound as dMel bins, by the engine's own encoder."""
    bins = _core.dmel_bins(episode.audio).astype(np.uint8)
    return Stream(
        bins,
        episode.labels,
        episode.images,
        episode.typed,
        episode.results,
        episode.outputs,
        episode.expected,
    )


def train_streams(
    bank_dir: Path, seed: int, n_turns: int = N_TURNS, p_drill: float = 0.0
) -> Iterator[Stream]:
    """Endless mixed episodes of the training voices, with all augmentation; see `compose`."""
    bank = Bank.open(bank_dir)
    rng = np.random.default_rng(seed)
    for number in count():
        if number % BABBLE_EPISODES == 0:
            babble = babble_track(bank, rng, BABBLE_S)
        treat = partial(augment, babble=babble)
        episode = compose(
            MIX,
            bank,
            rng,
            "train",
            n_turns,
            tempo=TEMPO,
            treat=treat,
            p_drill=p_drill,
            p_typed_first=P_TYPED_FIRST,
        )
        yield to_stream(episode)


def _make_shard(path: Path, bank_dir: Path, seed: int, n_episodes: int, n_turns: int) -> None:
    streams = train_streams(bank_dir, seed, n_turns)
    save_shard(path, [next(streams) for _ in range(n_episodes)])


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the shards.")],
    bank: Annotated[Path, typer.Option(help="Speech bank to compose from.")],
    episodes: Annotated[int, typer.Option(help="How many.")] = 5000,
    turns: Annotated[int, typer.Option(help="Micro-turns of an episode.")] = N_TURNS,
    seed: Annotated[int, typer.Option(help="Of the first shard; the next ones count on.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = cpu_count() or 1,
) -> None:
    """Writes shards of training episodes; those that are there already are kept."""
    jobs = []
    for number, first in enumerate(range(0, episodes, SHARD_EPISODES)):
        path = out / f"shard-{seed + number:05d}.npz"
        if not path.exists():
            jobs.append((path, bank, seed + number, min(SHARD_EPISODES, episodes - first), turns))
    with ProcessPoolExecutor(workers) as pool:
        # `map`, because an error or Ctrl-C ends it, and with it the jobs that wait.
        for _ in track(
            pool.map(_make_shard, *zip(*jobs, strict=True)),
            description="composing",
            total=len(jobs),
        ):
            pass


if __name__ == "__main__":
    run_command(main)
