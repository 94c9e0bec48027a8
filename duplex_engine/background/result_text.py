"""The text of a result as token ids that may enter a session.

Owns what is kept out: tokens that control the stream (a result comes from outside and must not end
its own brackets), words that the vocabulary does not have, and more than the session has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from duplex_engine.arguments import check_callable, found
from duplex_engine.arrays import token_ids
from duplex_engine.background.positions import room_left
from duplex_engine.background.task import Failure
from duplex_engine.errors import InvalidArgument
from duplex_engine.session import Session

__all__ = ["MAX_RESULT_CHARS", "ResultText"]

MAX_RESULT_CHARS = 65_536  # of a worker's text: what comes after is not read
SPARE_TURNS = 5  # that still fit into the session behind a result


class ResultText:
    """Encodes the results of one session."""

    def __init__(
        self,
        session: Session,
        encode: Callable[[str], Sequence[int]] | None,
        wording: Mapping[Failure, Sequence[str]],
    ) -> None:
        """Takes `encode`, or the checkpoint's tokenizer.

        Raises:
            InvalidArgument: there is neither, or `wording` is not a mapping to sequences of texts.
        """
        _check_wording(wording)
        layout, text = session.config.interaction, session.config.text
        assert layout is not None  # checked by the caller
        if encode is None:
            if session.tokenizer is None:
                raise InvalidArgument(
                    "encode: expected a function from text to token ids, because the checkpoint "
                    "has no tokenizer.json, found none"
                )
            encode = session.tokenizer.encode
        check_callable(encode, "encode")
        self._session, self._encode, self._wording = session, encode, wording
        self._vocab_size = text.vocab_size
        self._control = {getattr(layout, key) for key in layout.token_keys} | {*text.eos_token_ids}
        turn_rows = layout.audio_frames + layout.max_output_tokens + 1
        self._spare_rows = 3 + layout.max_image_patches + SPARE_TURNS * turn_rows

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, without those that control the stream.

        Raises:
            InvalidArgument: nothing is left, or ids are not of the vocabulary.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")  # no half of a surrogate pair
        ids = token_ids(self._encode(clean), self._vocab_size, "result")
        kept = [i for i in ids if i not in self._control]
        if not kept:
            raise InvalidArgument(
                f"result: expected words that the model's vocabulary has, found {text[:80]!r}"
            )
        return kept

    def explanation(self, failure: Failure) -> tuple[str, list[int]] | None:
        """What is said about a failure: the first wording that loses no token, or None."""
        wordings: Iterable[str] = self._wording.get(failure, ())
        for text in wordings:
            ids = list(self._encode(text))
            if ids and not self._control.intersection(ids):
                return text, token_ids(ids, self._vocab_size, "wording")
        return None

    def room(self) -> int:
        """Tokens that a result may have now, so that the stream can still go on behind it."""
        return max(room_left(self._session) - self._spare_rows, 0)


def _check_wording(wording: object) -> None:
    if not isinstance(wording, Mapping):
        raise InvalidArgument(
            f"wording: expected a mapping from failures to texts, found {found(wording)}"
        )
    for failure, texts in wording.items():
        is_several = isinstance(texts, Sequence) and not isinstance(texts, str)
        if not is_several or not all(isinstance(text, str) for text in texts):
            raise InvalidArgument(
                f"wording: expected a list of texts for {found(failure)}, found {found(texts)}"
            )
