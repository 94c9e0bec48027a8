"""How the ranks of a group meet, and how they add what they have computed: the choices of a load.

Owns the tables and the refusals. What is not there is refused by name, with what it would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from duplex_engine.arguments import MAX_INT32, found, integer, number, text
from duplex_engine.errors import BackendUnavailable, InvalidArgument
from duplex_engine.parallel.joining import parse_address

__all__ = [
    "MAX_RANKS",
    "REDUCTIONS",
    "REMOTE",
    "TRANSPORTS",
    "Group",
    "Transport",
    "check_reduction",
    "choose_group",
]

MAX_RANKS = 8
GPUS = ("cuda", "cuda_host")  # the second: the same kernels on the host, in a build with tests


@dataclass(frozen=True, slots=True)
class Transport:
    """One way for ranks to meet.

    Attributes:
        devices: whose ranks it connects.
        needs: what must be there.
    """

    name: str
    devices: tuple[str, ...]
    needs: str


# Best first.
TRANSPORTS = (
    Transport("nvls", ("cuda",), "GPUs of one NVLink domain with multicast (NVSwitch)"),
    Transport("p2p", ("cuda",), "GPUs that can read each other's memory"),
    Transport("shared memory", ("cpu", "cuda"), "ranks that are processes of one machine"),
    Transport("torch.distributed", ("cpu", "cuda"), "torch with gloo, and TCP between the ranks"),
)

# reduction -> the devices that have it; None: all, as one rank adds nothing
REDUCTIONS: dict[str, tuple[str, ...] | None] = {
    "ranks": None,
    "invariant": ("cpu", "cuda"),
    "switch": ("cuda",),
}


# The one that reaches other machines.
REMOTE = "torch.distributed"
MAX_JOIN_S = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Group:
    """How the ranks of an engine find and reach each other.

    Attributes:
        gpus: of each rank, so there are as many ranks; -1: none, or the current one.
        transport: a name of the table, or "auto" for the best that connects GPUs themselves.
        address: host and port of rank 0, where workers of other machines come to; None: workers are
            started here.
        join_s: how long they may take to come and to be ready to be connected with.
    """

    gpus: list[int]
    transport: str
    address: tuple[str, int] | None
    join_s: float

    @property
    def n_ranks(self) -> int:
        return len(self.gpus)


def choose_group(
    n_ranks: int,
    transport: object,
    address: object,
    join_s: object,
    gpus: Any,
    device: str,
    reduction: str = "ranks",
) -> Group:
    """The group that the options of `Engine.load` ask for, the reduction checked before.

    Raises:
        InvalidArgument: an option cannot be used.
        BackendUnavailable: the transport is not there.
    """
    seconds = number(join_s, "join_s")
    if not 0 < seconds <= MAX_JOIN_S:
        raise InvalidArgument(
            f"join_s: expected more than 0 seconds, a week at most, found {seconds}"
        )
    place = None if address is None else parse_address(address)
    if place is not None and n_ranks == 1:
        raise InvalidArgument(
            "address: expected tensor_parallel of 2 or more with it, found 1; leave it out"
        )
    name = text(transport, "transport")
    if n_ranks > 1 or name != "auto":
        name = _choose_transport(name, device, place is not None)
    if reduction == "switch" and (n_ranks == 1 or name not in ("auto", "nvls")):
        raise InvalidArgument(
            "reduction: 'switch' adds inside an NVLink switch; expected tensor_parallel of 2, 4 or "
            f"8 and transport='nvls' with it, found {n_ranks} and {name!r}"
        )
    return Group(_choose_gpus(gpus, n_ranks, device, place is not None), name, place, seconds)


def _kind(device: str) -> str:
    return "cuda" if device in GPUS else device


def _choose_transport(wanted: str, device: str, is_remote: bool) -> str:
    """The name of the transport for ranks on `device`; "auto" takes the best that is there. Of GPUs
    of one machine the core alone can tell which one that is: for them "auto" stays.

    Args:
        is_remote: whether workers come from other machines.

    Raises:
        InvalidArgument: no transport has that name, or it does not reach other machines.
        BackendUnavailable: it is not there, or does not connect such ranks; the message says why.
    """
    device = _kind(device)
    known = {transport.name: transport for transport in TRANSPORTS}
    if wanted == "auto" and device == "cuda" and not is_remote:
        return wanted
    if wanted == "auto":
        for transport in TRANSPORTS:
            reaches = not is_remote or transport.name == REMOTE
            if device in transport.devices and reaches:
                return transport.name
        raise BackendUnavailable(
            f"tensor_parallel: no transport connects ranks on the device {device!r} yet; "
            "load with device='cpu', or with tensor_parallel=1"
        )
    if wanted not in known:
        names = ", ".join(repr(name) for name in ("auto", *known))
        raise InvalidArgument(f"transport: expected one of {names}, found {found(wanted)}")
    transport = known[wanted]
    if device not in transport.devices:
        raise BackendUnavailable(
            f"transport: {wanted!r} connects ranks on {' and '.join(transport.devices)} "
            f"({transport.needs}), found the device {device!r}"
        )
    if is_remote and wanted != REMOTE:
        raise InvalidArgument(
            f"transport: expected {REMOTE!r} with an address, found {wanted!r}, which does not "
            "reach other machines"
        )
    return wanted


def check_reduction(wanted: str, device: str) -> None:
    """Raises InvalidArgument for an unknown reduction, BackendUnavailable for one that `device`
    does not have."""
    if wanted not in REDUCTIONS:
        names = ", ".join(repr(name) for name in REDUCTIONS)
        raise InvalidArgument(f"reduction: expected one of {names}, found {found(wanted)}")
    devices = REDUCTIONS[wanted]
    if devices is None or _kind(device) in devices:
        return
    if wanted == "switch":
        raise BackendUnavailable(
            "reduction: 'switch' adds inside an NVLink switch and takes ranks on GPUs, found the "
            f"device {device!r}; expected 'ranks' or 'invariant'"
        )
    raise BackendUnavailable(f"reduction: {wanted!r} is not there on the device {device!r} yet")


def _choose_gpus(
    gpus: Sequence[int] | None, n_ranks: int, device: str, is_remote: bool
) -> list[int]:
    """The number of each rank's GPU on its machine; -1: the current one, or none.

    Raises:
        InvalidArgument: not as many numbers as ranks, one twice on one machine, or no GPU is asked
            for. Whether a GPU is there, its rank finds out.
    """
    if gpus is None:
        is_several = device in GPUS and n_ranks > 1 and not is_remote
        return list(range(n_ranks)) if is_several else [-1] * n_ranks
    if device not in GPUS:
        raise InvalidArgument(f"gpus: expected none on the device {device!r}, found {found(gpus)}")
    try:
        numbers = [integer(gpu, "gpus", high=MAX_INT32) for gpu in gpus]
    except TypeError:
        numbers = []
    if len(numbers) != n_ranks or (len(set(numbers)) != n_ranks and not is_remote):
        kind = "" if is_remote else "different "
        raise InvalidArgument(
            f"gpus: expected {n_ranks} {kind}numbers, one for each rank, found {found(gpus)}"
        )
    return numbers
