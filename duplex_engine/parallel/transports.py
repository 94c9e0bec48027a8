"""How the ranks of a group meet, and how they add what they have computed: the choices of a load.

Owns the tables and the refusals. What is not there is refused by name, with what it would need.
"""

from __future__ import annotations

from dataclasses import dataclass

from duplex_engine.errors import BackendUnavailable, InvalidArgument
from duplex_engine.json_input import found

__all__ = ["REDUCTIONS", "TRANSPORTS", "Transport", "check_reduction", "choose_transport"]


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
    Transport("torch.distributed", ("cpu", "cuda"), "torch, and NCCL or gloo on each rank", False),
)

# reduction -> the devices that have it; None: all, as one rank adds nothing
REDUCTIONS: dict[str, tuple[str, ...] | None] = {
    "ranks": None,
    "invariant": ("cpu",),
    "switch": (),
}


def choose_transport(wanted: str, device: str) -> str:
    """The name of the transport for ranks on `device`; "auto" takes the best that is there.

    Raises:
        InvalidArgument: no transport has that name.
        BackendUnavailable: it is not there, or does not connect such ranks; the message says why.
    """
    known = {transport.name: transport for transport in TRANSPORTS}
    if wanted == "auto":
        for transport in TRANSPORTS:
            if transport.is_built and device in transport.devices:
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
