"""Random bad days for a live engine, on a made-up clock.

    python -m bench.chaos --schedules 10000

Each schedule has a few clients for a few seconds: sound that is late, lost, doubled and out of
order, typed text and pictures and results sent twice, interruptions, true and absurd
acknowledgements, clients that leave in the middle of a step, detach and come back, forks, snapshots
that are restored, background work that fails, machines that are too slow. After each one:

 - the driver never spins and never stops, and nothing is raised that is not documented;
 - every push that was answered "queued" is in the sequence exactly once, unless its session ended;
 - time adds up: sound given is as long as the micro-turns counted, none is missing;
 - epochs never go back, and nothing of an old epoch is delivered after an interruption;
 - every page is back in the pool.

For every `--verify`-th schedule, each session is computed again without a clock, and what was
delivered must be what that says. A schedule that fails prints its seed: run it alone with
`--first SEED --schedules 1`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from duplex_engine import CapacityError, Engine, Session, SessionClosed
from duplex_engine.live import LiveSession, LiveTurn, Receipt
from duplex_engine.live.simulation import Simulation, drain
from duplex_engine.models import write_random_checkpoint

TURN = 3200  # samples of a micro-turn
FIRST_MARK = 264  # token ids from here on are marks: each is pushed once in a schedule
N_MARKS = 120
STEP_MS = (0, 0, 20, 150, 450)  # what a step takes: the last is too slow for real time
SECONDS = 3.0


class Client:
    """One user: what it sends, what it was answered, what it heard."""

    def __init__(self, chaos: Chaos, session: LiveSession, max_positions: int) -> None:
        self.chaos = chaos
        self.session = session
        self.max_positions = max_positions  # they decide what an endless session forgets
        self.heard: list[LiveTurn] = []
        self.marks: dict[int, str] = {}  # what was queued: token -> kind
        self.token: str | None = None
        self.picture = np.full((16, 16, 3), 77, np.uint8)

    def read(self) -> None:
        """Takes what was put out, and looks at its epochs."""
        for out in drain(self.session):
            assert out.epoch >= (self.heard[-1].epoch if self.heard else 0), "an old epoch"
            assert out.epoch <= self.session.epoch
            self.heard.append(out)

    def push_ids(self, kind: str) -> None:
        """A mark as text or result, perhaps twice."""
        push = self.session.push_text if kind == "text" else self.session.push_result
        mark = self.chaos.next_mark()
        if mark is None:
            return
        for n in range(int(self.chaos.rng.integers(1, 3))):
            receipt = self.push(lambda: push([mark], f"op {mark}"))
            if n == 0 and receipt is not None and receipt.status == "queued":
                self.marks[mark] = kind
            elif n > 0 and receipt is not None:
                assert receipt.status == "repeated", receipt

    def push(self, call: Callable[[], Receipt]) -> Receipt | None:
        """A push, which a session that has ended refuses."""
        try:
            receipt = call()
        except SessionClosed:
            assert self.session.ended is not None
            return None
        self.chaos.seen[f"receipt {receipt.status}"] += 1
        return receipt


class Chaos:
    """One schedule."""

    def __init__(self, engine: Engine, seed: int, folder: Path) -> None:
        self.rng = np.random.default_rng(seed)
        self.engine = engine
        self.seen: Counter[str] = Counter()
        self.sim = Simulation(
            engine,
            step_us=int(self.rng.choice(STEP_MS)) * 1000,
            lease_s=float(self.rng.choice([0.7, 60])),
            folder=folder,
        )
        self._step_many = self.sim.step_many
        self.sim.step_many = self._step_with_company
        self._mark = FIRST_MARK
        self.clients = [self._open() for _ in range(int(self.rng.integers(1, 4)))]
        self.events: list[tuple[int, int, Callable[[], None]]] = []

    def chance(self, p: float) -> bool:
        """True with probability `p`."""
        return bool(self.rng.random() < p)

    def next_mark(self) -> int | None:
        """A token that no one has pushed yet."""
        self._mark += 1
        return self._mark if self._mark < FIRST_MARK + N_MARKS else None

    def run(self, verify: bool) -> Counter[str]:
        """The whole schedule, and what must hold afterwards."""
        for client in self.clients:
            self._plan_sound(client)
            self._plan_deeds(client)
        self.events.sort(key=lambda event: event[:2])
        for at_us, _, act in self.events:
            self.sim.run(max(at_us - self.sim.now_us, 0) / 1000)
            act()
        for client in self.clients:
            if client.token is not None and self.chance(0.6):
                self._come_and_go(client)
        self.sim.step_many = self._step_many  # quiet: what was pushed last gets in
        self.sim.run(3000)
        self._check(verify)
        return self.seen

    # ---- what happens

    def _open(self) -> Client:
        max_positions = int(self.rng.choice([60, 400, 400]))
        session = self.sim.live.open(max_positions=max_positions)
        return Client(self, session, max_positions)

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        self.events.append((self.sim.now_us + int(at_s * 1e6), len(self.events), act))

    def _plan_sound(self, client: Client) -> None:
        samples = int(self.rng.choice([800, 1600, 3200, 1000]))
        ms = samples / 16
        for n in range(int(SECONDS * 1000 / ms)):
            if self.chance(0.06):
                continue  # lost
            for _ in range(1 + int(self.chance(0.08))):
                jitter = self.rng.exponential(40) if self.chance(0.9) else self.rng.uniform(0, 900)
                self._at(((n + 1) * ms + jitter) / 1000, self._sound(client, n, samples))

    def _sound(self, client: Client, n: int, samples: int) -> Callable[[], None]:
        chunk: NDArray[np.float32] = self.rng.standard_normal(samples).astype(np.float32) * 0.1

        def push() -> None:
            client.push(lambda: client.session.push_audio(chunk, n))

        return push

    def _plan_deeds(self, client: Client) -> None:
        deeds = [self._result, self._acknowledge, self._interrupt, self._look, self._fork]
        deeds += [self._leave, self._work, self._come_and_go, self._text, self._text]
        for _ in range(int(self.rng.integers(4, 14))):
            deed = deeds[int(self.rng.integers(len(deeds)))]
            self._at(self.rng.uniform(0, SECONDS), partial(deed, client))

    def _result(self, client: Client) -> None:
        client.push_ids("result")

    def _text(self, client: Client) -> None:
        client.push_ids("text")

    def _look(self, client: Client) -> None:
        client.push(lambda: client.session.push_image(client.picture))

    def _acknowledge(self, client: Client) -> None:
        client.read()
        newest = client.heard[-1].turn.index if client.heard else 0
        client.session.playback_ack(int(self.rng.integers(-2, newest + 3)))

    def _interrupt(self, client: Client) -> None:
        if client.session.ended is None:
            epoch = client.session.interrupt()
            client.read()
            assert all(out.epoch < epoch for out in client.heard)

    def _leave(self, client: Client) -> None:
        if self.chance(0.4):
            client.read()
            client.session.close()

    def _work(self, client: Client) -> None:
        def slices() -> Any:
            for _ in range(int(self.rng.integers(1, 6))):
                self.sim.now_us += int(self.rng.integers(0, 60_000))
                yield
            if self.chance(0.3):
                raise OSError("the tool is gone")

        try:
            self.sim.live.background(client.session, slices())
        except (CapacityError, SessionClosed):
            self.seen["work refused"] += 1

    def _come_and_go(self, client: Client) -> None:
        if client.token is None and client.session.ended is None:
            client.token = client.session.detach()
        elif client.token is not None:
            token, client.token = client.token, None
            before = client.session
            try:
                client.session = self.sim.live.resume(token)
                self.seen["resumed"] += 1
            except SessionClosed:
                return  # it was closed meanwhile
            if client.session is not before:
                self._move(client, before)

    def _move(self, client: Client, before: LiveSession) -> None:
        """It came back out of a file, under another name."""
        entries = self.sim.entries
        entries[client.session.id] = list(entries.get(before.id, []))
        client.heard, client.marks = [], {}
        self.seen["restored"] += 1

    def _fork(self, client: Client) -> None:
        if client.session.ended is not None or len(self.clients) > 6:
            return
        entries = self.sim.entries
        copy: list[Any] = []

        def fork(inner: Session) -> Session:
            copy.extend(entries.get(client.session.id, []))
            return inner.fork()

        future = client.session.at_boundary(fork)
        self.sim.live.poll()
        if not future.done() or future.exception() is not None:
            self.seen["fork refused"] += 1
            return
        session = self.sim.live.adopt(future.result())
        other = Client(self, session, client.max_positions)
        entries[other.session.id] = copy
        self.clients.append(other)
        self.seen["forked"] += 1

    def _step_with_company(self, requests: Any) -> Any:
        """A step during which other threads do something."""
        if self.chance(0.1):
            client = self.clients[int(self.rng.integers(len(self.clients)))]
            deeds = [self._interrupt, self._leave, self._acknowledge, self._text, self._come_and_go]
            deeds[int(self.rng.integers(len(deeds)))](client)
            self.seen["deeds in mid-step"] += 1
        return self._step_many(requests)

    # ---- what must hold

    def _check(self, verify: bool) -> None:
        for client in self.clients:
            client.read()
            indices = [out.turn.index for out in client.heard]
            assert indices == sorted(set(indices)), indices
            reason = client.session.ended
            assert reason in (None, "closed", "capacity", "lease"), (reason, client.session.error)
            self.seen[f"ended {reason}"] += 1
        self.seen.update({f"live {k}": n for k, n in self.sim.live.counters.items()})
        alive = [client.session.ended is None for client in self.clients]
        attached = [client.session.attached for client in self.clients]
        self.sim.live.close()
        stats = self.engine.stats
        left = {key: stats[key] for key in ("sessions", "pages_used", "pages_promised")}
        assert not any(left.values()), left
        if verify:
            for client, is_alive, is_attached in zip(self.clients, alive, attached, strict=True):
                self._recompute(client, is_alive and is_attached)

    def _recompute(self, client: Client, is_alive: bool) -> None:
        entries = self.sim.entries.get(client.session.id, [])
        marks: list[tuple[int, list[int]]] = []  # of steps that still stand: length before, marks
        turns: list[tuple[int, tuple[int, ...]]] = []
        with self.engine.open_session(max_positions=client.max_positions) as again:
            for entry in entries:
                if entry.call == "truncate":
                    marks = [step for step in marks if step[0] < entry.value]
                    again.truncate(entry.value)
                elif entry.call == "feed":
                    again.feed(**entry.value)
                else:
                    length = again.length
                    value = entry.value
                    marks.append((length, [*(value["text"] or []), *(value["result"] or [])]))
                    turn = again.step(**value)
                    n_turns = len(value["audio"]) // TURN
                    assert turn.input.merged_turns == n_turns - 1
                    turns.append((turn.index, turn.token_ids))
        standing = Counter(mark for _, step in marks for mark in step)
        assert set(standing.values()) <= {1}, "a push entered twice"
        if is_alive:
            assert set(client.marks) <= set(standing), "a push was lost"
        told = iter(turns)
        for out in client.heard:  # delivered in the order of the steps, and the same
            assert (out.turn.index, out.turn.token_ids) in told, "not what the stream says"
        self.seen["recomputed turns"] += len(turns)


def load(folder: Path) -> Engine:
    """The engine of all schedules."""
    write_random_checkpoint(folder, "smallest", seed=7)
    return Engine.load(folder, memory="64MiB", max_positions=400, threads=1, rewind_rows=120)


def run_schedules(engine: Engine, seeds: Any, verify_every: int) -> Counter[str]:
    """Runs one schedule per seed; returns how often everything happened.

    Raises:
        AssertionError: an invariant broke; the message begins with the seed.
    """
    seen: Counter[str] = Counter()
    for n, seed in enumerate(seeds):
        with tempfile.TemporaryDirectory() as parked:
            try:
                seen += Chaos(engine, seed, Path(parked)).run(verify=n % verify_every == 0)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return seen


def main(
    schedules: Annotated[int, typer.Option(min=1, help="how many")] = 1000,
    first: Annotated[int, typer.Option(min=0, help="seed of the first")] = 0,
    verify: Annotated[int, typer.Option(min=1, help="compute every n-th again")] = 5,
) -> None:
    """Runs the schedules and prints what happened in them."""
    with tempfile.TemporaryDirectory() as folder, load(Path(folder)) as engine:
        seeds = track(range(first, first + schedules), "schedules", console=Console(stderr=True))
        seen = run_schedules(engine, seeds, verify)
    for name, n in sorted(seen.items()):
        print(f"{n:9d}  {name}")


if __name__ == "__main__":
    typer.run(main)
