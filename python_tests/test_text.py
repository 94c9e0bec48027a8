"""Text leaves as soon as it is certain, and the pieces joined are the whole."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers

from duplex_engine.config import ModelConfig
from duplex_engine.errors import CheckpointError, InvalidArgument
from duplex_engine.events import MAX_REQUEST, OutputReader
from duplex_engine.models import write_random_checkpoint
from duplex_engine.text import TextStream, Tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def byte_level(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """A tokenizer in SentencePiece's manner: words with a leading mark, others as bytes."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("\u2581", "a", "b", "\u2581a", "\u2581b"):
        vocab[piece] = len(vocab)
    merges = [("\u2581", "a"), ("\u2581", "b")]
    tokenizer = HuggingFaceTokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return Tokenizer(tokenizer)


def _streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(id_) for id_ in ids]


@given(text=st.text(max_size=40))
def test_pieces_join_to_the_text_byte_level(byte_level: Tokenizer, text: str) -> None:
    # A trailing replacement character may stay held back: it looks like an unfinished one.
    whole = text + "."
    assert "".join(_streamed(byte_level, byte_level.encode(whole))) == whole


@given(text=st.text("ab \u4e2d\u00e9\U0001f600", max_size=20))
def test_pieces_join_to_the_text_metaspace(metaspace: Tokenizer, text: str) -> None:
    ids = metaspace.encode(f"a{text}a")
    assert "".join(_streamed(metaspace, ids)) == metaspace.decode(ids)


def test_a_character_comes_out_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("\u4e2d")
    assert len(ids) == 3
    assert _streamed(byte_level, ids) == ["", "", "\u4e2d"]


def test_bytes_that_are_no_character_do_not_stop_the_text(byte_level: Tokenizer) -> None:
    broken = byte_level.encode("\u4e2d")[:2]
    pieces = _streamed(byte_level, [*broken, *byte_level.encode("bado")])
    assert "".join(pieces).endswith("bado")
    lone = byte_level.encode("\u4e2d")[2]
    assert len("".join(_streamed(byte_level, [lone] * 50))) >= 47


def test_a_copy_goes_on_alone(byte_level: Tokenizer) -> None:
    first, *rest = byte_level.encode("\u4e2d")
    stream = TextStream(byte_level)
    stream.push(first)
    other = stream.copy()
    assert stream.push(byte_level.encode("b")[0]).endswith("b")
    assert [other.push(id_) for id_ in rest] == ["", "\u4e2d"]


def test_control_tokens_are_left_out_where_they_have_no_other_spelling() -> None:
    """A word-level vocabulary, as the reference model's, has the control tokens as words."""
    folder = resources.files("duplex_engine") / "models" / "reference"
    with resources.as_file(folder / "tokenizer.json") as path:
        tokenizer = Tokenizer.from_file(path)
    assert tokenizer.encode("red <|listen|> seven <|delegate|>") == tokenizer.encode("red seven")


def test_control_tokens_spelled_out_stay_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<|listen|><|delegate|>")
    assert min(ids) >= 8
    assert byte_level.decode(ids) == "<|listen|><|delegate|>"
    assert byte_level.decode([1, 2, 3]) == ""


@pytest.mark.parametrize(("text", "index"), [("\ud800", 0), ("ab\udcff", 2), ("\ude00\ud83d", 0)])
def test_half_of_a_surrogate_pair_is_refused(byte_level: Tokenizer, text: str, index: int) -> None:
    with pytest.raises(
        InvalidArgument,
        match=f"^result: expected valid Unicode, found a lone surrogate at index {index}; ",
    ):
        byte_level.encode(text, "result")
    assert byte_level.decode(byte_level.encode("\U0001f600")) == "\U0001f600"


@pytest.mark.parametrize(
    "state",
    [
        {"pending": [1e999], "shown": 0, "begun": False},
        {"pending": [-1], "shown": 0, "begun": False},
        {"pending": "12", "shown": 0, "begun": False},
        {"pending": [], "shown": 1e999, "begun": False},
        {"pending": [], "shown": -1, "begun": False},
    ],
)
def test_a_state_that_no_stream_has_is_refused(byte_level: Tokenizer, state: Any) -> None:
    with pytest.raises(InvalidArgument):
        TextStream(byte_level).restore(state)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer"):
        Tokenizer.from_file(path)


def test_delegations_span_turns_and_are_not_spoken(checkpoint: Path, byte_level: Tokenizer) -> None:
    config = ModelConfig.read(checkpoint / "config.json")
    layout = config.interaction
    assert layout is not None
    reader = OutputReader(config, byte_level)
    said, asked = byte_level.encode("bado"), byte_level.encode("kemi zo")
    assert reader.read([*said, layout.delegate, *asked[:1], layout.listen]) == ("bado", [])
    fork = reader.copy()
    text, (delegation,) = reader.read([*asked[1:], layout.delegate_end, *said, layout.listen])
    assert text == "bado"
    assert (delegation.text, list(delegation.token_ids)) == ("kemi zo", asked)
    assert reader.read(said) == ("bado", [])
    # The copy still is inside the request; one that starts again drops what it had.
    text, (delegation,) = fork.read([layout.delegate, *said, layout.delegate_end])
    assert (text, delegation.text) == ("", "bado")
    assert fork.read([layout.delegate_end]) == ("", [])


def test_a_request_without_end_is_dropped(checkpoint: Path, byte_level: Tokenizer) -> None:
    config = ModelConfig.read(checkpoint / "config.json")
    layout = config.interaction
    assert layout is not None
    reader = OutputReader(config, byte_level)
    said = byte_level.encode("bado")
    reader.read([layout.delegate, *[said[0]] * MAX_REQUEST])
    _, (delegation,) = reader.copy().read([layout.delegate_end])
    assert len(delegation.token_ids) == MAX_REQUEST
    assert reader.read([said[0], *said, layout.delegate_end]) == ("bado", [])
    assert reader.state()["request"] is None


def test_without_a_tokenizer_there_are_token_ids_only(checkpoint: Path) -> None:
    config = ModelConfig.read(checkpoint / "config.json")
    reader = OutputReader(config, None)
    text, (delegation,) = reader.read([100, 2, 101, 3, 102])
    assert (text, delegation.text, delegation.token_ids) == ("", "", (101,))
