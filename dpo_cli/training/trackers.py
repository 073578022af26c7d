"""Experiment trackers, by accelerate: each is told the lines of a run's ``metrics.jsonl``, in order and once.

The file is the truth and the trackers follow it. How far each of them is stands in ``trackers.json`` beside it, so that
a resumed run goes on with the tracker's own run and tells what that lacks, all of it to a tracker that comes late.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from dpo_cli.config.options import RESUME_MUTABLE, TrainOptions
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import Interrupted, UsageError
from dpo_cli.utils.files import to_json

PROJECT = "dpo"


def check_installed(options: TrainOptions) -> None:
    """Refuse a tracker that is not there before anything is computed.

    Raises:
        UsageError: with the command that installs what is missing.
    """
    if missing := [name for name in options.trackers if not _installed(name)]:
        raise UsageError(f"--report-to {','.join(missing)}: not installed; run: pip install {' '.join(missing)}")


def _installed(name: str) -> bool:
    """Whether the package is there. A folder of its name, such as the one in which W&B keeps runs, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def hyperparameters(options: TrainOptions) -> dict[str, bool | int | float | str]:
    """The options that decide what is trained, as plain values; those that are left open are left out."""
    values = dataclasses.asdict(options)
    told = {name: v for name, v in values.items() if name not in {*RESUME_MUTABLE, "output"} and v is not None}
    joined = {name: ", ".join(v) if isinstance(v, list) else v for name, v in told.items()}
    return {name: v if isinstance(v, (bool, int, float)) else str(v) for name, v in joined.items()}


class Trackers:
    """The trackers of the run in ``folder``; of several ranks the first one has them all.

    What goes wrong in one of them is told, and ends neither the run nor the others.
    """

    def __init__(self, folder: Path, options: TrainOptions, reporter: Reporter) -> None:
        self.folder, self.reporter = folder, reporter
        self.state = folder / "trackers.json"
        self.known = _read(self.state)  # by name: its own run, and how many lines that was told
        self.live: dict[str, GeneralTracker] = {}
        for name in options.trackers if distributed.rank() == 0 else ():
            with self._guarded(name):
                self._start(name, options)
        metrics = folder / "metrics.jsonl"
        if self.live:
            metrics.touch()
        self.lines = metrics.open("rb") if self.live else None
        self.seen = 0

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.follow()
        finally:
            for name, tracker in list(self.live.items()):
                with self._guarded(name):
                    _finish(tracker, kind)
            if self.lines:
                self.lines.close()

    def follow(self) -> None:
        """Tell every tracker the lines that it does not have yet."""
        for line in self._whole_lines():
            self.seen += 1
            row = json.loads(line)
            step = row.pop("step")
            values = {name: value for name, value in row.items() if value is not None}
            for name, tracker in list(self.live.items()):
                if self.known[name]["told"] < self.seen:
                    with self._guarded(name):
                        _log(tracker, values, step)
                        self.known[name]["told"] = self.seen
            self._note()

    def _whole_lines(self) -> Iterator[bytes]:
        """The lines that were not read yet, up to one that is cut short: a full disk leaves half of it."""
        if self.lines:
            while (line := self.lines.readline()).endswith(b"\n"):
                yield line
            self.lines.seek(-len(line), os.SEEK_CUR)

    def _start(self, name: str, options: TrainOptions) -> None:
        known = self.known.get(name)
        own, told = (known["run"], known["told"]) if known else (secrets.token_hex(4), 0)
        tracker, where = _make(name, self.folder, own, new=known is None)
        tracker.start()
        self.live[name] = tracker  # not before: to end what did not start may end a run of the user's
        if isinstance(tracker, WandBTracker):
            tracker.tracker.define_metric("*", step_metric="step")
        if known is None or name == "trackio":  # it replaces the options with those of each start
            tracker.store_init_configuration(hyperparameters(options))
        if known is None and name == "mlflow":
            own = tracker.tracker.info.run_id
        self.known[name] = {"run": own, "told": told}
        self._note()
        self.reporter.info("tracker", f"{name}: {where}")

    def _note(self) -> None:
        """Write how far all are. It is not synced: after a power cut a line that is told twice does no harm."""
        temporary = self.state.with_name(f".{self.state.name}.tmp")
        with suppress(OSError):  # the metrics, which stand beside it, will tell of it
            temporary.write_text(to_json(self.known) + "\n", encoding="utf-8")
            temporary.replace(self.state)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Go on without a tracker that fails, and keep what it prints away from the result on stdout."""
        with redirect_stdout(sys.stderr):
            try:
                yield
            except Exception as error:  # of its library, its server, its disk
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                if uri := os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/"):  # it may hold a password
                    reason = reason.replace(uri, "MLFLOW_TRACKING_URI")
                told = f"--report-to {name}: {reason}; the run goes on without it, and --resume tells it the rest"
                self.reporter.warning(told)
                if tracker := self.live.pop(name, None):
                    with suppress(Exception):  # it may be the same again
                        _finish(tracker, type(error))


def _make(name: str, folder: Path, own: str, new: bool) -> tuple[GeneralTracker, str]:
    """A tracker that goes on with its run ``own``, or begins it, and where to look at that. It is not started yet."""
    if name == "tensorboard":
        return TensorBoardTracker(name, folder), f"tensorboard --logdir {shlex.quote(str(folder))}"
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        settings = {"console": "off"}  # else it captures what this process prints
        wandb = WandBTracker(project, dir=str(folder), name=folder.name, id=own, resume="allow", settings=settings)
        return wandb, f"project {project}, run {own}"
    if name == "trackio":
        title = f"{folder.name}-{own}"
        trackio = TrackioTracker(PROJECT, name=title, resume="allow", auto_log_cpu=False, auto_log_gpu=False)
        return trackio, f"trackio show --project {PROJECT}; its run is {title}"
    return _make_mlflow(folder, None if new else own)


def _make_mlflow(folder: Path, own: str | None) -> tuple[GeneralTracker, str]:
    """MLflow on the server that its environment names, else in a data base below the run's folder."""
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    if "MLFLOW_TRACKING_URI" in os.environ:
        server = MLflowTracker(experiment, run_id=own, run_name=folder.name)
        return server, f"experiment {experiment} at MLFLOW_TRACKING_URI"
    store = folder.absolute() / "mlflow"
    store.mkdir(exist_ok=True)
    local = _LocalMLflow(experiment, (store / "artifacts").as_uri(), own, run_name=folder.name)
    local.uri = f"sqlite:///{store / 'mlflow.db'}"
    return local, f"mlflow ui --backend-store-uri {shlex.quote(local.uri)}"


class _LocalMLflow(MLflowTracker):  # type: ignore[misc]
    """MLflow in the data base ``uri``, which stands in the environment while this runs, and must not outlast it.

    The next run of the process would take it for a server that the user named.
    """

    uri = ""

    def start(self) -> None:
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        try:
            super().start()
        except BaseException:
            mlflow.set_tracking_uri(None)
            raise


def _log(tracker: GeneralTracker, values: dict[str, Any], step: int) -> None:
    """Tell one line; to W&B its step too is a value, as its own count takes no step that is lower than its last."""
    if isinstance(tracker, WandBTracker):
        tracker.log(values | {"step": step})
    else:
        tracker.log(values, step=step)


def _finish(tracker: GeneralTracker, kind: type[BaseException] | None) -> None:
    """End the tracker's run; W&B and MLflow keep whether it failed, MLflow also whether someone stopped it."""
    if isinstance(tracker, TrackioTracker):
        import trackio

        trackio.finish()  # accelerate's leaves the run open, and the end of the process tells of that on stdout
    elif isinstance(tracker, WandBTracker):
        tracker.tracker.finish(exit_code=0 if kind is None else 1)
    elif isinstance(tracker, MLflowTracker):
        import mlflow

        stopped = kind and issubclass(kind, (Interrupted, KeyboardInterrupt))
        try:
            mlflow.end_run("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")
        finally:
            if isinstance(tracker, _LocalMLflow):
                mlflow.set_tracking_uri(None)
    else:
        tracker.finish()


def _read(state: Path) -> dict[str, Any]:
    """What is known of the trackers' runs; nothing, where the file or its part is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads(state.read_text(encoding="utf-8"))
        entries = found.items() if isinstance(found, dict) else ()
        return {name: entry for name, entry in entries if _is_whole(entry)}
    return {}


def _is_whole(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("run"), str) and isinstance(entry.get("told"), int)
