"""The functions of the package: what their commands do, in a process that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dpo_cli
from dpo_cli import Interrupted, UsageError, evaluate, precompute, train
from dpo_cli.cli.app import app
from dpo_cli.training.loop import StopSignal
from dpo_cli.training.step import Trainer
from dpo_cli.utils.files import to_json
from tests.helpers import ROOT, SAMPLE, write_rows

HELD_OUT = [json.loads(line) for line in (SAMPLE / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with a cache of its own. Reports take most of the time of so small a run."""
    for name in ("write_report", "write_plots"):
        monkeypatch.setattr(f"dpo_cli.training.loop.{name}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def rows(train_rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return train_rows[:24]


@pytest.fixture
def options(tiny: Path) -> dict[str, Any]:
    return {"model": tiny, "max_steps": 3, "batch_size": 4, "lr": 1e-3, "kl": "none"}


def command(*words: Any) -> dict[str, Any]:
    """What a command prints with ``--json``."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def printed(result: dict[str, Any]) -> dict[str, Any]:
    """The result as ``--json`` prints it, with null for NaN."""
    return dict(json.loads(to_json(result)))


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(name) is str and is_plain(each) for name, each in value.items())
    return all(map(is_plain, value)) if type(value) is list else type(value) in (str, int, float, bool, type(None))


# ---- the same as the commands -----------------------------------------------------------------------------------


def test_results_are_those_of_the_commands(tiny: Path, rows: list[Any], options: dict[str, Any], here: Path) -> None:
    data, held_out = write_rows(here / "rows.jsonl", rows), write_rows(here / "held-out.jsonl", HELD_OUT[:4])
    words = ["--model", tiny, "--max-steps", 3, "--batch-size", 4, "--lr", 1e-3, "--kl", "none"]
    trained = train(data, eval_data=held_out, output="run", show_answers=1, **options)
    told = command("train", "--data", data, "--eval-data", held_out, "--output", "other", "--show-answers", 1, *words)
    assert trained == told | {name: told[name].replace("other", "run") for name in ("run", "model", "report")}
    assert trained["after"]["rewards/margins"] > trained["before"]["rewards/margins"] == 0
    found = evaluate(held_out, model=trained["run"], samples=1, sample_prompts=1, sample_tokens=4)
    options_of_eval = ["--samples", 1, "--sample-prompts", 1, "--sample-tokens", 4]
    assert printed(found) == command("eval", "--data", held_out, "--model", "run", *options_of_eval)
    assert found["rewards/margins"] == pytest.approx(trained["after"]["rewards/margins"], abs=1e-6)
    filled = command("precompute-ref", "--data", data, "--model", tiny, "--verify", 2)
    kept = precompute(data, model=tiny, verify=2)
    assert kept == filled | {"hits": 24, "misses": 0, "tokens": 0, "seconds": 0}
    for each in (trained, found, kept):
        assert is_plain(each), each


# ---- rows in memory ---------------------------------------------------------------------------------------------


def test_rows_in_memory_are_data(rows: list[Any], options: dict[str, Any]) -> None:
    """A run names the file that they were written to, and so can be repeated and resumed without them."""
    done = train(rows, eval_data=iter(HELD_OUT[:4]), output="run", trust_remote_code=False, wpo=True, **options)
    (file,) = (file for file in Path("runs").glob("rows-*.jsonl") if len(file.read_text().splitlines()) == len(rows))
    told = json.loads(Path("run/manifest.json").read_text())["command"]
    assert told.startswith("dpo train ") and f"--data {file}" in told and "--lr 0.001" in told
    assert " --wpo" in told and "--trust-remote-code" not in told
    assert train(resume="run")["after"] == done["after"]
    assert len(list(Path("runs").glob("rows-*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "no rows"),
        ([{"prompt": "p", "chosen": "a", "rejected": b"b"}], "cannot be written as JSON"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}], ".jsonl:2"),
        (None, "--data is missing"),
        ("nowhere.jsonl", "no such file"),
    ],
)
def test_data_that_cannot_be_used(data: Any, told: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match=told):
        precompute(data, model=tiny)


def test_an_option_may_have_the_hyphens_of_its_flag(rows: list[Any], options: dict[str, Any]) -> None:
    hyphens = {name.replace("_", "-"): value for name, value in options.items()}
    done = train(rows, output="run", **hyphens, **{"eval-data": HELD_OUT[:4]})
    assert done["after"] and "--max-steps 3" in json.loads(Path("run/manifest.json").read_text())["command"]


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"batchsize": 4}, "unknown option 'batchsize'; did you mean 'batch_size'?"),
        ({"resum": "run"}, "unknown option 'resum'"),
        ({"max-steps": "x"}, "option 'max_steps' cannot be 'x'"),
        ({"max-steps": 3, "max_steps": 3}, "an option is given twice, with hyphens and with underscores"),
        ({"lr": True}, "option 'lr' cannot be True"),
        ({"epochs": 1.5}, "option 'epochs' cannot be 1.5"),
        ({"model": 7.5j}, "option 'model' cannot be 7.5j"),
        ({"beta": 0}, "--beta 0.0: must be greater than 0"),
        ({"label_smoothing": "0.7"}, "--label-smoothing 0.7: must be at least 0 and less than 0.5"),
    ],
)
def test_options_are_checked(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        train("pairs.jsonl", **given)
    assert str(caught.value) == told


def test_all_that_is_wrong_is_told() -> None:
    with pytest.raises(UsageError) as caught:
        train("pairs.jsonl", batchsize=4, lr=[], loss={"sigmoid": 1, "sft": 0.2})
    assert str(caught.value).splitlines() == [
        "unknown option 'batchsize'; did you mean 'batch_size'?",
        "option 'lr' cannot be []",
    ]


def test_a_file_gives_options_and_a_resumed_run_takes_none(rows: list[Any], options: dict[str, Any]) -> None:
    Path("run.yaml").write_text("beta: 0.7\nmax_steps: 9\nloss: {sigmoid: 1, sft: 0.2}\n")
    done = train(rows, config="run.yaml", output="run", **options)
    written = Path("run/config.yaml").read_text()
    command = json.loads(Path("run/manifest.json").read_text())["command"]
    assert "--config" in command and done["steps"] == 3 and "beta: 0.7" in written and "sigmoid=1,sft=0.2" in written
    with pytest.raises(UsageError, match="leave out --config"):
        train(resume="run", config="run.yaml")
    with pytest.raises(UsageError, match="cannot change --beta"):
        train(resume="run", output="run", beta=0.2)


@pytest.mark.parametrize("function", [train, evaluate, precompute])
def test_the_functions_are_for_one_process(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process"):
        function("pairs.jsonl")


def test_what_is_no_data_and_a_misspelled_option_are_refused() -> None:
    for data in (5, {"prompt": ["Why?"]}):
        with pytest.raises(UsageError, match="must be what --data names"):
            train(data)  # type: ignore[arg-type]
    rows = [{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}]
    with pytest.raises(UsageError, match=r"unknown option 'dryrun'"):
        train(rows, dryrun=True)
    with pytest.raises(UsageError, match=r"unknown option 'resume'$"):
        evaluate(rows, resume="run")


# ---- a process that goes on -------------------------------------------------------------------------------------


def test_it_is_quiet_but_for_warnings_unless_asked(
    rows: list[Any], options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    train(rows, output="quiet", **options)
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="--trust-remote-code"):
        precompute(rows, model=options["model"], trust_remote_code=True)
    train(rows, output="told", dry_run=True, progress=True, **options)
    out, err = capfd.readouterr()
    assert out == "" and "plan        3 steps of 4 pairs" in err


def test_a_cell_that_imports_can_run_again(rows: list[Any], options: dict[str, Any]) -> None:
    """Modules that are imported bind their names in the package, and must not take the functions'."""
    assert dpo_cli.train is train and dpo_cli.evaluate is evaluate and dpo_cli.precompute is precompute
    assert {name for name in dpo_cli.__all__ if (ROOT / "dpo_cli" / f"{name}.py").exists()} == set()


def test_an_interrupted_run_goes_on(rows: list[Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT, as a notebook's stop button sends it, in the second of three steps."""
    handler, taken, step = signal.getsignal(signal.SIGINT), [], Trainer.step

    def struck(self: Trainer, *arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", struck)
        with pytest.raises(Interrupted, match="a checkpoint was written"):
            train(rows, output="run", **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert train(resume="run")["steps"] == 3
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_second_signal_ends_a_run_but_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_it_runs_in_a_thread(rows: list[Any], options: dict[str, Any]) -> None:
    """Where Python lets nobody handle signals."""
    done: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: done.append(train(rows, output="run", **options)))
    thread.start()
    thread.join()
    assert done and done[0]["steps"] == 3


def test_importing_is_light() -> None:
    """And wrong options are told before anything heavy is loaded."""
    code = (
        "import sys, dpo_cli\n"
        "try: dpo_cli.train('pairs.jsonl', batchsize=1)\n"
        "except dpo_cli.UsageError: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(out.stdout.replace("'", '"')))
    assert "dpo_cli" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "accelerate", "datasets", "typer", "rich", "yaml"}
