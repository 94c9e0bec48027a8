"""A task as messages for a chat model.

Owns the prompt. The conversation goes as text into one message: its roles are not those of a chat,
and what the user said aloud is known by the model's request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from duplex_engine.background.task import Task
from duplex_engine.background.transcript import transcript_text

__all__ = ["Message", "Messages", "chat_messages", "chat_prompt"]

Message: TypeAlias = dict[str, Any]
Messages: TypeAlias = Callable[[Task], list[Message]]

MAX_CHARS = 4000  # about 1,000 tokens: small models have a small context
INSTRUCTIONS = (
    "You work in the background of a live conversation. A small assistant that talks with the user "
    "hands you a request and will say your answer aloud. Answer the request alone, in one or two "
    "short sentences, without lists or markup."
)


def chat_messages(instructions: str = INSTRUCTIONS, *, max_chars: int = MAX_CHARS) -> Messages:
    """A function from a task to a system message and one of the user; see `chat_prompt`."""
    return lambda task: [
        {"role": "system", "content": instructions},
        {"role": "user", "content": chat_prompt(task, max_chars=max_chars)},
    ]


def chat_prompt(task: Task, *, max_chars: int = MAX_CHARS) -> str:
    """The newest part of the conversation, where there is one, and the request.

    max_chars: of the conversation; older entries are left out, and the text says how many.
    """
    lines = [str(entry) for entry in task.transcript]
    n_kept = n_chars = 0
    while n_kept < len(lines) and n_chars + len(lines[-1 - n_kept]) < max_chars:
        n_chars += len(lines[-1 - n_kept]) + 1
        n_kept += 1
    if not n_kept:
        return task.text
    n_left_out = task.n_dropped + len(lines) - n_kept
    conversation = transcript_text(task.transcript[-n_kept:], n_left_out)
    return f"The conversation so far:\n{conversation}\n\nThe request: {task.text}"
