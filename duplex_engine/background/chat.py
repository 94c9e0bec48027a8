"""A task as messages for a chat model.

Owns the prompt. The conversation goes as text into one message: its roles are not those of a chat,
and what the user said aloud is known by the model's request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from duplex_engine.background.task import Task

__all__ = ["Message", "Messages", "chat_messages", "chat_prompt"]

Message: TypeAlias = dict[str, Any]
Messages: TypeAlias = Callable[[Task], list[Message]]

INSTRUCTIONS = (
    "You work in the background of a live conversation. A small assistant that talks with the user "
    "hands you a request and will say your answer aloud. Answer the request alone, in one or two "
    "short sentences, without lists or markup."
)


def chat_messages(instructions: str = INSTRUCTIONS) -> Messages:
    """A function from a task to a system message and one of the user."""
    return lambda task: [
        {"role": "system", "content": instructions},
        {"role": "user", "content": chat_prompt(task)},
    ]


def chat_prompt(task: Task) -> str:
    """The conversation, where there is one, and the request."""
    if not task.transcript:
        return task.text
    return f"The conversation so far:\n{task.conversation}\n\nThe request: {task.text}"
