"""Whoever mistypes a name is told the nearest that there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.utils.errors import did_you_mean, name_beside


def test_the_nearest_word() -> None:
    assert did_you_mean("sigmod", ["hinge", "sigmoid", "sigmoid_norm"]) == "; did you mean 'sigmoid'?"
    assert did_you_mean("xyz", ["hinge", "sigmoid"]) == "" == did_you_mean("xyz", [])


def test_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    assert name_beside(tmp_path / "piars.jsonl") == "; did you mean 'pairs.jsonl'?"
    assert name_beside(tmp_path / "pairs.jsonl") == ""  # it is there
    assert name_beside(tmp_path / "none" / "pairs.jsonl") == "" == name_beside(Path("a\0b"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pairs, a run's folder and a file of options; where the commands below run."""
    monkeypatch.chdir(tmp_path)
    row = {"question": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("data: pairs.jsonl\n")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian", "'train'"),
        ("train --bta 1", "--beta"),
        ("train --data piars.jsonl --model {tiny}", "'pairs.jsonl'"),
        ("train --data pairs.jsonl --loss sigmod", "'sigmoid'"),
        ("train --data pairs.jsonl --format alpacca", "'alpaca'"),
        ("train --data pairs.jsonl --memory splitt", "'split'"),
        ("train --data pairs.jsonl --lr-scheduler cosinus", "'cosine'"),
        ("train --data pairs.jsonl --f-divergence js_divergense", "'js_divergence'"),
        ("train --data pairs.jsonl --columns promt=question --model {tiny}", "'prompt'"),
        ("train --data pairs.jsonl --columns prompt=qestion --model {tiny}", "'question'"),
        ("train --data pairs.jsonl --model ./runs/frist", "'first'"),
        ("train --resume runs/frist", "'first'"),
        ("train --config rnu.yaml", "'run.yaml'"),
    ],
)
def test_a_command_tells_it(typed: str, meant: str, place: Path, tiny: Path) -> None:
    told = CliRunner().invoke(app, typed.format(tiny=tiny).split())
    assert told.exit_code == 2 and meant in told.stderr, told.output
    assert "did you mean" in told.stderr.lower() or "Possible options" in told.stderr


def test_what_lies_below_runs_is_never_looked_up_on_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the hub was asked"))
    told = CliRunner().invoke(app, ["train", "--data", "pairs.jsonl", "--model", "runs/frist"])
    assert told.exit_code == 2
    assert told.stderr == "error: --model runs/frist: no such folder; did you mean 'first'?\n"
