"""This process among the ranks of a run: start, agree with the others, stop."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from shardopt.errors import InputError, StorageError
from shardopt.watchdog import Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others. A single process (world size 1) may have no process group at all.

    Every wait ends after the process group's timeout. Methods that say "A collective" are called by all ranks, in the
    same order.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    distributed: bool
    owns_group: bool = False  # whether `start` made the process group, so that `stop` ends it
    timeout: timedelta = timedelta(minutes=10)  # of every wait for another rank
    watchdog: Watchdog | None = None  # of a process group that `start` made

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def start(cls, device: str = "auto", timeout_minutes: float = 10.0) -> Ranks:
        """Join the process group that torchrun describes in the environment, or stand alone without one.

        Args:
            device: "auto" takes CUDA where there is one (NCCL, with gloo beside it for CPU tensors), else "cpu".
            timeout_minutes: how long a collective, or whatever else waits for another rank, may wait before it fails.

        Raises:
            InputError: there is no such device, or the processes cannot find each other.
        """
        rank, world_size, local_rank = _integer("RANK", 0), _integer("WORLD_SIZE", 1), _integer("LOCAL_RANK", 0)
        where = _device(device, local_rank)
        distributed = "RANK" in os.environ
        owns_group = distributed and not dist.is_initialized()
        timeout = timedelta(minutes=timeout_minutes)
        watchdog = None
        if owns_group:
            store = _init_process_group(where, timeout)
            watchdog = Watchdog(store, rank, world_size, timeout)
        return cls(rank, world_size, local_rank, where, distributed, owns_group, timeout, watchdog)

    @classmethod
    def current(cls) -> Ranks:
        """The processes of the default process group, which something else has made; this one alone without one."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, local_rank, device, False)
        if dist.get_backend() == "gloo":
            device = torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device, True)

    def stop(self) -> None:
        """Destroy the process group that `start` made."""
        if self.watchdog is not None:
            self.watchdog.close()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def watched(self) -> AbstractContextManager[None]:
        """Around a step: see Watchdog.watched."""
        return self.watchdog.watched() if self.watchdog is not None else nullcontext()

    def explain(self, error: BaseException) -> str:
        """Where every rank is, if `error` is of a wait that ended in vain: see Watchdog.explain. Else empty."""
        return self.watchdog.explain(error) if self.watchdog is not None else ""

    def sum(self, values: list[float]) -> list[float]:
        """The sum over ranks of each value, in float64. A collective."""
        if not self.distributed:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Reduce `flag` over all ranks: true where any rank has it true. A collective."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """All-gather a value that can be pickled: every rank's, in rank order. A collective."""
        return all_gather_objects(value, dist.group.WORLD) if self.distributed else [value]

    def gather_to_main(self, value: T) -> list[T] | None:
        """Gather a value that can be pickled: every rank's, in rank order, on rank 0; None elsewhere. A collective."""
        if not self.distributed:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return gathered

    def scatter_from_main(self, values: list[T] | None) -> T:
        """Scatter rank 0's values, which can be pickled: each rank gets its own. A collective."""
        if not self.distributed:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, values, src=0)
        return box[0]

    def from_main(self, value: T) -> T:
        """Broadcast rank 0's value, which can be pickled. A collective."""
        if not self.distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def ask_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; its value, which can be pickled, or its error on every rank. A collective."""
        found = self.together(lambda: action() if self.is_main else None)
        return cast(T, self.from_main(found))

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raises on any rank, raise on every rank. A collective.

        Without it a rank that fails alone (an unwritable disk, a corpus that is missing on one node) leaves the
        others waiting in their next collective until the timeout.

        Returns:
            What `action` returned on this rank.

        Raises:
            InputError: the action raised an InputError on some rank; its message, once.
            RuntimeError: it raised something else on another rank. The failing rank raises its own error.
        """
        error: Exception | None = None
        try:
            result = action()
        except Exception as e:
            error = e
        raise_on_all_ranks(error, dist.group.WORLD if self.distributed else None)
        return result


def raise_on_all_ranks(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank of `group` (None: this process alone) if any of them has an error. A collective.

    Raises:
        InputError: some rank's error is an InputError; its message. (A StorageError stays one.)
        RuntimeError: another rank's error is something else. This rank's own error is raised as it is.
    """
    told = next((kind for kind in (StorageError, InputError) if isinstance(error, kind)), None)
    mine = None if error is None else (told, type(error).__name__, str(error))
    reports = all_gather_objects((dist.get_rank() if group is not None else 0, mine), group)
    if error is not None:
        raise error
    for rank, report in reports:
        if report is not None:
            told, kind, message = report
            raise told(message) if told else RuntimeError(f"rank {rank} failed: {kind}: {message}")


def all_gather_objects(value: T, *groups: dist.ProcessGroup | None) -> list[T]:
    """Every rank's `value`, over `groups` one after the other (None: this process alone). A collective."""
    values = [value]
    for group in groups:
        if group is not None and dist.get_backend(group) != "fake":  # simulated ranks do not answer
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, values, group=group)
            values = [each for part in gathered for each in part]
    return values


def _integer(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment variable {variable} is {text!r}, not a number: start with torchrun")
    return int(text)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch sees no GPU: set run.device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; lower --nproc_per_node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this attempt of the job: the same on all of its ranks, and another at every attempt.

    torchrun hands a restarted attempt the store of the one before, with the addresses of dead processes in it. Its
    TORCHELASTIC_RESTART_COUNT tells attempts apart on one node only: a node does not count the restarts that another
    one's failure made. So rank 0 offers a name, each rank answers to it with a token of its own, and takes the name
    when rank 0 has confirmed that token; a name of an attempt before confirms none.

    Raises:
        RuntimeError: a rank has not answered within `timeout`.
    """
    offer, token = "shardopt/attempt", uuid.uuid4().hex
    if rank == 0:
        store.set(offer, token)
        for other in range(1, world_size):
            answer = store.get(f"{token}/{other}").decode()
            store.set(f"{token}/{answer}", "")
        return token
    deadline, pause = time.monotonic() + timeout.total_seconds(), 0.01
    while time.monotonic() < deadline:
        name = store.get(offer).decode()
        store.set(f"{name}/{rank}", token)
        if store.check([f"{name}/{token}"]):
            return name
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    raise RuntimeError(f"rank 0 has not answered rank {rank} within {timeout}")


def _init_process_group(device: torch.device, timeout: timedelta) -> dist.Store:
    """Make the default process group, and return the store by which its ranks have met."""
    on_gpu = device.type == "cuda"
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(_attempt(store, rank, world_size, timeout), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        size, address, port = (os.environ.get(v, "not set") for v in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        library = "NCCL" if on_gpu else "GLOO"
        raise InputError(
            f"this process could not join the others (WORLD_SIZE {size}, MASTER_ADDR {address}, MASTER_PORT {port}): "
            f"start all of them, with torchrun; let every machine reach that address and port; and where a machine "
            f"has several networks name the right one in {library}_SOCKET_IFNAME. {type(error).__name__}: {error}"
        ) from error
    return store
