"""What the model is trained to do, checked scene by scene on a bank whose word times are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from toy_bank import CHATTER, WORD_S, toy_bank

from duplex_engine.errors import InvalidArgument
from duplex_engine.training import (
    episodes,
    phrases,
    shards,
    tasks_lists,
    tasks_seeing,
    tasks_talk,
)
from duplex_engine.training.bank import Bank, ClipInfo
from duplex_engine.training.episodes import TASKS, compose
from duplex_engine.training.rows import layout
from duplex_engine.training.shards import load_shard, save_shard
from duplex_engine.training.stage import MAX_TOKENS, TURN_S, TYPED, Event, Stage, turn_at
from duplex_engine.training.tasks_lists import ListFollower
from duplex_engine.training.vocabulary import decode, encode, token_id

BANK = toy_bank()
SEEDS = range(40)


def played(scene: Callable[[Stage], None], seed: int) -> Stage:
    """One scene by itself."""
    stage = Stage(BANK, np.random.default_rng(seed), "train")
    stage.time_s = 0.5
    scene(stage)
    return stage


def transcript(stage: Stage) -> list[tuple[str, float]]:
    """The words heard, with their ends."""
    return sorted(stage._word_ends, key=lambda item: item[1])


def of(stage: Stage, *kinds: str) -> list[Event]:
    """Events of these kinds, by time."""
    return sorted((e for e in stage.events if e.kind in kinds), key=lambda e: e.time_s)


def said(stage: Stage) -> list[str]:
    """What the model puts out, in order."""
    return [decode(tokens) for _, tokens in sorted(stage.outputs.items())]


@pytest.mark.parametrize(("time_s", "turn"), [(0.0, 0), (0.07, 0), (0.08, 1), (0.3, 2), (1.0, 5)])
def test_a_moment_is_answered_120_to_320_ms_later(time_s: float, turn: int) -> None:
    assert turn_at(time_s) == turn
    assert 0.12 - 1e-6 <= (turn + 1) * TURN_S - time_s <= 0.32 + 1e-6


@pytest.mark.parametrize(
    ("heard", "corrections"),
    [
        ("one two three four", "- - - -"),
        ("nine eight seven", "- - -"),
        ("nine eight nine", "- - seven"),
        ("one three", "- two"),  # the second word
        ("one two four five six", "- - three - -"),  # goes on from the wrong item
        ("one two four four five", "- - three - -"),  # goes on from the right item
        ("one two four three four", "- - three - -"),  # repeats the right item
        ("one two nine nine", "- - three four"),  # two mistakes in a row
        ("one two banana four", "- - three -"),
        ("one two three three", "- - - four"),
    ],
)
def test_numbers_are_followed(heard: str, corrections: str) -> None:
    follower = ListFollower(phrases.NUMBERS, cyclic=False, may_fall=True)
    found = [follower.hear(item) or "-" for item in heard.split()]
    assert found == corrections.split()


def test_days_begin_again_and_go_forward_only() -> None:
    follower = ListFollower(phrases.DAYS, cyclic=True, may_fall=False)
    heard = ["saturday", "sunday", "monday", "sunday"]
    assert [follower.hear(item) for item in heard] == [None, None, None, "tuesday"]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_list_item_is_judged_at_its_end(seed: int) -> None:
    stage = played(TASKS["list"][0], seed)
    ends = {round(end_s, 6): word for word, end_s in transcript(stage)}
    judged = of(stage, "correct", "pronounce", "right")
    assert {round(event.time_s, 6) for event in of(stage, "correct", "right")} <= ends.keys()
    for event in judged:
        words = decode(event.tokens).split()
        if event.kind == "correct":
            assert words[0] == "no"
            assert words[1] != ends[round(event.time_s, 6)]
        elif event.kind == "pronounce":
            assert words[0] == "say"
        if event.tokens:
            assert event.turn == turn_at(event.time_s)
            assert stage.outputs[event.turn] == list(event.tokens)
    assert len(stage.outputs) == len(of(stage, "correct", "pronounce"))


def test_a_drill_has_every_word_but_no_list() -> None:
    listed = {*phrases.NUMBERS, *phrases.DAYS, *phrases.MONTHS}
    heard: set[str] = set()
    for seed in range(300):
        stage = played(tasks_lists.drill_scene, seed)
        words = [word for word, _ in transcript(stage)]
        is_announced = bool(stage.typed) or any(
            " ".join(words).startswith(opening) for opening in phrases.RANDOM_OPENINGS
        )
        assert is_announced or not listed & set(words)
        heard |= set(words)
    known = BANK.texts(BANK.voices("train")[0])
    assert heard >= {word for text in phrases.WORDS if text in known for word in text.split()}


def test_lists_have_mistakes_about_as_often_as_not() -> None:
    wrong = [bool(of(played(TASKS["list"][0], seed), "correct")) for seed in range(300)]
    assert 0.35 < np.mean(wrong) < 0.65


@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_words_of_a_sentence_are_corrected(seed: int) -> None:
    stage = played(TASKS["sentence"][0], seed)
    judged = of(stage, "correct", "pronounce", "right")
    right = [decode(e.tokens).split()[1] if e.tokens else "" for e in judged]
    ends = {round(end_s, 6): word for word, end_s in transcript(stage)}
    words = [r or ends[round(e.time_s, 6)] for r, e in zip(right, judged, strict=True)]
    assert " ".join(words) in phrases.SENTENCES
    for event in of(stage, "correct"):
        assert decode(event.tokens) != f"no {ends[round(event.time_s, 6)]}"


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_wrong_where_there_is_no_order(seed: int) -> None:
    for scene in (TASKS["unordered"][0], TASKS["quiet"][0], tasks_lists.drill_scene):
        stage = played(scene, seed)
        assert not stage.outputs
        assert all(not event.tokens for event in stage.events)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_running_list_is_echoed_until_thanks(seed: int) -> None:
    stage = played(TASKS["running"][0], seed)
    heard = transcript(stage)
    words = [word for word, _ in heard]
    (command,) = [
        text
        for text, _ in phrases.RUNNING_LISTS
        if text in " ".join(words) or encode(text) in stage.typed.values()
    ]
    begin = 0 if encode(command) in stage.typed.values() else len(command.split())
    thanks = (i for i, word in enumerate(words) if word in ("thank", "thanks"))
    end = next(thanks, None)
    if end is None:  # they were typed
        (turn,) = [t for t, ids in stage.typed.items() if decode(ids) in phrases.THANKS]
        end = sum(end_s < turn * TURN_S for _, end_s in heard)
    wanted = dict(phrases.RUNNING_LISTS)[command]
    expected = [(word, end_s) for word, end_s in heard[begin:end] if word in wanted]
    echoes = of(stage, "echo")
    assert [(decode(e.tokens), e.time_s) for e in echoes] == expected
    assert said(stage) == [word for word, _ in expected]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_question_is_answered_once_when_it_is_finished(seed: int) -> None:
    stage = played(TASKS["question"][0], seed)
    answers = {question.text: " ".join(question.answer) for question in phrases.QUESTIONS}
    (answer,) = of(stage, "answer")
    if stage.typed:
        ((turn, tokens),) = stage.typed.items()
        assert (answer.turn, decode(answer.tokens)) == (turn, answers[decode(tokens)])
    else:
        heard = [(w, end_s) for w, end_s in transcript(stage) if w not in phrases.FILLERS]
        assert decode(answer.tokens) == answers[" ".join(word for word, _ in heard)]
        assert answer.time_s == heard[-1][1]
        assert answer.turn == turn_at(answer.time_s)
    assert stage.outputs == {answer.turn: list(answer.tokens)}
    for pause in of(stage, "pause"):
        assert pause.turn + pause.window_turns <= answer.turn


@pytest.mark.parametrize("seed", SEEDS)
def test_a_long_answer_goes_on_until_stopped(seed: int) -> None:
    stage = played(TASKS["long"][0], seed)
    (start,) = of(stage, "start")
    stops, answers = of(stage, "stop"), of(stage, "answer")
    turns = [turn for turn in sorted(stage.outputs) if not answers or turn < answers[0].turn]
    spoken = " ".join(decode(stage.outputs[turn]) for turn in turns)
    (full,) = {
        words
        for command, words in phrases.LONG_ANSWERS
        if " ".join(words).startswith(spoken)
        and (
            encode(command) in stage.typed.values()
            or command in " ".join(word for word, _ in transcript(stage))
        )
    }
    assert turns == list(range(start.turn, start.turn + len(turns)))
    if stops:
        assert turns[-1] + 1 == stops[0].turn == turn_at(stops[0].time_s)
    else:
        assert len(turns) == len(full)


@pytest.mark.parametrize("seed", range(80))
def test_a_result_is_said_once_the_user_is_silent(seed: int) -> None:
    stage = played(TASKS["delegate"][0], seed)
    (handed,) = of(stage, "delegate")
    request, moment = decode(handed.tokens).split(" <|delegate_end|> ")
    assert request.removeprefix("<|delegate|> ").split() in [[*r.words] for r in phrases.REQUESTS]
    assert moment == "one moment"
    assert stage.outputs[handed.turn] == encode(f"{request} <|delegate_end|>")
    results = sorted(stage.results.items())
    replies = of(stage, "result", "revise")
    if of(stage, "cancel"):
        assert decode(of(stage, "cancel")[0].tokens) == "okay"
        assert not replies
        return
    assert [e.kind for e in replies] == ["result", "revise"][: len(results)]
    for (arrival, tokens), event in zip(results, replies, strict=True):
        prefix = [token_id("sorry")] if event.kind == "revise" else []
        assert [*event.tokens] == prefix + tokens
        assert event.turn >= arrival
        begin_s = event.turn * TURN_S
        for word, end_s in transcript(stage):
            silent = end_s <= begin_s or end_s - WORD_S >= begin_s + TURN_S
            assert silent, f"{word} is being said"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_changes_in_the_picture_is_said_in_its_turn(seed: int) -> None:
    stage = played(tasks_seeing.seeing_scene, seed)
    seen = of(stage, "see")
    assert seen
    for event in seen:
        before = stage.images[event.turn - 1].astype(int)
        now = stage.images[event.turn].astype(int)
        assert now.shape == (tasks_seeing.HEIGHT, tasks_seeing.WIDTH, 3)
        assert abs(now - before).max() > 40
        assert stage.outputs[event.turn] == list(event.tokens)
    words = [decode(event.tokens) for event in seen]
    if words[0] == "one":
        assert words == list(phrases.NUMBERS[: len(words)])


def test_voices_without_word_times_do_the_same_tasks() -> None:
    bank = toy_bank(with_times=False)
    for seed in range(10):
        episode = compose("mix", bank, np.random.default_rng(seed))
        assert episode.outputs


@pytest.mark.parametrize("task", TASKS)
def test_a_voice_with_few_words_does_what_it_can(task: str) -> None:
    spoken = ClipInfo("one", (("one", 0.0, WORD_S),), "v", "human", "word", 0, 4800)
    bank = Bank(np.ones(4800, np.int16), [spoken])
    compose(task, bank, np.random.default_rng(0), "human", 200)


@pytest.mark.parametrize("task", [*TASKS, episodes.MIX])
def test_an_episode_is_whole_and_depends_on_its_seed_alone(task: str) -> None:
    first, second, other = (
        compose(task, BANK, np.random.default_rng(seed), n_turns=80) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.audio, second.audio)
    assert first.outputs == second.outputs
    assert first.events == second.events
    assert not np.array_equal(first.audio, other.audio)
    assert first.audio.shape == (80 * 3200,)
    assert first.labels.shape == (80 * 4,)
    assert all(0 < len(tokens) <= MAX_TOKENS for tokens in first.outputs.values())
    assert all(event.turn + event.window_turns <= 80 for event in first.events)


@pytest.mark.parametrize("seed", range(3))
def test_a_question_may_be_typed_before_anything_is_heard(seed: int) -> None:
    episode = compose("mix", BANK, np.random.default_rng(seed), p_typed_first=1.0)
    first = episode.events[0]
    assert (first.kind, first.time_s, first.turn, first.voice) == ("answer", 0.0, 0, TYPED)
    questions = {question.text: question.answer for question in phrases.QUESTIONS}
    answer = questions[decode(episode.typed[0])]
    assert decode(list(first.tokens)) == " ".join(answer)
    assert min(episode.outputs) == 0


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="expected mix or one of list"):
        compose("lists", BANK, np.random.default_rng(0))


def test_a_falling_list_does_not_begin_with_its_last_item() -> None:
    """Nothing rises from there, so whatever came next would be taken for a beginning."""
    stage = Stage(BANK, np.random.default_rng(0), "train")
    first = {tasks_lists._first_item(stage, phrases.NUMBERS, falls=True) for _ in range(300)}
    assert first == set(phrases.NUMBERS[5:-1])


@pytest.mark.parametrize("task", ["list", "sentence"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_correction_is_the_word_that_was_expected(task: str, seed: int) -> None:
    stage = played(TASKS[task][0], seed)
    expected = sorted(stage._expected, key=lambda item: item[1])
    for event in of(stage, "correct"):
        before = [word for word, at_s in expected if at_s < event.time_s]
        assert decode(event.tokens) == f"no {before[-1]}"
    labels = stage.episode(150, None).expected
    assert {int(id_) for id_ in labels if id_} <= {token_id(word) for word, _ in expected}
    assert bool(labels.any()) == bool(expected)


def test_labels_name_the_word_that_ended_within_200_ms() -> None:
    stage = Stage(BANK, np.random.default_rng(0), "train")
    stage.say("three", at_s=0.62)  # ends at 0.92; heard from 1.04 on, in the frame to 1.05
    labels = stage.episode(10, None).labels
    assert np.flatnonzero(labels).tolist() == [20, 21, 22, 23]
    assert labels[20] == token_id("three")


def test_a_faster_voice_has_earlier_word_ends() -> None:
    stage = Stage(BANK, np.random.default_rng(0), "train", tempo=(1.25, 1.25))
    spoken = stage.say("count to ten", at_s=1.0)
    assert spoken.end_s == pytest.approx(1.0 + 3 * WORD_S / 1.25)


def test_a_result_that_comes_while_the_user_talks_waits() -> None:
    stage = Stage(BANK, np.random.default_rng(0), "train")
    talk = stage.say(CHATTER[0], at_s=1.0)  # to 3.1 s
    tasks_talk._deliver(stage, ("sunny",), 1.5, [talk], kind="result")
    (event,) = of(stage, "result")
    assert 1.5 < next(iter(stage.results)) * TURN_S <= 3.3
    assert event.turn == turn_at(3.1 + 0.3)


def test_without_voices_of_the_group_there_is_no_stage() -> None:
    with pytest.raises(InvalidArgument, match="bank: expected voices of group 'human', found none"):
        Stage(BANK, np.random.default_rng(0), "human")


def test_a_shard_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that goes on keeps what is there."""
    stream = episodes.to_stream(compose("mix", BANK, np.random.default_rng(0), n_turns=20))

    def interrupted(file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez_compressed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_shard(tmp_path / "a.npz", [stream])
    assert not list(tmp_path.glob("*.npz"))
    save_shard(tmp_path / "a.npz", [stream])
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_shard_of_other_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = episodes.to_stream(compose("mix", BANK, np.random.default_rng(0), n_turns=20))
    monkeypatch.setattr(shards, "TOKENS", ("hello", *shards.TOKENS))
    save_shard(tmp_path / "a.npz", [stream])
    monkeypatch.undo()
    with pytest.raises(InvalidArgument, match=r"a\.npz: expected the 304 tokens"):
        load_shard(tmp_path / "a.npz")


def _fail(path: Path, *_: object) -> None:
    path.with_suffix(".begun").touch()
    raise InvalidArgument("no such bank")


def test_an_error_ends_the_other_shards_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes, "_make_shard", _fail)
    with pytest.raises(InvalidArgument, match="no such bank"):
        episodes.main(tmp_path, tmp_path, episodes=200 * episodes.SHARD_EPISODES, workers=1)
    assert len(list(tmp_path.glob("*.begun"))) < 100


def test_shards_keep_everything(tmp_path: Path) -> None:
    streams = [
        episodes.to_stream(compose("mix", BANK, np.random.default_rng(seed), n_turns=100))
        for seed in range(6)
    ]
    save_shard(tmp_path / "shards" / "a.npz", streams)
    for found, expected in zip(load_shard(tmp_path / "shards" / "a.npz"), streams, strict=True):
        one, two = layout(found), layout(expected)
        for name in ("kinds", "values", "targets", "labels", "expected", "bins", "images"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
