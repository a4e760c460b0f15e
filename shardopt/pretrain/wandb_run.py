"""The run's page in W&B: one id for the life of the run folder, whatever stops and resumes."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

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
_ENVIRONMENT_MODES = {"run": "online", "dryrun": "offline"}
_ENVIRONMENT_MODES |= {mode: mode for mode in ("online", "shared", "offline", "disabled")}


class WandbConfig(Section):
    """The W&B run: mode, project and labels."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: as WANDB_MODE says; without it online where there is an API key, else offline. Never asks."""
    project: str = "shardopt"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; None: the account's default."""
    group: str | None = None
    """Group of runs that W&B shows as one; None: none."""
    tags: tuple[str, ...] = ()
    """Words to find the run by."""


class WandbRun:
    """A run of W&B under the id kept in FOLDER/wandb/run-id; where W&B cannot be had, every method does nothing.

    Its step is the run's step, declared as the x axis too. No step stands twice when a run is resumed, since the
    rows of steps that were logged before are dropped: a resumed run repeats the same numbers, and metrics.jsonl,
    which is cut at the checkpoint, is the record where something was changed.

    - offline, every start makes another folder with the same id, and `wandb sync` on all of them (`where` gives
      the command) makes one run; the steps that an earlier folder has are dropped here.
    - online, the run is continued (`resume="allow"`), and wandb itself drops steps that the server has.

    Args:
        folder: the run folder.
        config: the `tracking.wandb` section.
        run_config: the whole resolved config as plain data, shown by W&B.
        name: name of the run.
        logged_step: the last step that earlier starts logged, 0 for none.
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
        logged_step: int,
        run_id: str | None,
        warn: Callable[[str], None],
    ) -> None:
        self.id, self._folder, self._run = run_id, folder, None
        self._offline_step = 0
        wandb, mode = _choose_mode(config, warn)
        if wandb is None:
            return
        try:
            self._identify(logged_step)
        except (OSError, ValueError) as error:
            warn(f"W&B is off: {cause(error)}")
            return
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
        if self._run is not None and step > self._offline_step:
            self._run.log(dict(row), step=step)

    def drop_through(self, step: int) -> None:
        """Drop rows up to `step`, which is logged already."""
        self._offline_step = max(self._offline_step, step)

    def finish(self, status: Status) -> None:
        if self._run is not None:
            self._run.finish(exit_code=_EXIT_CODES[status])

    def _identify(self, logged_step: int) -> None:
        """Find or make the run's id, and the last step that an offline folder of it may have."""
        kept = self._folder / "wandb" / "run-id"
        if kept.exists():
            run_id, _, before = kept.read_text(encoding="utf-8").partition(" ")
            self.id = run_id.strip() or self.id
            # A run stopped again before it got so far has cut its metrics meanwhile.
            logged_step = max(logged_step, int(before or 0))
        self.id = self.id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(f"{self.id} {logged_step}\n", encoding="utf-8")
        offline = any(kept.parent.glob(f"offline-run-*-{self.id}*"))
        self._offline_step = logged_step if offline else 0

    def _init(self, wandb: ModuleType, mode: str, config: WandbConfig, run_config: Mapping[str, Any], name: str) -> Any:
        run = wandb.init(
            **config.model_dump(exclude={"mode"}),
            name=name,
            id=self.id,
            resume="allow",
            mode=mode,
            dir=self._folder.resolve(),
            config=dict(run_config),
            # Somebody else's open run in this process stays theirs.
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_INIT_TIMEOUT_SECONDS,
                finish_timeout=_FINISH_TIMEOUT_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def cause(error: BaseException) -> str:
    """`error` in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _choose_mode(config: WandbConfig, warn: Callable[[str], None]) -> tuple[ModuleType | None, str]:
    """The wandb module, None where it is not to be used, and the mode to start it in.

    A mode in the config holds. `auto` takes WANDB_MODE, then what `wandb offline` or `wandb disabled` left in
    wandb's settings, then online where there is a key, else offline.
    """
    asked: str | None = config.mode
    if config.mode == "auto":
        word = os.environ.get("WANDB_MODE") or None
        if word and word not in _ENVIRONMENT_MODES:
            raise InputError(f"WANDB_MODE is {word!r}: set it to one of {', '.join(_ENVIRONMENT_MODES)}")
        asked = word and _ENVIRONMENT_MODES[word]
    if asked == "disabled":
        return None, asked
    try:
        import wandb

        # A folder called wandb, such as wandb itself makes, is importable where the package is missing.
        if not hasattr(wandb, "init"):
            raise ModuleNotFoundError("No module named 'wandb'")
    except ImportError as error:
        if config.mode != "auto":
            raise MissingExtraError("wandb", "wandb") from error
        warn(f"W&B is off: {error}. pip install 'shardopt[wandb]', or set tracking.wandb.mode=disabled")
        return None, "disabled"
    try:
        given = {} if asked is None else {"mode": asked}
        left = wandb.setup(wandb.Settings(silent=True, console="off", **given)).settings.mode
        if asked is None and left in ("offline", "disabled"):
            asked = left
        # Finds the key now, so that wandb.init has nothing to ask the terminal for.
        has_key = asked not in ("offline", "disabled") and wandb.login(prompt=False, verify=False)
    except Exception as error:
        warn(f"W&B is off, it could not be started: {cause(error)}")
        return None, "disabled"
    if asked in ("online", "shared") and not has_key:
        raise InputError(
            "W&B is to be online and there is no API key: run `wandb login`, set WANDB_API_KEY, or set "
            "tracking.wandb.mode=offline"
        )
    mode = asked or ("online" if has_key else "offline")
    return (None if mode == "disabled" else wandb), mode
