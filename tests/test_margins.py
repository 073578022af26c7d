"""What is told of pairs beyond their means: worked by hand, and what must not depend on how it is counted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from dpo_cli.evaluation.margins import compared, sections
from dpo_cli.evaluation.scores import Distributions, Scores, means, values
from dpo_cli.losses.objective import Objective
from dpo_cli.reporting.text import as_text
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import to_json

SURE = math.log(0.78 / 0.22)  # sigma of it is 0.78


def make_scores(logratios: Any, tokens: Any = None, ref_logps: Any = None, beta: float = 1.0, **more: Any) -> Scores:
    """Scores of pairs with these log-ratios (P, 2); responses of 10 tokens and -20 nats where not given."""
    logratios = np.asarray(logratios, float)
    tokens = np.full(logratios.shape, 10.0) if tokens is None else np.asarray(tokens, float)
    ref_logps = np.full(logratios.shape, -20.0) if ref_logps is None else np.asarray(ref_logps, float)
    terms = np.tile([1.0, 0.0], (len(logratios), 1))
    where = [f"rows.jsonl:{line + 1}" for line in range(len(logratios))]
    return Scores(where, tokens, ref_logps + logratios, ref_logps, terms, Objective(beta=beta), **more)


def with_margins(*margins: float, **more: Any) -> Scores:
    """Half a margin on each side."""
    return make_scores([[m / 2, -m / 2] for m in margins], **more)


def random_scores(pairs: int, seed: int = 0, shift: float = 1.0, beta: float = 0.1, exact: bool = True) -> Scores:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 100, (pairs, 2)).astype(float)
    each = tokens * rng.uniform(0.01, 0.1, tokens.shape)
    table = Distributions(tokens, tokens, tokens + each, tokens + 2 * each, each, 2 * each, each, 1e-6)
    logratios = rng.normal([shift / 2, -shift / 2], 2, tokens.shape)
    return make_scores(logratios, tokens, -2 * tokens, beta, distributions=table if exact else None)


# ---- intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_every_mean_has_an_interval_around_it(exact: bool) -> None:
    scores = random_scores(200, exact=exact)
    known, intervals = values(scores), sections(scores)["intervals"]
    perplexities = {f"{name}perplexity/{side}" for name in ("", "ref_") for side in ("chosen", "rejected")}
    assert intervals.keys() == known.keys() | perplexities
    for name, value in known.items():
        low, high = intervals[name]
        assert low <= value + 1e-9 and value - 1e-9 <= high, name
    for side in ("chosen", "rejected"):
        low, high = intervals[f"cross_entropy/{side}"]
        assert intervals[f"perplexity/{side}"] == pytest.approx([math.exp(low), math.exp(high)])
        low, high = intervals[f"data_kl_change/{side}"]  # the same resamples, the other sign
        assert intervals[f"logratio/{side}"] == pytest.approx([-high, -low])


def test_accuracy_has_wilsons_interval_and_ties_count_half() -> None:
    scores = with_margins(*[1] * 80, *[-1] * 181, 0, 0)
    assert sections(scores)["intervals"]["rewards/accuracies"] == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_that_no_token_moved_is_not_certain() -> None:
    scores = random_scores(100)
    assert scores.distributions is not None
    none = dataclasses.replace(scores.distributions, moved=0 * scores.tokens)
    intervals = sections(dataclasses.replace(scores, distributions=none))["intervals"]
    assert intervals["moved_tokens/chosen"] == intervals["moved_tokens/rejected"] == pytest.approx([0, 0.037], abs=1e-3)


def test_pairs_of_one_prompt_are_no_more_than_one() -> None:
    """Every pair six times, as of one prompt: intervals are those of the pairs once, and not 2.4 times narrower."""
    once = random_scores(60, exact=False)
    six = np.repeat(np.arange(60), 6)
    tables = {name: getattr(once, name)[six] for name in ("tokens", "logps", "ref_logps", "terms")}
    often = dataclasses.replace(once, where=[str(i) for i in range(360)], groups=six, **tables)
    a, b = sections(once), sections(often)
    for name in ("loss", "rewards/margins", "cross_entropy/chosen"):
        assert b["intervals"][name] == pytest.approx(a["intervals"][name])
    assert b["length"]["margin_length_correlation_interval"] is not None
    widths = [np.subtract(*told["intervals"]["rewards/accuracies"]) for told in (a, b)]
    assert widths[0] == pytest.approx(widths[1], rel=0.1)
    differences = [compared(s, dataclasses.replace(s, logps=s.logps * 0.9))["differences"] for s in (once, often)]
    assert differences[0]["loss"]["interval"] == pytest.approx(differences[1]["loss"]["interval"])


@pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf, -1e300])
@pytest.mark.parametrize("pairs", [1, 30])
def test_log_probs_that_are_no_numbers(worth: float, pairs: int) -> None:
    """They make what is computed from them unknown, and nothing fails."""
    scores = random_scores(pairs)
    scores.logps[0] = worth
    with np.errstate(invalid="ignore", over="ignore"):
        told = json.loads(to_json(values(scores) | sections(scores)))
        json.loads(to_json(compared(scores, scores)))
    if math.isnan(worth):
        assert told["rewards/accuracies"] is told["rewards/ties"] is told["intervals"]["rewards/accuracies"] is None
        assert told["intervals"]["rewards/ties"] is told["intervals"]["loss"] is None
        assert told["length"]["margin_length_correlation"] is None
    assert told["perplexity/chosen"] is None or worth == math.inf
    assert told["intervals"]["perplexity/chosen"] is None


def test_what_is_told_is_json_however_few_pairs_there_are() -> None:
    for pairs in (1, 2, 3):
        told = json.loads(to_json(sections(random_scores(pairs))))
        assert told.keys() == {
            "intervals", "rewards/margins_quantiles", "effect", "buckets", "calibration", "length",
        }  # fmt: skip
        assert (told["intervals"]["loss"] is None) == (pairs == 1)
        assert len(told["intervals"]["rewards/accuracies"]) == 2


def test_a_model_that_is_the_reference() -> None:
    """Differences that are only arithmetic have no effect, no correlation and no order."""
    rng = np.random.default_rng(0)
    scores = make_scores(rng.normal(0, 1e-5, (50, 2)), rng.integers(5, 50, (50, 2)))
    told = sections(scores)
    assert math.isnan(told["effect"]["margin_d"]) and told["effect"]["margin_d_interval"] is None
    assert math.isnan(told["length"]["margin_length_correlation"])
    assert told["effect"]["rank/change"] == 0 and told["effect"]["rank/change_interval"] == [0, 0]
    assert told["calibration"]["brier"] == pytest.approx(0.25, abs=1e-4) and told["calibration"]["ece"] < 1e-4
    assert [bucket["accuracy"] for bucket in told["buckets"]["margin"]] == [0.5] * 5


# ---- quantiles, effect ------------------------------------------------------------------------------------------


def test_quantiles() -> None:
    told = sections(with_margins(*range(101)))["rewards/margins_quantiles"]
    assert told == pytest.approx({"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95})


def test_effect_is_the_mean_over_the_spread_whatever_beta_is() -> None:
    first, second = (sections(with_margins(*range(1, 12), beta=beta))["effect"] for beta in (1.0, 0.1))
    assert first["margin_d"] == pytest.approx(6 / math.sqrt(11))
    assert second["margin_d"] == pytest.approx(first["margin_d"])
    assert second["margin_d_interval"] == pytest.approx(first["margin_d_interval"])
    assert first["margin_d_interval"][0] < first["margin_d"] < first["margin_d_interval"][1]


def test_the_effect_of_few_prompts_has_no_interval() -> None:
    assert sections(with_margins(*range(1, 10)))["effect"]["margin_d_interval"] is None
    pairs = with_margins(*range(1, 19), groups=np.arange(18) // 2)
    assert sections(pairs)["effect"]["margin_d_interval"] is None


def test_ranks_by_log_probability_before_and_after() -> None:
    """Right before and after; wrong before and right after; wrong; equal before and right after."""
    ref_logps = [[-10, -20], [-20, -10], [-20, -10], [-10, -10]]
    effect = sections(make_scores([[0, 0], [15, 0], [5, 0], [1, 0]], ref_logps=ref_logps))["effect"]
    assert effect["rank/reference"] == 1.5 / 4 and effect["rank/policy"] == 3 / 4
    assert effect["rank/change"] == 1.5 / 4


# ---- buckets, calibration ---------------------------------------------------------------------------------------


def test_accuracy_by_fifths_of_the_absolute_margin() -> None:
    buckets = sections(with_margins(1, -2, 3, -4, 5, 6, 7, -8, 9, 10))["buckets"]["margin"]
    assert [bucket["pairs"] for bucket in buckets] == [2] * 5
    assert [bucket["accuracy"] for bucket in buckets] == [0.5, 0.5, 1, 0.5, 1]
    assert buckets[0]["from"] == 1 and buckets[-1]["to"] == 10
    assert all(a["to"] == b["from"] for a, b in itertools.pairwise(buckets))
    (only,) = sections(with_margins(2, 2, -2))["buckets"]["margin"]
    assert (only["from"], only["to"], only["pairs"]) == (2, 2, 3)


def test_accuracy_by_length_gap_has_readable_edges() -> None:
    """Pairs are counted once; the policy is right just where the chosen response is longer."""
    gaps = np.arange(-103, 104)
    tokens = np.stack([200 + gaps, np.full(len(gaps), 200)], 1)
    buckets = sections(make_scores(np.stack([gaps, 0 * gaps], 1), tokens))["buckets"]["length"]
    assert [(bucket["from"], bucket["to"]) for bucket in buckets] == [
        (-103, -101), (-100, -51), (-50, 50), (51, 100), (101, 103),
    ]  # fmt: skip
    assert sum(bucket["pairs"] for bucket in buckets) == len(gaps)
    assert [bucket["accuracy"] for bucket in buckets] == [0, 0, 0.5, 1, 1]
    (equal,) = sections(with_margins(1, 2))["buckets"]["length"]
    assert (equal["from"], equal["to"], equal["pairs"]) == (-1, 1, 2)


def test_calibration_by_hand() -> None:
    """78 % sure, and right in two of three; a tie that is half right by chance."""
    told = sections(with_margins(SURE, SURE, -SURE, 0))["calibration"]
    assert told["brier"] == pytest.approx((2 * 0.22**2 + 0.78**2 + 0.5**2) / 4)
    assert told["ece"] == pytest.approx(3 / 4 * (0.78 - 2 / 3))
    hits, p = np.arange(4), np.array([0.22**3, 3 * 0.78 * 0.22**2, 3 * 0.78**2 * 0.22, 0.78**3])
    assert told["ece_expected"] == pytest.approx((0.5 + p @ np.abs(hits - 3 * 0.78)) / 4)
    unsure, sure = told["curve"]
    assert (unsure["pairs"], unsure["predicted"], unsure["observed"]) == (1, 0.5, 0.5)
    assert (sure["from"], sure["to"], sure["pairs"]) == (0.75, 0.8, 3)
    assert (sure["predicted"], sure["observed"]) == pytest.approx((0.78, 2 / 3))


def test_a_calibrated_policy_of_few_pairs_has_the_error_that_is_expected() -> None:
    rng, found = np.random.default_rng(1), []
    margins = np.abs(rng.normal(0, 1, 60))
    for _ in range(60):
        right = rng.random(60) < 1 / (1 + np.exp(-margins))
        found.append(sections(with_margins(*np.where(right, 1, -1) * margins))["calibration"])
    assert found[0]["ece_expected"] == pytest.approx(np.mean([each["ece"] for each in found]), rel=0.08)
    assert found[0]["ece_expected"] > 0.08


def test_a_calibrated_policy_has_a_small_error() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 5_000)
    right = rng.random(5_000) < 1 / (1 + np.exp(-np.abs(margins)))
    calibration = sections(with_margins(*np.where(right, 1, -1) * np.abs(margins)))["calibration"]
    assert calibration["ece"] < 0.02
    inside = [line["interval"][0] <= line["predicted"] <= line["interval"][1] for line in calibration["curve"]]
    assert sum(inside) >= 9


# ---- length -----------------------------------------------------------------------------------------------------


def test_length_by_hand() -> None:
    tokens = [[30, 10], [20, 10], [10, 20], [10, 40], [10, 10]]
    told = sections(make_scores([[2, 0], [1, 0], [-1, 0], [-3, 0], [0, 0]], tokens))["length"]
    assert told["margin_length_correlation"] == pytest.approx(1)
    assert (told["accuracy_chosen_longer"], told["accuracy_chosen_longer_pairs"]) == (1, 2)
    assert (told["accuracy_chosen_shorter"], told["accuracy_chosen_shorter_pairs"]) == (0, 2)
    assert told["accuracy_prefer_longer"] == 0.5
    rewards = [2, 0, 1, 0, -1, 0, -3, 0, 0, 0]
    assert told["reward_length_correlation"] == pytest.approx(spearmanr(rewards, np.ravel(tokens)).statistic)


def test_length_is_held_against_the_rewards_that_are_reported() -> None:
    """Without a reference those are of log-probs a token, though there are log-ratios that go the other way."""
    scores = random_scores(40)
    scores = dataclasses.replace(scores, objective=Objective({"simpo": 1.0}), ref_logps=np.full((40, 2), np.nan))
    told, a_token = sections(scores)["length"], scores.logps / scores.tokens
    assert told["reward_length_correlation"] == pytest.approx(spearmanr(a_token.ravel(), scores.tokens.ravel())[0])
    gaps = a_token[:, 0] - a_token[:, 1], scores.tokens[:, 0] - scores.tokens[:, 1]
    assert told["margin_length_correlation"] == pytest.approx(spearmanr(*gaps)[0])


def test_no_pair_where_the_chosen_response_is_shorter() -> None:
    told = sections(make_scores([[1, 0], [2, 0]], [[3, 1], [4, 1]]))["length"]
    assert told["accuracy_chosen_shorter_pairs"] == 0 and told["accuracy_chosen_shorter_interval"] is None
    assert math.isnan(told["accuracy_chosen_shorter"])  # null in JSON


# ---- two models -------------------------------------------------------------------------------------------------


def test_a_model_is_no_better_than_itself() -> None:
    scores = random_scores(50)
    told = compared(scores, scores)
    assert told["differences"].keys() == means(scores).keys()
    assert all(each["difference"] == 0 and each["interval"] == [0, 0] for each in told["differences"].values())
    assert told["pairs_b_better"]["share"] == 0.5


def test_differences_are_paired() -> None:
    """A constant gain is sure, however much the pairs differ from each other."""
    a = random_scores(50)
    b = dataclasses.replace(a, logps=a.logps + np.array([3.0, -1.0]))
    told = compared(a, b)
    margins = told["differences"]["rewards/margins"]
    assert margins["difference"] == pytest.approx(0.4) and margins["interval"] == pytest.approx([0.4, 0.4])
    assert margins["b"] - margins["a"] == pytest.approx(margins["difference"])
    assert told["pairs_b_better"] == {"share": 1, "interval": pytest.approx([0.9287, 1], abs=1e-4)}
    assert "logratios/margins" not in told["differences"]


def test_models_of_different_betas_are_compared_in_log_ratios_too() -> None:
    a = random_scores(50)
    told = compared(a, dataclasses.replace(a, objective=Objective(beta=1.0)))
    assert told["differences"]["rewards/margins"]["difference"] > 0.1
    assert told["differences"]["logratios/margins"]["interval"] == [0, 0]
    assert told["pairs_b_better"]["share"] == 0.5


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (Objective(label_smoothing=0.1), {"loss": "--loss sigmoid, with other options"}),
        (Objective({"ipo": 1.0}), {"loss": "a's is of --loss sigmoid, b's of --loss ipo"}),
        (Objective({"simpo": 1.0}), {"loss": "simpo", "rewards": "a's are of log-ratios, b's of log-probs a token"}),
    ],
)
def test_what_other_objectives_measure_otherwise_is_not_compared(objective: Objective, told: dict[str, str]) -> None:
    a = random_scores(20, beta=0.1)
    result = compared(a, dataclasses.replace(a, objective=objective))
    assert result["not_compared"].keys() == told.keys()
    assert all(words in result["not_compared"][name] for name, words in told.items())
    kept = result["differences"]
    assert "loss" not in kept and "kl/chosen" in kept
    assert ("rewards/margins" in kept) == ("rewards" not in told) == ("logratios/margins" not in kept)
    about = {"model": "m", "reference": "r", "beta": 0.1}
    text = as_text({"a": about, "b": about, "pairs": 20, "same_tokens": True} | result)
    assert all(f"{name} not compared" in text and words in text for name, words in told.items())


def test_what_only_one_has_is_not_compared() -> None:
    told = compared(random_scores(20), random_scores(20, exact=False))
    assert "kl/chosen" not in told["differences"] and "loss" in told["differences"]


def test_other_pairs_are_refused() -> None:
    with pytest.raises(UsageError, match="the same pairs"):
        compared(random_scores(20), random_scores(21))
