"""Cases of the sums over ranks (kernels/all_reduce.cu), as one rank sees them.

What the other ranks send lies in the own memory before the kernel begins, since a number is its own
signal; what the kernel sends them is looked for in theirs. That ranks wait for each other is not
shown here.
"""

from __future__ import annotations

from ctypes import Structure
from functools import partial

import numpy as np
from ptx.arguments import (
    BF16,
    F32,
    MAX_RANKS,
    PTR,
    AllReduce,
    ConvAddNorm,
    ConvSlot,
    Floats,
    GatherSlices,
    NextWeights,
    Parts,
    RankGroup,
    Segment,
    Segments,
    Share,
    TapeView,
    pad,
)
from ptx.cases_append import KERNEL, streams
from ptx.cases_rows import EPS, norm_bound, rms_norm
from ptx.device import UNIT, Case, Device, check_close

EMPTY = 0xFFFFFFFF
PAD_WORDS, SIGNALS_AT = 128, MAX_RANKS  # of 4 bytes
N_BLOCKS = 2
EPOCH, N_SIGNALS, OLD_WORDS = 4, 2, 5
ROWS, WIDTH, PADDED = 6, 40, 48
WORDS = PADDED // 4  # of 16 bytes, in a row


class Ranks:
    """The memories of all ranks, as they are and as they should be; it is one rank's kernel.

    The buffers are rows of four numbers: the second is the call's, the first was the last call's.
    """

    RANK = 1

    def __init__(self, n_ranks: int, buffer_words: int, rank: int = RANK) -> None:
        self.n_ranks, self.buffer_words, self.rank = n_ranks, buffer_words, rank
        size = PAD_WORDS + 3 * 4 * buffer_words
        self.now = [np.full(size, EMPTY, np.uint32) for _ in range(n_ranks)]
        for memory in self.now:
            memory[:PAD_WORDS] = 0
        # What the last call left, and more that must stay.
        self.buffer(self.now[rank], 0)[: OLD_WORDS + 2] = 3
        self.then = [memory.copy() for memory in self.now]
        for memory in self.then:
            memory[rank] = EPOCH + 1
        self.buffer(self.then[rank], 0)[:OLD_WORDS] = EMPTY

    def buffer(self, memory: np.ndarray, which: int) -> np.ndarray:
        begin = PAD_WORDS + which * 4 * self.buffer_words
        return memory[begin : begin + 4 * self.buffer_words].reshape(-1, 4)

    def receive(self, word: int, values: Floats) -> None:
        """What another rank has sent to this one."""
        words = values.view(np.uint32).reshape(-1, 4)
        for memories in (self.now, self.then):
            self.buffer(memories[self.rank], 1)[word : word + len(words)] = words

    def expect(self, rank: int, word: int, values: Floats) -> None:
        """What this rank should send."""
        words = values.view(np.uint32).reshape(-1, 4)
        self.buffer(self.then[rank], 1)[word : word + len(words)] = words

    def put(self, device: Device, *, has_multicast: bool) -> Structure:
        self.addresses = [device.out(memory) for memory in self.now]
        size = self.now[0].nbytes
        self.state = device.out(np.array([EPOCH, 1, N_SIGNALS, 0, 0, OLD_WORDS, 77, 78], np.uint32))
        peers = (PTR * MAX_RANKS)(*self.addresses)
        multicast = device.multicast(self.addresses, size) if has_multicast else 0
        return RankGroup(
            self.rank, self.n_ranks, N_BLOCKS, self.addresses[self.rank], peers, multicast,
            16 * self.buffer_words, self.state, device.out(np.zeros(8, np.uint32)), 1 << 40,
        )  # fmt: skip

    def check(self, device: Device, used_words: int, n_signals: int = N_SIGNALS) -> None:
        for address, expected in zip(self.addresses, self.then, strict=True):
            np.testing.assert_array_equal(device.get(address), expected)
        state = [EPOCH + 1, 2, n_signals, 0, 0, OLD_WORDS, used_words, 78]
        assert device.get(self.state).tolist() == state


def in_rank_order(parts: Floats) -> Floats:
    """The sum of (ranks, ...), rounded after each."""
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return total


def one_shot(ranks: Ranks, parts: Floats) -> int:
    """Fills in what goes over the wire; the words that it takes."""
    for rank in range(ranks.n_ranks):
        ranks.receive(rank * ROWS * WORDS, parts[rank])
        ranks.expect(rank, ranks.RANK * ROWS * WORDS, parts[ranks.RANK])
    ranks.expect(ranks.RANK, ranks.n_ranks * ROWS * WORDS, in_rank_order(parts))
    return (ranks.n_ranks + 1) * ROWS * WORDS


def two_shot(ranks: Ranks, parts: Floats, *, switch: bool = False) -> int:
    """The same; with `switch` every rank holds its part itself, and the switch adds."""
    n, owned = ranks.n_ranks, -(-WORDS // ranks.n_ranks)
    sums_at, total = n * ROWS * owned, in_rank_order(parts)
    for row in range(ROWS):
        for owner in range(n):
            begin, end = 4 * owner * owned, 4 * min((owner + 1) * owned, WORDS)
            if begin >= end:
                continue
            sums = total[row, begin:end]
            place = sums_at + row * WORDS + begin // 4
            if owner == ranks.RANK:
                for rank in range(n):
                    ranks.expect(rank, place, sums)
            else:
                ranks.receive(place, sums)
            for rank in range(n if not switch else 0):
                at = (rank * ROWS + row) * owned
                if rank == ranks.RANK:
                    ranks.expect(owner, at, parts[rank, row, begin:end])
                elif owner == ranks.RANK:
                    ranks.receive(at, parts[rank, row, begin:end])
    for rank in range(n if switch else 0):
        for memories in (ranks.now,) if rank != ranks.RANK else ():
            ranks.buffer(memories[rank], 1)[: ROWS * WORDS] = (
                parts[rank].view(np.uint32).reshape(-1, 4)
            )
        ranks.expect(rank, 0, parts[rank])
    return sums_at + ROWS * WORDS


def all_reduce(device: Device, kernel: str, n_ranks: int, *, has_multicast: bool) -> None:
    """Two streams, one from its first position on."""
    random = np.random.default_rng(17)
    dtype = BF16 if n_ranks == 4 else F32
    parts = pad(random.normal(size=(n_ranks * ROWS, WIDTH)).astype(np.float32), PADDED)
    parts = parts.reshape(n_ranks, ROWS, PADDED)
    ranks = Ranks(n_ranks, n_ranks * ROWS * WORDS + ROWS * WORDS)
    is_switch = kernel == "switch_kernel"
    used = (
        one_shot(ranks, parts)
        if kernel == "one_shot_kernel"
        else two_shot(ranks, parts, switch=is_switch)
    )
    if is_switch:  # the others have come already
        expected = (N_SIGNALS + 1) * n_ranks
        signals = slice(SIGNALS_AT, SIGNALS_AT + N_BLOCKS)
        for memory, after in zip(ranks.now, ranks.then, strict=True):
            memory[signals], after[signals] = expected - 1, expected
    group = ranks.put(device, has_multicast=has_multicast)
    both = streams(random, (0, 2))
    offset, scale = 32, 0.75
    hidden = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
    weight = random.normal(size=(KERNEL, WIDTH)).astype(np.float32)
    norm = random.normal(size=WIDTH).astype(np.float32)
    none = TapeView(0, 1, 0, 0)
    segments = (Segment * 2)(*[s.segment(device, none) for s in both])
    there = device.out(pad(hidden, PADDED + 16))
    out = device.out_rows(ROWS, PADDED, dtype)
    op = ConvAddNorm(
        Segments(device.put(np.frombuffer(segments, np.uint8)), 2, ROWS), Parts(), 1, 0, scale,
        ConvSlot(device.put(pad(weight, PADDED)), offset * 4, PADDED), KERNEL, there, PADDED + 16,
        device.put(pad(norm[None], PADDED)), EPS, WIDTH, out,
    )  # fmt: skip
    part = device.put(pad(parts[ranks.RANK], PADDED + 8))
    weights = NextWeights(device.put(np.zeros(9000, np.uint8)), 8976)
    args = AllReduce(group, part, PADDED + 8, op, weights)
    shared_bytes = (2 * PADDED + 4) * 4 + 8
    device.launch(f"all_reduce/{kernel}<{n_ranks}>", (N_BLOCKS,), 64, shared_bytes, args)
    ranks.check(device, used, N_SIGNALS + is_switch)
    scaled = in_rank_order(parts)[:, :WIDTH] * np.float32(scale)
    sums = np.concatenate(
        [
            hidden[s.row_begin :][: s.n_rows]
            + s.convolve(scaled[s.row_begin :][: s.n_rows], weight, offset)
            for s in both
        ]
    )
    # Sums of six terms of either sign, each up to about 10 times the root of the ranks.
    bound = 12 * 10 * np.sqrt(n_ranks) * UNIT
    check_close(device.get(there)[:, :WIDTH], sums, bound)
    normed = rms_norm(sums, norm)
    error = bound * np.abs(normed / sums) + norm_bound(normed, PADDED, dtype)
    check_close(device.read(out)[:, :WIDTH], normed, 2 * error + 1e-5 * np.abs(norm))
    for s in both:
        after = s.conv_after(device)[s.position :, offset : offset + WIDTH]
        assert (after == scaled[s.row_begin :][: s.n_rows]).all()


def shares(device: Device, n_ranks: int) -> None:
    """A reduce-scatter without multicast, then an all-gather with it."""
    random = np.random.default_rng(18)
    n_words = 29
    share = -(-n_words // n_ranks)
    parts = random.normal(size=(n_ranks, n_words, 4)).astype(np.float32)
    total = in_rank_order(parts)
    own = slice(Ranks.RANK * share, min((Ranks.RANK + 1) * share, n_words))
    ranks = Ranks(n_ranks, n_ranks * share)
    for rank in range(n_ranks):
        of_owner = slice(rank * share, min((rank + 1) * share, n_words))
        ranks.expect(rank, Ranks.RANK * share, parts[Ranks.RANK, of_owner])
        ranks.receive(rank * share, parts[rank, own])
    ranks.expect(Ranks.RANK, Ranks.RANK * share, parts[Ranks.RANK, own])
    out = device.out(np.full((share, 4), np.nan, np.float32))
    none = NextWeights(0, 0)
    group = ranks.put(device, has_multicast=False)
    scatter = Share(group, device.put(parts[Ranks.RANK]), out, n_words, none)
    device.launch(f"all_reduce/reduce_scatter_kernel<{n_ranks}>", (N_BLOCKS,), 64, 0, scatter)
    ranks.check(device, n_ranks * share)
    assert (device.get(out)[: own.stop - own.start] == total[own]).all()

    ranks = Ranks(n_ranks, n_words)
    for rank in range(n_ranks):
        if rank != Ranks.RANK:
            of_rank = slice(rank * share, min((rank + 1) * share, n_words))
            ranks.receive(rank * share, total[of_rank])
        ranks.expect(rank, own.start, total[own])
    out = device.out(np.full((n_words, 4), np.nan, np.float32))
    group = ranks.put(device, has_multicast=True)
    gather = Share(group, device.put(total[own]), out, n_words, none)
    device.launch(f"all_reduce/all_gather_kernel<{n_ranks}>", (N_BLOCKS,), 64, 0, gather)
    ranks.check(device, n_words)
    assert (device.get(out) == total).all()


def arrivals(ranks: Ranks) -> None:
    """The word by which each rank says that it is there."""
    here = np.zeros(4, np.float32)
    for rank in range(ranks.n_ranks):
        ranks.expect(rank, ranks.rank, here)
        if rank != ranks.rank:
            ranks.receive(rank, here)


def root(device: Device, n_ranks: int, rank: int) -> None:
    """What rank 0 has for all, then what it gets of all, as that rank or another."""
    random = np.random.default_rng(19)
    words = random.normal(size=(13, 4)).astype(np.float32)
    ranks = Ranks(n_ranks, n_ranks + len(words), rank)
    arrivals(ranks)
    for other in range(n_ranks if rank == 0 else 0):
        ranks.expect(other, n_ranks, words)
    if rank != 0:
        ranks.receive(n_ranks, words)
    there = device.out(words if rank == 0 else np.full_like(words, np.nan))
    group = ranks.put(device, has_multicast=n_ranks == 4)
    weights = NextWeights(device.put(np.zeros(9000, np.uint8)), 8976)
    share = Share(group, there, there, len(words), weights)
    device.launch(f"root/broadcast_kernel<{n_ranks}>", (N_BLOCKS,), 64, 0, share)
    ranks.check(device, n_ranks + len(words))
    assert (device.get(there) == words).all()

    n_rows, stride = 3, 8
    of_rank, widths = n_rows * stride // 4, [5 + other % 4 for other in range(n_ranks)]
    parts = random.normal(size=(n_ranks, n_rows, stride)).astype(np.float32)
    ranks = Ranks(n_ranks, n_ranks + n_ranks * of_rank, rank)
    arrivals(ranks)
    ranks.expect(0, n_ranks + rank * of_rank, parts[rank])
    out = np.full((n_rows, sum(widths) + 3), 7, np.float32)
    there, firsts = device.out(out), np.cumsum([0, *widths[:-1]])
    for other in range(n_ranks if rank == 0 else 0):
        if other != rank:
            ranks.receive(n_ranks + other * of_rank, parts[other])
        out[:, firsts[other] :][:, : widths[other]] = parts[other, :, : widths[other]]
    slices = [int(value) for pair in zip(firsts, widths, strict=True) for value in pair]
    gather = GatherSlices(
        ranks.put(device, has_multicast=n_ranks == 4), device.put(parts[rank]), there, n_rows,
        stride, out.shape[1], tuple(slices + [0] * (2 * MAX_RANKS - len(slices))),
    )  # fmt: skip
    device.launch(f"root/gather_kernel<{n_ranks}>", (N_BLOCKS,), 64, 0, gather)
    ranks.check(device, n_ranks + (n_ranks * of_rank if rank == 0 else 0))
    assert (device.get(there) == out).all()


CASES: dict[str, Case] = {
    **{
        f"{kernel}_{n}_ranks": partial(
            all_reduce,
            kernel=f"{kernel}_kernel",
            n_ranks=n,
            has_multicast=n != 2 or kernel == "switch",
        )
        for kernel in ("one_shot", "two_shot", "switch")
        for n in (2, 4, 8)
    },
    **{f"shares_of_{n}_ranks": partial(shares, n_ranks=n) for n in (2, 4, 8)},
    **{
        f"root_of_{n}_ranks_at_{rank}": partial(root, n_ranks=n, rank=rank)
        for n in (2, 4, 8)
        for rank in (0, 1)
    },
}
