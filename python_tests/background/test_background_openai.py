"""The worker for an endpoint, against a server on this machine: answers, failures, tools."""

from __future__ import annotations

import time
from typing import Any

import pytest
from chat_server import DROP, chat_server, say, tool_call
from delegating import Clock, answer, broken, price, run_example, streaming, until, weather

from duplex_engine import Engine
from duplex_engine.background import Delegations, OpenAIWorker

pytest.importorskip("openai", reason="the extra `openai` is not installed")
pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_an_endpoint_answers(reference: Engine) -> None:
    with chat_server(say("sunny", " ", "warm")) as server:
        worker = OpenAIWorker(server.url, "m", options={"temperature": 0})
        assert answer(reference, worker) == "sunny warm"
        (request,) = server.requests
        assert (request["model"], request["stream"], request["temperature"]) == ("m", True, 0)
        system, user = request["messages"]
        assert system["role"] == "system"
        assert "user typed: hello" in user["content"]
        assert user["content"].endswith("The request: weather paris")
        assert "tools" not in request


def test_pieces_come_as_they_are_written(reference: Engine) -> None:
    with (
        chat_server([*say("sunny ", finish=None), 0.3, *say("warm")]) as server,
        streaming(reference, OpenAIWorker(server.url, "m")) as stream,
    ):
        stream.step("weather")
        until(lambda: stream.background.jobs[0].text == "sunny ")
        assert stream.background.jobs[0].state == "running"
        assert stream.background.wait(10)
        assert stream.background.jobs[0].text == "sunny warm"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (401, "AuthenticationError"),
        (400, "BadRequestError"),
        (500, "InternalServerError"),
        ([*say("sunny", finish=None), DROP], "APIConnectionError"),
        ([DROP], "APIConnectionError"),
        (say("sunny", finish=None), "expected an answer with an end"),
        ([{"error": {"message": "overloaded"}}], "overloaded"),
    ],
    ids=["key", "request", "server", "cut", "nothing", "no end", "error in the stream"],
)
def test_an_endpoint_that_fails(reference: Engine, script: Any, message: str) -> None:
    with chat_server(script) as server:
        with pytest.raises(AssertionError) as caught:
            answer(reference, OpenAIWorker(server.url, "m", max_retries=0))
        assert message in str(caught.value)
        assert len(server.requests) == 1


def test_an_endpoint_that_is_not_there(reference: Engine) -> None:
    with pytest.raises(AssertionError, match="APIConnectionError"):
        answer(reference, OpenAIWorker("http://127.0.0.1:1/v1", "m", max_retries=0))


def test_a_request_is_made_again(reference: Engine) -> None:
    with chat_server(503, say("sunny")) as server:
        assert answer(reference, OpenAIWorker(server.url, "m", max_retries=1)) == "sunny"
        assert len(server.requests) == 2


def test_a_slow_endpoint_is_given_up(reference: Engine) -> None:
    clock = Clock()
    script = [*say("sunny", finish=None), *[0.02] * 100, *say("x" * 100_000), *say("y" * 100_000)]
    with chat_server(script) as server:
        worker = OpenAIWorker(server.url, "m")
        with streaming(reference, worker, timeout_s=5.0, clock=clock) as stream:
            stream.step("weather")
            until(lambda: bool(stream.background.jobs[0].text))
            clock.now_s += 5
            stream.step()
            assert stream.background.jobs[0].failure == "timeout"
            assert stream.told == [(1, "late")]
            began = time.monotonic()
            until(lambda: not stream.background._jobs._running)
            assert time.monotonic() - began < 1.0  # the connection was closed, not waited for


def test_many_sessions_share_a_worker(reference: Engine) -> None:
    with chat_server(*[say("sunny")] * 6) as server:
        worker = OpenAIWorker(server.url, "m")
        sessions = [reference.open_session(max_positions=1024) for _ in range(3)]
        backgrounds = [Delegations(session, worker) for session in sessions]
        for _ in range(2):
            for background in backgrounds:
                background.ask("weather")
            for background in backgrounds:
                assert background.wait(10)
        assert [[j.text for j in b.jobs] for b in backgrounds] == [["sunny", "sunny"]] * 3
        for background, session in zip(backgrounds, sessions, strict=True):
            background.close()
            session.close()


def test_the_model_calls_tools(reference: Engine) -> None:
    calls = tool_call(
        ("weather", '{"city": "paris"}'), ("price", '{"thing": 3}'), ("broken", '{"number": 4}')
    )
    with chat_server(calls, tool_call(("trains", "{}")), say("sunny")) as server:
        worker = OpenAIWorker(server.url, "m", tools=[weather, price, broken])
        assert answer(reference, worker) == "sunny"
        first, second, third = server.requests
        assert [t["function"]["name"] for t in first["tools"]] == ["weather", "price", "broken"]
        called, *results = second["messages"][2:]
        assert called["tool_calls"][0]["function"] == {
            "name": "weather",
            "arguments": '{"city": "paris"}',
        }
        assert [r["tool_call_id"] for r in results] == ["call_0", "call_1", "call_2"]
        assert results[0]["content"] == "sunny paris"
        assert results[1]["content"].startswith("error: tool 'price': thing: ")
        assert results[2]["content"] == "error: RuntimeError: no 4"
        assert "found 'trains'" in third["messages"][-1]["content"]


def test_a_model_that_only_calls_tools_is_stopped(reference: Engine) -> None:
    call = tool_call(("weather", '{"city": "paris"}'))
    with chat_server(call, call, call) as server:
        worker = OpenAIWorker(server.url, "m", tools=[weather], max_rounds=2)
        with pytest.raises(AssertionError, match="after at most 2 rounds of tools"):
            answer(reference, worker)
        assert len(server.requests) == 2


def test_the_key_is_sent(reference: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(say("sunny"), say("sunny")) as server:
        answer(reference, OpenAIWorker(server.url, "m", api_key="mine"))
        monkeypatch.setenv("OPENAI_API_KEY", "a secret")
        answer(reference, OpenAIWorker(server.url, "m"))
        keys = [headers["authorization"] for headers in server.headers]
        # The key of one service is not told to another.
        assert keys == ["Bearer mine", "Bearer none"]


def test_the_same_through_an_endpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server(tool_call(("weather", '{"city": "london"}')), say("rainy cold")) as server:
        run_example("tools.py", monkeypatch, server.url, "m")
        assert server.requests[1]["messages"][-1]["content"] == "rainy cold"
    assert "'weather paris': done, 'rainy cold'" in capsys.readouterr().out
