"""Ten minutes of stream: memory grows by the bytes of the global layers and by nothing else.

How long the micro-turns take is measured by `bench/stream.py`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from duplex_engine import Engine
from duplex_engine.models import PRESETS, write_random_checkpoint

TURNS = 3000  # ten minutes
SAMPLES = 3200  # of a micro-turn


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.core
def test_ten_minutes_grow_by_the_global_layers_alone(tmp_path: Path) -> None:
    preset = PRESETS["tiny"]
    n_global = preset.layers.split().count("gd")
    assert n_global == 1
    bytes_per_row = n_global * 2 * preset.heads[1] * preset.d_head * 4  # keys and values, float32
    speech, rate = soundfile.read(
        resources.files("duplex_engine") / "examples" / "speech.flac", dtype="float32"
    )
    assert rate == 16_000
    sound = np.resize(speech, TURNS * SAMPLES)
    process = psutil.Process()

    lengths, global_bytes, window_bytes, resident = [], [], [], []
    path = write_random_checkpoint(tmp_path, "tiny")
    with Engine.load(path, threads=2, memory="64MiB") as engine:
        with engine.open_session(max_positions=32_768) as session:
            for turn in range(TURNS):
                session.step(audio=sound[turn * SAMPLES : (turn + 1) * SAMPLES], max_tokens=1)
                memory = session.memory
                lengths.append(session.length)
                global_bytes.append(memory["global_bytes"])
                window_bytes.append(memory["local_bytes"] + memory["conv_bytes"])
                resident.append(process.memory_info().rss)
        page_bytes = engine.stats["page_bytes"]
        assert engine.stats["pages_used"] == 0

    # A turn appends four frames and one token. Pages hold whole blocks; a turn is backed ahead.
    assert lengths == [5 * turn + 4 for turn in range(TURNS)]
    rows_per_page = page_bytes // (64 * bytes_per_row) * 64
    for length, held in zip(lengths, global_bytes, strict=True):
        assert held in {
            page_bytes * -(-(length + ahead) // rows_per_page) for ahead in (0, 5, 6, 32)
        }
    # Windows are full after a minute, and hold as much at the end as then.
    assert max(window_bytes[300:1300]) == max(window_bytes[-1000:])
    growth = resident[-1] - resident[300]
    assert growth <= global_bytes[-1] - global_bytes[300] + 2**21  # two megabytes for the allocator
