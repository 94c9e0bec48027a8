"""Workers that answer with an engine of this package: a fork of the session, or another engine.

Owns how a request is put to a model and its answer read, in small slices: between two of them the
work can be cancelled. An interaction checkpoint answers in micro-turns of silence, as it was
trained; any other continues a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from duplex_engine.arguments import MAX_INT32, found, integer
from duplex_engine.arrays import token_ids
from duplex_engine.background.chat import chat_prompt
from duplex_engine.background.task import Task
from duplex_engine.engine import Engine
from duplex_engine.errors import InvalidArgument
from duplex_engine.session import Session
from duplex_engine.text import TextStream

__all__ = ["EngineWorker", "ForkWorker", "Prompt"]

Asked: TypeAlias = str | Sequence[int]
Prompt: TypeAlias = Callable[[Task], Asked] | Asked

SLICE_TOKENS = 8  # decoded between two looks whether anybody still waits
SILENT_TURNS = 10  # without a word, after which an interaction checkpoint has no answer


class ForkWorker:
    """Asks a fork of the session: the same weights, and all of the conversation as it was.

    The stream itself never sees what the fork reads and writes; only the answer enters.
    """

    def __init__(
        self,
        prompt: Prompt = lambda task: task.text,
        *,
        max_tokens: int = 64,
        stop: Sequence[int] = (),
        fork_positions: int = 1024,
    ) -> None:
        """Sets what every request is asked.

        Args:
            prompt: what is appended, as typed text: a function from the task to a string or token
                ids, or one of these, the same for every request.
            max_tokens: the longest answer.
            stop: tokens that end it, besides the checkpoint's own.
            fork_positions: the most that prompt and answer may take; their memory is promised to
                the fork.

        Raises:
            InvalidArgument: an argument is not as above.
        """
        self.fork_positions = integer(fork_positions, "fork_positions", low=1)
        self._prompt = _prompt_function(prompt)
        self._stop = tuple(token_ids(stop, MAX_INT32, "stop"))
        self._max_tokens = integer(max_tokens, "max_tokens", 1, MAX_INT32)

    def __call__(self, task: Task) -> Iterator[str]:
        """Yields the answer, slice by slice."""
        if task.session is None:
            raise InvalidArgument("ForkWorker: expected a task with a fork, found none")
        return _answer(task.session, self._prompt(task), self._max_tokens, self._stop)


class EngineWorker:
    """Asks another engine of this process, with weights of its own.

    The context goes over as text, read by that engine's tokenizer, or as token ids.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt = chat_prompt,
        *,
        max_tokens: int = 64,
        stop: Sequence[int] = (),
        **session_options: Any,
    ) -> None:
        """Sets what every request is asked.

        Args:
            engine: stays open as long as the worker is used.
            prompt: a function from the task to the text that the model goes on with, or to token
                ids; or a text or token ids, the same for every task, whose request is then unheard.
            max_tokens: the longest answer.
            stop: tokens that end it, besides the checkpoint's own.
            session_options: of `Engine.open_session`.

        Raises:
            InvalidArgument: an argument is not as above.
        """
        if not isinstance(engine, Engine):
            raise InvalidArgument(f"EngineWorker: expected an Engine, found {found(engine)}")
        self._engine, self._prompt = engine, _prompt_function(prompt)
        self._stop = tuple(token_ids(stop, MAX_INT32, "stop"))
        self._max_tokens = integer(max_tokens, "max_tokens", 1, MAX_INT32)
        self._options = session_options

    def __call__(self, task: Task) -> Iterator[str]:
        """Yields the answer, slice by slice, out of a session that is open as long."""
        # The one place where a session of another engine is opened for background work.
        with self._engine.open_session(**self._options) as session:
            yield from _answer(session, self._prompt(task), self._max_tokens, self._stop)


def _prompt_function(prompt: Prompt) -> Callable[[Task], Asked]:
    """What a task is asked, as a function; a text or token ids are asked each time."""
    if callable(prompt):
        return prompt
    expected = "prompt: expected a function from a task to its prompt, a text, or token ids"
    try:
        asked = prompt if isinstance(prompt, str) else token_ids(prompt, MAX_INT32)
    except InvalidArgument as error:
        raise InvalidArgument(f"{expected}, found {found(prompt)}") from error
    if not asked:
        raise InvalidArgument(f"{expected}, found {found(prompt)}")
    return lambda _: asked


def _answer(
    session: Session, prompt: str | Sequence[int], max_tokens: int, stop: tuple[int, ...]
) -> Iterator[str]:
    if not len(prompt):
        raise InvalidArgument(f"prompt: expected text or token ids, found {found(prompt)}")
    if session.tokenizer is None:
        raise InvalidArgument(
            "worker: expected a checkpoint with a tokenizer.json, which turns its answer into "
            "text, found none"
        )
    stop = tuple(token_ids(stop, session.config.text.vocab_size, "stop"))
    if session.config.interaction is not None:
        return _said_in_turns(session, prompt, max_tokens, stop)
    return _continued(session, prompt, max_tokens, stop)


def _said_in_turns(
    session: Session, prompt: str | Sequence[int], max_tokens: int, stop: tuple[int, ...]
) -> Iterator[str]:
    """The prompt is typed; the answer ends with the first silent micro-turn behind it."""
    n_left, n_silent, has_spoken = max_tokens, 0, False
    typed: str | Sequence[int] | None = prompt
    while n_left > 0 and n_silent < (1 if has_spoken else SILENT_TURNS):
        turn = session.step(text=typed)
        typed = None
        n_left -= len(turn.token_ids)
        has_spoken = has_spoken or bool(turn.text.strip())
        n_silent = 0 if turn.text.strip() else n_silent + 1
        yield turn.text
        if set(stop) & set(turn.token_ids):
            break
    if not has_spoken:
        raise InvalidArgument(
            f"worker: expected an answer, found {n_silent} silent micro-turns behind the request"
        )


def _continued(
    session: Session, prompt: str | Sequence[int], max_tokens: int, stop: tuple[int, ...]
) -> Iterator[str]:
    """The prompt is appended, and the model goes on with it."""
    tokenizer = session.tokenizer
    assert tokenizer is not None  # checked by the caller
    ends = {*stop, *session.config.text.eos_token_ids}
    reader = TextStream(tokenizer)
    session.append(text=prompt)
    n_left = max_tokens
    while n_left > 0:
        n = min(n_left, SLICE_TOKENS)
        ids = session.decode(n, stop=sorted(ends))
        n_left -= n
        yield "".join(reader.push(i) for i in ids if i not in ends)
        if len(ids) < n or ids[-1] in ends:
            break
