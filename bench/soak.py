"""Hours of live sessions on a made-up clock, with real compute: what grows, and what stays right?

    python -m bench.soak --hours 2

Eight clients talk without a pause: late and lost chunks, typed text, interruptions with honest
acknowledgements, delegations that are answered, forks that talk for a while, clients that come and
go, sessions that are written to a file and read again. Every session is summarised when it grows
long, or (`--policy window`) forgets its oldest middle. A twin of each session, in another engine,
is given the same without a clock, and every output must be the same, token for token. Printed for
each tenth of the time: memory of the process, pages in use, and how long steps took. The exit
status is 1 if an output differed or a page was lost.
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import soundfile
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from duplex_engine import Delegation, Engine, Session, Window
from duplex_engine.live import Entry, LiveSession, Summary, replay
from duplex_engine.live.simulation import Simulation, drain

TURN = 3200  # samples of a micro-turn
TENTHS = 10
Policy = Literal["summary", "window"]
MAX_POSITIONS = 3000
FIRST_WORD = 20  # token ids before it control the stream
PROMPT = list(range(20, 24))
# Chances in one micro-turn of one client.
LOST, LATE, TEXT, INTERRUPT = 0.01, 0.02, 0.02, 1 / 150
FORK, LEAVE, FILE = 1 / 1000, 1 / 500, 1 / 1000
FORK_TURNS = 25


def summarise(fork: Session) -> Iterator[list[int]]:
    """Twenty tokens, whatever they are: the model was not trained to sum up."""
    fork.append(text=PROMPT)
    for _ in range(20):
        yield [max(fork.decode(1)[0], FIRST_WORD)]


class Client:
    """One user, and the twin of its session."""

    def __init__(self, session: LiveSession, twin: Session, seed: int) -> None:
        self.session = session
        self.twin = twin
        self.rng = np.random.default_rng(seed)
        self.expected: deque[tuple[int, tuple[int, ...]]] = deque()  # of the twin
        self.seq = 0
        self.late: list[tuple[int, NDArray[np.float32]]] = []
        self.turns_left = 10**9
        self.newest = 0  # micro-turn that was read
        self.n_compared = 0

    def follow(self, entry: Entry) -> None:
        """Does to the twin what was done to the session."""
        for turn in replay(self.twin, [entry]):
            self.expected.append((turn.index, turn.token_ids))

    def listen(self) -> bool:
        """Reads all output, answers delegations; whether it is what the twin says."""
        for out in drain(self.session):
            while self.expected and self.expected[0][0] < out.turn.index:
                self.expected.popleft()  # of an older epoch: it was not delivered
            if not self.expected or self.expected.popleft() != (out.turn.index, out.turn.token_ids):
                return False
            self.n_compared += 1
            self.newest = out.turn.index
            for event in out.turn.events:
                if isinstance(event, Delegation):
                    self.session.push_result(event.token_ids[:40] or [30])
        return True

    def talk(self, sound: NDArray[np.float32]) -> None:
        """Pushes a micro-turn of sound, mostly in time."""
        at = int(self.rng.integers(len(sound) - TURN))
        chunk = sound[at : at + TURN]
        for seq, piece in self.late:
            self.session.push_audio(piece, seq)
        self.late = []
        chance = self.rng.random()
        if chance < LATE:
            self.late = [(self.seq, chunk)]
        elif chance > LOST + LATE:
            self.session.push_audio(chunk, self.seq)
        self.seq += 1
        if self.rng.random() < TEXT:
            self.session.push_text([int(i) for i in self.rng.integers(20, 200, 5)])
        if self.rng.random() < INTERRUPT:
            self.session.playback_ack(max(self.newest - int(self.rng.integers(4)), 0))
            self.session.interrupt()


class Soak:
    """All clients."""

    def __init__(self, model: str, n_sessions: int, policy: Policy, folder: Path) -> None:
        self.folder = folder
        self.n_files = 0
        options: dict[str, Any] = {"memory": "256MiB", "threads": 1, "rewind_rows": 128}
        self.engine = Engine.load(model, **options)
        self.twins = Engine.load(model, **options)
        self.sim = Simulation(self.engine)
        self.sim.live._on_journal = self._note
        path = resources.files("duplex_engine") / "examples" / "showcase.flac"
        sound, _ = soundfile.read(str(path), dtype="float32")
        self.sound = np.asarray(sound, np.float32)
        self.clients: dict[str, Client] = {}
        self.step_us: list[int] = []
        self.n_compared = 0
        for seed in range(n_sessions):
            at = 1500 + 50 * seed
            summary = Summary(at=at, keep_head=64, write=summarise) if policy == "summary" else None
            sizes: dict[str, Any] = {"max_positions": MAX_POSITIONS}
            if policy == "window":
                sizes["endless"] = Window(head=64, recent=at)
            session = self.sim.live.open(summary=summary, **sizes)
            twin = self.twins.open_session(**sizes)
            self.clients[session.id] = Client(session, twin, seed)
        good = self.sim.step_many

        def timed(requests: Any) -> Any:
            answers = good(requests)
            self.step_us.append(answers[0].timing.total_us)
            return answers

        self.sim.step_many = timed

    def tick(self) -> None:
        """One micro-turn of everybody.

        Raises:
            AssertionError: an output is not the twin's.
        """
        for client in list(self.clients.values()):
            client.talk(self.sound)
            if client.turns_left > FORK_TURNS and client.rng.random() < FORK:
                self._fork(client)
            if client.rng.random() < FILE:
                self._through_a_file(client)
            if client.rng.random() < LEAVE:
                token = client.session.detach()
                self.sim.run(1)
                assert self.sim.live.resume(token) is client.session
                client.seq, client.late = 0, []
        self.sim.run(200)
        for name, client in list(self.clients.items()):
            assert client.session.ended is None, (name, client.session.error)
            assert client.listen(), f"{name}: an output is not what the stream says"
            client.turns_left -= 1
            if client.turns_left <= 0:
                self._leave(name)

    def close(self) -> int:
        """Ends everybody; returns the pages that are left."""
        for name in list(self.clients):
            self._leave(name)
        self.sim.live.close()
        left = self.engine.stats["pages_used"] + self.twins.stats["pages_used"]
        self.engine.close()
        self.twins.close()
        return left

    def _note(self, session_id: str, entry: Entry) -> None:
        self.clients[session_id].follow(entry)

    def _fork(self, client: Client) -> None:
        twins: list[Session] = []

        def fork(inner: Session) -> Session:
            twins.append(client.twin.fork())
            return inner.fork()

        future = client.session.at_boundary(fork)
        self.sim.live.poll()
        session = self.sim.live.adopt(future.result())
        child = Client(session, twins[0], int(client.rng.integers(2**32)))
        child.turns_left = FORK_TURNS
        self.clients[session.id] = child

    def _through_a_file(self, client: Client) -> None:
        """Writes the session, closes it, and goes on with what is read; the twin just goes on."""
        old, path = client.session, self.folder / "session"

        def write(inner: Session) -> None:
            inner.snapshot(path)
            old.close()  # before it steps again

        written = old.at_boundary(write)
        self.sim.live.poll()
        written.result()
        assert client.listen()
        client.session = self.sim.live.adopt(self.engine.restore(path), summary=old._summary)
        self.clients[client.session.id] = self.clients.pop(old.id)
        client.seq, client.late = 0, []
        self.n_files += 1

    def _leave(self, name: str) -> None:
        client = self.clients.pop(name)
        self.n_compared += client.n_compared
        client.session.close()
        client.twin.close()


def main(
    hours: Annotated[float, typer.Option(min=0.01)] = 2.0,
    sessions: Annotated[int, typer.Option(min=1)] = 8,
    model: Annotated[str, typer.Option(help="a checkpoint's folder")] = "reference",
    policy: Annotated[Policy, typer.Option(help="what becomes of the long past")] = "summary",
) -> None:
    """Runs the clients and prints a row for each tenth of the time."""
    with tempfile.TemporaryDirectory() as folder:
        soak_for(hours, Soak(model, sessions, policy, Path(folder)))


def soak_for(hours: float, soak: Soak) -> None:
    """Lets the hours pass, prints the table, and exits."""
    process = psutil.Process()
    n_ticks = int(hours * 3600 * 5) // TENTHS * TENTHS
    table = Table("tenth", "RSS MiB", "pages", "trace", "step ms p50", "p99", "p99.9")
    for n in track(range(n_ticks), "micro-turns", console=Console(stderr=True)):
        soak.tick()
        if (n + 1) % (n_ticks // TENTHS) == 0:
            ms = np.array(soak.step_us) / 1000
            soak.step_us.clear()
            table.add_row(
                str((n + 1) * TENTHS // n_ticks),
                f"{process.memory_info().rss / 2**20:.1f}",
                str(soak.engine.stats["pages_used"]),
                str(len(soak.sim.live.trace._events)),
                *(f"{np.percentile(ms, p):.2f}" for p in (50, 99, 99.9)),
            )
    counters = Counter(soak.sim.live.counters)
    left = soak.close()
    Console().print(table)
    print(f"{soak.n_compared} micro-turns equal to their twins'; {left} pages left")
    print(f"{soak.n_files:12d}  files")
    for name, count in sorted(counters.items()):
        print(f"{count:12d}  {name}")
    raise typer.Exit(1 if left else 0)


if __name__ == "__main__":
    typer.run(main)
