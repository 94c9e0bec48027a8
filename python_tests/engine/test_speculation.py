"""Tokens guessed ahead change when output is computed, and nothing else.

Every test runs the same calls on a session that guesses and on one that does not, and compares
bytes: tokens, hashes of all that a session remembers, logits of the same next rows, and memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_models import TURN, examples, load, sound, words, write
from safetensors.numpy import load_file, save_file

from duplex_engine import CapacityError, Engine, InvalidArgument, MicroTurn, Session
from duplex_engine.models.random import LISTEN_SCALE

pytestmark = pytest.mark.core

Loader: TypeAlias = Callable[..., Engine]
Action: TypeAlias = tuple[str, Any]

GREEDY: dict[str, Any] = {}
SAMPLED: dict[str, Any] = {"temperature": 0.4, "top_k": 8, "top_p": 0.95, "seed": 5}
PROBE = words(3, seed=99)
N_LAYERS = 2  # of multi-token prediction, in every checkpoint here
FORGET_BEHIND = 64  # more than any window and what a rewind needs


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """load(model, dtype, ...): engines of models that repeat themselves, made once."""
    folders: dict[str, Path] = {}
    engines: dict[Any, Engine] = {}

    def get(model: str, dtype: str = "float32", **options: Any) -> Engine:
        if model not in folders:
            folders[model] = write_repeating(tmp_path_factory.mktemp(model), model)
        key = (model, dtype, *sorted(options.items()))
        if key not in engines:
            engines[key] = load(folders[model], dtype=dtype, **options)
        return engines[key]

    yield get
    for engine in engines.values():
        engine.close()


def write_repeating(folder: Path, model: str) -> Path:
    """A random model that is no more inclined to listen than to speak, and whose blocks add little:
    the newest token decides the next one, so that greedy output soon goes round in a circle.
    Its multi-token-prediction layers look at the newest token alone, and so they guess well."""
    write(folder, model, mtp_layers=N_LAYERS)
    listen = json.loads((folder / "config.json").read_text())["interaction"]["listen"]
    tensors = load_file(folder / "model.safetensors")
    mtp = load_file(folder / "mtp.safetensors")
    tensors["model.llm.unembed.weight"][listen] /= LISTEN_SCALE
    final_norm = tensors["model.llm.norm.weight"]
    for depth in range(N_LAYERS):
        prefix = f"model.mtp.layers.{depth}."
        mtp[prefix + "embed_norm.weight"] = final_norm
        eye = np.eye(len(final_norm), dtype=final_norm.dtype)
        mtp[prefix + "input_proj.weight"] = np.concatenate([0 * eye, eye], axis=1)
    for file, content in ("model.safetensors", tensors), ("mtp.safetensors", mtp):
        for name, tensor in content.items():
            if "wo_ud" in name or "w2" in name:
                content[name] = tensor * tensor.dtype.type(0.01)
        save_file(content, folder / file)
    return folder


def act(session: Session, action: Action) -> Any:
    """Does one thing to a session; returns what came back, comparable."""
    kind, data = action
    try:
        if kind == "step":
            turn = session.step(**data)
            own_bytes = turn.memory.sequence_bytes - session.memory["draft_bytes"]
            return turn.token_ids, turn.stopped, turn.index, own_bytes
        if kind == "decode":
            return session.decode(**data)
        if kind == "truncate":
            session.truncate(session.marks[data % len(session.marks)])
            return session.length
        if kind == "forget":  # all that no window needs
            end = max(session.length - FORGET_BEHIND, 0)
            return session.forget(0, end), session.length
        return session.append(**{kind: data}, logits="all").tobytes()
    except (CapacityError, InvalidArgument) as error:
        return str(error)


def state(session: Session) -> tuple[Any, ...]:
    """What a session is: its hashes, its memory, where it can go back to, what it answers next.

    The pages of its windows are left out: they stay as many as were once needed, and a session that
    guesses needs more at a time.
    """
    windows = {"local_bytes": 0, "conv_bytes": 0, "draft_bytes": 0}
    return (
        session.length,
        session.marks,
        session.memory | windows,
        session._core.digests(),
        act(session, ("text", PROBE)),
        act(session, ("decode", {"n": 2})),
    )


def same(guessing: Session, plain: Session, actions: Sequence[Action]) -> None:
    """Both sessions do the same, step by step, and are the same at the end."""
    for action in actions:
        assert act(guessing, action) == act(plain, action), action
    assert state(guessing) == state(plain)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["dense", "moe", "local"])
@pytest.mark.parametrize(("speculate", "mtp_layers"), [(1, 0), (5, 0), (64, 0), (1, 1), (5, 2)])
def test_long_output(
    loader: Loader,
    model: str,
    dtype: str,
    sampling: dict[str, Any],
    speculate: int,
    mtp_layers: int,
) -> None:
    engine = loader(model, dtype, mtp_layers=mtp_layers)
    before = engine.stats
    with (
        engine.open_session(speculate=speculate, **sampling) as guessing,
        engine.open_session(**sampling) as plain,
    ):
        same(guessing, plain, [("text", words(9)), ("decode", {"n": 300}), ("decode", {"n": 7})])
    after = engine.stats
    drafted, accepted = (after[key] - before[key] for key in ("drafted", "accepted"))
    assert 0 < accepted <= drafted
    if sampling:
        assert accepted < drafted  # some guesses were wrong
    else:
        assert accepted > 50
    # Two sessions, and each accepted draft saves one of the passes.
    assert after["passes"] - before["passes"] == 2 * (1 + 299 + 7 + 1 + 1) - accepted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_guess_what_never_was(loader: Loader, dtype: str) -> None:
    """Drawn at random, text does not repeat; layers that know what decides it guess it."""
    sampling = {"temperature": 1.0, "seed": 3}
    counts = []
    for mtp_layers in (0, 1, 2):
        engine = loader("dense", dtype, mtp_layers=mtp_layers)
        before = engine.stats
        with (
            engine.open_session(speculate=4, **sampling) as guessing,
            engine.open_session(**sampling) as plain,
        ):
            same(guessing, plain, [("text", words(9)), ("decode", {"n": 100})])
            assert (guessing.memory["draft_bytes"] > 0) == (mtp_layers > 0)
            assert plain.memory["draft_bytes"] == 0
        counts.append(engine.stats["accepted"] - before["accepted"])
    assert counts[0] < 10 < 35 < counts[1] < counts[2] <= 67


@pytest.mark.parametrize("mtp_layers", [0, 2])
def test_turns_say_what_was_guessed(loader: Loader, mtp_layers: int) -> None:
    engine = loader("dense", mtp_layers=mtp_layers)
    before = engine.stats
    with engine.open_session(speculate=4) as guessing, engine.open_session() as plain:
        turns = [guessing.step(sound(TURN, k), max_tokens=30) for k in range(30)]
        for k, turn in enumerate(turns):
            expected = plain.step(sound(TURN, k), max_tokens=30)
            assert expected.drafted == expected.accepted == 0
            assert turn.token_ids == expected.token_ids
            assert turn.accepted <= turn.drafted
            assert turn.accepted < len(turn.token_ids)
    assert sum(turn.accepted for turn in turns) == engine.stats["accepted"] - before["accepted"] > 0
    assert sum(turn.drafted for turn in turns) == engine.stats["drafted"] - before["drafted"]


def test_stop_tokens_and_limits(loader: Loader) -> None:
    """A draft behind the end of the output is not taken, wherever the end is."""
    engine = loader("dense")
    with engine.open_session() as plain:
        plain.append(text=words(9))
        expected = plain.decode(100)
    for n in (0, 1, 2, 59, 60, 61, 99):
        with engine.open_session(speculate=6) as guessing, engine.open_session() as plain:
            same(guessing, plain, [("text", words(9)), ("decode", {"n": n})])
    for stop in sorted(set(expected)):
        actions = [("text", words(9)), *3 * [("decode", {"n": 100, "stop": [stop]})]]
        with engine.open_session(speculate=6) as guessing, engine.open_session() as plain:
            same(guessing, plain, actions)


@pytest.mark.parametrize("mtp_layers", [0, 2])
@pytest.mark.parametrize("room", range(8))
def test_a_full_sequence(loader: Loader, room: int, mtp_layers: int) -> None:
    """Guesses ask for no room that the output itself would not need."""
    engine = loader("dense", mtp_layers=mtp_layers)
    actions: list[Action] = [("text", words(9)), ("decode", {"n": 120})]
    actions += [("step", {"audio": sound(TURN), "max_tokens": k}) for k in (9, 2, 9, 1, 9)]
    with (
        engine.open_session(speculate=8, max_positions=129 + room) as guessing,
        engine.open_session(max_positions=129 + room) as plain,
    ):
        same(guessing, plain, actions)


@pytest.mark.parametrize("mtp_layers", [0, 2])
@pytest.mark.parametrize("max_batch_rows", [1, 2, 3, 16])
def test_small_passes(loader: Loader, max_batch_rows: int, mtp_layers: int) -> None:
    engine = loader("dense", max_batch_rows=max_batch_rows, mtp_layers=mtp_layers)
    with engine.open_session(speculate=8) as guessing, engine.open_session() as plain:
        same(guessing, plain, [("text", words(9)), ("decode", {"n": 90})])
    assert (engine.stats["accepted"] > 0) == (max_batch_rows > 1)


step_inputs = st.fixed_dictionaries(
    {"audio": st.sampled_from([0, 1, TURN, TURN, TURN, 2 * TURN + 5]).map(sound)},
    optional={
        "text": st.integers(1, 40).map(words),
        "result": st.integers(1, 12).map(words),
        "max_tokens": st.integers(0, 40),
    },
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("step"), step_inputs),
        st.tuples(st.just("decode"), st.fixed_dictionaries({"n": st.integers(0, 80)})),
        st.tuples(st.just("text"), st.builds(words, st.integers(1, 70), st.integers(0, 2))),
        st.tuples(st.just("truncate"), st.integers(0, 31)),
        st.tuples(st.just("forget"), st.just(None)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@examples(40)
@given(before=actions, after=actions, elsewhere=actions, data=st.data())
def test_any_history(
    loader: Loader,
    dtype: str,
    before: list[Action],
    after: list[Action],
    elsewhere: list[Action],
    data: st.DataObject,
) -> None:
    """Rewinding, and forks that go on in turns with the original."""
    engine = loader("dense", dtype, mtp_layers=data.draw(st.sampled_from([0, 1, 2])))
    sampling = data.draw(st.sampled_from([GREEDY, SAMPLED]))
    speculate = data.draw(st.sampled_from([1, 3, 8, 40]))
    with ExitStack() as stack:
        guessing = stack.enter_context(engine.open_session(speculate=speculate, **sampling))
        plain = stack.enter_context(engine.open_session(**sampling))
        for action in [("text", words(3)), *before]:
            assert act(guessing, action) == act(plain, action), action
        forks = [stack.enter_context(session.fork()) for session in (guessing, plain)]
        for action in elsewhere:
            assert act(forks[0], action) == act(forks[1], action), action
        same(guessing, plain, after)
        assert state(forks[0]) == state(forks[1])


@examples(25)
@given(data=st.data())
def test_sessions_that_guess_share_passes(loader: Loader, data: st.DataObject) -> None:
    """Each with guesses of its own, or none, beside others."""
    rows = data.draw(st.sampled_from([4, 16, 64]), label="max_batch_rows of the shared engine")
    streams = data.draw(
        st.lists(st.lists(step_inputs, min_size=1, max_size=5), min_size=1, max_size=6)
    )
    mtp_layers = data.draw(st.sampled_from([0, 1, 2]))
    alone = loader("moe")
    shared = loader("moe", max_batch_rows=rows, mtp_layers=mtp_layers)
    samplings = [GREEDY if i % 2 else SAMPLED for i in range(len(streams))]
    expected = []
    for stream, sampling in zip(streams, samplings, strict=True):
        with alone.open_session(**sampling) as session:
            turns = [session.step(**inputs).token_ids for inputs in stream]
            expected.append((turns, session._core.digests(), session.length))
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(shared.open_session(speculate=[4, 0, 9][i % 3], **sampling))
            for i, sampling in enumerate(samplings)
        ]
        said: list[list[Any]] = [[] for _ in streams]
        for k in range(max(map(len, streams))):
            together = [i for i, stream in enumerate(streams) if k < len(stream)]
            pairs = [(sessions[i], streams[i][k]) for i in together]
            for i, turn in zip(together, shared.step_many(pairs), strict=True):
                assert isinstance(turn, MicroTurn), turn
                said[i].append(turn.token_ids)
        for i, session in enumerate(sessions):
            assert (said[i], session._core.digests(), session.length) == expected[i]


@pytest.mark.parametrize("speculate", [-1, 65, 2**40, 1.5, "4", None, True])
def test_bad_numbers(loader: Loader, speculate: Any) -> None:
    with pytest.raises(InvalidArgument, match="speculate"):
        loader("dense").open_session(speculate=speculate)
