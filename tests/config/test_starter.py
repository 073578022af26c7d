"""`dpo init`: the file it writes says all that the options' definitions say, and is taken as it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import Check, TrainOptions, option
from dpo_cli.config.resolve import WIDTH, resolve, write_config

FIELDS = dataclasses.fields(TrainOptions)


def entries(text: str) -> dict[str, str]:
    """What stands above each option, in one line."""
    found = {}
    for block in text.split("\n\n")[1:]:
        comments = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
        [option_line] = [line for line in block.splitlines() if not line.startswith("#")]
        found[option_line.partition(":")[0]] = " ".join(comments)
    return found


def test_every_option_stands_there_with_its_default(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml")
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert list(values)[:2] == ["data", "model"] and set(values) == {f.name for f in FIELDS}
    assert resolve(TrainOptions, {"data": ["pairs.jsonl"]}, tmp_path / "run.yaml") == TrainOptions(data=["pairs.jsonl"])


def test_a_comment_says_what_it_is_for_and_what_it_can_be(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    assert all(len(line) <= WIDTH for line in text.splitlines())
    about = entries(text)
    for field in FIELDS:
        assert about[field.name].startswith(field.metadata["help"])
        check = field.metadata["check"]
        assert not check or all(choice in about[field.name] for choice in check.choices)
        assert field.metadata["shown"] is None or f"null: {field.metadata['shown']}" in about[field.name]
    assert "Must be at least 0 and less than 1." in about["warmup_ratio"]


def test_a_new_option_is_in_it_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, init=False)
    class More(TrainOptions):
        mood: str = option("good", "How it is.", Check(str.isalpha, "must be a word"))

    monkeypatch.setattr("dpo_cli.config.resolve.TrainOptions", More)
    write_config(tmp_path / "run.yaml")
    assert (tmp_path / "run.yaml").read_text().endswith("\n# How it is. Must be a word.\nmood: good\n")


def test_the_command_fills_in_data_and_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["init", "--data", "a.jsonl", "--data", "b: c.jsonl"])
    assert told.exit_code == 0 and told.stdout == "run.yaml is written. Now: dpo train --config run.yaml\n"
    assert resolve(TrainOptions, {}, Path("run.yaml")).data == ["a.jsonl", "b: c.jsonl"]
    told = CliRunner().invoke(app, ["init"])
    assert told.exit_code == 2 and told.stderr.startswith("error: run.yaml: exists already; ")
    assert resolve(TrainOptions, {}, Path("run.yaml")).data == ["a.jsonl", "b: c.jsonl"]
    told = CliRunner().invoke(app, ["init", "--force", "--json"])
    assert told.exit_code == 0 and json.loads(told.stdout) == {"config": "run.yaml"}
    told = CliRunner().invoke(app, ["train", "--config", "run.yaml"])
    assert told.exit_code == 2 and told.stderr.startswith("error: --data is missing: ")


def test_it_is_written_somewhere_else_or_not_at_all(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["init", str(tmp_path / "configs" / "mine.yaml")])
    assert told.exit_code == 0 and (tmp_path / "configs" / "mine.yaml").is_file()
    told = CliRunner().invoke(app, ["init", str(tmp_path / "configs" / "mine.yaml" / "below.yaml")])
    assert told.exit_code == 1 and "cannot be written" in told.stderr
