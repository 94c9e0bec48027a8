"""Runs Inkling interaction models as a live stream of sound, pictures and text.

    import duplex_engine

    with duplex_engine.Engine.load("checkpoint") as engine, engine.open_session() as session:
        turn = session.step(audio=chunk)  # 200 ms of sound in, this micro-turn's output out
        print(turn.text, turn.timing.total_us, turn.memory.sequence_bytes)

`Engine` and `Session` are the synchronous interface, `AsyncEngine` and `AsyncSession` the same for
asyncio. Everything that they raise on purpose is a `DuplexError`.
"""

from __future__ import annotations

from duplex_engine.aio import AsyncEngine, AsyncSession
from duplex_engine.config import ModelConfig
from duplex_engine.engine import Engine
from duplex_engine.errors import (
    BackendUnavailable,
    CapacityError,
    CheckpointError,
    DuplexError,
    InvalidArgument,
    RankFailed,
    SessionBusy,
    SessionClosed,
)
from duplex_engine.session import Session
from duplex_engine.types import (
    Delegation,
    Event,
    Forgot,
    InputSummary,
    MemoryUse,
    MergedTurns,
    MicroTurn,
    MissingAudio,
    StageTiming,
    StepInput,
    Window,
)

__all__ = [
    "AsyncEngine",
    "AsyncSession",
    "BackendUnavailable",
    "CapacityError",
    "CheckpointError",
    "Delegation",
    "DuplexError",
    "Engine",
    "Event",
    "Forgot",
    "InputSummary",
    "InvalidArgument",
    "MemoryUse",
    "MergedTurns",
    "MicroTurn",
    "MissingAudio",
    "ModelConfig",
    "RankFailed",
    "Session",
    "SessionBusy",
    "SessionClosed",
    "StageTiming",
    "StepInput",
    "Window",
]
