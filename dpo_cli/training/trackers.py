"""A run's ``metrics.jsonl``, and the experiment trackers of accelerate that get its lines too."""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import RESUME_MUTABLE
from dpo_cli.evaluation.metrics import append_metrics
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError

PROJECT = "dpo"


def check_installed(options: TrainOptions) -> None:
    """Refuse a tracker whose package is missing before anything is computed."""
    specs = {name: importlib.util.find_spec(name) for name in options.trackers}
    if missing := [name for name, spec in specs.items() if spec is None or spec.origin is None]:  # a folder has none
        raise UsageError(f"--report-to {','.join(missing)}: not installed; run: pip install {' '.join(missing)}")


def hyperparameters(options: TrainOptions) -> dict[str, bool | int | float | str]:
    """Return the options that decide what is trained, as plain values; unset ones are left out."""
    values = {name: v for name, v in vars(options).items() if v is not None and name not in {*RESUME_MUTABLE, "output"}}
    joined = {name: ", ".join(v) if isinstance(v, list) else v for name, v in values.items()}
    return {name: v if isinstance(v, (bool, int, float)) else str(v) for name, v in joined.items()}


class MetricsLog:
    """Writes the lines of ``metrics.jsonl`` and logs them to the trackers, on rank 0.

    A tracker that fails is dropped with a warning; the run continues. ``done``: steps that a resumed run has taken.
    """

    def __init__(self, folder: Path, options: TrainOptions, reporter: Reporter, done: int = 0) -> None:
        self.file, self.reporter, self.live = folder / "metrics.jsonl", reporter, dict[str, GeneralTracker]()
        names, run_id = options.trackers if distributed.rank() == 0 else [], folder / "tracker-id"
        resumed = run_id.exists()
        if names and not resumed:
            run_id.write_text(secrets.token_hex(4))
        for name in names:
            PartialState(cpu=True)  # through which accelerate's trackers log
            with self._guarded(name):
                self.live[name] = _start(name, folder, run_id.read_text(), done + 1 if resumed else None)
                if not resumed or name != "tensorboard":
                    self.live[name].store_init_configuration(hyperparameters(options))
                self.reporter.info("tracker", name)

    def write(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Append a line; trackers get its values that are finite."""
        if distributed.rank() != 0:
            return
        append_metrics(self.file, step, values, prefix)
        finite = {prefix + name: value for name, value in values.items() if math.isfinite(value)}
        for name, tracker in list(self.live.items()):
            with self._guarded(name):
                if name == "wandb":  # its own step must not fall, as it does after a resume
                    tracker.log(finite | {"step": step})
                else:
                    tracker.log(finite, step=step)

    def close(self) -> None:
        """End the run in every tracker."""
        for name, tracker in list(self.live.items()):
            with self._guarded(name):
                tracker.finish()
                if name == "trackio":  # accelerate's leaves the run open, which prints on stdout at exit
                    sys.modules["trackio"].finish()

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
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": folder, "purge_step": purge_step},
        "wandb": {"dir": str(folder), "name": folder.name, "id": run_id, "resume": "allow"},
        "trackio": {"name": f"{folder.name}-{run_id}", "resume": "allow", "auto_log_cpu": False, "auto_log_gpu": False},
        "mlflow": {"run_name": folder.name},
    }
    project = {"tensorboard": name, "wandb": os.environ.get("WANDB_PROJECT", PROJECT)}.get(name, PROJECT)
    options["wandb"]["settings"] = {"console": "off"}  # else it captures what this process prints
    tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](project, **options[name])
    tracker.start()
    if name == "wandb":
        tracker.tracker.define_metric("*", step_metric="step")
    return tracker
