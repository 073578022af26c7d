"""Experiment trackers get what metrics.jsonl gets, once and in order, and none of them ends a run."""

import json
import os
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from accelerate.tracking import GeneralTracker

from dpo_cli.config.options import TrainOptions
from dpo_cli.evaluation.metrics import append_metrics, read_metrics, truncate_metrics
from dpo_cli.training import trackers
from dpo_cli.training.trackers import Trackers, check_installed, hyperparameters
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import Interrupted, NotWrittenError, UsageError
from tests.conftest import Cli

Told = dict[str, dict[int, list[float]]]  # by name and step: each value that was told


def scalars(folder: Path) -> Told:
    """What TensorBoard itself reads from the event files of one run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: Told = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(name, {}).setdefault(event.step, []).append(event.value)
    return found


def expected(run: Path) -> Told:
    """What is in the metrics of a run, each value once."""
    found: Told = {}
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
    assert "tracker     tensorboard: tensorboard --logdir run\n" in out.stderr
    run = tmp_path / "run"
    told = scalars(run / "tensorboard")
    assert told == expected(run)
    assert list(told["loss"]) == [1, 2, 3, 4] and list(told["eval_loss"]) == [0, 2, 4]
    (hparams,) = run.glob("tensorboard/*/hparams.yml")
    assert "beta: 0.1\n" in hparams.read_text() and "output" not in hparams.read_text()


@pytest.mark.parametrize(
    ("tracker", "told"),
    [
        ("tensorbord", "--report-to tensorbord: must be one or more of tensorboard, wandb, mlflow, trackio, with "
         "commas between, or none; did you mean 'tensorboard'?"),
        ("mlflow,W&B", "--report-to W&B: must be"),
        ("none,mlflow", "--report-to none: must be"),
        ("", "--report-to : must be"),
    ],
)  # fmt: skip
def test_an_unknown_tracker_is_refused_with_the_nearest_word(tracker: str, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        TrainOptions(data=["pairs.jsonl"], report_to=tracker)
    assert told in str(raised.value)


def test_a_missing_tracker_is_told_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its name, which W&B leaves where it ran, does not pass for the package."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    with pytest.raises(UsageError, match="--report-to wandb: not installed; run: pip install wandb"):
        check_installed(TrainOptions(data=["pairs.jsonl"], report_to="wandb"))


def test_hyperparameters_are_plain_and_decide_what_is_trained() -> None:
    options = TrainOptions(data=["a.jsonl", "b.jsonl"], output=Path("here"), push_to_hub="me/mine", report_to="mlflow")
    told = hyperparameters(options)
    assert told["data"] == "a.jsonl, b.jsonl" and told["beta"] == 0.1 and told["wpo"] is False
    assert not {"output", "push_to_hub", "cache_dir", "report_to", "lora_rank", "max_steps"} & set(told)
    assert all(isinstance(value, (bool, int, float, str)) for value in told.values())


# ---- the lines, whatever happens --------------------------------------------------------------------------------


class Listener(GeneralTracker):
    """A tracker that keeps what it is told, prints, and fails at the steps that it is to fail at."""

    requires_logging_directory = False
    tracker = None

    def __init__(self, name: str, own: str, new: bool, bad: set[int]) -> None:
        self.name, self.own, self.new, self.bad = name, own, new, bad
        self.told: list[tuple[int, dict[str, float]]] = []
        self.options: dict[str, Any] = {}
        self.finished = False
        super().__init__()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.options = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        print("a tracker prints")
        if step in self.bad:
            raise ConnectionError("no answer\nfrom a server")
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Listener]:
    """All trackers that are made, in order; the one that is called wandb fails at step 2 of its first start."""
    found: list[Listener] = []

    def make(name: str, folder: Path, own: str, new: bool) -> tuple[GeneralTracker, str]:
        found.append(Listener(name, own, new, {2} if name == "wandb" and new else set()))
        return found[-1], "here"

    monkeypatch.setattr(trackers, "_make", make)
    return found


def start(folder: Path, names: str) -> Trackers:
    folder.mkdir(exist_ok=True)
    return Trackers(folder, TrainOptions(data=["pairs.jsonl"], report_to=names), Reporter())


def tell(live: Trackers, *steps: int) -> None:
    """Steps of a run, each with a line of metrics."""
    for step in steps:
        append_metrics(live.folder / "metrics.jsonl", step, {"loss": 1 / step, "grad_norm": float("nan")})
        live.follow()


def tell_and_die(folder: Path, names: str, *steps: int) -> None:
    """The same in a process that is killed after them."""
    live = start(folder, names)
    tell(live, *steps)
    assert live.lines
    live.lines.close()


def test_each_line_is_told_once_and_in_order(made: list[Listener], tmp_path: Path) -> None:
    """Held-out lines too; what is no finite number is left out."""
    with start(tmp_path, "trackio") as live:
        append_metrics(tmp_path / "metrics.jsonl", 0, {"loss": 0.5}, "eval_")
        tell(live, 1, 2)
        append_metrics(tmp_path / "metrics.jsonl", 2, {"loss": 0.25}, "eval_")
    (only,) = made
    rows = [(0, {"eval_loss": 0.5}), (1, {"loss": 1.0}), (2, {"loss": 0.5}), (2, {"eval_loss": 0.25})]
    assert only.told == rows and only.finished and only.options["beta"] == 0.1


def test_a_resumed_run_goes_on_with_the_trackers_own_run(made: list[Listener], tmp_path: Path) -> None:
    """Killed after step 3 and taken back to step 1: steps 2 and 3 come again, and are not told again."""
    tell_and_die(tmp_path, "tensorboard", 1, 2, 3)
    for _ in range(2):  # these are killed before they are as far as the first was
        truncate_metrics(tmp_path / "metrics.jsonl", 1)
        tell_and_die(tmp_path, "tensorboard", 2)
    truncate_metrics(tmp_path / "metrics.jsonl", 1)
    with start(tmp_path, "tensorboard") as live:
        tell(live, 2, 3, 4)
    assert [[step for step, _ in each.told] for each in made] == [[1, 2, 3], [], [], [4]]
    assert len({each.own for each in made}) == 1 and [each.new for each in made] == [True, False, False, False]
    assert not any(each.options for each in made[1:])


def test_a_tracker_that_comes_late_is_told_all_of_it(made: list[Listener], tmp_path: Path) -> None:
    with start(tmp_path, "none") as live:
        tell(live, 1, 2)
    assert not made and not (tmp_path / "trackers.json").exists()
    with start(tmp_path, "trackio") as live:
        tell(live, 3)
    assert [step for step, _ in made[0].told] == [1, 2, 3] and made[0].new


def test_a_tracker_that_fails_ends_neither_run_nor_others(
    made: list[Listener], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told of once, and what it missed reaches it with a later start; stdout stays the result's."""
    with start(tmp_path, "wandb,trackio") as live:
        tell(live, 1, 2, 3)
    out, err = capsys.readouterr()
    assert out == "" and err.count("warning: --report-to wandb: no answer; the run goes on without it") == 1
    failed, other = made
    assert [step for step, _ in failed.told] == [1] and failed.finished
    assert [step for step, _ in other.told] == [1, 2, 3]
    with start(tmp_path, "wandb,trackio"):
        pass
    assert [step for step, _ in made[2].told] == [2, 3] and made[2].own == failed.own and not made[3].told


def test_a_tracker_that_cannot_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any, **__: Any) -> tuple[GeneralTracker, str]:
        raise ValueError("api_key not configured")

    monkeypatch.setattr(trackers, "_make", make)
    warned: list[str] = []
    monkeypatch.setattr(Reporter, "warning", lambda _, text: warned.append(text))
    with start(tmp_path, "wandb") as live:
        tell(live, 1)
    assert len(warned) == 1 and "api_key not configured" in warned[0]


def test_only_the_first_rank_has_trackers(
    made: list[Listener], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cli.utils.distributed.rank", lambda: 1)
    with start(tmp_path, "trackio") as live:
        tell(live, 1)
    assert not made


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"trackio": {"run": "x"}}', '{"trackio": 1}'])
def test_a_damaged_state_ends_no_run(damaged: str, made: list[Listener], tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text(damaged)
    with start(tmp_path, "trackio") as live:
        tell(live, 1)
    assert made[0].told == [(1, {"loss": 1.0})] and made[0].new


def test_half_a_line_is_told_when_it_is_whole(made: list[Listener], tmp_path: Path) -> None:
    with start(tmp_path, "trackio") as live:
        tell(live, 1)
        for part in ('{"step": 2, ', '"loss": ', "0.5}\n"):
            with (tmp_path / "metrics.jsonl").open("a") as stream:
                stream.write(part)
            live.follow()
        tell(live, 3)
    assert made[0].told == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]


def test_half_a_line_hides_no_error(made: list[Listener], tmp_path: Path) -> None:
    """A full disk leaves it, and ends the run."""
    with pytest.raises(NotWrittenError), start(tmp_path, "trackio") as live:
        tell(live, 1)
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 2, "lo')
        raise NotWrittenError("no space left")
    assert made[0].finished and live.lines and live.lines.closed


@pytest.mark.parametrize(("method", "ended"), [("start", False), ("store_init_configuration", True)])
def test_only_what_has_started_is_ended(
    method: str, ended: bool, made: list[Listener], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the user's in the same process is left alone."""

    def fail(*_: Any) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(Listener, method, fail)
    with start(tmp_path, "trackio"):
        pass
    assert made[0].finished is ended


class FakeMLflow:
    """What is used of the package; the address is in the environment too, as in the real one."""

    utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))

    def __init__(self) -> None:
        self.fails = False
        self.calls: list[tuple[str | None, str]] = []  # what was done, and with which address

    def set_tracking_uri(self, uri: str | None) -> None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = uri

    def search_experiments(self, filter_string: str) -> list[Any]:
        return [SimpleNamespace(experiment_id="0")]

    def start_run(self, **_: Any) -> Any:
        if self.fails:
            raise ConnectionError(f"no answer from {os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/api")
        self.calls.append((os.environ.get("MLFLOW_TRACKING_URI"), "start"))
        return SimpleNamespace(info=SimpleNamespace(run_id="id"))

    def log_params(self, values: dict[str, Any]) -> None:
        pass

    def end_run(self, status: str) -> None:
        self.calls.append((os.environ.get("MLFLOW_TRACKING_URI"), status))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that it is as it was at the end
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return fake


def test_each_run_of_a_process_has_its_own_mlflow(mlflow: FakeMLflow, tmp_path: Path) -> None:
    """The address of one is gone when it ends, or does not start."""
    ends: list[type[BaseException] | None] = [None, Interrupted, NotWrittenError, KeyboardInterrupt]
    for place, end in enumerate(ends):
        with suppress(Interrupted, NotWrittenError, KeyboardInterrupt), start(tmp_path / str(place), "mlflow"):
            if end:
                raise end
        assert "MLFLOW_TRACKING_URI" not in os.environ
    uris = [f"sqlite:///{tmp_path / str(place) / 'mlflow' / 'mlflow.db'}" for place in range(4)]
    assert mlflow.calls[::2] == [(uri, "start") for uri in uris]
    assert mlflow.calls[1::2] == list(zip(uris, ["FINISHED", "KILLED", "FAILED", "KILLED"], strict=True))
    mlflow.fails = True
    with start(tmp_path / "4", "mlflow"):
        assert "MLFLOW_TRACKING_URI" not in os.environ
    assert len(mlflow.calls) == 8


def test_the_address_of_a_server_is_the_users(
    mlflow: FakeMLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may hold a password: it is not told, and stays as it is."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host/")
    for mlflow.fails in (False, True):
        with start(tmp_path, "mlflow"):
            pass
    err = capsys.readouterr().err
    assert "mlflow: experiment dpo at MLFLOW_TRACKING_URI\n" in err and "secret" not in err
    assert "mlflow: no answer from MLFLOW_TRACKING_URI/api; the run goes on" in err
    assert mlflow.calls == [("https://me:secret@host/", "start"), ("https://me:secret@host/", "FINISHED")]
    assert not (tmp_path / "mlflow").exists()


def test_wandb_draws_over_the_steps_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own count would leave out what a resumed run tells of steps before its last; a failed run is told as one."""
    run = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", MagicMock(init=lambda **_: run))
    with pytest.raises(NotWrittenError), start(tmp_path, "wandb") as live:
        tell(live, 1, 2)
        raise NotWrittenError("no space left")
    run.define_metric.assert_called_once_with("*", step_metric="step")
    assert run.log.call_args_list == [
        call({"loss": 1.0, "step": 1}, step=None),
        call({"loss": 0.5, "step": 2}, step=None),
    ]
    run.finish.assert_called_once_with(exit_code=1)


# ---- the real ones, on this machine -----------------------------------------------------------------------------


def killed_and_resumed(folder: Path, name: str) -> str:
    """A run that is taken back from step 3 to step 1 and goes on to step 4; returns the tracker's own run."""
    with start(folder, name) as live:
        tell(live, 1, 2, 3)
    truncate_metrics(folder / "metrics.jsonl", 1)
    with start(folder, name) as live:
        tell(live, 2, 3, 4)
    state: dict[str, Any] = json.loads((folder / "trackers.json").read_text())
    assert state[name]["told"] == 4
    return str(state[name]["run"])


LOSSES = {1: [1.0], 2: [0.5], 3: [pytest.approx(1 / 3)], 4: [0.25]}


def test_tensorboard_draws_one_curve_of_a_resumed_run(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path / "run", "tensorboard")
    assert scalars(tmp_path / "run" / "tensorboard") == {"loss": LOSSES}


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_one_run_below_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    own = killed_and_resumed(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'dpo'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.data.params["beta"]) == (own, "run", "0.1")
    assert {point.step: [point.value] for point in client.get_metric_history(own, "loss")} == LOSSES
    assert len(client.get_metric_history(own, "loss")) == 4


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_one_run_in_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    own = killed_and_resumed(tmp_path / "run", "trackio")
    with closing(sqlite3.connect(tmp_path / "trackio" / "dpo.db")) as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{own}"}
    assert [(step, [json.loads(told)["loss"]]) for _, step, told in rows] == list(LOSSES.items())


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_its_files_below_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = killed_and_resumed(tmp_path / "run", "wandb")
    assert {file.name for file in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")} == {f"run-{own}.wandb"}
