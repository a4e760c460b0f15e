"""Rank processes that stay alive between tests, so that a gloo test costs milliseconds and not an import of torch.

They are forked from a server that has imported the large packages and the launcher, which starts with the first pool: a
pool, also a fresh one, takes a second or less.

    from tests.distributed.pool import on_ranks

    def body(rank, world_size, a, b):      # module-level function, runs on every rank with a process group
        ...
        return plain_data

    def test_it():
        results = on_ranks(2, body, a, b)  # [result of rank 0, result of rank 1]

A pool is made on first use for each world size and kept for the session. A rank that raises makes `on_ranks`
raise RankError with every rank's traceback; a body that hangs is killed after `timeout` seconds. In both cases
that pool is thrown away, since its process group may be out of step. `fresh=True` uses a pool of its own and
ends it: for bodies that kill a rank, or replace the process group, of which libraries keep subgroups that would be
dead for the bodies after them.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

# None of these starts a thread when it is imported; `datasets` does, and a process with threads is not forked safely.
_PRELOADED = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "matplotlib.projections",
    "matplotlib.backends.backend_agg",
    "shardopt.engines.fsdp",
    "shardopt.engines.zero",
    "shardopt.pretrain.loop",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


class RankError(AssertionError):
    pass


def _serve(rank: int, world_size: int, folder: str, connection: Any, group_timeout: float, kept: bool) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=group_timeout),
    )
    environment = dict(os.environ)
    group = dist.group.WORLD if kept else None
    modules = 0
    while True:
        try:
            job = connection.recv()
        except EOFError:
            job = None
        if job is None:
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        body, args, kwargs = job
        if len(sys.modules) != modules:  # else each collection looks through them, and DeepSpeed asks for many
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            modules = len(sys.modules)
        gc.collect()  # a ZeroOptimizer of an earlier body, beside which reductions of another do not wait
        try:
            torch.manual_seed(0)
            reply = (True, body(rank, world_size, *args, **kwargs))
            assert not kept or dist.group.WORLD is group, "the body replaced the process group: give it fresh=True"
        except BaseException:
            reply = (False, traceback.format_exc())
        if os.environ != environment:  # a body may pose as a process without a launcher
            os.environ.clear()
            os.environ.update(environment)
        connection.send(reply)


class Pool:
    def __init__(self, world_size: int, group_timeout: float = 60.0, kept: bool = False) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve, args=(rank, world_size, self.folder.name, theirs, group_timeout, kept), daemon=False
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def begin(self, body: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start `body` on every rank and wait for none."""
        for connection in self.connections:
            connection.send((body, args, kwargs))

    def run(self, body: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> list[tuple[bool, Any]]:
        self.begin(body, *args, **kwargs)
        deadline = time.monotonic() + timeout
        replies: list[tuple[bool, Any]] = []
        for connection in self.connections:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                replies.append((False, f"no answer within {timeout} s"))
                continue
            try:
                replies.append(connection.recv())
            except EOFError:
                replies.append((False, "the process died"))
        return replies

    def end(self, kill: bool = False) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                try:
                    connection.send(None)
                except OSError:
                    process.kill()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


_pools: dict[int, Pool] = {}


@atexit.register
def end_all() -> None:
    while _pools:
        _pools.popitem()[1].end()


def on_ranks(
    world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 120.0, fresh: bool = False, **kwargs: Any
) -> list[Any]:
    """`body(rank, world_size, *args, **kwargs)` on every rank; the list of what they return."""
    pool = Pool(world_size) if fresh else _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = Pool(world_size, kept=True)
    replies = pool.run(body, args, kwargs, timeout)
    failed = [f"--- rank {rank}\n{text}" for rank, (good, text) in enumerate(replies) if not good]
    if fresh:
        pool.end(kill=bool(failed))
    elif failed:
        _pools.pop(world_size).end(kill=True)
    if failed:
        raise RankError("\n".join(failed))
    return [result for _, result in replies]


def scratch() -> Path:
    """A new folder that every rank process of this machine can reach."""
    return Path(tempfile.mkdtemp(prefix="shardopt-test-"))
