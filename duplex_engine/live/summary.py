"""A session that never ends: when it has grown long, a summary takes the place of its middle.

A fork of the session writes the summary in the background, token by token in the gaps between
micro-turns; then the old middle is forgotten and the summary enters as a background result. If no
summary comes, the middle is forgotten all the same, and an event says so. Owns the policy; the
sequence's holes are in `csrc/sequence/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from duplex_engine.arguments import MAX_INT32, check_callable, integer
from duplex_engine.arrays import token_ids
from duplex_engine.background.positions import BLOCK, fork_limit
from duplex_engine.errors import InvalidArgument
from duplex_engine.live.background import Slices
from duplex_engine.live.journal import Entry
from duplex_engine.live.types import Summarised, SummaryFailed
from duplex_engine.session import Session

if TYPE_CHECKING:
    from duplex_engine.engine import Engine
    from duplex_engine.live.driver import LiveEngine
    from duplex_engine.live.session import LiveSession

__all__ = ["Summary", "begin_summary"]

SLACK = 64  # positions of a fork beyond what it needs


@dataclass(frozen=True, slots=True)
class Summary:
    """How to shorten a session.

    Attributes:
        at: positions held at which a summary begins. The session needs room for it, for what comes
            while it is written, and for the summary.
        keep_head: positions at the beginning that always stay.
        keep_recent: positions at the end that stay; at least those stay that sliding windows and
            rewinding need, the model's `sliding_window_size` and `Engine.rewind_rows`.
        prompt: text or token ids that the fork is given in order to write the summary.
        max_tokens: of the summary.
        write: instead of prompt and max_tokens: is given the fork and yields None between pieces of
            work and text or token ids of the summary in any number of parts.

    Raises:
        InvalidArgument: a field is not as above.
    """

    at: int
    keep_head: int = 0
    keep_recent: int = 0
    prompt: str | list[int] = ""
    max_tokens: int = 128
    write: Callable[[Session], Iterable[str | list[int] | None]] | None = None

    def __post_init__(self) -> None:
        """A wrong field would show only in the driver, when the session has grown long."""
        integer(self.at, "Summary: at", low=1)
        integer(self.keep_head, "Summary: keep_head")
        integer(self.keep_recent, "Summary: keep_recent")
        integer(self.max_tokens, "Summary: max_tokens", 1, MAX_INT32)
        if not isinstance(self.prompt, str):
            token_ids(self.prompt, MAX_INT32, "Summary: prompt")
        if self.write is not None:
            check_callable(self.write, "Summary: write")

    def of_session(self, engine: Engine, session: Session) -> Summary:
        """The same for one session: its prompt is token ids, and known to be right.

        Raises:
            InvalidArgument: as `recent`, or the prompt is none of this checkpoint.
        """
        self.recent(engine)
        is_needed = self.write is None and len(self.prompt) > 0
        return replace(self, prompt=session._ids(self.prompt, "prompt") if is_needed else [])

    def recent(self, engine: Engine) -> int:
        """Positions at the end that stay.

        Raises:
            InvalidArgument: that leaves nothing to forget.
        """
        recent = max(self.keep_recent, engine.config.text.sliding_window_size + engine.rewind_rows)
        if self.at < self.keep_head + recent + 2 * BLOCK:
            raise InvalidArgument(
                f"Summary: expected at >= keep_head + {recent} recent positions + {2 * BLOCK}, "
                f"found at={self.at} and keep_head={self.keep_head}; raise at"
            )
        return recent


def begin_summary(live: LiveEngine, session: LiveSession, policy: Summary) -> None:
    """Starts a summary if the session has grown long. The driver calls it after each turn."""
    inner = session._inner
    if session._is_summarising or session._ended is not None:
        return
    end = 0
    fork: Session | None = None
    try:
        length = inner.length
        if length - sum(end - begin for begin, end in inner.forgotten) < policy.at:
            return
        end = length - policy.recent(live.engine)
        session._is_summarising = True
        extra = len(policy.prompt) + policy.max_tokens + SLACK
        fork = inner.fork(fork_limit(inner, extra), background=True)
        slices = _write(live, session, policy, fork, end)
        live.background(session, slices, gives_way=True)
    except Exception as error:  # of this session alone: the driver goes on
        if fork is not None:
            fork.close()
        _shorten(live, session, policy, end, [], error)


def _write(
    live: LiveEngine, session: LiveSession, policy: Summary, fork: Session, end: int
) -> Slices:
    """The task: slices until the summary is written."""
    summary: list[int] = []
    failure: BaseException | None = None
    with fork:
        try:
            pieces = _decode(live, fork, policy) if policy.write is None else policy.write(fork)
            for piece in pieces:
                if piece is not None:
                    summary += fork._ids(piece, "summary")
                yield
        except GeneratorExit:  # the session has ended
            raise
        except BaseException as error:  # whatever the writer does, the session goes on
            failure = error
    job = partial(_shorten, live, session, policy, end, summary, failure)
    with live._lock:
        session._jobs.append((lambda _: job(), Future()))  # between two micro-turns
        live._wake.set()


def _decode(live: LiveEngine, fork: Session, policy: Summary) -> Iterable[list[int] | None]:
    """Reads the prompt and writes up to `max_tokens`, a token a slice."""
    stop = {live._layout.listen, *fork.config.text.eos_token_ids}
    if policy.prompt:
        fork.append(text=policy.prompt)
        yield None
    for _ in range(policy.max_tokens):
        token = fork.decode(1)
        if token[0] in stop:
            return
        yield token


def _shorten(
    live: LiveEngine,
    session: LiveSession,
    policy: Summary,
    end: int,
    summary: list[int],
    failure: BaseException | None,
) -> None:
    """Forgets the middle up to `end`, and queues the summary in its place."""
    session._is_summarising = False
    if session._ended is not None:
        return
    if failure is None and not summary:
        failure = InvalidArgument("summary: expected text, found none")
    try:
        hidden = session._inner.forget(policy.keep_head, end)
        live._journal(session, Entry("forget", hidden))
    except Exception as error:
        failure = error
        hidden = (policy.keep_head, policy.keep_head)
    with live._lock:
        if failure is None and session._mailbox.push_ids("result", summary, None) == "full":
            failure = InvalidArgument(f"summary: {len(summary)} tokens do not fit beside the input")
        if failure is None:
            session._events.append(Summarised(*hidden, len(summary)))
            live._count("summaries")
        else:
            session._events.append(SummaryFailed(*hidden, str(failure)))
            live._count("summaries_failed")
