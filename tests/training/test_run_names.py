"""The folder of a run: runs that are started at once without ``--output`` get one each, and what its manifest says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dpo_cli.training.loop
from dpo_cli.cli.app import app
from tests.helpers import SAMPLE
from tests.helpers.caches import PROCESSES, dpo
from tests.helpers.pictures import pictures

NOW = "20260101-120000"


def _train(folder: Path, model: Path, together: Barrier, more: tuple[str, ...]) -> None:
    """A run whose name is settled when the other ones are laid out too."""
    os.chdir(folder)
    make_manifest = dpo_cli.training.loop.make_manifest

    def laid_out(*arguments: Any) -> Any:
        together.wait()
        return make_manifest(*arguments)

    dpo_cli.training.loop.make_manifest = laid_out
    time.strftime = lambda *_: NOW  # type: ignore[assignment]
    command = [
        "train",
        "--model",
        str(model),
        "--data",
        str(SAMPLE / "train.jsonl"),
        "--max-steps",
        "1",
        "--batch-size",
        "2",
        *more,
    ]
    with pictures(drawn=False):
        out = CliRunner().invoke(app, command)
    Path(f"{os.getpid()}.txt").write_text(out.output)
    os._exit(out.exit_code)


def trained(folder: Path, model: Path, *others: tuple[str, ...]) -> list[int | None]:
    """Exit codes of runs with these options that were started together."""
    together = PROCESSES.Barrier(len(others))
    runs = [PROCESSES.Process(target=_train, args=(folder, model, together, more)) for more in others]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    return [run.exitcode for run in runs]


def test_runs_that_begin_at_once_get_a_name_each(tiny: Path, tmp_path: Path) -> None:
    assert trained(tmp_path, tiny, ("--seed", "0"), ("--seed", "1")) == [0, 0]
    names = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert len(names) == 2 and all(re.fullmatch(f"{NOW}-[0-9a-f]{{4}}", name) for name in names)  # and nothing else
    told = [line for file in tmp_path.glob("*.txt") for line in file.read_text().splitlines()]
    assert sorted(line for line in told if line.startswith("run  ")) == [f"run         runs/{name}" for name in names]
    for name in names:
        folder = tmp_path / "runs" / name
        assert (folder / "model/config.json").is_file() and (folder / "report.html").is_file()
        assert not (folder / "run.lock").exists()


@pytest.mark.parametrize("more", [("--dry-run",), ("--max-grad-norm", "0", "--eval-steps", "1"), ("--lr", "-1")])
def test_no_name_is_taken_by_what_never_begins(tiny: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    trained(tmp_path, tiny, more)
    assert not (tmp_path / "runs").exists()


def test_the_manifest_has_the_commit_of_the_working_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    common = ("train", "--model", tiny, "--data", SAMPLE / "train.jsonl", "--max-steps", 1, "--batch-size", 2)

    def committed(name: str) -> Any:
        dpo(*common, "--output", name)
        return json.loads(Path(name, "manifest.json").read_text())["git_commit"]

    assert committed("before") is None

    def git(*words: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(["git", *author, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert committed("after") == git("rev-parse", "HEAD")


def test_a_dry_run_estimates_the_time_by_a_forward(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of four pairs counts as three forwards of them; to score them is one more, until they are cached."""
    monkeypatch.chdir(tmp_path)
    clock = iter(range(0, 10**6, 1000))  # a forward takes 1000 s
    monkeypatch.setattr("dpo_cli.training.setup.time.perf_counter", lambda: next(clock))
    base = ["--model", str(tiny), "--data", str(SAMPLE / "train.jsonl"), "--cache-dir", "cache"]
    plan = [*base, "--max-steps", "1", "--batch-size", "4", "--dry-run"]
    for seconds, first in ((4000, None), (3000, ["precompute-ref", *base])):
        if first:
            assert CliRunner().invoke(app, first).exit_code == 0
        out = CliRunner().invoke(app, ["train", *plan])
        assert out.exit_code == 0 and f"time        about {timedelta(seconds=seconds)} for scoring, " in out.stderr


def test_a_folder_that_cannot_be_made_is_refused_at_once(tiny: Path, tmp_path: Path) -> None:
    """Also by root, whom no mode stops."""
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "run", Path("/proc/none/run")):
        more = ["--data", str(SAMPLE / "train.jsonl"), "--output", str(output)]
        out = CliRunner().invoke(app, ["train", "--model", str(tiny), *more])
        assert out.exit_code == 2 and f"--output {output}: cannot be created" in out.stderr
        assert "data  " not in out.stderr, "nothing was read"


def test_steps_that_the_epochs_do_not_have_are_pointed_out(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = ["train", "--model", str(tiny), "--data", str(SAMPLE / "heldout.jsonl"), "--batch-size", "8", "--dry-run"]
    for most, told in (("12", True), ("11", False)):  # 88 pairs
        out = CliRunner().invoke(app, [*plan, "--max-steps", most])
        assert out.exit_code == 0 and "plan        11 steps of 8 pairs" in out.stderr
        assert ("--max-steps 12 is more than 1 epoch of these pairs: add --epochs" in out.stderr) == told
