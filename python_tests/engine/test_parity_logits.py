"""Float32 logits and greedy tokens against transformers, for every kind of model."""

from __future__ import annotations

import oracle
import pytest
from parity import (
    MAX_ERROR,
    OracleCheckpoint,
    append,
    assert_greedy,
    load,
    logits,
    mixed_prompt,
    oracle_parts,
    relative_error,
)

from duplex_engine import BackendUnavailable

N_TOKENS = 200
SEED = 1  # of the prompts; with it no choice of a token is a near-tie, see assert_greedy


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_mixed_prompt_and_greedy_tokens(name: str, oracle_checkpoint: OracleCheckpoint) -> None:
    folder, model = oracle_checkpoint(name)
    prompt = mixed_prompt(model, SEED)
    with load(folder) as engine, engine.open_session() as session:
        found = append(session, prompt)
        tokens = session.decode(N_TOKENS)
        assert session.length == len(found) + N_TOKENS - 1  # the last token waits
        newest = session.append(text=[5], logits="last")
    parts = [*oracle_parts(model, prompt), ("text", [*tokens, 5])]
    expected = oracle.logits(model, parts)
    assert expected.std(axis=-1).min() > 0.5, "a flat oracle would prove nothing"
    n = len(found)
    assert len(prompt[0][1]) >= 200
    assert relative_error(found, expected[:n]) < MAX_ERROR
    assert relative_error(newest, expected[-1:]) < MAX_ERROR
    assert_greedy(tokens, expected[n - 1 : -2])


@pytest.mark.parametrize("name", ["uneven_heads", "log_scaling"])
def test_greedy_tokens_of_transformers_own_cache(
    name: str, oracle_checkpoint: OracleCheckpoint
) -> None:
    folder, model = oracle_checkpoint(name)
    prompt = mixed_prompt(model, SEED)
    with load(folder) as engine, engine.open_session() as session:
        append(session, prompt)
        tokens = session.decode(N_TOKENS)
    assert tokens == oracle.greedy(model, oracle_parts(model, prompt), N_TOKENS)


@pytest.mark.cpu
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512"])
@pytest.mark.parametrize("name", ["odd_sizes_moe", "uneven_heads", "wide_window", "bigger"])
def test_instruction_sets(name: str, isa: str, oracle_checkpoint: OracleCheckpoint) -> None:
    folder, model = oracle_checkpoint(name)
    prompt = mixed_prompt(model, SEED)
    try:
        found = logits(folder, prompt, isa=isa)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    expected = oracle.logits(model, oracle_parts(model, prompt))
    assert relative_error(found, expected) < MAX_ERROR


@pytest.mark.parametrize("name", ["dense_mixed", "moe_mixed"])
def test_other_weights(name: str, oracle_checkpoint: OracleCheckpoint) -> None:
    for seed in (1, 2, 3):
        folder, model = oracle_checkpoint(name, seed=seed)
        prompt = mixed_prompt(model, seed)
        expected = oracle.logits(model, oracle_parts(model, prompt))
        assert relative_error(logits(folder, prompt), expected) < MAX_ERROR
