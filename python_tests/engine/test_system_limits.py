"""What the system refuses, threads, memory or mappings, is an error that changes nothing.

Each scene is a process of its own: it uses up what the whole process has. Not marked `core`:
AddressSanitizer takes more addresses than the scenes leave.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from random_models import write

pytestmark = pytest.mark.cpu

BEGIN = """
import ctypes, resource, sys
import numpy as np
from duplex_engine import CapacityError, Engine

# Lets every further mapping fail (vm.max_map_count): pages of two kinds in turns.
def use_up_mappings():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    n = int(open("/proc/sys/vm/max_map_count").read()) + 5000
    base = libc.mmap(None, n * 8192, 0, 0x4022, -1, 0)
    for k in range(n):
        if libc.mprotect(base + 8192 * k, 4096, 1) != 0:
            break
    return lambda: libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(n * 8192))

def engine(**options):
    return Engine.load(sys.argv[1], memory="64MiB", max_positions=4000, **{"threads": 1, **options})
"""

NO_MAPPINGS = """
e = engine()
session, other, twin = e.open_session(), e.open_session(), e.open_session()
for s in (session, other, twin):
    s.append(text=[9] * 60)
    s.append(text=[8] * 3)
    s.decode(1)
give_back = use_up_mappings()
failed = None
for _ in range(60):  # until a page is needed
    before = session.length, other.length
    session.feed(text=[20, 21, 22])
    turn, turn_of_other = e.step_many([(session, {"max_tokens": 1}), (other, {"max_tokens": 1})])
    twin.step(text=[20, 21, 22], max_tokens=1) if not isinstance(turn, CapacityError) else None
    if isinstance(turn, CapacityError):
        failed = turn
        break
assert failed is not None and session.length == before[0]
try:
    session.append(text=[7] * 200)
    raise SystemExit("nothing was refused")
except CapacityError:
    assert session.length == before[0]
give_back()
told, twin_told = session.step(max_tokens=1), twin.step(text=[20, 21, 22], max_tokens=1)
assert told.input.rows == twin_told.input.rows
logits, of_twin = (s.append(text=[7] * 9, logits="last") for s in (session, twin))
assert (logits == of_twin).all()
print("held")
"""

NO_LOGITS = """
e = Engine.load(sys.argv[1], memory="256MiB", max_positions=60000, threads=1)
session = e.open_session(endless=None)
session.append(text=[9] * 10)
session.decode(1)
twin = session.fork()
state = session.length, session.marks
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages + (24 << 20), soft[1]))
try:
    session.append(text=[8] * 30000, logits="all")
    raise SystemExit("nothing was refused")
except MemoryError:
    assert (session.length, session.marks) == state
resource.setrlimit(resource.RLIMIT_AS, soft)
assert (session.append(text=[7], logits="last") == twin.append(text=[7], logits="last")).all()
print("held")
"""

NO_THREADS = """
import threading
threading.stack_size(0)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
try:
    engine(threads=1000)
except CapacityError as error:
    assert "threads: expected 1000, the system gave" in str(error)
    engine(threads=2).close()
    print("held")
"""

NO_MEMORY_FOR_A_FORK = """
e = engine()
s = e.open_session()
s.step(text=[9] * 5)
s.feed(audio=np.zeros(19_000_000, np.float32))
s.fork().close()
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + (60 << 20)  # the copy of the sound needs 76 MB
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    s.fork()
except MemoryError:
    s.append(text=[9])
    assert e.stats["sessions"] == 1
    print("held")
"""


@pytest.mark.parametrize("scene", [NO_MAPPINGS, NO_LOGITS, NO_THREADS, NO_MEMORY_FOR_A_FORK])
def test_what_the_system_refuses_changes_nothing(scene: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")
    command = [sys.executable, "-c", BEGIN + scene, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("held\n", 0), done.stderr
