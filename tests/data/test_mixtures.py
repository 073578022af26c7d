"""Mixtures: shares of several data sets, the same rows wherever they are read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import resolve
from dpo_cli.data.sources import find_sources, hub_id, split_share
from dpo_cli.utils.errors import UsageError
from tests.helpers import Cli, write_rows


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(count)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 20), ("b", 20)):
        write_rows(Path(f"{name}.jsonl"), rows(name, count))


def prompts(*data: str, seed: int | None = 0) -> list[str]:
    return [row["prompt"] for source in find_sources([*data], seed=seed) for _, row in source.records()]


@pytest.mark.usefixtures("files")
def test_shares_are_parts_of_the_largest_mixture_without_a_repeated_row() -> None:
    drawn = prompts("a.jsonl=0.75", "b.jsonl=0.25")
    assert Counter(prompt[0] for prompt in drawn) == {"a": 20, "b": 7}, "20 / 0.75 = 26.7, a quarter of it is 6.7"
    assert len({*drawn}) == len(drawn)
    assert drawn == sorted(drawn, key=lambda prompt: (prompt[0], int(prompt[2:-1]))), "in the order of the files"
    assert Counter(prompt[0] for prompt in prompts("a.jsonl=0.3", "b.jsonl=0.7")) == {"a": 9, "b": 20}


@pytest.mark.usefixtures("files")
def test_the_seed_draws() -> None:
    mixture = ("a.jsonl=0.75", "b.jsonl=0.25")
    assert prompts(*mixture, seed=1) == prompts(*mixture, seed=1) != prompts(*mixture, seed=2)
    assert prompts(*mixture, seed=None) == prompts("a.jsonl", "b.jsonl"), "who names no seed reads every row"


@pytest.mark.usefixtures("files")
def test_a_folder_has_one_share() -> None:
    Path("more").mkdir()
    for name in "cd":
        write_rows(Path("more", f"{name}.jsonl"), rows(name, 5))
    drawn = Counter(prompt[0] for prompt in prompts("a.jsonl=0.8", "more=0.2"))
    assert drawn["a"] == 20 and drawn["c"] + drawn["d"] == 5 and min(drawn["c"], drawn["d"]) > 0


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (["a.jsonl=0.7", "b.jsonl"], "b.jsonl has no share"),
        (["a.jsonl=0.7", "b.jsonl=0.2"], "these add up to 0.9"),
        (["a.jsonl=0.5"], "these add up to 0.5"),
        (["a.jsonl=1.5", "b.jsonl=-0.5"], "must be greater than 0 and at most 1"),
        (["a.jsonl=nan", "b.jsonl=1"], "must be greater than 0 and at most 1"),
        (["a.jsonl=0.5", "a.jsonl=0.5"], "is named twice; name it once"),
        (["a.jsonl=0.999", "b.jsonl=0.001"], "a share of 0.001 is less than a row"),
    ],
)
def test_what_cannot_be_is_refused(data: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        find_sources(data, seed=0)


@pytest.mark.usefixtures("files")
def test_names_that_have_an_equals_sign() -> None:
    write_rows(Path("x=y.jsonl"), rows("x", 3))
    Path("set=0.5").mkdir()
    write_rows(Path("set=0.5", "z.jsonl"), rows("z", 3))
    assert split_share("x=y.jsonl") == ("x=y.jsonl", None) and len(prompts("x=y.jsonl", "set=0.5")) == 6
    assert split_share("x=y.jsonl=0.5") == ("x=y.jsonl", 0.5)
    assert hub_id("org/name:config/split=0.5") == "org/name"
    with pytest.raises(UsageError, match="no such file"):
        prompts("missing.jsonl=0.5", "a.jsonl=0.5")


def test_a_mapping_in_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {a.jsonl: 0.7, b.jsonl: 0.3}\n")
    assert resolve(TrainOptions, {}, tmp_path / "run.yaml").data == ["a.jsonl=0.7", "b.jsonl=0.3"]


@pytest.mark.usefixtures("files")
def test_a_mixture_is_trained_resumed_and_checked_on_the_same_rows(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    """What is precomputed is all that the training scores, with held-out rows, and with another seed it is not."""
    mixture = ("--data", "a.jsonl=0.75", "--data", "b.jsonl=0.25", "--model", tiny)
    cached = (*mixture, "--cache-dir", tmp_path / "cache")
    done = dpo("precompute-ref", *cached, "--seed", 5, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"] == 27
    checked = json.loads(dpo("check", *mixture, "--seed", 5, "--json", "--fix", "clean.jsonl").stdout)
    assert checked["rows"] == 27
    train = ("train", *cached, "--eval-fraction", 0.2, "--max-steps", 2, "--batch-size", 4, "--json")
    run = dpo(*train, "--seed", 5, "--output", "run")
    assert run.returncode == 0, run.stderr
    assert "a.jsonl: 20 of its 20 rows drawn" in run.stderr and "b.jsonl: 7 of its 20 rows drawn" in run.stderr
    assert "nothing to score" in run.stderr
    manifest = json.loads(Path("run", "manifest.json").read_text())
    assert manifest["data"]["drawn"] == {"a.jsonl": 20, "b.jsonl": 7}
    assert manifest["data"]["pairs"] == 22 and manifest["held_out"]["pairs"] == 5
    assert {json.loads(line)["prompt"] for line in Path("clean.jsonl").read_text().splitlines()} == {
        *prompts("a.jsonl=0.75", "b.jsonl=0.25", seed=5)
    }
    assert dpo("train", "--resume", "run").returncode == 0
    other = dpo(*train, "--seed", 6, "--dry-run", "--max-steps", 6)
    assert json.loads(other.stdout)["reference_misses"] > 0
