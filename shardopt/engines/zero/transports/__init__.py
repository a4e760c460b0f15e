"""Transports of ZeRO's gradients and weights: three behind one interface."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from shardopt.distributed import all_gather_objects
from shardopt.engines.zero.transports import shared_memory
from shardopt.engines.zero.transports.backends import NativeCommunicator, SocketsCommunicator
from shardopt.engines.zero.transports.base import Communicator, Part, PeerError, Reduction

__all__ = ["Communicator", "Part", "PeerError", "Reduction", "communicator"]

_next_channel: dict[str, int] = {}  # by the name of the process group


def communicator(
    group: dist.ProcessGroup | None, device: torch.device, timeout: timedelta | None = None, *, in_flight: int = 1
) -> Communicator:
    """A communicator for tensors on `device`, apart from all others on `group`. A collective.

    Args:
        group: the ranks; None is a single process.
        timeout: of every wait; None is the process group's own.
        in_flight: reduce-scatters, and all-gathers, that are in flight at most at a time.

    Returns:
        On gloo shared memory where all ranks may read each other's, else sockets; the backend's collectives elsewhere.
    """
    if group is None or dist.get_world_size(group) == 1:
        return SocketsCommunicator(group, timeout)
    # "cpu:gloo,cuda:nccl"
    backends = dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
    if device.type == "meta":  # simulated ranks cannot agree on anything
        return NativeCommunicator(group, timeout)
    # A rank may have counted alone, where its construction of something failed.
    channel = max(all_gather_objects(_next_channel.get(group.group_name, 0), group))
    _next_channel[group.group_name] = channel + 1
    if backends.get(device.type) == "gloo":
        joined = shared_memory.join(group, timeout, channel, in_flight) if device.type == "cpu" else None
        return joined or SocketsCommunicator(group, timeout, channel)
    if channel and dist.get_world_size(group) == dist.get_world_size():
        # One group runs its collectives in the order of their launch, which need not be the same on all ranks for two
        # optimizers. A part of the ranks cannot make a group without the others (NCCL splits the communicator of all).
        patience = group._get_backend(device).options._timeout
        group = dist.new_group(timeout=patience, backend=backends[device.type])
    return NativeCommunicator(group, timeout, channel, in_stream=device.type == "cuda")
