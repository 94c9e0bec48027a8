"""The slower half: workers that answer what the interaction model delegates.

    from duplex_engine.background import Delegations

    async def worker(task):  # an agent, a model, a tool
        return await look_up(task.text)

    with Delegations(session, worker) as background:
        turn = background.step(audio=chunk)  # instead of session.step

Read `task.py` for what a worker may be, `delegations.py` for what happens to its result, and
docs/BACKGROUND.md for the whole.
"""

from __future__ import annotations

from duplex_engine.background.chat import Message, Messages, chat_messages
from duplex_engine.background.delegations import Delegations
from duplex_engine.background.engine_workers import EngineWorker, ForkWorker, Prompt
from duplex_engine.background.gguf_worker import GgufWorker, smollm2_path
from duplex_engine.background.openai_worker import OpenAIWorker
from duplex_engine.background.policy import WORDING, by_sentence, same_request
from duplex_engine.background.task import Failure, Job, State, Task, Worker
from duplex_engine.background.tools import Tools, ToolWorker
from duplex_engine.background.transcript import Entry, Role, Transcript, transcript_text

__all__ = [
    "WORDING",
    "Delegations",
    "EngineWorker",
    "Entry",
    "Failure",
    "ForkWorker",
    "GgufWorker",
    "Job",
    "Message",
    "Messages",
    "OpenAIWorker",
    "Prompt",
    "Role",
    "State",
    "Task",
    "ToolWorker",
    "Tools",
    "Transcript",
    "Worker",
    "by_sentence",
    "chat_messages",
    "same_request",
    "smollm2_path",
    "transcript_text",
]
