"""How the ranks of a group meet, and how they add what they have computed: the choices of a load.

Owns the tables and the refusals. What is not there is refused by name, with what it would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duplex_engine.arguments import MAX_INT32, integer
from duplex_engine.errors import BackendUnavailable, InvalidArgument
from duplex_engine.json_input import found

__all__ = [
    "MAX_RANKS",
    "REDUCTIONS",
    "TRANSPORTS",
    "Transport",
    "check_parts",
    "check_reduction",
    "choose_gpus",
    "choose_transport",
]

MAX_RANKS = 8
GPUS = ("cuda", "cuda_host")  # the second: the same kernels on the host, in a build with tests


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
    Transport("nvls", ("cuda",), "GPUs of one NVLink domain with multicast (NVSwitch)", True),
    Transport("p2p", ("cuda",), "GPUs that can read each other's memory", True),
    Transport("shared memory", ("cpu",), "ranks that are processes of one machine", True),
    Transport("torch.distributed", ("cpu", "cuda"), "torch, and NCCL or gloo on each rank", False),
)

# reduction -> the devices that have it; None: all, as one rank adds nothing
REDUCTIONS: dict[str, tuple[str, ...] | None] = {
    "ranks": None,
    "invariant": ("cpu", "cuda"),
    "switch": (),
}


def _kind(device: str) -> str:
    return "cuda" if device in GPUS else device


def choose_transport(wanted: str, device: str) -> str:
    """The name of the transport for ranks on `device`; "auto" takes the best that is there. Of GPUs
    the core alone can tell which one that is: for them "auto" stays.

    Raises:
        InvalidArgument: no transport has that name.
        BackendUnavailable: it is not there, or does not connect such ranks; the message says why.
    """
    device = _kind(device)
    known = {transport.name: transport for transport in TRANSPORTS}
    if wanted == "auto" and device == "cuda":
        return wanted
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
    if devices is None or _kind(device) in devices:
        return
    if wanted == "switch":
        raise BackendUnavailable(
            "reduction: 'switch' adds inside an NVLink switch, which takes ranks on GPUs that this "
            "version of the engine does not have; expected 'ranks' or 'invariant'"
        )
    raise BackendUnavailable(f"reduction: {wanted!r} is not there on the device {device!r} yet")


def check_parts(n_parts: int, n_ranks: int, device: str) -> None:
    """Raises BackendUnavailable where ranks on `device` cannot have several parts each; `n_parts`
    is of all together."""
    if device in GPUS and n_parts != n_ranks:
        raise BackendUnavailable(
            f"reduction: 'invariant' cuts this model into {n_parts} parts, and a GPU computes one "
            f"so far; expected tensor_parallel={n_parts}, found {n_ranks}; or take "
            "reduction='ranks', or the device 'cpu'"
        )


def choose_gpus(gpus: Sequence[int] | None, n_ranks: int, device: str) -> list[int]:
    """The number of each rank's GPU; -1: the current one, or none.

    Raises:
        InvalidArgument: not as many numbers as ranks, one twice, or no GPU is asked for. Whether a
            GPU is there, its rank finds out.
    """
    if gpus is None:
        return list(range(n_ranks)) if device in GPUS and n_ranks > 1 else [-1] * n_ranks
    if device not in GPUS:
        raise InvalidArgument(f"gpus: expected none on the device {device!r}, found {found(gpus)}")
    try:
        numbers = [integer(gpu, "gpus", high=MAX_INT32) for gpu in gpus]
    except TypeError:
        numbers = []
    if len(numbers) != n_ranks or len(set(numbers)) != n_ranks:
        raise InvalidArgument(
            f"gpus: expected {n_ranks} different numbers, one for each rank, found {found(gpus)}"
        )
    return numbers
