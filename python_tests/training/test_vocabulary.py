"""The vocabulary and the closed world of texts behind it."""

from __future__ import annotations

from pathlib import Path

from duplex_engine.text import TextStream, Tokenizer
from duplex_engine.training import phrases, vocabulary


def test_control_tokens_come_first() -> None:
    assert vocabulary.TOKENS[:8] == vocabulary.CONTROL_TOKENS
    assert vocabulary.token_id("<|listen|>") == vocabulary.LISTEN == 0
    assert vocabulary.token_id("<|pad|>") == vocabulary.PAD == 7
    assert len(set(vocabulary.TOKENS)) == len(vocabulary.TOKENS) <= vocabulary.VOCAB_SIZE


def test_text_to_ids_and_back() -> None:
    ids = vocabulary.encode("no three")
    assert [vocabulary.TOKENS[id_] for id_ in ids] == ["no", "three"]
    assert vocabulary.decode([*ids, vocabulary.LISTEN]) == "no three <|listen|>"


def test_everything_that_is_put_out_or_typed_has_tokens() -> None:
    said = [" ".join(question.answer) for question in phrases.QUESTIONS]
    said += [question.text for question in phrases.QUESTIONS]
    said += [f"{request.text} {' '.join(request.words)}" for request in phrases.REQUESTS]
    said += [f"{command} {' '.join(words)}" for command, words in phrases.LONG_ANSWERS]
    said += [f"{command} {' '.join(words)}" for command, words in phrases.RUNNING_LISTS]
    said += [*phrases.SENTENCES, *phrases.RESULT_WORDS, *phrases.SHAPES, *phrases.THANKS]
    for text in said:
        vocabulary.encode(text)


def test_the_bank_is_asked_for_every_text_a_task_says() -> None:
    spoken = {*phrases.WORDS, *phrases.PHRASES}
    assert len(spoken) == len(phrases.WORDS) + len(phrases.PHRASES)
    for question in phrases.QUESTIONS:
        assert spoken.issuperset(question.parts)
        assert not question.whole or question.text in spoken
    for request in phrases.REQUESTS:
        assert spoken.issuperset((*request.parts, request.text))
    for sentence, index, wrong in phrases.WRONG_SENTENCES:
        words = phrases.SENTENCES[sentence].split()
        assert words[index] != wrong
        words[index] = wrong
        assert " ".join(words) in spoken
    assert {word for word, _, _ in phrases.MISPRONOUNCED} <= spoken


def test_a_question_has_one_answer() -> None:
    assert len({question.text for question in phrases.QUESTIONS}) == len(phrases.QUESTIONS)
    answers = {question.text: question.answer for question in phrases.QUESTIONS}
    assert answers["what comes after sunday"] == ("monday",)
    assert answers["what comes before january"] == ("december",)
    assert answers["what is nine plus nine"] == ("eighteen",)
    assert "what comes after twenty" not in answers


def test_the_tokenizer_file_reads_words_as_the_vocabulary_does(tmp_path: Path) -> None:
    vocabulary.write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "what comes after seven"
    assert tokenizer.encode(text) == vocabulary.encode(text)
    assert tokenizer.decode(vocabulary.encode(text)) == text
    stream = TextStream(tokenizer)
    pieces = [stream.push(id_) for id_ in vocabulary.encode("one moment")]
    assert pieces == ["one", " moment"]
