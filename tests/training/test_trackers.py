"""Experiment trackers get what metrics.jsonl gets, once and in order, and none of them ends a run."""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from accelerate import PartialState
from accelerate.tracking import GeneralTracker

from dpo_cli.config.options import TrainOptions
from dpo_cli.evaluation.metrics import read_metrics, truncate_metrics
from dpo_cli.training import trackers
from dpo_cli.training.trackers import MetricsLog, check_installed, hyperparameters
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import NotWrittenError, UsageError
from tests.helpers import Cli

Scalars = dict[str, dict[int, list[float]]]  # by name and step: each value


def scalars(folder: Path) -> Scalars:
    """What TensorBoard itself reads from the event files of one run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: Scalars = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(name, {}).setdefault(event.step, []).append(event.value)
    return found


def expected(run: Path) -> Scalars:
    """What is in the metrics of a run, each value once."""
    found: Scalars = {}
    for row in read_metrics(run / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step" and value is not None:
                found.setdefault(name, {})[row["step"]] = [pytest.approx(value, rel=1e-6)]
    return found


# ---- the command ------------------------------------------------------------------------------------------------

SMALL = ("--output", "run", "--max-steps", 4, "--batch-size", 2, "--kl", "none", "--eval-steps", 2, "--json")


@pytest.fixture
def command(tiny: Path, tmp_path: Path, train_rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """`dpo train` of a few pairs."""
    for name, rows in (("train", train_rows[:8]), ("held-out", train_rows[8:12])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        "train",
        "--model",
        tiny,
        "--data",
        "train.jsonl",
        "--eval-data",
        "held-out.jsonl",
        "--output",
        "run",
        *SMALL,
    )


def test_tensorboard_has_every_number_of_the_metrics(dpo: Cli, command: tuple[Any, ...], tmp_path: Path) -> None:
    out = dpo(*command, "--report-to", "tensorboard")
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["steps"] == 4
    assert "tracker     tensorboard\n" in out.stderr
    run = tmp_path / "run"
    shown = scalars(run / "tensorboard")
    assert shown == expected(run)
    assert list(shown["loss"]) == [1, 2, 3, 4] and list(shown["eval_loss"]) == [0, 2, 4]
    (hparams,) = run.glob("tensorboard/*/hparams.yml")
    assert "beta: 0.1\n" in hparams.read_text() and "output" not in hparams.read_text()


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("tensorbord", "--report-to tensorbord: must be one or more of tensorboard, wandb, mlflow, trackio, "
         "separated by commas, or none; did you mean 'tensorboard'?"),
        ("mlflow,W&B", "--report-to mlflow,W&B: must be"),
        ("none,mlflow", "--report-to none,mlflow: must be"),
        ("", "--report-to : must be"),
    ],
)  # fmt: skip
def test_an_unknown_tracker_is_refused_with_the_nearest_word(tracker: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        TrainOptions(data=["pairs.jsonl"], report_to=tracker)
    assert message in str(raised.value)


def test_a_missing_tracker_is_told_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its name, which W&B leaves where it ran, does not pass for the package."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UsageError, match="--report-to wandb: not installed; run: pip install wandb"):
        check_installed(TrainOptions(data=["pairs.jsonl"], report_to="wandb"))


def test_hyperparameters_are_plain_and_decide_what_is_trained() -> None:
    options = TrainOptions(data=["a.jsonl", "b.jsonl"], output=Path("here"), report_to="mlflow")
    told = hyperparameters(options)
    assert told["data"] == "a.jsonl, b.jsonl" and told["beta"] == 0.1 and told["wpo"] is False
    assert not {"output", "cache_dir", "report_to", "lora_rank", "max_steps"} & set(told)
    assert all(isinstance(value, (bool, int, float, str)) for value in told.values())


# ---- whatever happens -------------------------------------------------------------------------------------------


class Listener(GeneralTracker):
    """A tracker that keeps what it gets, prints, and fails at the steps in ``bad``."""

    requires_logging_directory = False
    tracker = None

    def __init__(self, name: str, bad: set[int]) -> None:
        self.name, self.bad = name, bad
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.options: dict[str, Any] = {}
        self.finished = False
        super().__init__()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.options = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        print("a tracker prints")
        if step in self.bad:
            raise ConnectionError("no answer from https://me:secret@host\nafter ten attempts")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Listener]:
    """All trackers that are made, in order; mlflow fails at step 2."""
    found: list[Listener] = []

    def make(name: str, *_: Any) -> GeneralTracker:
        found.append(Listener(name, {2} if name == "mlflow" else set()))
        return found[-1]

    monkeypatch.setattr(trackers, "_start", make)
    return found


def start(folder: Path, names: str, done: int = 0) -> closing[MetricsLog]:
    PartialState(cpu=True)  # accelerate's trackers log through it
    folder.mkdir(exist_ok=True)
    return closing(MetricsLog(folder, TrainOptions(data=["pairs.jsonl"], report_to=names), Reporter(), done))


def take_steps(log: MetricsLog, *steps: int) -> None:
    """Steps of a run, each with a line of metrics."""
    for step in steps:
        log.write(step, {"loss": 1 / step, "grad_norm": float("nan")})


def test_each_line_is_logged_once_and_in_order(made: list[Listener], tmp_path: Path) -> None:
    """Held-out lines too; what is no finite number is left out, but for the file."""
    with start(tmp_path, "tensorboard") as log:
        log.write(0, {"loss": 0.5}, "eval_")
        take_steps(log, 1, 2)
        log.write(2, {"loss": 0.25}, "eval_")
    (only,) = made
    rows = [(0, {"eval_loss": 0.5}), (1, {"loss": 1.0}), (2, {"loss": 0.5}), (2, {"eval_loss": 0.25})]
    assert only.rows == rows and only.finished and only.options["beta"] == 0.1
    lines = [(line.pop("step"), line) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert lines == [
        (step, values if step == 0 or "eval_loss" in values else values | {"grad_norm": None}) for step, values in rows
    ]


def test_a_tracker_that_fails_ends_neither_run_nor_others(
    made: list[Listener], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is reported once, without the password in its address; stdout stays the result's."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host/")
    with start(tmp_path, "mlflow,tensorboard") as log:
        take_steps(log, 1, 2, 3)
    out, err = capsys.readouterr()
    message = "warning: --report-to mlflow: no answer from MLFLOW_TRACKING_URI; the run continues without it"
    assert out == "" and err.count(message) == 1 and "secret" not in err
    assert [[step for step, _ in each.rows] for each in made] == [[1], [1, 2, 3]]


def test_a_tracker_that_cannot_start_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_start", MagicMock(side_effect=ValueError("api_key not configured")))
    with start(tmp_path, "wandb") as log:
        take_steps(log, 1)
    assert capsys.readouterr().err.count("api_key not configured") == 1


def test_only_rank_0_reports(made: list[Listener], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.utils.distributed.rank", lambda: 1)
    with start(tmp_path, "trackio") as log:
        take_steps(log, 1)
    assert not made


def test_a_line_that_is_not_written_is_not_logged(
    made: list[Listener], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run's error is not hidden."""
    with pytest.raises(NotWrittenError), start(tmp_path, "tensorboard") as log:
        take_steps(log, 1)
        monkeypatch.setattr(trackers, "append_metrics", MagicMock(side_effect=NotWrittenError("no space left")))
        take_steps(log, 2)
    assert made[0].finished and made[0].rows == [(1, {"loss": 1.0})]


def test_wandb_draws_over_the_steps_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own count would drop the steps that a resumed run repeats."""
    run = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", MagicMock(init=lambda **_: run))
    with start(tmp_path, "wandb") as log:
        take_steps(log, 1, 2)
    run.define_metric.assert_called_once_with("*", step_metric="step")
    rows = [{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}]
    assert run.log.call_args_list == [call(row, step=None) for row in rows]


def test_tensorboard_draws_one_curve_of_a_resumed_run(tmp_path: Path) -> None:
    """Killed after step 3 and taken back to step 1: steps 2 and 3 come again, and replace the first ones."""
    with start(tmp_path, "tensorboard") as log:
        take_steps(log, 1, 2, 3)
    truncate_metrics(tmp_path / "metrics.jsonl", 1)
    with start(tmp_path, "tensorboard", done=1) as log:
        take_steps(log, 2, 3, 4)
    assert scalars(tmp_path / "tensorboard") == {"loss": {1: [1.0], 2: [0.5], 3: [pytest.approx(1 / 3)], 4: [0.25]}}
