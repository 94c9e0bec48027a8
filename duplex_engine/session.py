"""A session: one user's stream of micro-turns.

Owns the shape of the calls and what Python carries from turn to turn: the resampler of the
incoming sound and the reader of the outgoing tokens. The sequence itself, the encoders' state and
the sampler live in the core. Read `types.py` for what comes back, `engine.py` for who opens this.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from duplex_engine import _core
from duplex_engine.arguments import MAX_INT32, found, integer, position_limit, sampling_options
from duplex_engine.arrays import (
    SAMPLE_RATE,
    Resampler,
    Samples,
    checked_rate,
    rgb_image,
    samples_1d,
    token_ids,
)
from duplex_engine.config import ModelConfig
from duplex_engine.errors import DuplexError, InvalidArgument, SessionClosed
from duplex_engine.events import OutputReader, micro_turn
from duplex_engine.exclusive import Exclusive
from duplex_engine.snapshot import ModelIdentity, write_snapshot
from duplex_engine.step import step_input, step_together
from duplex_engine.text import Tokenizer
from duplex_engine.types import MicroTurn, Window

if TYPE_CHECKING:
    from duplex_engine.engine import Engine

__all__ = ["Session"]

MAX_READERS = 64  # kept for `truncate`: more than the core keeps marks


class Session:
    """Made by `Engine.open_session`. Use it as a context manager, or `close` it.

    One call at a time: a second thread gets SessionBusy. `feed`, which only queues, and `close`
    may come from any thread at any time.

    Every method raises SessionClosed when the session or its engine is closed.
    """

    def __init__(
        self,
        core: _core.Session,
        engine: _core.Engine,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        model: ModelIdentity,
    ) -> None:
        self._core = core
        self._engine = engine
        self._model = model
        self._config = config
        self._tokenizer = tokenizer
        self._reader = OutputReader(config, tokenizer)
        # As it was at the end of calls, by the length then; what `truncate` accepts is among them.
        self._readers: dict[int, OutputReader] = {core.length: self._reader.copy()}
        self._resampler: Resampler | None = None
        self._input_rate: int | None = None
        self._feeding = threading.Lock()

        def check_open() -> None:  # of the core alone, so that no cycle keeps a session alive
            if core.closed:
                raise SessionClosed("session: it is closed; open a new one")

        self._exclusive = Exclusive(check_open)

    def step(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
        max_tokens: int | None = None,
    ) -> MicroTurn:
        """Runs one micro-turn: appends what was fed and what is given here, then decodes.

        Of the sound that waits, one micro-turn's worth is consumed. If more than one micro-turn
        waits, all complete ones (of an endless session, as many as fit) are appended in the same
        pass and only the newest decodes; missing sound is appended as silence. Both are events.

        Args:
            audio: (n,) or (n, channels) float32 or int16 samples, any n; see `arrays.samples_1d`.
            image: (height, width, 3) uint8 RGB.
            text: what the user typed: a string, or token ids.
            result: what the background found for a `Delegation`: a string, or token ids.
            sample_rate: Hz of `audio`; None is 16 kHz. Fixed by the first sound of the session.
            max_tokens: most tokens to put out; None takes the checkpoint's limit, or 16 if it has
                none.

        Raises:
            InvalidArgument: an input is not as above; nothing was taken.
            CapacityError: the sequence is full and not `endless`, or these rows alone are too many
                for it; truncate, forget, or open a longer session.
            SessionBusy: another thread is at work on this session.
        """
        inputs = step_input(audio, image, text, result, sample_rate, max_tokens)
        (answer,) = step_together(self._engine, [(self, inputs)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def feed(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
    ) -> None:
        """Queues input for the next micro-turn; the arguments are those of `step`.

        Raises:
            InvalidArgument: an input is not as `step` says; nothing was taken.
            CapacityError: too much of one kind waits already; the other kinds may have been taken.
        """
        with self._feeding:
            # Everything is checked before anything is queued; the core checks the picture's size.
            samples = resampler = None
            if audio is not None:
                samples, resampler = samples_1d(audio), self._resampler_for(sample_rate)
            elif sample_rate is not None:
                checked_rate(sample_rate)
            text_ids = None if text is None else self._ids(text, "text")
            result_ids = None if result is None else self._ids(result, "result")
            if result_ids is not None and self._config.interaction is None:
                raise InvalidArgument(
                    "result: expected an interaction checkpoint, found one that cannot delegate; "
                    "pass it as text"
                )
            if image is not None:
                self._core.feed_image(rgb_image(image))
            if result_ids is not None:
                self._core.feed_result(result_ids)
            if text_ids is not None:
                self._core.feed_text(text_ids)
            if samples is not None:
                try:
                    self._core.feed_audio(self._at_16_khz(samples, resampler))
                except DuplexError:
                    self._restart_resampler()  # it holds the end of sound that was refused
                    raise

    @overload
    def append(
        self,
        *,
        text: object = ...,
        audio: object = ...,
        image: object = ...,
        sample_rate: int | None = ...,
        end_of_audio: bool = ...,
        logits: None = ...,
    ) -> None: ...

    @overload
    def append(
        self,
        *,
        text: object = ...,
        audio: object = ...,
        image: object = ...,
        sample_rate: int | None = ...,
        end_of_audio: bool = ...,
        logits: Literal["last", "all"],
    ) -> NDArray[np.float32]: ...

    def append(
        self,
        *,
        text: object = None,
        audio: object = None,
        image: object = None,
        sample_rate: int | None = None,
        end_of_audio: bool = False,
        logits: Literal["last", "all"] | None = None,
    ) -> NDArray[np.float32] | None:
        """Appends one kind of input now, outside any micro-turn, and decodes nothing.

        Args:
            text, audio, image, sample_rate: exactly one input, as in `step`. Of sound, whole frames
                of 50 ms are appended; the rest waits for more.
            end_of_audio: pad the last frame of sound with silence and append it too.
            logits: None for none, "last" for those of the newest row, "all" for every row.

        Returns:
            None, or float32 logits: (1, vocabulary) for "last", (rows, vocabulary) for "all"; no
            rows where nothing was appended.
        """
        given = {"text": text, "audio": audio, "image": image}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise InvalidArgument(
                f"append: expected one of text, audio, image, found {' and '.join(names) or 'none'}"
            )
        if not (logits is None or (isinstance(logits, str) and logits in ("last", "all"))):
            raise InvalidArgument(f"logits: expected None, 'last' or 'all', found {found(logits)}")
        (kind,) = names
        data: Any
        with self._exclusive:
            if kind == "text":
                data = self._ids(text, "text")
            elif kind == "image":
                data = rgb_image(image)
            else:
                data = samples_1d(audio)
                with self._feeding:
                    data = self._at_16_khz(data, self._resampler_for(sample_rate))
            try:
                rows: NDArray[np.float32] | None = self._core.append(
                    kind, data, logits=logits or "none", end_of_audio=bool(end_of_audio)
                )
            except DuplexError:
                if kind == "audio":
                    with self._feeding:
                        self._restart_resampler()  # it holds the end of sound that was refused
                raise
            self._remember_reader(self._core.length)
            return rows

    def decode(self, n: int, stop: Sequence[int] = ()) -> list[int]:
        """Decodes up to `n` tokens, ending after one of `stop`; returns their ids.

        These tokens are the caller's: they enter no micro-turn's `text` or `events`. `interrupt`
        from another thread ends it behind the next one.

        Raises:
            InvalidArgument: `n` or `stop` is wrong, or the session is empty.
            CapacityError: so many positions are not left.
        """
        with self._exclusive:
            n = integer(n, "decode: n", high=MAX_INT32)
            ids = self._core.decode(n, token_ids(stop, self._config.text.vocab_size, "stop"))
            self._remember_reader(self._core.length)
            return list(ids)

    def truncate(self, length: int) -> None:
        """Drops the newest positions until `length` are left.

        Everything else the session carries goes back too, except the resampler: where sound has
        another rate than 16 kHz, it begins anew. Queued input and the sampling options stay as they
        are, and what was forgotten stays so.

        Raises:
            InvalidArgument: `length` is not one of `marks`: too old, or inside a micro-turn.
        """
        with self._exclusive:
            length = integer(length, "truncate: length")
            self._core.truncate(length)
            self._restart_resampler()
            # None of a call that Ctrl-C ended before it was remembered: its output is unread.
            reader = self._readers.get(length)
            self._reader = (
                OutputReader(self._config, self._tokenizer) if reader is None else reader.copy()
            )
            self._readers = {at: r for at, r in self._readers.items() if at <= length}

    def interrupt(self) -> None:
        """Raises the epoch, and ends output in progress behind its next token.

        On a GPU: behind the tokens that were launched together, at most 32. The sequence stays: the
        turn that was cut off ends as at its limit of tokens, `stopped` is "interrupted" and its
        `epoch` the old one, so that a player can drop it. From any thread.
        """
        self._core.interrupt()

    def fork(self, max_positions: int | None = None, *, background: bool = False) -> Session:
        """A second session that goes on from the same point; the prefix is shared, not copied.

        Queued input is taken along. The resampler is not: where sound has another rate than 16 kHz,
        the fork's begins anew, and may have a rate of its own.

        Args:
            max_positions: the longest its sequence can become; None takes this session's.
            background: compute it on the background lane, whichever lane this session is on; see
                `Engine.open_session`.

        Raises:
            CapacityError: the memory left cannot hold the fork's own part.
        """
        with self._exclusive:
            core = self._core.fork(position_limit(max_positions), bool(background))
            other = Session(core, self._engine, self._config, self._tokenizer, self._model)
            other._reader = self._reader.copy()
            other._readers = self._readers.copy()
            return other

    def forget(self, begin: int, end: int) -> tuple[int, int]:
        """Hides positions [begin, end) of the past and gives their memory back.

        Returns:
            The range really forgotten, rounded inward to blocks; later positions keep their
            numbers.

        Raises:
            InvalidArgument: the range reaches into what sliding windows still need.
        """
        with self._exclusive:
            hidden = self._core.forget(integer(begin, "forget: begin"), integer(end, "forget: end"))
            return hidden[0], hidden[1]

    def set_sampling(
        self, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        """Replaces the sampling options, and starts the random numbers again from `seed`."""
        with self._exclusive:
            self._core.set_sampling(**sampling_options(temperature, top_k, top_p, seed))

    def snapshot(self, path: str | Path) -> None:
        """Writes the session to a file, from which `Engine.restore` goes on bit for bit.

        Whoever opens `path` sees the whole file, the one before it, or none, also when the process
        is killed or the power fails. Queued input is taken along. The resampler is not: as in a
        `fork`, sound of another rate than 16 kHz begins anew. Other sessions go on meanwhile.

        Keep the file as private as the process: beside this conversation, its unfinished blocks may
        hold bytes that the memory held before, of other sessions too.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        with self._exclusive:
            write_snapshot(path, self._core, self._model, self._carried())

    def migrate(self, engine: Engine) -> Session:
        """Moves the session to another engine of this process, and closes it here.

        Where that fails the session stays as it was. `feed` waits meanwhile.

        Raises:
            CheckpointError: the other engine has other weights or other options.
            CapacityError: its memory cannot hold the session.
        """
        with self._exclusive, self._feeding:
            model = getattr(engine, "_model", None)
            if not isinstance(model, ModelIdentity):
                raise InvalidArgument(f"migrate: expected an Engine, found {found(engine)}")
            model.check(self._model.fields, "migrate")
            core = _core.copy_session(self._core, engine._core)
            other = engine._adopt(core, self._carried())
            other._resampler, other._input_rate = self._resampler, self._input_rate
            self._core.close()
            return other

    @property
    def length(self) -> int:
        """Positions in the sequence."""
        return self._core.length

    @property
    def background(self) -> bool:
        """Whether it computes on the background lane; see `Engine.open_session`."""
        return self._core.background

    @property
    def epoch(self) -> int:
        """How often `interrupt` and `truncate` were called: output of an older one is not valid."""
        return self._core.epoch

    @property
    def max_positions(self) -> int:
        """The longest its sequence can become; no limit to a model without global layers."""
        return self._core.max_positions

    @property
    def config(self) -> ModelConfig:
        """The checkpoint's validated `config.json`."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, or None; see `Engine.tokenizer`."""
        return self._tokenizer

    @property
    def forgotten(self) -> list[tuple[int, int]]:
        """The ranges of positions that the model no longer sees, in order."""
        return list(self._core.forgotten())

    @property
    def endless(self) -> Window | None:
        """What is kept when the session is full; None where it ends then."""
        window = self._core.endless
        return None if window is None else Window(*window[:2])

    @property
    def marks(self) -> list[int]:
        """The lengths that `truncate` accepts."""
        return list(self._core.marks())

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the sequence holds now, by part.

        `global_bytes` grows with the conversation; `local_bytes` (sliding windows) and `conv_bytes`
        (short convolutions) are bounded; `shared_bytes` is the part of these held with forks;
        `draft_bytes` is what multi-token-prediction layers hold beside them.
        """
        return dict(self._core.memory())

    @property
    def closed(self) -> bool:
        """Whether the session was closed."""
        return self._core.closed

    def close(self) -> None:
        """Gives the session's memory back, once a call at work on it ends; twice does no harm."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, text: object, name: str) -> list[int]:
        if not isinstance(text, str):
            return token_ids(text, self._config.text.vocab_size, name)
        if self._tokenizer is None:
            raise InvalidArgument(
                f"{name}: expected token ids, found a string, and the checkpoint has no "
                "tokenizer.json; encode it yourself or add the file"
            )
        return token_ids(self._tokenizer.encode(text, name), self._config.text.vocab_size, name)

    def _resampler_for(self, sample_rate: int | None) -> Resampler | None:
        """The resampler of the session's sound, a new one for the first; changes nothing."""
        rate = SAMPLE_RATE if sample_rate is None else checked_rate(sample_rate)
        if self._input_rate is None:
            return None if rate == SAMPLE_RATE else Resampler(rate)
        if rate != self._input_rate:
            raise InvalidArgument(
                f"sample_rate: expected {self._input_rate} Hz as in the sound before, found "
                f"{found(rate)}; open another session, or resample first"
            )
        return self._resampler

    def _at_16_khz(self, samples: Samples, resampler: Resampler | None) -> Samples:
        """Brings sound to the model's rate; from here on the session's rate is fixed."""
        self._resampler = resampler
        self._input_rate = SAMPLE_RATE if resampler is None else resampler.sample_rate
        return samples if resampler is None else resampler.push(samples)

    def _restart_resampler(self) -> None:
        """Forgets the sound that a resampler holds back; the next sound may have any rate."""
        self._resampler = self._input_rate = None

    def _remember_reader(self, length: int) -> None:
        self._readers.pop(length, None)  # the newest goes last
        self._readers[length] = self._reader.copy()
        if len(self._readers) > MAX_READERS:
            del self._readers[next(iter(self._readers))]

    def _carried(self) -> dict[str, Any]:
        """What Python carries from call to call, as plain JSON; the resampler is left out."""
        readers = [[length, reader.state()] for length, reader in self._readers.items()]
        return {"reader": self._reader.state(), "readers": readers}

    def _resume(self, carried: dict[str, Any]) -> None:
        """Goes on with what `_carried` gave; raises KeyError, TypeError, ValueError otherwise."""
        self._reader = self._reader.restored(carried["reader"])
        self._readers = {
            integer(length, "length"): self._reader.restored(state)
            for length, state in carried["readers"]
        }

    def _finish(self, turn: _core.Turn) -> MicroTurn:
        """Reads what the core's turn means."""
        text, delegations = self._reader.read(turn.token_ids)
        self._remember_reader(turn.position)
        return micro_turn(turn, text, delegations)
