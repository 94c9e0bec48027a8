"""Python functions as tools: what a model is told about them, and calls with checked arguments.

Owns the schemas, made from the functions' annotations by pydantic, and the worker that calls one
tool for one request. A chat model that calls tools is in `openai_worker.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from duplex_engine.arguments import found
from duplex_engine.arguments import text as checked_text
from duplex_engine.background.task import Task
from duplex_engine.errors import InvalidArgument

__all__ = ["ToolWorker", "Tools", "result_as_text"]

Function: TypeAlias = Callable[..., Any]
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Tools:
    """Named functions, plain or asynchronous, called with arguments that fit their annotations.

    Parameters without an annotation take anything. The docstring tells a model what a tool does.
    """

    def __init__(self, functions: Mapping[str, Function] | Iterable[Function]) -> None:
        """Reads the signatures.

        Raises:
            InvalidArgument: they are no functions, or one cannot be called by names, has a type
                without a JSON schema, or has the name of another.
        """
        if isinstance(functions, Mapping):
            named = list(functions.items())
        elif not isinstance(functions, Iterable):
            raise InvalidArgument(
                f"tools: expected functions, in a list or by name, found {found(functions)}; put a "
                "single one into a list"
            )
        else:
            named = [(getattr(f, "__name__", repr(f)), f) for f in functions]
        self._functions: dict[str, Function] = {}
        self._arguments: dict[str, type[BaseModel]] = {}
        self.schemas: list[dict[str, Any]] = []
        for name, function in named:
            if name in self._functions:
                raise InvalidArgument(f"tools: expected different names, found '{name}' twice")
            model = _arguments_model(name, function)
            self._functions[name], self._arguments[name] = function, model
            self.schemas.append(_schema(name, function, model))

    @property
    def names(self) -> list[str]:
        """The tools' names, in order."""
        return list(self._functions)

    def parameters(self, name: str) -> list[str]:
        """The names of a tool's parameters, in order."""
        return [str(field.alias) for field in self._model(name).model_fields.values()]

    def bind(self, name: str, arguments: Mapping[str, Any] | str) -> Callable[[], Any]:
        """Checks a call and returns it, not yet made.

        arguments: by name, or a JSON object of them; strings become what the annotations ask for.

        Raises:
            InvalidArgument: no tool of this name, or arguments that it does not take.
        """
        model = self._model(name)
        if not isinstance(arguments, str | Mapping):
            raise InvalidArgument(
                f"tool '{name}': expected arguments by name, or a JSON object of them, "
                f"found {found(arguments)}"
            )
        try:
            if isinstance(arguments, str):
                checked = model.model_validate_json(arguments or "{}")
            else:
                checked = model.model_validate(dict(arguments))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors()
            )
            raise InvalidArgument(f"tool '{name}': {problems}") from error
        given = {
            str(field.alias): getattr(checked, key)
            for key, field in model.model_fields.items()
            if key in checked.model_fields_set
        }
        return partial(self._functions[name], **given | (checked.model_extra or {}))

    async def call(self, name: str, arguments: Mapping[str, Any] | str) -> Any:
        """Checks and makes a call; a plain function runs in a thread.

        Raises:
            InvalidArgument: as `bind`; besides, whatever the tool raises.
        """
        call = self.bind(name, arguments)
        if inspect.iscoroutinefunction(self._functions[name]):
            return await call()
        value = await asyncio.to_thread(call)
        return await value if inspect.isawaitable(value) else value

    def _model(self, name: str) -> type[BaseModel]:
        if checked_text(name, "tool") not in self._arguments:
            raise InvalidArgument(
                f"tool: expected one of {', '.join(sorted(self._functions))}, found '{name}'"
            )
        return self._arguments[name]


class ToolWorker:
    """Calls the tool that a request names, without a model in between.

    A request is a JSON object, {"name": "weather", "arguments": {"city": "paris"}}, or plain words:
    the tool, then its arguments in order ("weather paris"); the last one takes the words left over.
    """

    def __init__(self, tools: Tools | Mapping[str, Function] | Iterable[Function]) -> None:
        """Takes the tools, or the functions to make them of."""
        self.tools = tools if isinstance(tools, Tools) else Tools(tools)

    async def __call__(self, task: Task) -> str:
        """Returns the tool's result as text."""
        name, arguments = self._request(task.text)
        return result_as_text(await self.tools.call(name, arguments))

    def _request(self, text: str) -> tuple[str, Mapping[str, Any]]:
        if not text.lstrip().startswith("{"):
            name, *words = text.split() or [""]
            return name, _by_order(self.tools.parameters(name), words)
        try:
            request = json.loads(text)
            name, arguments = request["name"], request.get("arguments") or {}
        except (KeyError, ValueError, RecursionError) as error:
            raise InvalidArgument(
                f"request: expected {{'name', 'arguments'}}, found {found(text)}"
            ) from error
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise InvalidArgument(
                f"request: expected a name and an object of arguments, found {found(text)}"
            )
        return name, arguments


def result_as_text(value: Any) -> str:
    """A tool's result for a model to read: a string as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return json.dumps(value, ensure_ascii=False, default=str)


def _by_order(names: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    if len(words) > len(names) > 0:
        words = [*words[: len(names) - 1], " ".join(words[len(names) - 1 :])]
    elif len(words) > len(names):
        raise InvalidArgument(f"request: expected no arguments, found {' '.join(words)!r}")
    return dict(zip(names, words, strict=False))


def _arguments_model(name: str, function: Function) -> type[BaseModel]:
    try:
        signature = inspect.signature(function)
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"tool '{name}': expected a function with a signature, found: {error}"
        ) from error
    fields: dict[str, Any] = {}
    extra: Any = "forbid"
    for key, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind in BY_NAME:
            default = ... if parameter.default is parameter.empty else parameter.default
            # By alias, because a model has attributes of its own, such as `copy`.
            fields[f"field_{len(fields)}"] = (hints.get(key, Any), Field(default, alias=key))
        else:
            raise InvalidArgument(
                f"tool '{name}': expected parameters that can be given by name, found '{parameter}'"
            )
    try:
        return create_model(name, __config__=ConfigDict(extra=extra), **fields)
    except Exception as error:  # pydantic has several, by kind of type
        raise InvalidArgument(
            f"tool '{name}': expected types that pydantic can check, found: {error}"
        ) from error


def _schema(name: str, function: Function, model: type[BaseModel]) -> dict[str, Any]:
    """One entry of `tools` in OpenAI's chat completions."""
    try:
        parameters = model.model_json_schema()
    except Exception as error:
        raise InvalidArgument(
            f"tool '{name}': expected types with a JSON schema, found: {error}"
        ) from error
    parameters.pop("title", None)
    described = {"name": name, "parameters": parameters}
    if text := inspect.getdoc(function):
        described["description"] = text
    return {"type": "function", "function": described}
