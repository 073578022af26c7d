"""The benchmark of reward over KL: its reward and preferences, its baselines by brute force, all of it in small."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.studies import frontier
from benchmarks.studies.frontier import Plainness, best_of, best_of_kl, first_is_preferred, main, optimum, unlikelihood
from benchmarks.studies.frontier_report import along, slopes
from dpo_cli.losses import preference as losses
from dpo_cli.losses.preference import Preferences

SMALL = """
    --jobs 1 --seeds 2 --tokens 4 --prompts 6 --pairs 2 --batch-size 4 --rank 2 --lr 0.1 --checkpoints 1 3
    --held-out 3 --copies 2 --pool 4 --dtype float32
"""


@pytest.fixture(autouse=True)
def own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark adds a loss, which no other test is to see."""
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))


def test_reward_is_bounded_and_orders_what_it_was_made_of() -> None:
    reward = Plainness(["press it now", "press it"], ["it might help, perhaps"])
    most = frontier.SHARPNESS * max(map(abs, reward.odds.values()))
    texts = ["press it now", "", "unknown words", "it might help, perhaps", "press press!", "it"]
    values = [reward(text) for text in texts]
    assert all(-most <= value <= most for value in values)
    assert values[0] > 0 > values[3] and values[1] == values[2] == 0


def test_reward_of_a_word_by_hand() -> None:
    """Of 2 and 2 words, 3 different: "a" is 2 of one side and 1 of the other, each with one count more."""
    assert Plainness(["a a"], ["a b"])("a") == pytest.approx(frontier.SHARPNESS * math.log((3 / 4) / (2 / 4)))


@pytest.mark.parametrize("difference", [-2.0, 0.0, 0.7])
def test_preferences_come_as_often_as_bradley_and_terry_say(difference: float) -> None:
    rng, n = np.random.default_rng(0), 20_000
    share = sum(first_is_preferred(1 + difference, 1, rng) for _ in range(n)) / n
    expected = 1 / (1 + math.exp(-difference))
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    rewards = np.random.default_rng(1).normal(size=(3, 7)).round(1)  # with ties
    expected = [np.mean([max(some) for some in itertools.combinations(row, n)]) for row in rewards]
    assert best_of(rewards, n) == pytest.approx(expected)


def test_kl_of_best_of_n_by_enumeration() -> None:
    """Of 2,000 equally likely completions the best of 4 is the i-th with probability (i^4 - (i - 1)^4) / 2000^4."""
    p = np.diff((np.arange(2001) / 2000) ** 4)
    assert best_of_kl(4) == pytest.approx(float((p * np.log(p * 2000)).sum()), abs=1e-3)


def test_the_optimum_is_above_every_other_policy() -> None:
    """Over equally likely completions, where it is exact."""
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=(1, 8))
    curve = [{"kl": kl, "gain": gain - rewards.mean()} for kl, gain in optimum(rewards, np.geomspace(0.05, 100, 400))]
    for _ in range(200):
        p = rng.dirichlet(np.full(8, rng.uniform(0.1, 5)))
        kl = float((p * np.log(p * 8)).sum())
        (most,) = along(curve, np.array([kl]))
        assert math.isnan(most) or p @ rewards[0] - rewards.mean() <= most + 1e-3


def test_a_curve_begins_at_the_reference_and_ends_at_its_last_point() -> None:
    points = [{"kl": 16.0, "gain": 1.0}, {"kl": 4.0, "gain": 2.0}]
    assert along(points, np.array([0.0, 1.0, 9.0, 16.0])).tolist() == [0, 1, 1.5, 1]
    assert np.isnan(along(points, np.array([17.0]))).all()


def test_a_slope_is_the_gain_for_each_root_of_the_kl() -> None:
    seeds = [(0, 3.0), (1, 2.0)]
    points = [{"method": "DPO", "seed": n, "kl": kl, "gain": a * kl**0.5} for n, a in seeds for kl in (0.1, 0.4, 2.0)]
    assert slopes(points, "DPO") == pytest.approx([3, 2])


def run(folder: Path, model: Path, *more: str) -> dict[str, Any]:
    main(["--output", str(folder), "--model", str(model), *SMALL.split(), *more])
    return json.loads((folder / "frontier.json").read_text())


@pytest.mark.bench
def test_all_of_it_and_going_on_from_an_interruption(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", tiny)
    assert len(whole["points"]) == 2 * 6 * 2
    assert {point["step"] for point in whole["points"] if "long" not in point["setting"]} == {1, 3}
    assert {point["step"] for point in whole["points"] if "long" in point["setting"]} == {4, 12}
    for point in whole["points"]:
        assert point["kl"] > 0 and math.isfinite(point["gain"])
        first, last = point["kl_interval"]
        assert first <= point["kl"] <= last
    assert [point["n"] for point in whole["best_of"]] == [2, 4]
    assert (tmp_path / "whole" / "frontier.png").stat().st_size > 10_000
    assert "| DPO beta 0.1 | 3 |" in (tmp_path / "whole" / "frontier.md").read_text()

    lines = (tmp_path / "whole" / "points.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "points.jsonl").write_text("".join(lines[:6]))  # after two trainings
    again = run(tmp_path / "broken", tiny)
    assert [plain(point) for point in again["points"]] == [plain(point) for point in whole["points"]]

    assert run(tmp_path / "whole", tiny) == whole
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "whole", tiny, "--copies", "4")
    assert "name another folder" in capsys.readouterr().err


def plain(point: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != "seconds"}


def test_unlikelihood_by_hand() -> None:
    whole = torch.tensor([-2.0, -3.0, -5.0, -1.0])
    p = Preferences(whole, torch.zeros(4), torch.ones(4), whole, mean_chosen_length=2.0)
    assert unlikelihood(p).tolist() == [(-5 + 2) / 2, (-1 + 3) / 2]
