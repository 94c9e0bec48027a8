"""A worker for any endpoint that speaks OpenAI's chat completions, with or without tools.

Owns the streamed request and the loop in which the model calls tools and reads their results. The
client is the `openai` package (extra `openai`), which also knows proxies and retries.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from duplex_engine.arguments import integer
from duplex_engine.background.chat import Message, Messages, chat_messages
from duplex_engine.background.task import Task
from duplex_engine.background.tools import Tools, result_as_text
from duplex_engine.errors import BackendUnavailable, DuplexError

__all__ = ["OpenAIWorker"]

log = logging.getLogger(__name__)
NO_KEY = "none"  # for servers that ask for none; the client insists on one


class OpenAIWorker:
    """Asks a chat model over HTTP; the answer comes as it is written."""

    def __init__(
        self,
        base_url: str | None,
        model: str,
        *,
        api_key: str | None = None,
        messages: Messages | None = None,
        tools: Tools | Mapping[str, Callable[..., Any]] | Iterable[Callable[..., Any]] = (),
        max_rounds: int = 8,
        max_retries: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Sets what every request is asked; connects only then.

        Args:
            base_url: such as "http://localhost:8000/v1"; None is OpenAI's own.
            model: as the endpoint calls it.
            api_key: None takes OPENAI_API_KEY for OpenAI's own, and sends none to a `base_url`.
            messages: a task as chat messages; None takes `chat_messages()`.
            tools: functions that the model may call.
            max_rounds: requests for one task, each after the tools that the last one called.
            max_retries: of a request that could not be made.
            options: more arguments of the request, such as {"temperature": 0, "max_tokens": 100}.

        Raises:
            BackendUnavailable: the package `openai` is not installed.
        """
        try:
            import openai
        except ImportError as error:
            raise BackendUnavailable(
                f"OpenAIWorker: expected the package openai, found: {error}; "
                "pip install 'duplex_engine[openai]'"
            ) from error
        self._openai = openai
        self._base_url, self._model, self._api_key = base_url, model, api_key
        self._messages = messages or chat_messages()
        self._tools = tools if isinstance(tools, Tools) else Tools(tools)
        self._max_rounds = integer(max_rounds, "max_rounds", low=1)
        self._max_retries = integer(max_retries, "max_retries")
        self._options = dict(options or {})
        if self._tools.names:
            self._options["tools"] = self._tools.schemas

    async def __call__(self, task: Task) -> AsyncIterator[str]:
        """Yields the answer as it comes.

        Raises:
            openai.OpenAIError: the endpoint refuses, or cannot be reached.
            BackendUnavailable: the answer broke off, or never came to an end.
        """
        messages = self._messages(task)
        # A client belongs to its event loop, so each task has one of its own.
        async with self._client() as client:
            for _ in range(self._max_rounds):
                answer = _Answer()
                stream = await client.chat.completions.create(
                    model=self._model, messages=messages, stream=True, **self._options
                )
                async with stream:
                    async for chunk in stream:
                        if text := answer.add(chunk):
                            yield text
                if answer.finish_reason is None:
                    raise BackendUnavailable(
                        f"{self._model}: expected an answer with an end, found one that broke off"
                    )
                if not answer.calls:
                    return
                messages = [*messages, answer.message(), *await self._call_tools(answer)]
        raise BackendUnavailable(
            f"{self._model}: expected an answer after at most {self._max_rounds} rounds of tools, "
            "found another call; raise max_rounds"
        )

    def _client(self) -> Any:
        key = self._api_key
        if key is None and self._base_url is not None:
            key = NO_KEY
        return self._openai.AsyncOpenAI(
            base_url=self._base_url, api_key=key, max_retries=self._max_retries
        )

    async def _call_tools(self, answer: _Answer) -> list[Message]:
        """What the tools return; an error is told to the model, which may try again."""
        results: list[Message] = []
        for call in answer.calls.values():
            try:
                content = result_as_text(await self._tools.call(call.name, call.arguments))
            except DuplexError as error:  # the model called it wrongly
                content = f"error: {error}"
            except Exception as error:
                log.exception("tool '%s' failed on %r", call.name, call.arguments)
                content = f"error: {type(error).__name__}: {error}"
            results.append({"role": "tool", "tool_call_id": call.id, "content": content})
        return results


@dataclass
class _Call:
    """A call of a tool, as far as it has come."""

    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class _Answer:
    """One streamed answer, put together."""

    text: str = ""
    finish_reason: str | None = None
    calls: dict[int, _Call] = field(default_factory=dict)

    def add(self, chunk: Any) -> str:
        """Takes a chunk; returns its text."""
        if not chunk.choices:  # such as a last one with the usage
            return ""
        choice = chunk.choices[0]
        self.finish_reason = choice.finish_reason or self.finish_reason
        for part in choice.delta.tool_calls or ():
            call = self.calls.setdefault(part.index, _Call())
            call.id += part.id or ""
            if part.function is not None:
                call.name += part.function.name or ""
                call.arguments += part.function.arguments or ""
        text = choice.delta.content or ""
        self.text += text
        return text

    def message(self) -> Message:
        """The answer as a message of the conversation."""
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.calls.values()
        ]
        return {"role": "assistant", "content": self.text or None, "tool_calls": calls}
