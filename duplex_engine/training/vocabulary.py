"""Token ids of the reference interaction model: eight control tokens, then whole words.

Owns the order of the ids and the tokenizer file. The words come from ``phrases.py``; a text is
split at white space, and a word that is not in the vocabulary has no token.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from duplex_engine.errors import InvalidArgument
from duplex_engine.training import phrases

__all__ = [
    "CONTROL_TOKENS",
    "DELEGATE",
    "DELEGATE_END",
    "LISTEN",
    "PAD",
    "RESULT",
    "RESULT_END",
    "TOKENS",
    "USER_TEXT",
    "USER_TEXT_END",
    "VOCAB_SIZE",
    "decode",
    "encode",
    "is_tokenizer",
    "knows",
    "other_tokens",
    "token_id",
    "write_tokenizer",
]

CONTROL_TOKENS = (
    "<|listen|>",
    "<|delegate|>",
    "<|delegate_end|>",
    "<|result|>",
    "<|result_end|>",
    "<|user_text|>",
    "<|user_text_end|>",
    "<|pad|>",
)
LISTEN, DELEGATE, DELEGATE_END, RESULT, RESULT_END, USER_TEXT, USER_TEXT_END, PAD = range(8)

# What only the model says; every other word of the vocabulary can be heard or typed as well.
REPLIES = "no say sorry one moment okay hello"


def _vocabulary() -> tuple[str, ...]:
    texts = [
        *phrases.WORDS,
        *(question.text for question in phrases.QUESTIONS),
        *(word for question in phrases.QUESTIONS for word in question.answer),
        *(request.text for request in phrases.REQUESTS),
        *(word for request in phrases.REQUESTS for word in request.words),
        *(command for command, _ in phrases.LONG_ANSWERS + phrases.RUNNING_LISTS),
        *(phrases.RANDOM_OPENINGS + phrases.LIST_OPENINGS),
        *(phrases.STORY + phrases.SHAPES + phrases.RESULT_WORDS),
        REPLIES,
    ]
    words = dict.fromkeys(word for text in texts for word in text.split())
    return (*CONTROL_TOKENS, *words)


TOKENS: tuple[str, ...] = _vocabulary()  # by id
VOCAB_SIZE = -(-len(TOKENS) // 64) * 64  # rows of the embedding; the last ones are never used
_IDS = {token: id_ for id_, token in enumerate(TOKENS)}


def token_id(word: str) -> int:
    """The id of one word or control token; raises KeyError if the vocabulary lacks it."""
    return _IDS[word]


def knows(word: str) -> bool:
    """Whether the vocabulary has this word."""
    return word in _IDS


def encode(text: str) -> list[int]:
    """Ids of the words of a text, control tokens included; raises KeyError for an unknown word."""
    return [_IDS[word] for word in text.split()]


def decode(ids: list[int] | tuple[int, ...]) -> str:
    """The words of these ids, joined by blanks, control tokens included."""
    return " ".join(TOKENS[id_] for id_ in ids)


def is_tokenizer(path: str | Path) -> bool:
    """Whether a ``tokenizer.json`` has just these tokens."""
    return bool(Tokenizer.from_file(str(path)).get_vocab() == _IDS)


def other_tokens(source: Path) -> InvalidArgument:
    """The refusal of what was made with other tokens than now."""
    return InvalidArgument(
        f"{source}: expected the {len(TOKENS)} tokens of vocabulary.py, found others: the texts "
        "were changed since, and it knows each token by its number; make it anew"
    )


def write_tokenizer(path: str | Path) -> None:
    """Writes ``tokenizer.json``: words split at white space; an unknown one becomes `pad`."""
    tokenizer = Tokenizer(models.WordLevel(vocab=_IDS, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.save(str(path))
