"""How the ranks of a group meet, and how they add what they have computed: the choices of a load.

Owns the tables and the refusals. What is not there is refused by name, with what it would need.
"""

from __future__ import annotations

from dataclasses import dataclass

from duplex_engine.arguments import number, text
from duplex_engine.errors import BackendUnavailable, InvalidArgument
from duplex_engine.json_input import found
from duplex_engine.parallel.joining import parse_address

__all__ = [
    "REDUCTIONS",
    "REMOTE",
    "TRANSPORTS",
    "Group",
    "Transport",
    "check_reduction",
    "choose_group",
]


@dataclass(frozen=True, slots=True)
class Transport:
    """One way for ranks to meet.

    Attributes:
        devices: whose ranks it connects.
        needs: what must be there.
        is_built: whether this version has it.
    """

    name: str
    devices: tuple[str, ...]
    needs: str
    is_built: bool


# Best first.
TRANSPORTS = (
    Transport("nvls", ("cuda",), "GPUs of one NVLink domain with multicast (NVSwitch)", False),
    Transport("p2p", ("cuda",), "GPUs that can read each other's memory", False),
    Transport("shared memory", ("cpu",), "ranks that are processes of one machine", True),
    Transport("torch.distributed", ("cpu",), "torch with gloo, and TCP between the ranks", True),
)

# reduction -> the devices that have it; None: all, as one rank adds nothing
REDUCTIONS: dict[str, tuple[str, ...] | None] = {
    "ranks": None,
    "invariant": ("cpu",),
    "switch": (),
}


# The one that reaches other machines.
REMOTE = "torch.distributed"
MAX_JOIN_S = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Group:
    """How the ranks of an engine find and reach each other.

    Attributes:
        transport: a name of the table; None where there is one rank.
        address: host and port of rank 0, where workers of other machines come to; None: workers are
            started here.
        join_s: how long they may take to come and to be ready to be connected with.
    """

    n_ranks: int
    transport: str | None
    address: tuple[str, int] | None
    join_s: float


def choose_group(
    n_ranks: int, transport: object, address: object, join_s: object, device: str
) -> Group:
    """The group that the options of `Engine.load` ask for.

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
    name = None
    if n_ranks > 1 or transport != "auto":
        name = _choose_transport(text(transport, "transport"), device, place is not None)
    return Group(n_ranks, name, place, seconds)


def _choose_transport(wanted: str, device: str, is_remote: bool) -> str:
    """The name of the transport for ranks on `device`; "auto" takes the best that is there.

    Args:
        is_remote: whether workers come from other machines.

    Raises:
        InvalidArgument: no transport has that name, or it does not reach other machines.
        BackendUnavailable: it is not there, or does not connect such ranks; the message says why.
    """
    known = {transport.name: transport for transport in TRANSPORTS}
    if wanted == "auto":
        for transport in TRANSPORTS:
            reaches = not is_remote or transport.name == REMOTE
            if transport.is_built and device in transport.devices and reaches:
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
    if not transport.is_built:
        raise BackendUnavailable(
            f"transport: {wanted!r} needs {transport.needs}, and this version of the engine does "
            "not have it; leave transport out"
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
    if devices is None or device in devices:
        return
    if wanted == "switch":
        raise BackendUnavailable(
            "reduction: 'switch' adds inside an NVLink switch, which takes ranks on GPUs that this "
            "version of the engine does not have; expected 'ranks' or 'invariant'"
        )
    raise BackendUnavailable(f"reduction: {wanted!r} is not there on the device {device!r} yet")
