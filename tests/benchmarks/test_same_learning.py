"""The comparison with TRL over data sets and seeds: one data set from end to end, and what it calls a difference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.studies import same_learning
from benchmarks.studies.same_learning import (
    IN_OUR_ORDER,
    OURS,
    TRL,
    WAYS,
    Design,
    Lab,
    draw,
    figures,
    run,
    table,
    verdicts,
)
from dpo_cli.evaluation.statistics import Table, wilson
from tests.helpers import SAMPLE

pytestmark = [
    # transformers renames the method that TRL 1.16 still calls by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PAIRS = 64


def margins(mean: float, seed: int, seeds: int = 3) -> Table:
    """Of some seeds over the same pairs, whose own differences are larger than those of seeds."""
    pairs = np.random.default_rng(0).normal(mean, 0.5, PAIRS)
    return pairs + np.random.default_rng(seed).normal(0, 0.05, (seeds, PAIRS))


# ---- verdicts ---------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    """48 of 64 pairs are right under each seed: more seeds of the same pairs make no more observations."""
    of_one = np.array([[1.0] * 48 + [-0.5] * 16])
    for seeds in (1, 3):
        found = figures(np.repeat(of_one, seeds, axis=0))
        accuracy, margin = found["accuracy"], found["margin"]
        assert accuracy.seeds == [0.75] * seeds and margin.seeds == [0.625] * seeds
        assert (accuracy.mean, margin.mean) == (0.75, 0.625)
        half = 1.998 * 1.5 * np.sqrt(0.75 * 0.25 / (PAIRS - 1))  # Student's of 63 degrees of freedom
        assert (margin.low, margin.high) == pytest.approx((0.625 - half, 0.625 + half), abs=0.03)
        assert (accuracy.low, accuracy.high) == pytest.approx(wilson(48, 64), abs=0.005)


def test_runs_that_differ_by_their_seeds_are_the_same() -> None:
    found = verdicts(margins(0.4, seed=1), margins(0.4, seed=2))
    assert [(each["figure"], each["within"]) for each in found] == [("accuracy", True), ("margin", True)]
    low, high = found[1]["difference_interval"]
    assert low < 0 < high


def test_a_planted_difference_is_told() -> None:
    margin = verdicts(margins(0.4, seed=1), margins(0.6, seed=2))[1]
    assert not margin["within"]
    assert margin["difference"] == pytest.approx(-0.2, abs=0.03)
    assert margin["difference_interval"][1] < 0
    accuracy = verdicts(margins(0.4, seed=1), margins(0.0, seed=2))[0]
    assert not accuracy["within"]


def test_both_means_must_lie_in_the_other_interval() -> None:
    """A wide interval holds a mean whose own narrow one does not hold it."""
    wide, narrow = margins(0.3, seed=1), 0.3 * np.ones((3, PAIRS)) + 0.001 * margins(0.0, seed=2)
    narrow += figures(wide)["margin"].high - 0.01 - narrow.mean()
    assert figures(wide)["margin"].holds(figures(narrow)["margin"])
    assert not verdicts(wide, narrow)[1]["within"]


# ---- one data set -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def design(tiny: Path) -> Design:
    data = {"sample": str(SAMPLE / "train.jsonl")}
    return Design(data=data, model=str(tiny), steps=2, held_out=8, seeds=1)


@pytest.fixture(scope="module")
def output(design: Design, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("study") / "results"
    run(design, folder)
    return folder


@pytest.mark.bench
def test_every_training_is_judged_alike(output: Path) -> None:
    lines = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    found = {(line["way"], line["side"]): line for line in lines}
    assert list(found) == [(way, side) for way in WAYS for side in (OURS, TRL)] + [(way, IN_OUR_ORDER) for way in WAYS]
    for way in WAYS:
        ours, trl, again = (found[way, side] for side in (OURS, TRL, IN_OUR_ORDER))
        for line in (ours, trl):
            assert len(line["margins"]) == 8
            assert line["told"]["margin"] == pytest.approx(np.mean(line["margins"]), rel=0.02)  # heads sum differently
            assert line["told"]["margin"] > 0.005  # something was learned
        assert again["margins"] == pytest.approx(ours["margins"], abs=3e-5)  # some last bits of log-probs, times beta
        assert trl["margins"] != pytest.approx(ours["margins"], abs=3e-4)  # by the order


@pytest.mark.bench
def test_what_is_written(output: Path) -> None:
    found = json.loads((output / "results.json").read_text())
    assert [(cell["way"], cell["figure"]) for cell in found["cells"]] == [
        (way, figure) for way in ("full", "LoRA") for figure in ("accuracy", "margin")
    ]
    assert (output / "results.md").read_text() == table(found) + "\n"
    assert (output / "results.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.bench
def test_a_miss_is_told(output: Path, tmp_path: Path) -> None:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    for place, cell in enumerate(found["cells"]):
        cell["within"] = place != 1
    assert table(found).count("**no**") == 1
    draw(tmp_path / "picture.png", found)
    assert (tmp_path / "picture.png").exists()


@pytest.mark.bench
def test_it_goes_on_where_it_was(design: Design, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = output / "runs.jsonl"
    whole = runs.read_text().splitlines()
    runs.write_text("\n".join(whole[:-1]) + "\n")
    taken = []

    def take(lab: Lab, way: str, seed: int, side: str) -> dict[str, Any]:
        taken.append((way, seed, side))
        return {name: json.loads(whole[-1])[name] for name in ("seconds", "told", "margins")}

    monkeypatch.setattr(same_learning.Lab, "take", take)
    run(design, output)
    assert taken == [("LoRA", 0, IN_OUR_ORDER)]
    assert runs.read_text().splitlines() == whole


@pytest.mark.bench
def test_another_design_finds_no_place(design: Design, output: Path) -> None:
    with pytest.raises(SystemExit, match="another design"):
        run(Design(data=design.data, model=design.model, steps=3), output)


def test_too_few_rows(tmp_path: Path, design: Design) -> None:
    with pytest.raises(SystemExit, match="are needed"):
        run(Design(data=design.data, model=design.model, held_out=400), tmp_path / "results")
