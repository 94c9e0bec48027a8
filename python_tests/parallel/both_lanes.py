"""A conversation and thoughts beside it, on both lanes at once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from duplex_engine import Engine, Session

__all__ = ["check_both_lanes"]


def check_both_lanes(
    alone: Engine,
    engine: Engine,
    hear: Callable[[Session], object],
    think: Callable[[Session], object],
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """What a session hears and says in one lane, and what two of its forks think in the other, are
    what they are one after the other on the engine `alone`."""
    with alone.open_session() as session, session.fork() as fork:
        heard, thought = hear(session), think(fork)
    thoughts: list[object] = []
    with engine.open_session() as session:
        forks = [session.fork(background=True) for _ in range(2)]
        threads = [threading.Thread(target=lambda f=f: thoughts.append(think(f))) for f in forks]
        for thread in threads:
            thread.start()
        assert hear(session) == heard
        meanwhile()
        for thread in threads:
            thread.join()
        for fork in forks:
            fork.close()
    assert thoughts == [thought, thought]
