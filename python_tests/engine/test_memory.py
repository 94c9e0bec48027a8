"""Loading needs the memory of the weights as they run, and hardly more; closing gives it back.

For the first, a process of its own loads a checkpoint of a few hundred megabytes; the kernel
reports the most memory it ever had (VmHWM), which counts pages of the mapped file too.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from duplex_engine import CheckpointError, Engine, SessionClosed
from duplex_engine.models import PRESETS, write_random_checkpoint
from duplex_engine.models.random import Dtype, Preset

pytestmark = pytest.mark.cpu

# 56 million parameters: 220 MB in float32, 110 MB in bfloat16.
LARGE = Preset(
    vocab_size=4096,
    d_model=1024,
    d_ff=4096,
    layers="ld ld gd",
    heads=(8, 4),
    local_heads=(8, 4),
    d_head=128,
    d_rel=16,
    rel_extent=1024,
    window=512,
    patch_size=16,
    vision_layers=2,
)
POOL_BYTES = 64 << 20

LOAD = """
import json, re, sys
from pathlib import Path
from duplex_engine import Engine

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = status("VmRSS")
with Engine.load(sys.argv[1], dtype=sys.argv[2], memory=int(sys.argv[3]), threads=1) as engine:
    loaded = status("VmHWM") - before
    with engine.open_session(max_positions=512) as session:
        session.append(text=list(range(300, 700)))
    print(json.dumps({"loaded": loaded, "used": status("VmHWM") - before,
                      "plan": dict(engine.memory_plan)}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("large")
    with mock.patch.dict(PRESETS, {"large": LARGE}):
        dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
        yield {
            dtype: write_random_checkpoint(folder / dtype, "large", dtype=dtype) for dtype in dtypes
        }
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_loading_needs_little_more_than_the_weights(
    checkpoints: dict[str, Path], stored: str, dtype: str
) -> None:
    command = [sys.executable, "-c", LOAD, str(checkpoints[stored]), dtype, str(POOL_BYTES)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    plan = answer["plan"]
    file_bytes = (checkpoints[stored] / "model.safetensors").stat().st_size
    # Packing pads little; the plan itself is honest.
    n_bytes = {"float32": 4, "bfloat16": 2}
    assert plan["weights"] < 1.05 * file_bytes * n_bytes[dtype] / n_bytes[stored]
    assert plan["page_pool"] <= POOL_BYTES
    # Nothing has used the pool yet: pages are backed when a session takes them.
    assert answer["loaded"] < 1.15 * plan["weights"]
    others = sum(plan.values()) - plan["weights"]
    assert answer["used"] < 1.15 * plan["weights"] + others


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def test_closing_frees_the_weights_whoever_keeps_what_is_closed(tmp_path: Path) -> None:
    preset = dataclasses.replace(LARGE, layers="gd", d_ff=512)  # 57 MB
    folder = write_random_checkpoint(tmp_path / "model", preset)
    with Engine.load(folder, memory=POOL_BYTES, threads=1) as engine:
        session = engine.open_session(max_positions=512)
        session.append(text=[300])
        loaded = resident_bytes()
    assert resident_bytes() < loaded - 0.9 * dict(engine.memory_plan)["weights"]
    assert session.closed
    calls: list[Callable[[Path], object]] = [session.snapshot, engine.write_weights, engine.restore]
    for call in calls:
        with pytest.raises((SessionClosed, CheckpointError)):
            call(tmp_path / "file")
