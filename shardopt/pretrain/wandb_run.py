"""The run's page in W&B: one id for the life of the run folder, whatever stops and resumes."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from shardopt.checkpoint.store import is_local
from shardopt.errors import InputError, MissingExtraError
from shardopt.pretrain.sink import Sink, Status
from shardopt.pretrain.tracking import WandbConfig

# wandb itself reports 255 for a run that was interrupted, so that its page says so.
_EXIT_CODES: dict[Status, int] = {"finished": 0, "interrupted": 255, "failed": 1}
# A dead network must not keep a job from starting, nor a finished one on its nodes; what was not sent stays
# on disk for `wandb sync`.
_INIT_TIMEOUT_SECONDS = 30.0
_FINISH_TIMEOUT_SECONDS = 300.0
# WANDB_MODE's own words, old ones included.
_ENVIRONMENT_MODES = {"run": "online", "dryrun": "offline"}
_ENVIRONMENT_MODES |= {mode: mode for mode in ("online", "shared", "offline", "disabled")}


class WandbRun(Sink):
    """A run of W&B under the id kept in FOLDER/wandb/run-id; where W&B cannot be had, every method does nothing.

    Its step is the run's step, declared as the x axis too. No step stands twice when a run is resumed, since the
    rows of steps that were logged before are dropped: a resumed run repeats the same numbers, and metrics.jsonl,
    which is cut at the checkpoint, is the record where something was changed.

    - offline, every start makes another folder with the same id, and `wandb sync` on all of them (`where` gives
      the command) makes one run; the steps that an earlier start has logged offline are dropped here.
    - online, the run is continued (`resume="allow"`), and wandb itself drops steps that the server has.

    Args:
        folder: the run folder.
        config: the `tracking.wandb` section.
        run_config: the whole resolved config as plain data, shown by W&B.
        name: name of the run.
        logged_step: the last step that earlier starts logged, 0 for none.
        samples: the samples of text that earlier starts logged, as `step` and `text`.
        run_id: the id that the checkpoint kept, for a run folder that lost its own.
        warn: called with one line.

    Attributes:
        id: the run's id; None where there never was W&B.
        where: the page of the run, or the command that uploads an offline one; None without W&B.

    Raises:
        InputError: W&B is to be online and there is no API key.
        MissingExtraError: mode is online or offline and wandb is not installed (with auto: a warning).
    """

    name = "W&B"

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        run_config: Mapping[str, Any],
        name: str,
        logged_step: int,
        run_id: str | None,
        warn: Callable[[str], None],
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.id, self._folder, self._run = run_id, folder, None
        self._offline_step, self._artifacts = 0, config.artifacts
        self._samples = [[row["step"], row["text"]] for row in samples]
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
                self._wandb, self._run = wandb, self._init(wandb, attempt, config, run_config, name)
                self._note(logged_step, offline=self._run.offline)
                return
            except Exception as error:
                then = "the run is logged offline" if attempt != "offline" else "training goes on without it"
                warn(f"W&B could not be started {attempt}, {then}: {cause(error)}")
                if attempt != "offline":
                    wandb.teardown()  # its service still holds the id otherwise

    @property
    def where(self) -> str | None:  # type: ignore[override]
        if self._run is None:
            return None
        if self._run.offline:
            # The last star: a second start within one second gets a suffix.
            return f"wandb sync {shlex.quote(str(self._folder / 'wandb'))}/offline-run-*-{self.id}*"
        return self._run.url

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        if self._run is not None and step > self._offline_step:
            self._run.log(dict(row), step=step)

    def sample(self, step: int, text: str) -> None:
        self._samples.append([step, text])
        if self._run is not None:  # a table stands for all rows of its own
            self.log(step, {"step": step, "samples": self._wandb.Table(["step", "text"], self._samples)})

    def keep(self, kind: Literal["checkpoint", "export"], folder: Path) -> None:
        if self._run is None or self._artifacts not in ("all", kind):
            return
        name = re.sub(r"[^\w.-]", "-", f"{self._run.name}-{kind}")
        artifact = self._wandb.Artifact(name, type="model" if kind == "export" else kind)
        if is_local(folder):
            artifact.add_dir(str(folder))
        else:  # it is in a store already
            artifact.add_reference(str(folder))
        self._run.log_artifact(artifact)

    def rewind(self, step: int, last: int) -> None:
        """Keep what is logged, and drop the rows up to `last` that come again."""
        self._offline_step = max(self._offline_step, last)

    def close(self, status: Status, summary: Mapping[str, float | int]) -> None:
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=_EXIT_CODES[status])

    def _identify(self, logged_step: int) -> None:
        """Find or make the run's id, and the last step that an earlier start has logged offline."""
        kept = self._folder / "wandb" / "run.json"
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        self.id = before.get("id") or self.id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        # A run stopped again before it got so far has cut its metrics meanwhile.
        self._offline_step = max(logged_step, before["logged_step"]) if before.get("offline") else 0
        kept.parent.mkdir(parents=True, exist_ok=True)

    def _note(self, logged_step: int, offline: bool) -> None:
        """Write down for later starts what this one has found, and whether its rows stay on this disk."""
        kept, logged_step = self._folder / "wandb" / "run.json", max(logged_step, self._offline_step)
        offline = offline or self._offline_step > 0
        kept.write_text(json.dumps({"id": self.id, "logged_step": logged_step, "offline": offline}), encoding="utf-8")

    def _init(self, wandb: ModuleType, mode: str, config: WandbConfig, run_config: Mapping[str, Any], name: str) -> Any:
        run = wandb.init(
            **config.model_dump(exclude={"mode", "artifacts"}),
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
