"""Cases of what lies between the passes of a turn (kernels/turn.cu)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx.arguments import (
    SAMPLE_ROW,
    GatherRows,
    Segment,
    TakeTokens,
    TapeView,
    TurnPlaces,
    raw,
)
from ptx.device import Case, Device

MAX_TOKENS = 3
STOPS = [7, 90]
LOOP = 1 << 40 | 5
THREADS = 64  # the kernel takes any number


def gather_rows(device: Device) -> None:
    """Rows of 48 bytes out of wider ones, all of them, then some."""
    source = np.arange(6 * 20, dtype=np.int32).reshape(6, 20)
    rows = [4, 0, 0, 5]
    for is_wanted in (None, [1, 0, 1, 0]):
        out = device.out(np.full((4, 12), -1, np.int32))
        args = GatherRows(
            device.put_late(source), 80, device.put(rows, np.int32),
            0 if is_wanted is None else device.put_late(is_wanted, np.int32), out, 48,
        )  # fmt: skip
        device.launch("turn/gather_rows_kernel", (4,), 2, 0, args)
        expected = np.where(np.array(is_wanted or [1] * 4)[:, None], source[rows, :12], -1)
        assert (device.get(out) == expected).all()


@dataclass
class Sequence:
    """One of a turn: what it may say, and what is chosen behind each of its rows."""

    limit: int
    chosen: list[int]

    def said(self) -> list[int]:
        """Up to a stop or the limit."""
        ends = [i + 1 for i, token in enumerate(self.chosen) if token in STOPS]
        return self.chosen[: min([self.limit, *ends])]

    def is_open(self, n_passes: int) -> bool:
        """Behind so many passes."""
        return n_passes < len(self.said())


# A limit of none; stops at once and later, both of them; the limit with a stop behind it.
SEQUENCES = [
    Sequence(0, [1, 1, 1]), Sequence(3, [7, 2, 2]), Sequence(3, [3, 90, 4]), Sequence(2, [5, 6, 7]),
    Sequence(3, [8, 8, 9]), Sequence(3, [1, 1, 1]), Sequence(3, [2, 2, 7]), Sequence(3, [4, 7, 4]),
]  # fmt: skip


def take_tokens(device: Device, sequences: list[Sequence], *, has_loop: bool) -> None:
    """The passes of a turn, as long as more than half of the sequences go on."""
    count = len(sequences)
    tape = TapeView(1 << 20, 1, 64, 64)
    segments = b"".join(raw(Segment(i, 1, 1000 + i, tape, tape, tape, 0, 0)) for i in range(count))
    sampling = np.zeros(count, SAMPLE_ROW)
    sampling["position"] = np.arange(count) + 1000
    places = {
        "segments": device.out(np.frombuffer(segments, np.int64).reshape(count, -1)),
        "sampling": device.out(sampling),
        "chosen": device.out(np.zeros(count, np.int32)),
        "is_open": device.out(np.full(count, -5, np.int32)),  # nothing as yet, as n_tokens
        "n_tokens": device.out(np.full(count, -5, np.int32)),
        "tokens": device.out(np.full((count, MAX_TOKENS), -1, np.int32)),
        "limits": device.put([s.limit for s in sequences], np.int32),
        "stops": device.put(STOPS, np.int32),
    }
    before = device.get(places["segments"]).copy()
    n_passes, goes_on = 0, True
    while goes_on:
        chosen = [s.chosen[n_passes] for s in sequences]
        places["chosen"] = device.put(chosen, np.int32)
        turn = TurnPlaces(count=count, max_tokens=MAX_TOKENS, n_stops=len(STOPS), **places)
        args = TakeTokens(turn, n_passes == 0, has_loop, LOOP)
        device.launch("turn/take_tokens_kernel", (1,), THREADS, 4 * THREADS, args)
        n_passes += 1
        is_open = [s.is_open(n_passes) for s in sequences]
        goes_on = 2 * sum(is_open) > count and has_loop
        if has_loop:
            assert device.loops[-1] == (LOOP, goes_on)
        assert device.get(places["is_open"]).tolist() == is_open
        n_said = np.array([min(n_passes, len(s.said())) for s in sequences])
        assert (device.get(places["n_tokens"]) == n_said).all()
        # A row behind the newest token that was said, of those that said one; the rest untouched.
        moved = before.copy()
        moved[:, 1] += np.maximum(n_said - 1, 0)
        assert (device.get(places["segments"]) == moved).all()
        next_draw = 1000 + np.arange(count) + np.maximum(n_said, 1)
        assert (device.get(places["sampling"])["position"] == next_draw).all()
    assert len(device.loops) == (n_passes if has_loop else 0)
    for said, s in zip(device.get(places["tokens"]), sequences, strict=True):
        expected = s.said()[:n_passes]
        assert said.tolist() == expected + [-1] * (MAX_TOKENS - len(expected))


def take_tokens_in_a_loop(device: Device) -> None:
    """More sequences than threads, in passes that end with the fifth of them."""
    many = [SEQUENCES[4], SEQUENCES[5]] * 40 + SEQUENCES
    take_tokens(device, many, has_loop=True)


def take_tokens_once(device: Device) -> None:
    """Outside a record there is no loop, and nothing is called."""
    take_tokens(device, SEQUENCES, has_loop=False)


CASES: dict[str, Case] = {
    "gather_rows": gather_rows,
    "take_tokens": take_tokens_in_a_loop,
    "take_tokens-once": take_tokens_once,
}
