"""The speech bank: what is trimmed, what is stored, and that a build can be interrupted.

The builds use espeak-ng, the one synthesiser that all of the recipe depends on.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from duplex_engine.training import bank as bank_module
from duplex_engine.training import phrases, voices
from duplex_engine.training.bank import Bank, build
from duplex_engine.training.speech.sound import SAMPLE_RATE_HZ, SPEECH_RMS, Unspeakable, finish

WORDS = ("seven", "hold on")
PHRASES = ("what is the weather in paris",)
MISPRONOUNCED = (("seven", "s'i:v@n", "seeven"),)


def tone(seconds: float) -> np.ndarray:
    t = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return np.sin(2 * np.pi * 440 * t).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE_HZ), np.float32)


# --- a raw sound becomes a clip ----------------------------------------------------------------
def test_finish_trims_and_moves_the_times() -> None:
    raw = np.concatenate([silence(0.5), 0.3 * tone(1.0), silence(0.25)])
    speech = finish(raw, SAMPLE_RATE_HZ, [("one", 0.5, 0.9), ("two", 0.9, 1.5)])
    assert len(speech.samples) == SAMPLE_RATE_HZ
    assert speech.words == (("one", 0.0, 0.4), ("two", 0.4, 1.0))


def test_finish_levels_the_speech() -> None:
    for gain in (1e-3, 1.0, 1e4):
        speech = finish(gain * tone(1.0), SAMPLE_RATE_HZ, [("one", None, None)])
        assert np.sqrt(np.mean(speech.samples**2)) == pytest.approx(SPEECH_RMS, rel=1e-3)


def test_finish_resamples() -> None:
    speech = finish(tone(1.0), 2 * SAMPLE_RATE_HZ, [("one", None, None)])
    assert len(speech.samples) / SAMPLE_RATE_HZ == pytest.approx(0.5, abs=0.01)


def test_unknown_end_is_where_the_sound_turns_soft() -> None:
    raw = np.concatenate([tone(0.5), 0.02 * tone(0.2)])  # the second part is 34 dB softer
    speech = finish(raw, SAMPLE_RATE_HZ, [("one", None, None), ("two", None, None)])
    assert speech.words == (("one", 0.0, None), ("two", None, 0.5))
    assert len(speech.samples) == round(0.7 * SAMPLE_RATE_HZ)


def test_silence_is_no_speech() -> None:
    with pytest.raises(Unspeakable, match="one"):
        finish(silence(1.0), SAMPLE_RATE_HZ, [("one", None, None)])


# --- who speaks -------------------------------------------------------------------------------
def test_groups_share_no_speaker() -> None:
    roster = voices.roster()
    assert len({voice.name for voice in roster}) == len(roster)
    assert {voice.group for voice in roster} == set(voices.GROUPS)
    assert not set(voices.TRAIN_VARIANTS) & set(voices.HELD_VARIANTS)
    assert not set(voices.KOKORO_TRAIN) & set(voices.KOKORO_HELD)
    engines = {
        group: {
            voice.engine for voice in roster if voice.group == group and voice.kinds[0] == "word"
        }
        for group in voices.GROUPS
    }
    assert "piper" in engines["held"] - engines["train"]
    assert engines["human"] == {"recordings"}


def test_many_voices_are_trained_on() -> None:
    train = [voice for voice in voices.roster() if voice.group == "train"]
    assert sum("word" in voice.kinds for voice in train) >= 120
    assert sum("phrase" in voice.kinds for voice in train) >= 60


def test_a_voice_says_what_its_kinds_name() -> None:
    voice = voices.roster(quick=True)[0]
    said = {(line.kind, line.text) for line in voices.lines(voice)}
    assert {text for kind, text in said if kind == "word"} == set(phrases.WORDS)
    assert {text for kind, text in said if kind == "phrase"} == set(phrases.PHRASES)
    assert len([1 for kind, _ in said if kind == "mispronounced"]) == len(phrases.MISPRONOUNCED)


def test_no_voice_spells_out_a_back_channel() -> None:
    speakers = [voice for voice in voices.roster() if voice.engine != "recordings"]
    for voice in speakers:
        for line in voices.lines(voice):
            if line.text == "mhm":
                assert line.source != line.text
                assert line.source.startswith("[[") == (voice.engine not in voices.TEXT_ENGINES)


# --- a bank of two voices ------------------------------------------------------------------------
@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader")
    monkeypatch.setattr(phrases, "WORDS", WORDS)
    monkeypatch.setattr(phrases, "PHRASES", PHRASES)
    monkeypatch.setattr(phrases, "MISPRONOUNCED", MISPRONOUNCED)
    monkeypatch.setattr(voices, "N_CHATTER", 0)


def two_voices() -> list[voices.Voice]:
    roster = voices.roster(quick=True)
    return [roster[0], roster[-1]]


@pytest.mark.usefixtures("few_texts")
def test_build_stores_clips_with_word_times(tmp_path: Path) -> None:
    assert not build(tmp_path, two_voices())
    bank = Bank.open(tmp_path)
    (train,), (held,) = bank.voices("train"), bank.voices("held")
    assert bank.voices("human") == []
    assert bank.texts(train) == {*WORDS, *PHRASES}
    assert bank.texts(train, "mispronounced") == {"seven"}
    assert [info.voice for info in bank.clips("seven", "held")] == [held]

    clip = bank.clip(PHRASES[0], train)
    assert [word for word, _, _ in clip.words] == PHRASES[0].split()
    ends = [end for _, _, end in clip.words if end is not None]
    assert ends == sorted(ends)
    assert 0.7 < ends[-1] <= len(clip.samples) / SAMPLE_RATE_HZ

    right, wrong = bank.clip("seven", train), bank.clip("seven", train, "mispronounced")
    assert wrong.words[0][0] == "seven"
    assert not np.array_equal(right.samples, wrong.samples)
    with pytest.raises(KeyError, match="eight"):
        bank.clip("eight", train)


@pytest.mark.usefixtures("few_texts")
def test_build_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build(whole, two_voices())
    build(broken, two_voices()[:1])
    with (
        (broken / bank_module.AUDIO).open("ab") as audio,
        (broken / bank_module.INDEX).open("a") as index,
    ):
        audio.write(b"half a clip")
        index.write('{"text": "se')
    build(broken, two_voices())
    banks = [Bank.open(folder) for folder in (whole, broken)]
    for group in ("train", "held"):
        for kind in ("word", "phrase", "mispronounced"):
            expected, found = (bank.of_kind(kind, group) for bank in banks)
            assert [info.text for info in found] == [info.text for info in expected]
            # Not to the sample: espeak-ng's noise depends on what it spoke before.
            for one, other in zip(expected, found, strict=True):
                assert other.n == pytest.approx(one.n, abs=0.02 * SAMPLE_RATE_HZ)
    last = max(banks[1].of_kind("phrase", "held"), key=lambda info: info.offset)
    assert (broken / bank_module.AUDIO).stat().st_size == 2 * (last.offset + last.n)


@pytest.mark.usefixtures("few_texts")
def test_build_adds_only_new_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speakers = two_voices()[:1]
    build(tmp_path, speakers)
    before = (tmp_path / bank_module.AUDIO).read_bytes()
    monkeypatch.setattr(phrases, "WORDS", (*WORDS, "eight"))
    build(tmp_path, speakers)
    assert (tmp_path / bank_module.AUDIO).read_bytes()[: len(before)] == before
    bank = Bank.open(tmp_path)
    assert "eight" in bank.texts(bank.voices("train")[0])


@pytest.mark.usefixtures("few_texts")
def test_the_seed_varies_the_manner(tmp_path: Path) -> None:
    lengths = []
    for seed in (0, 1):
        build(tmp_path / str(seed), two_voices()[:1], seed=seed)
        index = (tmp_path / str(seed) / bank_module.INDEX).read_text().splitlines()
        lengths.append([json.loads(line)["n"] for line in index])
    assert lengths[0] != lengths[1]


def test_opening_nothing_tells_how_to_make_a_bank(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"duplex_engine\.training\.bank"):
            Bank.open(tmp_path)
        for name in (bank_module.AUDIO, bank_module.INDEX):  # interrupted before its first clip
            (tmp_path / name).touch()
