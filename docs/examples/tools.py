"""A background agent with tools: Python functions, called with arguments that were checked.

`python docs/examples/tools.py` calls the tool that the request names: the reference model hands
on "weather paris", which is the tool `weather` with the city "paris". With the address of an
OpenAI-compatible server and the name of a model, that model reads the conversation and decides
which tools to call, as often as it needs:

    pip install 'duplex_engine[openai]'
    python docs/examples/tools.py http://localhost:8000/v1 my-model
"""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Annotated

import soundfile
from pydantic import Field

from duplex_engine import Engine
from duplex_engine.background import (
    Delegations,
    OpenAIWorker,
    Tools,
    ToolWorker,
    Worker,
    chat_messages,
)

PLACES = {"paris": "sunny warm", "london": "rainy cold"}
INSTRUCTIONS = "Answer with two words that a tool returned, and nothing else."


def weather(city: Annotated[str, Field(description="a city, in lower case")]) -> str:
    """The weather of today: the sky and the temperature."""
    return PLACES[city]


async def train(city: str) -> str:
    """When the next train to a city leaves."""
    return "soon" if city in PLACES else "closed"


def main() -> None:
    """Plays the recorded scene and shows what the background did."""
    tools = Tools([weather, train])
    worker: Worker = ToolWorker(tools)
    if len(sys.argv) > 1:
        messages = chat_messages(INSTRUCTIONS)
        worker = OpenAIWorker(sys.argv[1], sys.argv[2], messages=messages, tools=tools)
    with (files("duplex_engine") / "examples" / "showcase.flac").open("rb") as file:
        samples, rate = soundfile.read(file, dtype="float32")
    with (
        Engine.load("reference") as engine,
        engine.open_session() as session,
        Delegations(session, worker, timeout_s=30.0) as background,
    ):
        for start in range(0, len(samples), rate // 5):
            background.step(audio=samples[start : start + rate // 5], sample_rate=rate)
            background.wait(timeout_s=30.0)  # a recording can wait; a live stream goes on
        print(background.transcript)
        for job in background.jobs:
            print(f"{job.request!r}: {job.state}, {job.text or job.error!r}")


if __name__ == "__main__":
    main()
