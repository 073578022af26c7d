"""Experiment trackers, by accelerate: each gets the lines of a run's ``metrics.jsonl`` as they are written."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import RESUME_MUTABLE
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError

PROJECT = "dpo"


def check_installed(options: TrainOptions) -> None:
    """Refuse a tracker whose package is missing before anything is computed.

    Raises:
        UsageError: with the command that installs it.
    """
    specs = {name: importlib.util.find_spec(name) for name in options.trackers}
    if missing := [name for name, spec in specs.items() if spec is None or spec.origin is None]:  # a folder has none
        raise UsageError(f"--report-to {','.join(missing)}: not installed; run: pip install {' '.join(missing)}")


def hyperparameters(options: TrainOptions) -> dict[str, bool | int | float | str]:
    """Return the options that decide what is trained, as plain values; unset ones are left out."""
    values = {name: v for name, v in vars(options).items() if v is not None and name not in {*RESUME_MUTABLE, "output"}}
    joined = {name: ", ".join(v) if isinstance(v, list) else v for name, v in values.items()}
    return {name: v if isinstance(v, (bool, int, float)) else str(v) for name, v in joined.items()}


class Trackers:
    """The trackers of the run in ``folder``, on rank 0. One that fails is dropped with a warning; the run continues."""

    def __init__(self, folder: Path, options: TrainOptions, reporter: Reporter) -> None:
        self.reporter, self.live = reporter, dict[str, GeneralTracker]()
        self.metrics, file = folder / "metrics.jsonl", folder / "tracker-id"
        names, resumed = options.trackers if distributed.rank() == 0 else [], file.exists()
        logged = self.metrics.read_bytes() if resumed else b""
        self.offset = len(logged)
        purge_step = json.loads(logged.splitlines()[-1])["step"] + 1 if logged else None
        if names and not resumed:
            file.write_text(secrets.token_hex(4))
        for name in names:
            PartialState(cpu=True)  # through which accelerate's trackers log
            with self._guarded(name):
                self.live[name] = _start(name, folder, file.read_text(), purge_step)
                if not resumed or name != "tensorboard":
                    self.live[name].store_init_configuration(hyperparameters(options))
                self.reporter.info("tracker", name)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.follow()
        for name, tracker in list(self.live.items()):
            with self._guarded(name):
                tracker.finish()
                if name == "trackio":  # accelerate's leaves the run open, which prints on stdout at exit
                    sys.modules["trackio"].finish()

    def follow(self) -> None:
        """Send every tracker the lines that were written since the last call; a full disk may leave half a line."""
        if not self.live or not self.metrics.exists():
            return
        with self.metrics.open("rb") as stream:
            stream.seek(self.offset)
            lines = [line for line in stream if line.endswith(b"\n")]
        self.offset += sum(map(len, lines))
        for line in lines:
            values = {name: value for name, value in json.loads(line).items() if value is not None}
            step = values.pop("step")
            for name, tracker in list(self.live.items()):
                with self._guarded(name):
                    if name == "wandb":  # its own step must not fall, as it does after a resume
                        tracker.log(values | {"step": step})
                    else:
                        tracker.log(values, step=step)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Drop a tracker that fails, and keep what it prints away from the result on stdout."""
        with redirect_stdout(sys.stderr):
            try:
                yield
            except Exception as error:  # of its library, its server, its disk
                reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
                if uri := os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/"):  # it may hold a password
                    reason = reason.replace(uri, "MLFLOW_TRACKING_URI")
                self.live.pop(name, None)
                self.reporter.warning(f"--report-to {name}: {reason}; the run continues without it")


def _start(name: str, folder: Path, run_id: str, purge_step: int | None) -> GeneralTracker:
    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker(name, folder, purge_step=purge_step)
    elif name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        settings = {"console": "off"}  # else it captures what this process prints
        tracker = WandBTracker(project, dir=str(folder), name=folder.name, id=run_id, resume="allow", settings=settings)
    elif name == "trackio":
        tracker = TrackioTracker(
            PROJECT, name=f"{folder.name}-{run_id}", resume="allow", auto_log_cpu=False, auto_log_gpu=False
        )
    else:
        tracker = MLflowTracker(PROJECT, run_name=folder.name)
    tracker.start()
    if name == "wandb":
        tracker.tracker.define_metric("*", step_metric="step")
    return tracker
