"""Messages of a process that cannot join the process group."""

import time
from datetime import timedelta
from threading import Thread
from unittest import mock

import pytest
import torch.distributed as dist

from shardopt.distributed import Ranks, _attempt
from shardopt.errors import InputError
from shardopt.pretrain import progress
from tests.distributed.pool import RankError, on_ranks


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_single_process_needs_no_process_group(alone):
    ranks = Ranks.start("cpu", timeout_minutes=0.5)
    assert (ranks.rank, ranks.world_size, ranks.distributed) == (0, 1, False)
    assert ranks.timeout == timedelta(seconds=30)
    assert (ranks.sum([2.0]), ranks.gather("a"), ranks.from_main(3), ranks.any(True)) == ([2.0], ["a"], 3, True)
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "first"}, "the environment variable RANK is 'first', not a number: start with torchrun"),
        ({"RANK": "0"}, "WORLD_SIZE not set, MASTER_ADDR not set, MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}, "MASTER_PORT 99999"),
    ],
)
def test_failed_start_names_what_to_change(alone, environment, message):
    for name, value in environment.items():
        alone.setenv(name, value)
    with pytest.raises(InputError, match=message) as raised:
        Ranks.start("cpu")
    assert "torchrun" in str(raised.value)


def test_restarted_attempt_does_not_read_the_store_of_the_one_before(alone):
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agents.port)}
    for name, value in (environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        alone.setenv(name, value)
    found = []

    def init_process_group(backend, store, **_):
        found.append(store.check(["address"]))
        store.set("address", backend)

    alone.setattr(dist, "init_process_group", init_process_group)
    for _ in range(2):
        Ranks.start("cpu")
    assert found == [False, False]


def test_ranks_agree_on_an_attempt_whatever_those_before_have_left_in_the_store():
    """As on nodes that count restarts apart; a rank that comes before rank 0 finds the offer of the attempt before."""
    store, timeout = dist.HashStore(), timedelta(seconds=20)
    store.set_timeout(timedelta(seconds=5))  # of the rank 0 that nobody answers

    def attempt(first):
        names = [None] * 3
        threads = [Thread(target=lambda r=r: names.__setitem__(r, _attempt(store, r, 3, timeout))) for r in range(3)]
        for rank in first, *({0, 1, 2} - {first}):
            threads[rank].start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        return names

    names = [attempt(first) for first in (0, 1, 2)]
    assert all(name is not None and of == [name] * 3 for of in names for name in of)
    assert len({name for of in names for name in of}) == 3
    store.set("shardopt/attempt", "of one that nobody has joined")
    with pytest.raises(RuntimeError, match=r"rank 0 has not answered rank 1 within 0:00:00\.05"):
        _attempt(store, 1, 2, timedelta(seconds=0.05))


def _sums(rank, world_size):
    return Ranks.current().sum([2.0**24 + rank, 1e300, 0.1])


def test_sums_over_ranks_are_those_of_doubles():
    assert on_ranks(2, _sums) == [[2.0**25 + 1, 2e300, 0.2]] * 2


def _joins_anew(rank, world_size, folder):
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/anew", rank=rank, world_size=world_size)


def test_body_that_replaces_the_process_group_does_not_leave_it_to_the_next_one(tmp_path):
    with pytest.raises(RankError, match="the body replaced the process group: give it fresh=True"):
        on_ranks(1, _joins_anew, tmp_path)
    on_ranks(1, _joins_anew, tmp_path, fresh=True)


def _last_checkpoint(rank, world_size, root):
    """What the end of a run says on each rank where only rank 0's disk does not answer."""

    def latest(root):
        if rank == 0:
            raise OSError(5, "Input/output error")

    with mock.patch.object(progress.checkpoint, "latest", latest), pytest.raises(Exception) as raised:
        progress.saved(root, 3, Ranks.current())
    return str(raised.value)


def test_what_rank_0_alone_reads_from_a_disk_in_trouble_reaches_all_ranks(tmp_path):
    first, second = on_ranks(2, _last_checkpoint, tmp_path)
    assert "Input/output error" in first
    assert "Input/output error" in second
