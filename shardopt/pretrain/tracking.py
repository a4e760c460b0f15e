"""What a run leaves behind while it trains: metrics.jsonl, W&B, and loss.png at the end.

A tracker that fails never stops training: it warns once, with the cause, goes on, and says at the end how
much was lost. Only what is known before the first step is an error: a folder that cannot be written, a W&B
mode that was asked for by name and cannot be had.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import shlex
import string
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from shardopt.errors import InputError, MissingExtraError
from shardopt.pretrain.section import Section

Status = Literal["finished", "interrupted", "failed"]

# The metrics that loss.png draws; the rest may have any name.
LOSS = "loss"
EVAL_LOSS = "eval_loss"

# wandb itself reports 255 for a run that was interrupted, so that its page says so.
_EXIT_CODES: dict[Status, int] = {"finished": 0, "interrupted": 255, "failed": 1}
# A dead network must not keep a job from starting, nor a finished one on its nodes; what was not sent stays
# on disk for `wandb sync`.
_INIT_TIMEOUT_SECONDS = 30.0
_FINISH_TIMEOUT_SECONDS = 300.0
# WANDB_MODE's own words, old ones included.
_ENVIRONMENT_MODES = {
    "online": "online",
    "run": "online",
    "shared": "shared",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
# Where `wandb login` may have left a key for the default host, whichever of its names was current.
_DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")


class WandbConfig(Section):
    """How the run appears in W&B."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: as WANDB_MODE says; without it online where there is an API key, else offline. Never asks."""
    project: str = "shardopt"
    entity: str | None = None
    """User or team; None: the account's default."""
    group: str | None = None
    tags: tuple[str, ...] = ()


class TrackingConfig(Section):
    """The `tracking` section."""

    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between rows of metrics."""
    wandb: WandbConfig = WandbConfig()


def warn_on_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Tracker:
    """Writes one row of metrics a logged step, on rank 0; on the other ranks every method does nothing.

    metrics.jsonl gets one JSON object a line, `step` first, at once and whole; a value that is not finite is
    null. When the run resumes at step S the rows beyond S are cut (written aside, then renamed); when it
    starts afresh, all are. So no step stands twice.

    W&B runs under one id for the life of the run folder (kept in `wandb/run-id`, and offered as `run_id` for
    the checkpoints). Its step is the run's step, declared as the x axis too. What that gives on resuming:

    - offline, every start makes another folder with the same id, whose rows begin after the checkpoint. The
      rows beyond it are cut from the folders before, unless they are uploaded already. `wandb sync` on all
      of them (`where` gives the command) makes one run.
    - online, the run is continued (`resume="allow"`). Its rows beyond the checkpoint stay: rewinding a run
      (`resume_from`) is a preview that W&B enables account by account and self-managed servers lack. wandb
      drops the repeated steps until the new rows pass them, so none stands twice, and as a resumed run
      repeats the same numbers nothing is lost. Where the config was changed, metrics.jsonl is the record.

    Args:
        folder: the run folder.
        config: the `tracking` section.
        run_config: the whole resolved config as plain data, shown by W&B.
        run_name: name in W&B and title of loss.png.
        resume_step: the step of the checkpoint that the run continues from; None where it starts afresh.
        run_id: the W&B id that the checkpoint kept, for a run folder that lost its own.
        is_main: whether this is rank 0. Construct it on all ranks under `Ranks.together`.
        warn: called with one line; by default it is printed to stderr.

    Raises:
        InputError: metrics.jsonl cannot be written, or W&B is to be online and there is no API key.
        MissingExtraError: mode is online or offline and wandb is not installed (with auto: a warning).
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        run_config: Mapping[str, Any],
        run_name: str,
        resume_step: int | None,
        *,
        run_id: str | None = None,
        is_main: bool = True,
        warn: Callable[[str], None] = warn_on_stderr,
    ) -> None:
        self._is_main = is_main
        self._folder, self._name, self._warn = folder, run_name, warn
        self._closed = not is_main
        self._last_step: int | None = resume_step
        self._failures: dict[str, int] = {}
        self._run: Any = None
        self._run_id = run_id
        self._file = -1
        self._torn = False
        if not is_main:
            return
        wandb, mode = _wandb_mode(config, warn)
        self._file = self._open_metrics(resume_step)
        if wandb is not None:
            self._run = self._start_wandb(wandb, mode, config, run_config, resume_step)

    @property
    def run_id(self) -> str | None:
        """The W&B run id; None on other ranks and where there never was W&B."""
        return self._run_id

    @property
    def metrics_path(self) -> Path:
        return self._folder / "metrics.jsonl"

    @property
    def plot_path(self) -> Path:
        return self._folder / "loss.png"

    @property
    def where(self) -> str | None:
        """The W&B page of the run, or the command that uploads an offline one; None without W&B."""
        if self._run is None:
            return None
        if self._run.offline:
            # The last star: a second start within one second gets a suffix.
            return f"wandb sync {shlex.quote(str(self._folder / 'wandb'))}/offline-run-*-{self._run_id}*"
        return self._run.url

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Write the metrics of one step, held-out ones included; what is None was not measured: left out.

        Raises:
            ValueError: `step` is not beyond the last one logged. All of a step's metrics go into one call.
        """
        if self._closed:
            return
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step {step} logged after step {self._last_step}: steps ascend, each is logged in one call"
            )
        self._last_step = step
        row = {"step": step, **{name: value for name, value in metrics.items() if value is not None}}
        self._attempt("metrics.jsonl", lambda: self._write(row))
        if self._run is not None:
            self._attempt("W&B", lambda: self._run.log(row, step=step))

    def summary(self, values: Mapping[str, float | int | str | None]) -> None:
        """Set final values on the run's page in W&B."""
        if self._run is not None:
            self._attempt("W&B", lambda: self._run.summary.update(dict(values)))

    def close(self, status: Status = "finished") -> None:
        """Draw loss.png, end the W&B run and say what was lost; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        os.close(self._file)
        self._attempt("loss.png", lambda: draw_loss(self.metrics_path, self.plot_path, self._name))
        if self._run is not None:
            self._attempt("W&B", lambda: self._run.finish(exit_code=_EXIT_CODES[status]))
        for sink, count in self._failures.items():
            if count > 1:
                self._warn(f"{sink}: {count} writes failed in all")

    def _attempt(self, sink: str, action: Callable[[], object]) -> None:
        """Run `action`; a failure is warned of once a sink, and counted."""
        try:
            action()
        except Exception as error:
            self._failures[sink] = self._failures.get(sink, 0) + 1
            if self._failures[sink] == 1:
                self._warn(f"{sink} failed, training goes on without it: {_cause(error)}")

    def _open_metrics(self, resume_step: int | None) -> int:
        """A descriptor that appends to metrics.jsonl, once the rows beyond `resume_step` are cut from it."""
        path = self.metrics_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = read_metrics(path) if resume_step is not None else []
                aside = path.with_suffix(".jsonl.tmp")
                aside.write_text(
                    "".join(json.dumps(row) + "\n" for row in kept if row["step"] <= (resume_step or 0)),
                    encoding="utf-8",
                )
                aside.replace(path)
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another run.dir") from error

    def _write(self, row: dict[str, Any]) -> None:
        plain = {name: _plain(value) for name, value in row.items()}
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        if self._torn:  # a full disk left half a line: end it, readers skip it
            line = b"\n" + line
        # One write, so that whoever follows the file sees whole lines. It may be cut short where a disk is
        # full; the second then raises with the cause.
        written = os.write(self._file, line)
        self._torn = written < len(line)
        if self._torn:
            os.write(self._file, line[written:])
            self._torn = False

    def _start_wandb(
        self,
        wandb: ModuleType,
        mode: str,
        config: TrackingConfig,
        run_config: Mapping[str, Any],
        resume_step: int | None,
    ) -> Any:
        """The W&B run, or None where it cannot be started; one that cannot go online is started offline."""
        folder = self._folder / "wandb"
        try:
            kept = folder / "run-id"
            if kept.exists():
                self._run_id = kept.read_text(encoding="utf-8").strip() or self._run_id
            self._run_id = self._run_id or os.environ.get("WANDB_RUN_ID") or _new_id()
            folder.mkdir(exist_ok=True)
            kept.write_text(self._run_id + "\n", encoding="utf-8")
        except OSError as error:
            self._warn(f"W&B is off: {_cause(error)}")
            return None
        self._attempt("cutting the W&B rows beyond the checkpoint", lambda: self._cut_offline(resume_step))
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                return self._init_wandb(wandb, attempt, config, run_config)
            except Exception as error:
                then = "the run is logged offline" if attempt != "offline" else "training goes on without it"
                self._warn(f"W&B could not be started {attempt}, {then}: {_cause(error)}")
                if attempt != "offline":
                    self._attempt("W&B", wandb.teardown)  # its service still holds the id otherwise
        return None

    def _cut_offline(self, resume_step: int | None) -> None:
        """Cut the rows beyond the checkpoint from this run's offline folders; all rows at a fresh start."""
        last = -1 if resume_step is None else resume_step
        for log in sorted(self._folder.glob(f"wandb/offline-run-*/run-{self._run_id}.wandb")):
            end = _end_of_step(log, last)
            if end is None:
                continue
            if log.with_suffix(".wandb.synced").exists():
                self._warn(f"W&B has rows beyond step {last} from {log.parent}: these steps will stand twice")
            else:
                os.truncate(log, end)  # reads as a run that ended there

    def _init_wandb(self, wandb: ModuleType, mode: str, config: TrackingConfig, run_config: Mapping[str, Any]) -> Any:
        options: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": _INIT_TIMEOUT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:  # newer than the oldest wandb that we support
            options.update(finish_timeout=_FINISH_TIMEOUT_SECONDS, finish_timeout_raises=True)
        if mode != "offline" and (key := _api_key(wandb)):
            options["api_key"] = key  # given, so that wandb has nothing to ask the terminal for
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=config.wandb.group,
            tags=config.wandb.tags or None,
            name=self._name,
            id=self._run_id,
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; lines that a crash or a full disk left half-written are skipped.

    A step that stands twice (which this module never writes) keeps its last row.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def draw_loss(metrics: Path, target: Path, title: str) -> None:
    """Draw the train loss, raw and smoothed, and the held-out loss of a metrics.jsonl as a PNG.

    Smoothing is an exponential average over about a fiftieth of the logged steps, corrected for its start.
    The first steps fall from far above: the y axis ends where the rest, all but the first twentieth, ends.
    Without any loss nothing is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    train = [(row["step"], row[LOSS]) for row in rows if row.get(LOSS) is not None]
    held_out = [(row["step"], row[EVAL_LOSS]) for row in rows if row.get(EVAL_LOSS) is not None]
    if not train and not held_out:
        return
    # Its own canvas: pyplot would choose a back end for the whole process and keep the figure.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = [step for step, _ in train], [loss for _, loss in train]
        smooth = _smooth(losses, max(1.0, len(losses) / 50))
        marker = "o" if len(train) == 1 else ""
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, marker=marker, label="train, raw")
        axes.plot(steps, smooth, color="tab:blue", linewidth=1.8, label="train, smoothed")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color="tab:red",
            marker="o",
            markersize=5,
            linewidth=1,
            linestyle="--",
            label=f"held-out ({held_out[-1][1]:.3f} at step {held_out[-1][0]})",
            zorder=3,
        )
    if len(train) >= 40:
        settled = [loss for _, loss in train[len(train) // 20 :]] + [loss for _, loss in held_out[1:]]
        low, high = min(settled), max(settled)
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    aside = target.with_suffix(".png.tmp")
    figure.savefig(aside, format="png", dpi=150)
    aside.replace(target)


def _end_of_step(log: Path, step: int) -> int | None:
    """Where in wandb's offline file the first row beyond `step` begins; None where there is none.

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


def _smooth(values: list[float], span: float) -> list[float]:
    decay, average, weight, smoothed = 1 - 1 / span, 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def _new_id() -> str:
    """Of wandb's own kind; not from the seeded generators, which every run of a config would share."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _plain(value: float | int) -> float | int | None:
    """`value` as JSON can hold it: torch's and numpy's scalars become Python's, the non-finite null."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _cause(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _wandb_mode(config: TrackingConfig, warn: Callable[[str], None]) -> tuple[ModuleType | None, str]:
    """The wandb module, None where it is not to be used, and the mode to start it in.

    A mode in the config holds. `auto` takes WANDB_MODE, then what `wandb offline` or `wandb disabled` left in
    wandb's settings, then online where there is a key, else offline.
    """
    mode: str = config.wandb.mode
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
        if config.wandb.mode != "auto":
            raise MissingExtraError("wandb", "wandb") from error
        warn(f"W&B is off: {error}. pip install 'shardopt[wandb]', or set tracking.wandb.mode=disabled")
        return None, mode
    try:
        settings = wandb.setup(wandb.Settings(silent=True, console="off")).settings
        key = _api_key(wandb) or settings.identity_token_file
    except Exception as error:
        warn(f"W&B is off, it could not be started: {_cause(error)}")
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
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for file in (Path(name).expanduser() for name in files if name):
        if not file.exists():
            continue
        try:
            entries = netrc.netrc(file)
        except (netrc.NetrcParseError, OSError):
            return None  # wandb cannot read it either, and says so
        for name in _DEFAULT_HOSTS if host in _DEFAULT_HOSTS else (host,):
            login = entries.authenticators(name)
            if login and login[2]:
                return login[2]
        return None
    return None
