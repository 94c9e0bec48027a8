"""torch.distributed between ranks that share no memory. The only module that needs torch.

Owns the process groups: one for each channel of the group, so that lanes never wait for each other.
They are objects of their own: the default process group of this process, if it has one, is not
touched. Does not own what is sent: see `csrc/parallel/transport.h`.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from duplex_engine import _core
from duplex_engine.errors import BackendUnavailable
from duplex_engine.parallel.joining import listen

__all__ = ["CONNECT_S", "Store", "open_store", "process_groups", "transport"]

CONNECT_S = 20.0  # for ranks that are all there, with torch imported
# Interface that gloo listens at, where it should not be the one that reaches rank 0.
INTERFACE = "GLOO_SOCKET_IFNAME"
Store = Any  # a torch.distributed.Store


def transport(rank: int, n_ranks: int) -> _core.TorchTransport:
    """A rank's transport, not connected yet.

    Raises:
        BackendUnavailable: there is no torch, or one without gloo.
    """
    return _core.TorchTransport(_torch(), rank=rank, n_ranks=n_ranks)


def open_store(host: str) -> Store:
    """Rank 0's: where the ranks tell each other their addresses. It listens at `host` alone.

    Raises:
        BackendUnavailable: `host` is not of this machine.
    """
    listener = listen((host, 0))
    port = listener.getsockname()[1]
    distributed = _torch().distributed
    return distributed.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def process_groups(
    store: Store | tuple[str, int], host: str, rank: int, n_ranks: int, n_channels: int
) -> list[Any]:
    """Connects this rank with all others, which call this at the same time.

    Args:
        store: rank 0's, or the address of it.
        host: at which this rank can be reached by the others.

    Raises:
        BackendUnavailable: that took longer than CONNECT_S.
    """
    torch = _torch()
    limit = timedelta(seconds=CONNECT_S)
    gloo = torch.distributed.ProcessGroupGloo
    try:
        if isinstance(store, tuple):
            store = torch.distributed.TCPStore(*store, is_master=False, timeout=limit)
        options = gloo._Options()
        options._timeout = limit
        interface = os.environ.get(INTERFACE)
        place = {"interface": interface} if interface else {"hostname": host}
        options._devices = [gloo.create_device(**place)]
        prefix = torch.distributed.PrefixStore
        return [
            gloo(prefix(f"channel {i}", store), rank, n_ranks, options) for i in range(n_channels)
        ]
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise BackendUnavailable(
            f"transport: expected all {n_ranks} ranks to reach each other over TCP in "
            f"{CONNECT_S:g} s, found at rank {rank}, which listens at {host}: {reason}; "
            f"{INTERFACE} names another interface"
        ) from error


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(
            "transport: 'torch.distributed' needs torch, which is not installed; "
            "pip install 'duplex_engine[distributed]'"
        ) from error
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise BackendUnavailable(
            f"transport: 'torch.distributed' needs a torch with gloo, found {torch.__version__} "
            "without; pip install 'duplex_engine[distributed]'"
        )
    return torch
