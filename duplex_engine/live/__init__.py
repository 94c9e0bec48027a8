"""Live sessions: an engine in real time, with clients that are late, interrupt and come back.

    with Engine.load("reference") as engine, LiveEngine(engine) as live:
        session = live.open()
        session.push_audio(chunk)
        for out in session:
            print(out.turn.text, out.events)

docs/LIVE.md is the one page about it.
"""

from __future__ import annotations

from duplex_engine.live.cost import CostModel
from duplex_engine.live.driver import LiveEngine
from duplex_engine.live.journal import Entry, replay
from duplex_engine.live.metrics import Metrics
from duplex_engine.live.session import LiveSession
from duplex_engine.live.summary import Summary
from duplex_engine.live.trace import Trace
from duplex_engine.live.types import (
    AudioFilled,
    BackgroundFailed,
    Interrupted,
    LiveEvent,
    LiveTurn,
    NotRewound,
    OutputLost,
    Receipt,
    Refused,
    Rewound,
    Summarised,
    SummaryFailed,
)

__all__ = [
    "AudioFilled",
    "BackgroundFailed",
    "CostModel",
    "Entry",
    "Interrupted",
    "LiveEngine",
    "LiveEvent",
    "LiveSession",
    "LiveTurn",
    "Metrics",
    "NotRewound",
    "OutputLost",
    "Receipt",
    "Refused",
    "Rewound",
    "Summarised",
    "Summary",
    "SummaryFailed",
    "Trace",
    "replay",
]
