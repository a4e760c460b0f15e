"""Checkpoints in stores that have no rename: the same guarantees as on a disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from scripts import damage
from shardopt import AdEMAMix, checkpoint, cli
from shardopt.checkpoint import DamagedError, Keep, Saver, blocks, folders
from shardopt.checkpoint.document import DOCUMENT, records_of
from shardopt.checkpoint.export import WHOLE
from shardopt.checkpoint.store import as_folder, listing, put
from shardopt.engines.state import ModuleState
from shardopt.errors import InputError, MissingExtraError
from tests.checkpoint import made, objects
from tests.distributed.pool import on_ranks

ALONE = made.ranks_here()


class Killed(BaseException):
    """The process is gone: nothing that it does from here on reaches the store."""


class ClientError(Exception):
    """As the clients of stores have them, no OSError."""


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    objects.faults.before = lambda what, path: None


@pytest.fixture(params=["memory", "objects"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4()}/ck" if request.param == "memory" else f"objects://{tmp_path}/ck"


def _strike(number: int, kinds: tuple[str, ...], error: BaseException, *, once: bool = False) -> list[str]:
    """Let the requests of `kinds` from that number on raise `error`; the list gets what was asked for."""
    asked: list[str] = []

    def before(what: str, path: str) -> None:
        if what in kinds:
            asked.append(f"{what} {path.rpartition('/')[2]}")
            if len(asked) == number + 1 or (len(asked) > number and not once):
                raise error

    objects.faults.before = before
    return asked


def _spare() -> None:
    objects.faults.before = lambda what, path: None


def _saver(url: str, keep: int | Keep = 3) -> Saver:
    return Saver(url, keep, ranks=ALONE, asynchronous=False, allow_nonfinite=True)


def _save(url: str, *steps: int, keep: int | Keep = 3, **document: Any) -> None:
    saver = _saver(url, keep)
    for step in steps:
        saver.save(step, made.State(made.slices(made.whole), ALONE), {"step": step, **document})
    saver.close()


def _step(found: Path | None) -> int:
    """The step of a checkpoint, every value of which is right."""
    assert found is not None
    step = made.load(0, 1, found, made.rows)["step"]
    assert step == folders.step_of(found.name)
    return step


def _strays(root: Path) -> list[str]:
    """Files that no document names."""
    left = []
    for folder in (root / name for name in listing(root) if folders.step_of(name) is not None):
        there = listing(folder)
        named = {DOCUMENT, *records_of(checkpoint.read_document(folder))} if DOCUMENT in there else set()
        left += [f"{folder.name}/{name}" for name in there.keys() - named]
    return left


def test_a_store_keeps_replaces_and_finds_checkpoints_as_a_disk_does(url: str) -> None:
    assert checkpoint.latest(url) is None
    assert checkpoint.latest_intact(url, ALONE) is None
    with Saver(url, Keep(1, every=2), ranks=ALONE, asynchronous=True, allow_nonfinite=True) as saver:
        for step in (1, 2, 3, 4, 5, 5):
            extra = {"rng": torch.tensor([step])}
            saver.save(step, made.State(made.slices(made.whole), ALONE), {"step": step}, extra)
    root = as_folder(url)
    assert list(listing(root)) == ["step-00000002", "step-00000004", "step-00000005"]
    assert _strays(root) == []
    assert len(listing(root / "step-00000005")) == 3
    assert _step(checkpoint.latest(url)) == _step(checkpoint.latest_intact(url, ALONE)) == 5
    assert checkpoint.load_extras(f"{url}/step-00000005", ["rng"])["rng"].tolist() == [5]
    assert checkpoint.read_document(f"{url}/step-00000004")["step"] == 4
    assert checkpoint.find_damage(f"{url}/step-00000004", ALONE) is None


def test_a_folder_of_something_else_is_not_replaced(url: str) -> None:
    _save(url, 1)
    folder = as_folder(url) / "step-00000001"
    put(folder / "notes.txt", b"mine")
    with pytest.raises(InputError, match=r"step-00000001 holds something else: move it away"):
        _save(url, 1)
    assert folders.is_complete(folder)


def _two_ranks(rank: int, world_size: int, root: Path) -> Any:
    ranks = made.ranks_here(rank, world_size)
    url = f"objects://{root}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 128)  # many blocks, read by many threads
        saver = Saver(url, 3, ranks=ranks, asynchronous=True, allow_nonfinite=True)
        for step in (1, 2):
            saver.save(step, made.State(made.slices(made.flat, rank, world_size), ranks), {"step": step})
        saver.wait()
        for cut in (made.rows, made.strided, made.whole):
            made.load(rank, world_size, checkpoint.latest_intact(url, ranks), cut)
        if rank == 0:
            data = next(root.glob("step-00000002/rank-00001-*.data"))
            damage._flip(data.parent, data.name, data.stat().st_size - 1, 0)
        dist.barrier()
        said: list[str] = []
        found = checkpoint.latest_intact(url, ranks, said.append)
        made.load(rank, world_size, found, made.rows)
        saver.save(2, made.State(made.slices(made.rows, rank, world_size), ranks), {"step": 2})
        saver.close()
        made.load(rank, world_size, checkpoint.latest_intact(url, ranks), made.flat)
        return str(found), said, _strays(as_folder(url))


def test_ranks_share_a_store(tmp_path: Path) -> None:
    root = tmp_path / "ck"
    first, second = on_ranks(2, _two_ranks, root)
    assert first == second
    assert first[0] == f"objects://{root}/step-00000001"
    assert f"is set aside as objects://{root}/step-00000002.damaged, and the one before it is used" in first[1][0]
    assert "rank-00001-" in first[1][0]
    assert first[2] == []
    assert len(list((root / "step-00000002.damaged").iterdir())) == 4  # nothing is lost of it


def test_every_damage_in_a_store_is_found(tmp_path: Path) -> None:
    root = tmp_path / "ck"
    url = f"objects://{root}"
    _save(url, 1)
    _save(url, 2)
    old, new = root / "step-00000001", root / "step-00000002"
    kept = {path.name: path.read_bytes() for path in new.iterdir()}
    found = 0
    for kind, what, plant in damage.plants(new, old, flips=2, types=20):
        if kind in ("missing", "swap") and not (kind == "missing" and "checkpoint.json" not in what):
            continue  # without a document it is no checkpoint; other saves' files have other names
        if what == "everything":
            continue
        plant(new)
        if {p.name: p.read_bytes() for p in new.iterdir() if p.is_file()} != kept:
            found += 1
            with pytest.raises(DamagedError):
                checkpoint.load(as_folder(url) / new.name, made.State(made.slices(made.whole, filled=False), ALONE))
            assert checkpoint.find_damage(as_folder(url) / new.name, ALONE) is not None, what
        for path in new.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        for name, content in kept.items():
            (new / name).write_bytes(content)
    assert found > 50


def _new_step(url: str) -> None:
    _save(url, 3)


def _same_step(url: str) -> None:
    _save(url, 2, again=True)


def _old_ones_go(url: str) -> None:
    _save(url, 3, 4, keep=1)


def _set_aside(url: str) -> None:
    root = Path(url.removeprefix("objects://"))
    if (data := next(root.glob("step-00000002/rank-*.data"), None)) is not None:
        damage._flip(data.parent, data.name, 200, 0)
    assert _step(checkpoint.latest_intact(url, ALONE)) == 1


@pytest.mark.parametrize("action", [_new_step, _same_step, _old_ones_go, _set_aside])
def test_killed_between_any_two_requests_a_whole_checkpoint_is_left(
    tmp_path: Path, action: Callable[[str], None]
) -> None:
    for number in range(100):
        url = f"objects://{tmp_path}/{number}"
        _save(url, 1, 2)
        asked = _strike(number, objects.WRITES, Killed())
        with contextlib.suppress(Killed):
            action(url)
        _spare()
        if action is _set_aside:
            assert _step(checkpoint.latest_intact(url, ALONE)) == 1
        else:
            whole = [folder for folder in Path(tmp_path / str(number)).iterdir() if (folder / DOCUMENT).exists()]
            assert all(map(folders.is_complete, whole))
            assert _step(checkpoint.latest_intact(url, ALONE, lambda said: pytest.fail(said))) >= 2
        _save(url, 9)
        assert _step(checkpoint.latest_intact(url, ALONE)) == 9
        assert _strays(as_folder(url)) == []
        if action is _set_aside:  # nothing of it is lost
            assert len({p.name for p in (tmp_path / str(number)).glob("step-00000002.damaged*/*")}) == 3
        if len(asked) <= number:
            break
    assert 5 <= number < 100


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ClientError("SlowDown")])
def test_a_put_that_fails_is_an_error_and_the_checkpoint_before_stays(tmp_path: Path, error: Exception) -> None:
    url = f"objects://{tmp_path}/ck"
    _save(url, 1)
    for number in range(3):
        asked = _strike(number + 1, ("put",), error)  # after the one that tries whether the store can be written
        with pytest.raises(InputError, match=r"cannot write .*(No space left on device|SlowDown)"):
            _save(url, 1, again=True)
        assert len(asked) == number + 2
        _spare()
        assert "again" not in made.load(0, 1, as_folder(url) / "step-00000001", made.rows)
        assert _strays(as_folder(url)) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), ClientError("503")])
def test_a_store_in_trouble_is_an_error_and_nothing_is_set_aside_or_deleted(tmp_path: Path, error: Exception) -> None:
    url = f"objects://{tmp_path}/ck"
    _save(url, 1, 2)
    before, reads = sorted(tmp_path.rglob("*")), ("list", "info", "get")
    for action in (
        lambda: checkpoint.latest_intact(url, ALONE, lambda said: pytest.fail(said)),
        lambda: checkpoint.latest(url),
        lambda: made.load(0, 1, as_folder(url) / "step-00000002", made.rows),
    ):
        asked = _strike(10**6, reads, error)
        action()
        assert len(asked) > 2
        for number in range(len(asked)):
            _strike(number, reads, error, once=True)
            with pytest.raises(InputError, match=r"cannot read .*not taken for damage") as caught:
                action()
            assert not isinstance(caught.value, DamagedError)
            assert sorted(tmp_path.rglob("*")) == before


def test_a_url_of_a_local_file_is_a_path(tmp_path: Path) -> None:
    from upath import UPath

    _save(f"file://{tmp_path}/a%20b", 1)
    assert _step(tmp_path / "a b" / "step-00000001") == 1
    assert as_folder(UPath(tmp_path)) == as_folder(f"file://{tmp_path}") == as_folder(str(tmp_path)) == tmp_path
    given = UPath("memory://x/y", mine=3)
    assert as_folder(given).storage_options == {"mine": 3, "use_listings_cache": False}
    assert str(as_folder(as_folder(given)) / "z") == "memory://x/y/z"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3:/b/x", "a URL begins s3://"),
        ("memory:b", "a URL begins memory://"),
        ("file:/x", "a URL begins file://"),
        ("://x", "names no protocol"),
        ("file://~/x", "is absolute, file:///home"),
        ("file://rel/x", "is absolute, file:///home"),
        ("memory://b/x?y", r"has no \? and no #"),
        ("file:///b/x#y", r"has no \? and no #"),
    ],
)
def test_what_is_nearly_a_url_is_refused(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        as_folder(url)


def test_urls_are_read_as_others_read_them() -> None:
    assert as_folder("MEMORY://b/x") == as_folder("memory://b/x")
    assert as_folder("FILE://localhost/b/a%20b%23") == Path("/b/a b#")
    assert as_folder("notes:x/y") == Path("notes:x/y")


def test_a_url_that_cannot_work_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"stor://x/y: .*stor"):
        checkpoint.latest("stor://x/y")
    with pytest.raises(InputError, match=r"memry://x: .*; did you mean memory\?"):
        checkpoint.latest("memry://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"s3://x/y: .*[Ii]nstall s3fs.*: pip install s3fs"):
        checkpoint.latest("s3://x/y")
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'shardopt\[fsspec\]'"):
        checkpoint.latest("memory://x/y")


def test_commands_take_urls(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        return status, *capsys.readouterr()

    run = url.removesuffix("/ck")
    with Saver(f"{run}/checkpoints", 3, ranks=ALONE, asynchronous=False) as saver:
        for step in (1, 2):
            saver.save(step, _trained(), {"step": step})
    folder = as_folder(run)
    put(folder / "model" / "config.json", b"{}")
    put(folder / "checkpoints" / "step-00000003" / f"rank-00000-{'0' * 32}.data", b"cut")
    status, text, _ = say("checkpoint", "list", run)
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["1", "2", "step-00000003"]
    assert text.split()[-1] == "partial"
    status, text, _ = say("checkpoint", "inspect", run, "--verify")
    assert status == 0
    assert "step        2" in text
    assert "every checksum is right" in text
    assert say("export", run, f"{run}/out", "--step", "1")[0] == 0
    assert sorted(listing(folder / "out")) == ["config.json", "model.safetensors"]
    assert "exists already" in say("export", run, f"{run}/out")[2]
    assert say("export", run, str(tmp_path / "local"))[0] == 0
    assert (tmp_path / "local" / "model.safetensors").read_bytes() == (folder / "out/model.safetensors").read_bytes()
    places = (run, f"{run}/again", str(tmp_path / "x.pt"), f"{run}/y.pt")
    for source, target in pairwise(places):
        form = "torch" if ".pt" in target else "shardopt"
        status, _, error = say("checkpoint", "convert", source, target, "--to", form)
        assert status == 0, error
    (tmp_path / "y.pt").write_bytes((folder / "y.pt").read_bytes())
    there, here = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("y.pt", "x.pt"))
    assert there.keys() == here.keys() == {"weight", "bias"}
    assert all(torch.equal(there[name], here[name]) for name in here)
    there = say("checkpoint", "inspect", f"{run}/again", "--verify")[1]
    assert "every checksum is right" in there
    titan = tmp_path / "titan"
    assert say("checkpoint", "convert", run, str(titan), "--to", "torchtitan")[0] == 0
    for path in filter(Path.is_file, titan.rglob("*")):
        put(folder / "titan" / path.relative_to(titan).as_posix(), path.read_bytes())
    for number, source in enumerate(("y.pt", "titan", "again")):
        status, _, error = say(
            "checkpoint", "convert", f"{run}/{source}", str(tmp_path / f"{number}.pt"), "--to", "torch"
        )
        assert status == 0, error
        back = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert all(torch.equal(back["model"][name], here[name]) for name in here)
        assert set(back["optimizer"]["state"][0]) == {"m1", "m2", "nu", "step"}
    for source, said in (("none.pt", "is not there"), ("model", "is none of: a checkpoint or run of shardopt, a .pt")):
        told = say("checkpoint", "convert", f"{run}/{source}", str(tmp_path / "z"))[2]
        assert " ".join(told.split()).startswith(f"shardopt: {run}/{source} {said}")


def _trained() -> ModuleState:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = AdEMAMix(model.named_parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return ModuleState(optimizer, model)


def _export(url: str, value: float, max_file_bytes: int) -> None:
    values = {name: torch.full((2,), value) for name in "abc"}
    checkpoint.export_safetensors(
        url, iter(values.items()), ALONE, max_file_bytes=max_file_bytes, complete=lambda f: (f / "config.json").touch()
    )


def test_an_export_that_is_replaced_is_never_taken_for_whole_meanwhile(tmp_path: Path) -> None:
    whole: list[float] = []
    for number in range(100):
        folder = tmp_path / str(number)
        _export(f"objects://{folder}", 1.0, 8)
        asked = _strike(number, objects.WRITES, Killed())
        with contextlib.suppress(Killed):
            _export(f"objects://{folder}", 2.0, 2**30)
        _spare()
        names = {path.name for path in folder.iterdir()}
        if "config.json" in names:  # without which it is no model
            index = folder / "model.safetensors.index.json"
            files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {WHOLE}
            read = [value for file in files for value in load_file(folder / file).values()]
            assert len(read) == 3
            whole.append(read[0][0].item())
            assert all((value == whole[-1]).all() for value in read)
        if len(asked) <= number:
            break
    assert sorted(names) == ["config.json", WHOLE]
    assert set(whole) == {1.0, 2.0}
    assert 5 < number < 100
