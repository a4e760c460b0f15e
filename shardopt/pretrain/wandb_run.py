"""The run's page in W&B: one id for the life of the run folder, whatever stops and resumes."""

from __future__ import annotations

import netrc
import os
import secrets
import shlex
import string
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

from shardopt.errors import InputError, MissingExtraError
from shardopt.pretrain.section import Section

Status = Literal["finished", "interrupted", "failed"]

# wandb itself reports 255 for a run that was interrupted, so that its page says so.
_EXIT_CODES: dict[Status, int] = {"finished": 0, "interrupted": 255, "failed": 1}
# A dead network must not keep a job from starting, nor a finished one on its nodes; what was not sent stays
# on disk for `wandb sync`.
_INIT_TIMEOUT_SECONDS = 30.0
_FINISH_TIMEOUT_SECONDS = 300.0
# WANDB_MODE's own words, old ones included.
_ENVIRONMENT_MODES = {mode: mode for mode in ("online", "shared", "offline", "disabled")}
_ENVIRONMENT_MODES |= {"run": "online", "dryrun": "offline"}
# Where `wandb login` may have left a key for the default host, whichever of its names was current.
_DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


class WandbConfig(Section):
    """The W&B run: mode, project and labels."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: as WANDB_MODE says; without it online where there is an API key, else offline. Never asks."""
    project: str = "shardopt"
    entity: str | None = None
    """User or team; None: the account's default."""
    group: str | None = None
    tags: tuple[str, ...] = ()


class WandbRun:
    """A run of W&B under the id kept in FOLDER/wandb/run-id; where W&B cannot be had, every method does nothing.

    Its step is the run's step, declared as the x axis too. What that gives on resuming:

    - offline, every start makes another folder with the same id, whose rows begin after the checkpoint. The
      rows beyond it are cut from the folders before, unless they are uploaded already. `wandb sync` on all
      of them (`where` gives the command) makes one run.
    - online, the run is continued (`resume="allow"`). Its rows beyond the checkpoint stay: rewinding a run
      (`resume_from`) is a preview that W&B enables account by account and self-managed servers lack. wandb
      drops the repeated steps until the new rows pass them, so none stands twice, and as a resumed run
      repeats the same numbers nothing is lost. Where the config was changed, metrics.jsonl is the record.

    Args:
        folder: the run folder.
        config: the `tracking.wandb` section.
        run_config: the whole resolved config as plain data, shown by W&B.
        name: name of the run.
        resume_step: the step of the checkpoint that the run continues from; None where it starts afresh.
        run_id: the id that the checkpoint kept, for a run folder that lost its own.
        warn: called with one line.

    Attributes:
        id: the run's id; None where there never was W&B.

    Raises:
        InputError: W&B is to be online and there is no API key.
        MissingExtraError: mode is online or offline and wandb is not installed (with auto: a warning).
    """

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        run_config: Mapping[str, Any],
        name: str,
        resume_step: int | None,
        run_id: str | None,
        warn: Callable[[str], None],
    ) -> None:
        self.id, self._folder, self._run = run_id, folder, None
        wandb, mode = _choose_mode(config, warn)
        if wandb is None:
            return
        kept = folder / "wandb" / "run-id"
        try:
            if kept.exists():
                self.id = kept.read_text(encoding="utf-8").strip() or self.id
            self.id = self.id or os.environ.get("WANDB_RUN_ID") or _new_id()
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(self.id + "\n", encoding="utf-8")
        except OSError as error:
            warn(f"W&B is off: {cause(error)}")
            return
        try:
            self._cut_offline(resume_step, warn)
        except Exception as error:
            warn(f"the W&B rows beyond the checkpoint could not be cut: {cause(error)}")
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._run = self._init(wandb, attempt, config, run_config, name)
                return
            except Exception as error:
                then = "the run is logged offline" if attempt != "offline" else "training goes on without it"
                warn(f"W&B could not be started {attempt}, {then}: {cause(error)}")
                if attempt != "offline":
                    wandb.teardown()  # its service still holds the id otherwise

    @property
    def where(self) -> str | None:
        """The page of the run, or the command that uploads an offline one; None without W&B."""
        if self._run is None:
            return None
        if self._run.offline:
            # The last star: a second start within one second gets a suffix.
            return f"wandb sync {shlex.quote(str(self._folder / 'wandb'))}/offline-run-*-{self.id}*"
        return self._run.url

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log(dict(row), step=step)

    def finish(self, status: Status) -> None:
        if self._run is not None:
            self._run.finish(exit_code=_EXIT_CODES[status])

    def _cut_offline(self, resume_step: int | None, warn: Callable[[str], None]) -> None:
        """Cut the rows beyond the checkpoint from this run's offline folders; all rows at a fresh start."""
        last = -1 if resume_step is None else resume_step
        for log in sorted(self._folder.glob(f"wandb/offline-run-*/run-{self.id}.wandb")):
            end = _end_of_step(log, last)
            if end is None:
                continue
            if log.with_suffix(".wandb.synced").exists():
                warn(f"W&B has rows beyond step {last} from {log.parent}: these steps will stand twice")
            else:
                os.truncate(log, end)  # reads as a run that ended there

    def _init(self, wandb: ModuleType, mode: str, config: WandbConfig, run_config: Mapping[str, Any], name: str) -> Any:
        options: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": _INIT_TIMEOUT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:  # newer than the oldest wandb that we support
            options.update(finish_timeout=_FINISH_TIMEOUT_SECONDS, finish_timeout_raises=True)
        if mode != "offline" and (key := _api_key(wandb)):
            options["api_key"] = key  # given, so that wandb has nothing to ask the terminal for
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags or None,
            name=name,
            id=self.id,
            resume="allow",
            mode=mode,
            dir=self._folder.resolve(),
            config=dict(run_config),
            # Somebody else's open run in this process stays theirs.
            reinit="create_new",
            settings=wandb.Settings(**options),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def cause(error: BaseException) -> str:
    """`error` in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _end_of_step(log: Path, step: int) -> int | None:
    """Offset in wandb's offline file of the first row beyond `step`; None where there is none.

    The file is a LevelDB log: a header of 7 bytes, then 32 KiB blocks of records (crc32, 16-bit length, kind;
    whole or in first, middle and last parts), each a protobuf message; a killed run's file ends anywhere.
    """
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # its classes are made when it is imported: no types
    data = log.read_bytes()
    if not data.startswith(b":W&B"):
        raise ValueError(f"{log} is not in the format that is known here")
    at, start, message = 7, 7, b""
    while (left := 32768 - at % 32768) and at + 7 <= len(data):
        if left < 7:  # too short for a record: padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind in (1, 2):  # whole, first
            start, message = at, b""
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # whole, last
            record = messages.Record.FromString(message)
            if record.HasField("history") and record.history.step.num > step:
                return start
    return None


def _new_id() -> str:
    """Of wandb's own kind; not from the seeded generators, which every run of a config would share."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _choose_mode(config: WandbConfig, warn: Callable[[str], None]) -> tuple[ModuleType | None, str]:
    """The wandb module, None where it is not to be used, and the mode to start it in.

    A mode in the config holds. `auto` takes WANDB_MODE, then what `wandb offline` or `wandb disabled` left in
    wandb's settings, then online where there is a key, else offline.
    """
    mode: str = config.mode
    if mode == "disabled":
        return None, mode
    if mode == "auto" and (word := os.environ.get("WANDB_MODE")):
        if word not in _ENVIRONMENT_MODES:
            raise InputError(f"WANDB_MODE is {word!r}: set it to one of {', '.join(_ENVIRONMENT_MODES)}")
        mode = _ENVIRONMENT_MODES[word]
        if mode == "disabled":
            return None, mode
    try:
        import wandb

        # A folder called wandb, such as wandb itself makes, is importable where the package is missing.
        if not hasattr(wandb, "init"):
            raise ModuleNotFoundError("No module named 'wandb'")
    except ImportError as error:
        if config.mode != "auto":
            raise MissingExtraError("wandb", "wandb") from error
        warn(f"W&B is off: {error}. pip install 'shardopt[wandb]', or set tracking.wandb.mode=disabled")
        return None, mode
    try:
        settings = wandb.setup(wandb.Settings(silent=True, console="off")).settings
        key = _api_key(wandb) or settings.identity_token_file
    except Exception as error:
        warn(f"W&B is off, it could not be started: {cause(error)}")
        return None, mode
    if mode == "auto":
        mode = settings.mode if settings.mode in ("offline", "disabled") else "online" if key else "offline"
    elif mode in ("online", "shared") and key is None:
        raise InputError(
            "W&B is to be online and there is no API key: run `wandb login`, set WANDB_API_KEY, or set "
            "tracking.wandb.mode=offline"
        )
    return (None if mode == "disabled" else wandb), mode


def _api_key(wandb: ModuleType) -> str | None:
    """The key that wandb would find by itself, without asking the terminal as it does."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    settings = wandb.setup().settings
    if settings.api_key:
        return settings.api_key
    host = urlsplit(settings.base_url).netloc
    paths = (Path(name).expanduser() for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc") if name)
    file = next((path for path in paths if path.exists()), None)
    try:
        entries = netrc.netrc(file) if file else None
    except (netrc.NetrcParseError, OSError):  # wandb cannot read it either, and says so
        return None
    names = _DEFAULT_HOSTS if host in _DEFAULT_HOSTS else (host,)
    logins = (entries.authenticators(name) for name in names) if entries else ()
    return next((login[2] for login in logins if login and login[2]), None)
