"""Drawing tokens: the right distribution, and a pure function of the seed and the position.

The bounds are quantiles that a correct sampler would exceed once in 10^9 runs; seeds are fixed, so
a test that passes always passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from random_models import FIRST_WORD, TURN, examples, load, sound, words, write
from scipy.stats import chi2, norm

from duplex_engine import Engine, Session

pytestmark = pytest.mark.core

ONCE_IN = 1e-9  # how often chance alone may break a bound
N_DRAWS = 3000
PROMPT = words(20)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with load(write(tmp_path_factory.mktemp("dense"), "dense")) as engine:
        yield engine


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The same model in passes of 16 rows, on two threads."""
    folder = write(tmp_path_factory.mktemp("dense"), "dense")
    with load(folder, max_batch_rows=16, threads=2) as engine:
        yield engine


def probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    result: NDArray[np.float64] = weights / weights.sum()
    return result


def first_tokens(engine: Engine, **options: Any) -> tuple[Counter[int], NDArray[np.float32]]:
    """What `N_DRAWS` seeds draw behind the prompt, and the logits they draw from: (vocabulary)."""
    drawn: Counter[int] = Counter()
    with engine.open_session() as session:
        session.append(text=PROMPT[:-1])
        length = session.length
        for seed in range(N_DRAWS):
            session.set_sampling(seed=seed, **options)
            logits = session.append(text=PROMPT[-1:], logits="last")
            drawn.update(session.decode(1))
            session.truncate(length)
    return drawn, logits[0]


def check_distribution(drawn: Counter[int], expected: NDArray[np.float64]) -> None:
    """Pearson's chi-square; tokens too rare for it (expected under 5 times) are one class."""
    n = sum(drawn.values())
    counts = np.array([drawn[i] for i in range(len(expected))], dtype=np.float64)
    assert counts[expected == 0].sum() == 0
    common = expected * n >= 5
    found = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * n
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    assert statistic < chi2.isf(ONCE_IN, len(found) - 1), (statistic, len(found))
    assert len(found) > 3, "expected a distribution with several tokens"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_draws_from_the_softmax(engine: Engine, temperature: float) -> None:
    drawn, logits = first_tokens(engine, temperature=temperature)
    check_distribution(drawn, probabilities(logits, temperature))


@pytest.mark.parametrize("k", [5, 40, 319, 320, 10_000])
def test_top_k_keeps_the_k_best(engine: Engine, k: int) -> None:
    drawn, logits = first_tokens(engine, temperature=2.0, top_k=k)
    expected = probabilities(logits, 2.0)
    # Equal logits: the lower id is the better one.
    best = np.argsort(-logits, kind="stable")[: min(k, len(logits))]
    kept = np.zeros_like(expected)
    kept[best] = expected[best]
    check_distribution(drawn, kept / kept.sum())


@pytest.mark.parametrize(("p", "k"), [(0.5, 0), (0.9, 0), (0.99, 0), (0.7, 12)])
def test_top_p_keeps_the_fewest_that_reach_p(engine: Engine, p: float, k: int) -> None:
    drawn, logits = first_tokens(engine, temperature=2.0, top_p=p, top_k=k)
    expected = probabilities(logits, 2.0)
    best = np.argsort(-logits, kind="stable")[: k or len(logits)]
    mass = np.cumsum(expected[best]) / expected[best].sum()
    nucleus = best[: int(np.searchsorted(mass, p)) + 1]
    kept = np.zeros_like(expected)
    kept[nucleus] = expected[nucleus]
    check_distribution(drawn, kept / kept.sum())


def test_one_seed_draws_evenly_over_positions(engine: Engine) -> None:
    """Along one stream, tokens come as often as their probabilities add up to."""
    z = []
    for seed in range(5):
        with engine.open_session(temperature=1.0, seed=seed) as session:
            session.append(text=PROMPT)
            tokens = session.decode(400)
        with engine.open_session() as session:
            logits = session.append(text=PROMPT + tokens[:-1], logits="all")[len(PROMPT) - 1 :]
        hits = mean = variance = 0.0
        for token, row in zip(tokens, logits, strict=True):
            expected = probabilities(row, 1.0)
            likely = expected >= np.sort(expected)[-2]  # the two most likely tokens
            share = float(expected[likely].sum())
            hits += bool(likely[token])
            mean += share
            variance += share * (1 - share)
        z.append((hits - mean) / variance**0.5)
    assert max(map(abs, z)) < norm.isf(ONCE_IN / 2), z


def test_greedy_limits(engine: Engine) -> None:
    """The best token alone, or so cold that nothing else can be drawn: greedy."""

    def tokens(**sampling: Any) -> list[int]:
        with engine.open_session(**sampling) as session:
            session.append(text=PROMPT)
            return session.decode(60)

    greedy = tokens()
    assert len(set(greedy)) > 1
    for sampling in (
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 5.0, "top_k": 1, "top_p": 0.9, "seed": 3},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1e-3},
        {"temperature": 1e-40},  # below the smallest normal float32
    ):
        assert tokens(**sampling) == greedy, sampling
    assert tokens(temperature=1.0) != greedy


# ---- a pure function of (seed, position)

SAMPLING: dict[str, Any] = {"temperature": 1.2, "top_k": 50, "top_p": 0.95}
N_TOKENS = 40


def straight(engine: Engine, seed: int) -> list[int]:
    with engine.open_session(**SAMPLING, seed=seed) as session:
        session.append(text=PROMPT)
        return session.decode(N_TOKENS)


def test_seeds_and_positions_matter(engine: Engine) -> None:
    drawn = [tuple(straight(engine, seed)) for seed in (0, 1, 2**63, 2**64 - 1)]
    assert len(set(drawn)) == len(drawn)
    assert [tuple(straight(engine, seed)) for seed in (0, 1)] == drawn[:2]
    # The same rows behind one more row: other positions, so other draws.
    with engine.open_session(**SAMPLING) as session:
        firsts = []
        for _ in range(30):
            session.append(text=[FIRST_WORD] * 60)  # longer than the window: much the same logits
            firsts.append(session.decode(1)[0])
            session.append(text=[FIRST_WORD])
    assert len(set(firsts)) > 5


@examples(20)
@given(seed=st.integers(0, 2**64 - 1), data=st.data())
def test_draws_do_not_depend_on_how_one_asks(
    engine: Engine, crowded: Engine, seed: int, data: st.DataObject
) -> None:
    expected = straight(engine, seed)
    portions = data.draw(st.lists(st.integers(0, 10)).filter(lambda p: sum(p) <= N_TOKENS))
    forked = data.draw(st.integers(0, len(portions)), label="fork after")
    back = data.draw(st.integers(0, len(portions)), label="truncate to the end of")
    with crowded.open_session(**SAMPLING, seed=seed) as session:
        session.append(text=PROMPT[:7])
        session.append(text=PROMPT[7:])
        found: list[int] = []
        reached = {session.length: 0}  # length -> tokens known there
        lengths = [session.length]
        for k, n in enumerate([*portions, N_TOKENS - sum(portions)]):
            if k == forked:
                with session.fork() as fork:  # goes on as the original will
                    assert found + fork.decode(N_TOKENS - len(found)) == expected
            found += session.decode(n)
            reached[session.length] = len(found)
            lengths.append(session.length)
        assert found == expected
        if lengths[back] in session.marks:
            n = reached[lengths[back]]
            session.truncate(lengths[back])
            assert expected[:n] + session.decode(N_TOKENS - n) == expected


def test_draws_do_not_depend_on_company(engine: Engine, crowded: Engine) -> None:
    def turns(session: Session) -> list[tuple[int, ...]]:
        return [session.step(sound(TURN, k)).token_ids for k in range(6)]

    alone = []
    for seed in range(6):
        with engine.open_session(**SAMPLING, seed=seed) as session:
            alone.append(turns(session))
    assert len({str(said) for said in alone}) == len(alone)
    sessions = [crowded.open_session(**SAMPLING, seed=seed) for seed in range(6)]
    together: list[list[Any]] = [[] for _ in sessions]
    for k in range(6):
        answers = crowded.step_many([(s, {"audio": sound(TURN, k)}) for s in sessions])
        for said, turn in zip(together, answers, strict=True):
            said.append(turn.token_ids)  # type: ignore[union-attr]
    assert together == alone
    for session in sessions:
        session.close()
