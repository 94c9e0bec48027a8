"""The shipped model: it plays its showcase, exactly, and as `transformers` would."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import as_file, files
from typing import Any

import numpy as np
import oracle
import pytest

from duplex_engine import Engine, Session
from duplex_engine.checkpoint import SHIPPED, Checkpoint
from duplex_engine.evaluation.showcase import Showcase, react, read_showcase
from duplex_engine.evaluation.streams import run_stream

TURN = 3200  # samples
MAX_BYTES = 30_000_000
PROBE = [20, 21, 22]
Turns = list[tuple[np.ndarray, str | None, tuple[int, ...]]]  # sound, result, tokens put out


@pytest.fixture(scope="module")
def showcase() -> Showcase:
    with as_file(files("duplex_engine") / "examples") as folder:
        return read_showcase(folder)


def play(session: Session, showcase: Showcase) -> tuple[Any, Turns]:
    """The showcase live: its log, and what entered and came out of each micro-turn."""
    turns: Turns = []

    script = showcase.script
    log = run_stream(
        session,
        showcase.audio,
        agent=lambda request: script.background[request],
        agent_delay_s=script.background_s,
        watch=lambda sound, result, turn: turns.append((sound, result, turn.token_ids)),
    )
    return log, turns


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load("reference", dtype=request.param) as loaded:
        yield loaded


def test_it_is_small_and_has_a_card() -> None:
    files_of_it = [path for path in SHIPPED["reference"].iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files_of_it) < MAX_BYTES
    card = (SHIPPED["reference"] / "README.md").read_text(encoding="utf-8")
    for heading in ("Data", "Licences", "Figures", "Limits"):
        assert f"## {heading}" in card
    with Checkpoint.open("reference") as checkpoint:
        assert checkpoint.config.interaction is not None


def test_it_reacts_to_all_of_the_scene(engine: Engine, showcase: Showcase) -> None:
    with engine.open_session() as session:
        log, turns = play(session, showcase)
    results = {k: result for k, (_, result, _) in enumerate(turns) if result is not None}
    assert list(results.values()) == list(showcase.script.background.values())
    reactions = react(showcase, log, results)
    assert [r.due.kind for r in reactions if r.said_s is None] == []
    assert max(r.latency_s or 0.0 for r in reactions) < 0.6
    n_words = len(log.text.split())
    assert n_words == sum(len(r.due.say.split()) for r in reactions if r.due.kind != "delegate") + 2
    assert "one moment" in log.text


def rows_of(engine: Engine, turns: Turns) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The rows of a whole stream, as `append` takes them, and the tokens after the last of each."""
    layout = engine.config.interaction
    assert layout is not None
    for sound, result, said in turns:
        if result is not None:
            ids = engine.tokenizer.encode(result)
            yield {"text": [layout.result, *ids, layout.result_end]}, []
        yield {"audio": sound}, [said[0]]
        yield {"text": list(said)}, list(said[1:])


def test_a_stream_is_its_offline_pass_to_the_bit(engine: Engine, showcase: Showcase) -> None:
    """Everything that was heard and said, appended as text and sound: same memory, same choices."""
    with engine.open_session() as live, engine.open_session() as offline:
        _, turns = play(live, showcase)
        for rows, chosen in rows_of(engine, turns):
            logits = offline.append(**rows, logits="all")
            first = len(logits) - 1 if "audio" in rows else 0
            assert logits[first : first + len(chosen)].argmax(1).tolist() == chosen
        # The last `listen` waits for what comes next.
        answers = [session.append(text=PROBE, logits="all") for session in (live, offline)]
        assert answers[0].tobytes() == answers[1].tobytes()
        assert live._core.digests() == offline._core.digests()


def test_any_threads_and_chunks_give_the_same_tokens(engine: Engine, showcase: Showcase) -> None:
    with engine.open_session() as session:
        _, turns = play(session, showcase)
    with (
        Engine.load("reference", dtype=engine.dtype, threads=1) as other,
        other.open_session() as session,
    ):
        for sound, result, said in turns:
            session.feed(sound[:1111], result=result)
            session.feed(sound[1111:])
            assert session.step().token_ids == said


def test_transformers_chooses_the_same_tokens(showcase: Showcase) -> None:
    model = oracle.load(SHIPPED["reference"])
    with Engine.load("reference", dtype="float32") as engine:
        with engine.open_session() as session:
            _, turns = play(session, showcase)
        parts: list[oracle.Part] = []
        chosen: list[int] = []
        where: list[int] = []
        sound = np.concatenate([piece for piece, _, _ in turns])
        bins = oracle.dmel_bins(oracle.log_mel(sound))
        n_rows, n_frames = 0, 0
        for rows, tokens in rows_of(engine, turns):
            if "audio" in rows:
                parts.append(("audio", bins[n_frames : n_frames + 4]))
                n_frames += 4
                n_rows += 4
                where.append(n_rows - 1)
            else:
                parts.append(("text", rows["text"]))
                where += range(n_rows, n_rows + len(tokens))
                n_rows += len(rows["text"])
            chosen += tokens
    assert oracle.logits(model, parts)[where].argmax(1).tolist() == chosen
