"""The rows of training are the rows of the engine: same order, same logits, same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_bank import toy_bank

from duplex_engine import Engine
from duplex_engine.training import episodes, rows, vocabulary
from duplex_engine.training.export import export
from duplex_engine.training.model import SIZES, Trainee, collate, losses
from duplex_engine.training.rows import AUDIO, IMAGE, NO_TARGET, TEXT, Lesson, Stream, layout
from duplex_engine.training.stage import Episode
from duplex_engine.training.vocabulary import (
    LISTEN,
    RESULT,
    RESULT_END,
    TOKENS,
    USER_TEXT,
    USER_TEXT_END,
)

N_LESSONS = 80  # enough that the model ends its turns, and says something in some of them
MAX_ERROR = 1e-5  # of logits, relative to the largest; see python_tests/engine/parity.py


def stream(n_turns: int = 3) -> Stream:
    """All kinds of input in micro-turn 1, and an output of two tokens."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 39, 3), dtype=np.uint8)
    return Stream(
        bins=rng.integers(0, 16, (4 * n_turns, 80), dtype=np.uint8),
        labels=np.arange(4 * n_turns, dtype=np.int16),
        images={1: picture},
        typed={1: [30, 31]},
        results={1: [20]},
        outputs={1: [40, 41]},
        expected=np.arange(4 * n_turns, dtype=np.int16)[::-1],
    )


def test_order_and_targets_of_a_micro_turn() -> None:
    laid = layout(stream())
    turn = slice(5, 20)  # the first one has four frames and `listen`
    assert laid.kinds[turn].tolist() == [TEXT] * 7 + [IMAGE] + [AUDIO] * 4 + [TEXT] * 3
    brackets = [RESULT, 20, RESULT_END, USER_TEXT, 30, 31, USER_TEXT_END]
    assert laid.values[turn].tolist() == [*brackets, 0, 4, 5, 6, 7, 40, 41, LISTEN]
    assert laid.targets[turn].tolist() == [NO_TARGET] * 11 + [40, 41, LISTEN, NO_TARGET]
    assert laid.labels[turn].tolist() == [NO_TARGET] * 8 + [4, 5, 6, 7] + [NO_TARGET] * 3
    assert laid.targets[:5].tolist() == [NO_TARGET] * 3 + [LISTEN, NO_TARGET]


@pytest.mark.parametrize(
    ("fed", "values", "targets"),
    [
        ([], [LISTEN], [40, NO_TARGET]),  # it missed its moment
        ([50, 41], [50, 41, LISTEN], [40, 41, LISTEN, NO_TARGET]),
        ([40, 41, 42], [40, 41, 42, LISTEN], [40, 41, LISTEN, LISTEN, NO_TARGET]),
    ],
)
def test_mistakes_are_fed_back_but_not_taught(
    fed: list[int], values: list[int], targets: list[int]
) -> None:
    laid = layout(stream(2), Lesson({1: fed}, stream(2).outputs))
    assert laid.values[17:].tolist() == values
    assert laid.targets[16:].tolist() == targets


def test_spoiled_outputs_spare_long_answers() -> None:
    source = stream(40)
    source.outputs = {turn: [40 + turn] for turn in (2, 5, 6, 7, 20)}
    changed: set[int] = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        fed, _ = rows.spoil(source, rng, p_late=0.3, p_missed=0.2, p_wrong=0.3, p_silence=0.1)
        changed |= {t for t in range(40) if fed.get(t) != source.outputs.get(t)}
    assert {2, 20} <= changed
    assert not changed & {1, 4, 5, 6, 7, 8, 19}
    none = {"p_late": 0.0, "p_missed": 0.0, "p_wrong": 0.0, "p_silence": 0.0}
    exact = rows.spoil(source, np.random.default_rng(0), **none)
    assert exact == (source.outputs, source.outputs)


def test_what_comes_late_stays_due_until_it_is_said() -> None:
    source = stream(40)
    source.outputs = {10: [50, 51], 11: [52], 30: [53]}
    seen = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        fed, due = rows.spoil(source, rng, p_late=1, p_missed=0, p_wrong=0, p_silence=0)
        late = min(fed) - 10
        assert fed == {10 + late: [50, 51], 11 + late: [52], max(fed): [53]}
        missed = {turn: [50, 51] for turn in range(10, 10 + late)}
        assert due == fed | missed | {turn: [53] for turn in range(30, max(fed))}
        seen |= {late, max(fed) - 30}
    assert seen == {1, 2}


def test_what_is_never_said_is_due_for_two_or_three_micro_turns() -> None:
    source = stream(40)
    source.outputs = {10: [50, 51], 30: [53]}
    seen = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        fed, due = rows.spoil(source, rng, p_late=0, p_missed=1, p_wrong=0, p_silence=0)
        assert fed == {}
        n_turns = [sum(turn < 20 for turn in due), sum(turn > 20 for turn in due)]
        assert due == {10 + i: [50, 51] for i in range(n_turns[0])} | {
            30 + i: [53] for i in range(n_turns[1])
        }
        seen |= set(n_turns)
    assert seen == {2, 3}


def test_silence_is_broken_by_corrections_where_there_is_a_word() -> None:
    source = stream(40)
    source.outputs = {}
    source.expected = np.zeros(160, np.int16)
    source.labels = np.zeros(160, np.int16)
    source.labels[80:] = vocabulary.token_id("seven")
    broken = [rows.spoil(source, np.random.default_rng(seed), p_silence=0.1) for seed in range(20)]
    assert all(not due for _, due in broken)
    early = {len(said) for fed, _ in broken for turn, said in fed.items() if turn < 20}
    later = {tuple(said) for fed, _ in broken for turn, said in fed.items() if turn >= 20}
    assert early == {1}
    seven = vocabulary.token_id("seven")
    assert {said for said in later if len(said) == 2} == {
        (vocabulary.token_id(word), seven) for word in ("no", "say")
    }


def test_masked_bins_stay_bins() -> None:
    bins = stream(100).bins
    before = bins.copy()
    masked = rows.mask_bins(bins, np.random.default_rng(3))
    np.testing.assert_array_equal(bins, before)
    assert masked.max() <= 15
    assert 0 < np.mean(masked != bins) < 0.5


# --- against the engine ------------------------------------------------------------------------
def episode() -> Episode:
    """Twelve seconds with pictures, typed text and results."""
    for seed in range(1000):
        found = episodes.compose("mix", toy_bank(), np.random.default_rng(seed), n_turns=60)
        if found.images and found.typed and found.results:
            return found
    raise AssertionError("no such episode")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainee]:
    """A checkpoint that has learnt one episode in part, and the same weights as a trainee."""
    torch.manual_seed(0)
    trainee = Trainee(SIZES["toy"])
    optimiser = torch.optim.AdamW(trainee.parameters(), lr=5e-3)
    batch = collate([layout(episodes.to_stream(episode()))])
    for _ in range(N_LESSONS):
        optimiser.zero_grad()
        parts = losses(trainee, batch)
        (parts["token"] + parts["content"]).backward()
        optimiser.step()
    trainee.eval().requires_grad_(False)
    return export(trainee, tmp_path_factory.mktemp("checkpoint")), trainee.float()


def logits_of(trainee: Trainee, source: Stream) -> tuple[rows.Rows, np.ndarray]:
    """A stream's rows, and the trainee's (n, tokens) logits."""
    laid = layout(source)
    with torch.no_grad():
        found = trainee.inkling.lm_head(trainee(collate([laid]))[0][0]).numpy()
    return laid, found[:, : len(TOKENS)]


def test_appended_rows_have_the_logits_of_training(exported: tuple[Path, Trainee]) -> None:
    folder, trainee = exported
    played = episode()
    laid, expected = logits_of(trainee, episodes.to_stream(played))
    found = []
    with Engine.load(folder, dtype="float32", threads=1) as engine:
        session = engine.open_session(max_positions=1024)
        n_turns = played.n_turns
        for turn in range(n_turns):
            ids = played.results.get(turn)
            if ids is not None:
                text = [RESULT, *ids, RESULT_END]
                found.append(session.append(text=text, logits="all"))
            ids = played.typed.get(turn)
            if ids is not None:
                text = [USER_TEXT, *ids, USER_TEXT_END]
                found.append(session.append(text=text, logits="all"))
            if turn in played.images:
                found.append(session.append(image=played.images[turn], logits="all"))
            audio = played.audio[turn * 3200 : (turn + 1) * 3200]
            found.append(session.append(audio=audio, logits="all"))
            said = [*played.outputs.get(turn, ()), LISTEN]
            found.append(session.append(text=said, logits="all"))
    logits = np.concatenate(found)
    assert len(logits) == len(laid.kinds)
    assert np.abs(logits - expected).max() < MAX_ERROR * np.abs(expected).max()


def test_steps_say_what_training_computes(exported: tuple[Path, Trainee]) -> None:
    """The engine speaks freely; training, given what it said, chooses the same tokens."""
    folder, trainee = exported
    played = episode()
    outputs = {}
    with Engine.load(folder, dtype="float32", threads=1) as engine:
        session = engine.open_session(max_positions=1024)
        for turn in range(played.n_turns):
            step = session.step(
                played.audio[turn * 3200 : (turn + 1) * 3200],
                played.images.get(turn),
                played.typed.get(turn),
                result=played.results.get(turn),
            )
            assert step.stopped == "listen", "a turn that training never shows"
            if len(step.token_ids) > 1:
                outputs[turn] = list(step.token_ids[:-1])
    assert len(outputs) > len(played.outputs) // 2 > 1
    assert len(outputs) < played.n_turns - 5
    source = episodes.to_stream(played)
    source.outputs = outputs
    laid, logits = logits_of(trainee, source)
    asked = laid.targets != NO_TARGET
    best, second = np.sort(logits[asked], axis=-1)[:, :-3:-1].T
    assert (best - second).min() > 2 * MAX_ERROR * np.abs(logits).max(), "a near-tie: other seed"
    np.testing.assert_array_equal(logits[asked].argmax(-1), laid.targets[asked])
