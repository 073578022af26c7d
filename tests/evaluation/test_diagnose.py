"""Findings on numbers made up to have one thing wrong: that thing is found, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from dpo_cli.evaluation.diagnostics import ENOUGH, Evidence, diagnose, judge
from dpo_cli.evaluation.metrics import PairScores
from dpo_cli.evaluation.statistics import intervals, length_bias
from dpo_cli.losses.objective import Objective
from dpo_cli.reporting.text import passed_names
from dpo_cli.utils.files import to_json
from tests.helpers.synthetic import scores_of

PAIRS = 300


def healthy(seed: int = 0, pairs: int = PAIRS, shift: float = 4.0, beta: float = 0.1, **drift: float) -> PairScores:
    """Normal margins, right in about 70% of the pairs; the chosen responses rise as the rejected ones fall.

    ``drift``: KL a token and shares of moved tokens, of both sides or one.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 200, (pairs, 2)).astype(float)
    logratios = rng.normal([shift / 2, -shift / 2], 5, (pairs, 2))
    ref_logps = -tokens * rng.normal(1.5, 0.2, (pairs, 2))
    kl, shifted_chosen, shifted_rejected = (
        drift.get(name, 0.002) for name in ("kl", "shifted_chosen", "shifted_rejected")
    )
    exact = {
        "entropy": tokens,
        "ref_entropy": tokens,
        "kl": tokens * kl * rng.uniform(0.9, 1.1, tokens.shape),
        "reverse_kl": tokens * kl,
        "shifted_tokens": rng.binomial(tokens.astype(int), [shifted_chosen, shifted_rejected]).astype(float),
    }
    return scores_of(logratios, tokens, ref_logps, beta, distributions=exact)


def with_logratios(scores: PairScores, logratios: Any) -> PairScores:
    return dataclasses.replace(scores, logps=scores.ref_logps + logratios)


def judged_and_found(scores: PairScores, history: Any = (), **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return diagnose(Evidence(scores, intervals(scores), length_bias(scores), history, **more))


def found(scores: PairScores, history: Any = (), chance: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Without what is said of a policy that is no better than ``chance``, unless it is asked for."""
    every = judged_and_found(scores, history, **more)[0]
    told = [finding for finding in every if chance or not finding["kind"].endswith("_chance")]
    for finding in told:
        assert finding.keys() == {"kind", "title", "advice", "numbers"}
        assert finding["title"] and finding["advice"].endswith(".")
        assert json.loads(to_json(finding)) == finding
    return told


def only(scores: PairScores, history: Any = (), **more: Any) -> dict[str, Any]:
    (finding,) = found(scores, history, **more)
    return finding


# ---- nothing is wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_ordinary_noise_has_no_finding(seed: int) -> None:
    scores = healthy(seed)
    assert 0.6 < scores.wins.mean() < 0.8
    assert found(scores) == []


def test_a_model_that_is_the_reference_has_no_finding() -> None:
    """Be it to the bit or but for arithmetic."""
    scores = healthy(kl=0.0, shifted_chosen=0.0, shifted_rejected=0.0)
    noise = np.random.default_rng(0).normal(-2e-4, 1e-4, scores.tokens.shape)
    assert found(with_logratios(scores, 0.0)) == found(with_logratios(scores, noise)) == []


def test_few_pairs_have_no_finding_that_needs_an_interval() -> None:
    sunk = healthy(pairs=ENOUGH - 1, kl=9, shifted_chosen=0.9)
    assert found(with_logratios(sunk, sunk.logratios - 50)) == []
    assert found(scores_of([[1, 0]])) == []


# ---- what was judged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 6, ENOUGH - 1])
def test_too_few_pairs_are_no_clean_result(pairs: int) -> None:
    scores = healthy(pairs=pairs)
    told = judged_and_found(scores, run([0.69, 0.6]))[1]
    plural = "s" * (pairs > 1)
    assert told["text"] == f"Only {pairs} pair{plural}: too few to judge (20 needed)"
    assert (told["pairs"], told["needed"], told["enough"]) == (pairs, 20, False)
    assert told["passed"] == ["not_finite", "memorised", "nothing_learned"]


def test_a_clean_result_names_what_was_looked_for_on_how_many_pairs() -> None:
    scores = healthy()
    told = judged_and_found(scores)[1]
    passed = ["not_finite", "length_bias", "displaced_chosen", "kl_drift", "worse_than_chance"]
    passed += ["at_chance"]
    assert told == {"pairs": PAIRS, "needed": 20, "enough": True, "passed": passed, "text": told["text"]}
    assert told["text"] == "No problems found: 6 checks passed on 300 pairs"
    names = "not finite, length bias, displaced chosen, kl drift, worse than chance, at chance"
    assert passed_names(told) == names
    less = dataclasses.replace(scores, distributions={})
    assert judged_and_found(less)[1]["passed"] == [name for name in passed if "drift" not in name]
    more = judged_and_found(scores, run([0.69, 0.5]))[1]["passed"]
    assert set(more) == {*passed, "memorised", "nothing_learned", "over_optimised"}


def test_what_was_found_did_not_pass() -> None:
    scores = healthy(kl=0.8)
    told = judged_and_found(scores)[1]
    assert told["text"] == "1 problem found: 5 checks passed on 300 pairs"
    assert told["enough"] and "kl_drift" not in told["passed"] and len(told["passed"]) == 5


def test_of_pairs_of_one_prompt_no_check_that_needs_an_interval_has_passed() -> None:
    scores = dataclasses.replace(healthy(), groups=np.zeros(PAIRS, int))
    assert judged_and_found(scores)[1]["passed"] == ["not_finite"]


def test_pairs_that_were_trained_on_do_not_count() -> None:
    told = judge(30, 0, ["not_finite"], trained_on=24)
    assert told["text"] == "Only 6 pairs that were not trained on: too few to judge (20 needed)"
    assert not told["enough"] and told["pairs"] == 6
    told = judge(50, 2, ["not_finite"], trained_on=24)
    assert told["enough"] and told["text"].startswith("2 problems found: 1 check passed on 50 pairs, 24 of which were")
    told = judge(0)
    assert (
        not told["enough"]
        and told["text"].startswith("No pairs were held out: ")
        and "--eval-fraction 0.1" in told["text"]
    )


# ---- was anything learned ---------------------------------------------------------------------------------------


def trained_to(loss: float, start: float = 0.6931, lr: float = 1e-6) -> list[dict[str, Any]]:
    """Thirty steps whose loss falls to a value at once, and the evaluation before the first."""
    steps = [{"step": n, "loss": loss if n > 1 else start, "learning_rate": lr} for n in range(1, 31)]
    return [{"step": 0, "eval_loss": start}, *steps]


@pytest.mark.parametrize("pairs", [2, 6, PAIRS])
def test_memorised_training_pairs(pairs: int) -> None:
    scores = with_logratios(healthy(pairs=pairs, kl=0.0), np.tile([-10.0, 10.0], (pairs, 1)))
    finding = only(scores, trained_to(0.0013))
    assert finding["kind"] == "memorised" and "0.0013 on them and 2.1" in finding["title"]
    numbers = {"training_loss": 0.0013, "loss": 2.1269, "start_loss": 0.6931}
    assert finding["numbers"] == pytest.approx(numbers, abs=1e-3)
    assert "--save-best loss" in finding["advice"]


@pytest.mark.parametrize(("best", "kind"), [(0.69, "memorised"), (0.5, "over_optimised")])
def test_memorised_or_over_optimised(best: float, kind: str) -> None:
    """Both are one cause: the latter where the held-out loss was once better than at the start."""
    steps = [{"step": n, "loss": 0.69 * 0.9**n, "rewards/margins": 0.1 * n} for n in range(1, 31)]
    held_out = [{"step": 0, "eval_loss": 0.69}, {"step": 10, "eval_loss": best}, {"step": 30, "eval_loss": 2.13}]
    wrong = with_logratios(healthy(kl=0.0), np.tile([-10.0, 10.0], (PAIRS, 1)))
    assert only(wrong, [*steps, *held_out])["kind"] == kind


def test_what_is_not_memorised() -> None:
    wrong = with_logratios(healthy(pairs=6), np.tile([-10.0, 10.0], (6, 1)))
    assert found(wrong, trained_to(0.4)) == []  # the training loss is not far below
    assert found(wrong) == []  # never trained
    right = with_logratios(healthy(pairs=6), np.tile([1.0, -1.0], (6, 1)))
    assert found(right, trained_to(0.0013)) == []  # the loss is below ln 2


def test_memorised_is_measured_from_where_the_loss_begins() -> None:
    """At ln 2 for pairs that the run did not hold out, if its loss begins there; else where its held-out loss began."""
    wrong = with_logratios(healthy(pairs=6), np.tile([-10.0, 10.0], (6, 1)))
    assert only(wrong, trained_to(0.0013)[1:], held_out=False)["numbers"]["start_loss"] == pytest.approx(np.log(2))
    ipo = dataclasses.replace(wrong, objective=Objective({"ipo": 1.0}))
    now = float(ipo.losses.mean())
    assert found(ipo, trained_to(0.0013)[1:], held_out=False) == []
    assert only(ipo, trained_to(0.0013, start=now - 1))["kind"] == "memorised"
    assert found(ipo, trained_to(0.0013, start=now + 1)) == []


@pytest.mark.parametrize("pairs", [3, PAIRS])
@pytest.mark.parametrize("size", [0.0, 1e-4, 0.05])
def test_nothing_learned(pairs: int, size: float) -> None:
    scores = healthy(pairs=pairs)
    scores = with_logratios(scores, size * np.random.default_rng(0).normal(0, 1, (pairs, 2)))
    finding = only(scores, trained_to(0.6931))  # and not that it is no better than chance
    assert finding["kind"] == "nothing_learned" and "--lr" in finding["advice"]
    assert finding["numbers"]["moved"] <= 2 * size and finding["numbers"]["steps"] == 30
    assert found(scores) == []  # no training, of which to say so
    moved = with_logratios(scores, np.tile([0.3, -0.3], (pairs, 1)))
    assert found(moved, trained_to(0.68)) == []


@pytest.mark.parametrize("shift", [0.0, -8.0])
def test_no_better_than_chance(shift: float) -> None:
    scores = healthy(shift=shift)
    scores = with_logratios(scores, scores.logratios - scores.logratios.mean(0) + [shift / 2, -shift / 2])
    finding = only(scores, trained_to(0.5), chance=True)
    low, high = finding["numbers"]["accuracy_low"], finding["numbers"]["accuracy_high"]
    assert finding["kind"] == ("worse_than_chance" if shift else "at_chance") and low < 0.5
    assert (high < 0.5) == bool(shift) and f"{low:.1%} to {high:.1%}" in finding["title"]
    assert only(scores, chance=True)["kind"] == finding["kind"]  # of a model without a training, too
    itself = with_logratios(scores, np.zeros((PAIRS, 2)))
    assert found(itself, chance=True) == [] and not {"at_chance", "worse_than_chance"} & {
        *judged_and_found(itself)[1]["passed"]
    }
    few = with_logratios(healthy(pairs=ENOUGH - 1), np.tile([[1.0, -1.0], [-1.0, 1.0], [0, 0]], (7, 1))[: ENOUGH - 1])
    assert found(few, trained_to(0.5)) == []


def test_what_explains_chance_is_told_in_its_place() -> None:
    scores = healthy()
    by_length = with_logratios(scores, (scores.tokens - 110) / 10)
    assert only(by_length, trained_to(0.5))["kind"] == "length_bias"


# ---- numbers that are none --------------------------------------------------------------------------------------


@pytest.mark.parametrize("worth", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pairs", [2, PAIRS])
def test_a_policy_that_diverged(pairs: int, worth: float) -> None:
    scores = healthy(pairs=pairs)
    scores.logps[1, 0] = worth
    with np.errstate(invalid="ignore", over="ignore"):
        finding = found(scores)[0]
    assert finding["kind"] == "not_finite" and scores.where[1] in finding["title"]
    assert finding["numbers"] == {"pairs": 1, "policy": 1, "reference": 0} and "--lr" in finding["advice"]


def test_a_reference_that_fails_is_not_laid_upon_the_policy() -> None:
    scores = healthy()
    scores.ref_logps[:] = np.nan
    finding = only(scores)
    assert finding["kind"] == "not_finite" and f"{PAIRS} pairs" in finding["title"]
    assert "reference" in finding["advice"] and "--lr" not in finding["advice"]


# ---- displaced chosen responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_displaced_chosen(beta: float) -> None:
    scores = healthy(beta=beta)
    finding = only(with_logratios(scores, scores.logratios - 10))
    numbers = finding["numbers"]
    assert finding["kind"] == "displaced_chosen"
    assert numbers["chosen"] == pytest.approx(-8, abs=1) and numbers["rejected"] == pytest.approx(-12, abs=1)
    assert numbers["fell"] > 0.9  # all in nats, whatever beta is
    assert ("--beta" in finding["advice"] and "8." in finding["title"]) or "7." in finding["title"]


def test_a_fall_that_is_small_or_unsure_is_not_told() -> None:
    scores = healthy()
    mean = scores.logratios.mean(0)
    assert found(with_logratios(scores, scores.logratios - mean - [0.6, 3])) == []  # sure, but not of half
    wide = (scores.logratios - mean) * 5 - [1.5, 9]
    assert found(with_logratios(scores, wide)) == []  # 1.5 nats, but not sure
    assert found(with_logratios(scores, scores.logratios - mean - [3, -1])) == []  # not along with the rejected ones


# ---- length -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefers", "sign"), [("longer", 1), ("shorter", -1)])
def test_length_bias(prefers: str, sign: int) -> None:
    scores = healthy()
    finding = only(with_logratios(scores, sign * (scores.tokens - 110) / 10 + scores.logratios))
    numbers, against = finding["numbers"], {"longer": "shorter", "shorter": "longer"}[prefers]
    assert finding["kind"] == "length_bias" and f"prefers the {prefers}" in finding["title"]
    assert numbers[f"accuracy_chosen_{prefers}"] > numbers[f"accuracy_chosen_{against}"] + 0.3
    assert sign * numbers["correlation"] > 0.5


def test_a_preference_that_length_goes_with_is_no_bias() -> None:
    """Longer responses are better here, and the policy is as right where they are not."""
    scores = healthy()
    longer = np.sort(scores.tokens, 1)[:, ::-1]
    order = np.random.default_rng(1).random(PAIRS) < 0.8
    tokens = np.where(order[:, None], longer, longer[:, ::-1])
    assert found(dataclasses.replace(scores, tokens=tokens)) == []


# ---- drift ------------------------------------------------------------------------------------------------------


def test_kl_drift() -> None:
    finding = only(healthy(kl=0.8))
    assert finding["kind"] == "kl_drift" and "0.8" in finding["title"]
    assert finding["numbers"]["kl_chosen"] == pytest.approx(0.8, abs=0.01)
    assert found(healthy(kl=0.4)) == []


def test_what_was_not_computed_is_not_judged() -> None:
    scores = healthy(kl=0.8, shifted_chosen=0.5)
    assert found(dataclasses.replace(scores, distributions={})) == []


# ---- over-training ----------------------------------------------------------------------------------------------


def run(losses: list[float], margins: tuple[float, float] = (0.0, 4.0)) -> list[dict[str, Any]]:
    """A hundred steps whose margin goes from one number to another, with evaluations at equal distances."""
    lines = [
        {"step": step, "loss": 0.5, "rewards/margins": float(np.interp(step, [0, 100], margins))}
        for step in range(1, 101)
    ]
    held_out = [{"step": 20 * i, "eval_loss": loss, "eval_rewards/margins": 0.5} for i, loss in enumerate(losses)]
    return sorted(lines + held_out, key=lambda line: float(line["step"]))


def test_over_optimised() -> None:
    finding = only(healthy(), run([0.69, 0.6, 0.55, 0.6, 0.7, 0.8]))
    numbers = finding["numbers"]
    assert finding["kind"] == "over_optimised" and "since step 40" in finding["title"]
    assert (numbers["best_step"], numbers["best_loss"]) == (40, 0.55)
    assert (numbers["last_step"], numbers["last_loss"]) == (100, 0.8)
    assert "--save-best loss" in finding["advice"] and "40 steps" in finding["advice"]


def test_other_pairs_say_nothing_of_the_held_out_loss() -> None:
    scores = healthy()
    assert found(scores, run([0.69, 0.6, 0.55, 0.6, 0.7, 0.8]), held_out=False) == []


def test_held_out_loss_that_only_ever_rose() -> None:
    finding = only(healthy(), run([0.69, 0.7, 0.75, 0.8, 0.9, 1.0]))
    assert finding["numbers"]["best_step"] == 0
    assert "never better" in finding["advice"]


@pytest.mark.parametrize(
    "history",
    [
        [],
        run([0.69, 0.6, 0.55, 0.54, 0.53, 0.52]),  # still falling
        run([0.69, 0.6, 0.55, 0.54, 0.53, 0.54]),  # by less than noise
        run([0.69, 0.6, 0.55, 0.6, 0.7, 0.8], (4.0, 0.0)),  # a run that broke, which is something else
        run([]),
        [line for line in run([0.69, 0.6, 0.55, 0.6, 0.7, 0.8]) if "eval_loss" in line],
        [{"step": 1, "loss": None, "rewards/margins": None}, {"step": 1, "eval_loss": None}],
    ],
)
def test_no_over_training(history: Any) -> None:
    assert found(healthy(), history) == []
