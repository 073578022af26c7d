"""Means, intervals and comparisons of pairs: worked by hand, and how often an interval covers the truth."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, spearmanr

from dpo_cli.evaluation.diagnostics import count_new
from dpo_cli.evaluation.metrics import METRICS, PairScores, pair_sums, summarize
from dpo_cli.evaluation.statistics import (
    compare,
    intervals,
    length_bias,
    ratio_interval,
    share_interval,
    spearman,
    student,
    wilson,
)
from dpo_cli.losses.objective import Objective
from dpo_cli.reporting.text import as_text
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import to_json
from tests.helpers.synthetic import make_evaluation, scores_of

MANY = 1500  # repetitions


def with_margins(*margins: float, **more: Any) -> PairScores:
    """Half a margin on each side."""
    return scores_of([[m / 2, -m / 2] for m in margins], **more)


def random_scores(pairs: int, seed: int = 0, shift: float = 1.0, beta: float = 0.1, exact: bool = True) -> PairScores:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 100, (pairs, 2)).astype(float)
    each = tokens * rng.uniform(0.01, 0.1, tokens.shape)
    table = {"entropy": tokens, "ref_entropy": tokens, "kl": each, "reverse_kl": 2 * each, "shifted_tokens": each}
    logratios = rng.normal([shift / 2, -shift / 2], 2, tokens.shape)
    return scores_of(logratios, tokens, -2 * tokens, beta, distributions=table if exact else {})


def covered(ends: Any, truth: float) -> float:
    low, high = np.array(list(ends)).T
    return float(((low <= truth) & (truth <= high)).mean())


# ---- one definition of the metrics ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Objective(), Objective({"simpo": 1.0}, beta=2.0)])
def test_a_step_and_an_evaluation_have_the_same_metrics(objective: Objective) -> None:
    scores = dataclasses.replace(random_scores(40), objective=objective)
    logps, ref_logps, lengths = (
        torch.from_numpy(t.T.reshape(-1)) for t in (scores.logps, scores.ref_logps, scores.tokens)
    )
    reference = ref_logps if objective.reference else torch.zeros_like(logps)
    averaged = lengths if objective.length_normalized else None
    sums = pair_sums(torch.from_numpy(scores.losses), logps, reference, objective.beta, averaged)
    means = scores.means()
    assert summarize(sums.tolist()) == pytest.approx({name: means[name] for name in METRICS})


def test_a_tie_is_half_a_win_and_what_is_no_number_is_neither() -> None:
    scores = with_margins(1, -1, 0, 1e-5, math.nan)
    assert scores.wins.tolist()[:4] == [1, 0, 0.5, 0.5] and math.isnan(scores.wins[4])
    assert scores.metrics["rewards/ties"].tolist()[:4] == [0, 0, 1, 1]


# ---- intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [20, 300])
def test_intervals_of_means_cover(rows: int) -> None:
    rng = np.random.default_rng(rows)
    assert 0.93 < covered((student(rng.normal(1, 2, rows)) for _ in range(MANY)), 1) < 0.97
    assert 0.91 < covered((student(rng.exponential(1, 10 * rows)) for _ in range(MANY)), 1) < 0.97


@pytest.mark.parametrize("rows", [30, 300])
def test_intervals_of_ratios_of_sums_cover(rows: int) -> None:
    """Nats per token, of responses of random lengths, where longer ones have other rates."""
    rng, ends = np.random.default_rng(2), []
    for _ in range(MANY):
        tokens = rng.integers(5, 200, rows).astype(float)
        ends.append(ratio_interval(tokens * (1.5 - tokens / 400 + rng.normal(0, 0.3, rows)), tokens))
    lengths = np.arange(5, 200)
    assert 0.92 < covered(ends, 1.5 - (lengths**2).sum() / lengths.sum() / 400) < 0.97


def test_intervals_of_correlations_cover() -> None:
    rng, ends = np.random.default_rng(4), []
    for _ in range(MANY):
        x, noise = rng.normal(size=(2, 200))
        ends.append(spearman(x, x + noise)[1])
    assert 0.93 < covered(ends, 6 / math.pi * math.asin(math.sqrt(0.5) / 2)) < 0.97  # Pearson (1907), a normal pair


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_wilson_covers(share: float) -> None:
    """Exactly, by the binomial distribution, for every number of pairs from 50 to 300."""
    coverage = []
    for pairs in range(50, 301):
        ends = np.array([wilson(hits, pairs) for hits in range(pairs + 1)])
        inside = (ends[:, 0] <= share) & (share <= ends[:, 1])
        coverage.append(binom.pmf(np.arange(pairs + 1), pairs, share)[inside].sum())
    assert min(coverage) > 0.93 and max(coverage) < 0.971  # 0.9703 once, of 50 pairs at 0.9
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.002)


def test_wilson_by_known_values() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe (1998), table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(10, 21)[0] < wilson(10.5, 21)[0] == pytest.approx(1 - wilson(10.5, 21)[1])  # a tie is half a hit
    assert wilson(0, 0) == (0, 1)


def test_students_interval_by_hand() -> None:
    assert student(np.array([2.0, 4.0])) == pytest.approx([3 - 12.7062, 3 + 12.7062], abs=1e-4)
    assert student(np.array([2.0])) is None and student(np.array([2.0, np.nan])) is None
    assert student(np.full(9, 0.1)) == pytest.approx([0.1, 0.1])


def test_intervals_cover_where_rows_belong_together() -> None:
    """Half of the variance is that of the group; as if each row stood alone, the intervals would be too narrow."""
    rng, groups, means, alone, shares = np.random.default_rng(9), np.repeat(np.arange(30), 6), [], [], []
    for _ in range(MANY):
        drawn = 1 + rng.normal(size=30)[groups] + rng.normal(size=180)
        means.append(ratio_interval(drawn, np.ones(180), groups))
        alone.append(student(drawn))
        shares.append(share_interval((drawn > 1) * 1.0, groups))
    assert 0.93 < covered(means, 1) < 0.97
    assert covered(alone, 1) < 0.75
    assert covered(shares, 0.5) > 0.95  # rather too wide than too narrow


def test_one_group_has_no_interval_of_means_and_a_wide_one_of_shares() -> None:
    values, groups = np.random.default_rng(11).normal(size=9), np.zeros(9, int)
    assert ratio_interval(values, np.ones(9), groups) is None
    assert share_interval(np.ones(9), groups) == list(wilson(1, 1))
    assert share_interval(np.array([])) is None and share_interval(np.array([1.0, np.nan])) is None


@pytest.mark.parametrize("exact", [False, True])
def test_every_mean_has_an_interval_around_it(exact: bool) -> None:
    scores = random_scores(200, exact=exact)
    means, ends = scores.means(), intervals(scores)
    assert ends.keys() == means.keys() and ("kl/chosen" in means) == exact
    for name, value in means.items():
        low, high = ends[name] or (math.nan, math.nan)
        assert low <= value + 1e-9 and value - 1e-9 <= high, name
    for side in ("chosen", "rejected"):
        assert ends[f"perplexity/{side}"] == pytest.approx(np.exp(ends[f"cross_entropy/{side}"]))


def test_accuracy_has_wilsons_interval_and_ties_count_half() -> None:
    scores = with_margins(*[1] * 80, *[-1] * 181, 0, 0)
    assert intervals(scores)["rewards/accuracies"] == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_that_no_token_shifted_is_not_certain() -> None:
    scores = random_scores(100)
    none = scores.distributions | {"shifted_tokens": 0 * scores.tokens}
    ends = intervals(dataclasses.replace(scores, distributions=none))
    assert ends["shifted_tokens/chosen"] == ends["shifted_tokens/rejected"] == pytest.approx([0, 0.037], abs=1e-3)


def test_pairs_of_one_prompt_are_no_more_than_one() -> None:
    """Every pair six times, as of one prompt: intervals are those of the pairs once, and not 2.4 times narrower."""
    once = random_scores(60, exact=False)
    six = np.repeat(np.arange(60), 6)
    tables = {name: getattr(once, name)[six] for name in ("tokens", "logps", "ref_logps", "terms")}
    often = dataclasses.replace(once, where=[str(i) for i in range(360)], groups=six, **tables)
    for name, ends in intervals(once).items():
        assert intervals(often)[name] == pytest.approx(ends), name
    correlations = [length_bias(scores)["margin_length_correlation_interval"] for scores in (once, often)]
    assert correlations[0] == pytest.approx(correlations[1])
    differences = [compare(s, dataclasses.replace(s, logps=s.logps * 0.9))["differences"] for s in (once, often)]
    assert differences[0]["loss"]["interval"] == pytest.approx(differences[1]["loss"]["interval"])


@pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf, -1e300])
@pytest.mark.parametrize("pairs", [1, 2, 30])
def test_log_probs_that_are_no_numbers(worth: float, pairs: int) -> None:
    """They make what is computed from them unknown, and nothing fails; so do few pairs."""
    scores = random_scores(pairs)
    scores.logps[0] = worth
    with np.errstate(invalid="ignore", over="ignore"):
        result = {"intervals": intervals(scores), "length": length_bias(scores)}
        result = json.loads(to_json(scores.means() | result))
        json.loads(to_json(compare(scores, scores)))
    if math.isnan(worth):
        assert result["rewards/accuracies"] is result["rewards/ties"] is None
        assert result["intervals"]["rewards/accuracies"] is result["intervals"]["loss"] is None
        assert result["length"]["margin_length_correlation"] is None
    assert result["perplexity/chosen"] is None or worth == math.inf
    assert result["intervals"]["perplexity/chosen"] is None


def test_quantiles() -> None:
    expected = {"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95}
    result = make_evaluation(scores=with_margins(*range(101))).result
    assert result["rewards/margins_quantiles"] == pytest.approx(expected)


def test_accuracy_of_plain_log_probs() -> None:
    """Right before and after; wrong before and right after; wrong; equal before and right after."""
    ref_logps = [[-10, -20], [-20, -10], [-20, -10], [-10, -10]]
    means = scores_of([[0, 0], [15, 0], [5, 0], [1, 0]], ref_logps=ref_logps).means()
    assert means["logp_accuracy/reference"] == 1.5 / 4 and means["logp_accuracy/policy"] == 3 / 4


# ---- length -----------------------------------------------------------------------------------------------------


def test_length_by_hand() -> None:
    tokens = [[30, 10], [20, 10], [10, 20], [10, 40], [10, 10]]
    length = length_bias(scores_of([[2, 0], [1, 0], [-1, 0], [-3, 0], [0, 0]], tokens))
    assert length["margin_length_correlation"] == pytest.approx(1)
    assert (length["accuracy_chosen_longer"], length["accuracy_chosen_longer_pairs"]) == (1, 2)
    assert (length["accuracy_chosen_shorter"], length["accuracy_chosen_shorter_pairs"]) == (0, 2)
    assert length["accuracy_prefer_longer"] == 0.5


def test_length_is_compared_with_the_rewards_that_are_reported() -> None:
    """Without a reference those are of log-probs per token, though there are log-ratios that go the other way."""
    scores = random_scores(40)
    scores = dataclasses.replace(scores, objective=Objective({"simpo": 1.0}), ref_logps=np.full((40, 2), np.nan))
    per_token = scores.logps / scores.tokens
    gaps = per_token[:, 0] - per_token[:, 1], scores.tokens[:, 0] - scores.tokens[:, 1]
    assert length_bias(scores)["margin_length_correlation"] == pytest.approx(spearmanr(*gaps)[0])


def test_lengths_that_show_nothing() -> None:
    """No pair whose chosen response is shorter; a model that is its reference but for arithmetic."""
    length = length_bias(scores_of([[1, 0], [2, 0]], [[3, 1], [4, 1]]))
    assert length["accuracy_chosen_shorter_pairs"] == 0 and length["accuracy_chosen_shorter_interval"] is None
    assert math.isnan(length["accuracy_chosen_shorter"])  # null in JSON
    rng = np.random.default_rng(0)
    same = length_bias(scores_of(rng.normal(0, 1e-5, (50, 2)), rng.integers(5, 50, (50, 2))))
    assert math.isnan(same["margin_length_correlation"]) and same["margin_length_correlation_interval"] is None


# ---- two models -------------------------------------------------------------------------------------------------


def test_a_model_is_no_better_than_itself() -> None:
    scores = random_scores(50)
    result = compare(scores, scores)
    assert result["differences"].keys() == {*scores.ratios, "logratios/margins"}
    assert all(each["difference"] == 0 and each["interval"] == [0, 0] for each in result["differences"].values())
    assert result["pairs_b_better"]["share"] == 0.5


def test_differences_are_paired() -> None:
    """A constant gain is certain, however much the pairs differ from each other."""
    a = random_scores(50)
    b = dataclasses.replace(a, logps=a.logps + np.array([3.0, -1.0]))
    result = compare(a, b)
    margins = result["differences"]["rewards/margins"]
    assert margins["difference"] == pytest.approx(0.4) and margins["interval"] == pytest.approx([0.4, 0.4])
    assert margins["b"] - margins["a"] == pytest.approx(margins["difference"])
    assert result["pairs_b_better"] == {"share": 1, "interval": pytest.approx([0.9287, 1], abs=1e-4)}
    assert result["differences"]["logratios/margins"]["difference"] == pytest.approx(4)


def test_models_of_different_betas_are_compared_in_log_ratios_too() -> None:
    a = random_scores(50)
    result = compare(a, dataclasses.replace(a, objective=Objective(beta=1.0)))
    assert result["differences"]["rewards/margins"]["difference"] > 0.1
    assert result["differences"]["logratios/margins"]["interval"] == [0, 0]
    assert result["pairs_b_better"]["share"] == 0.5


@pytest.mark.parametrize(
    ("objective", "reasons"),
    [
        (Objective(label_smoothing=0.1), {"loss": "b's of --loss sigmoid, or their options differ"}),
        (Objective({"ipo": 1.0}), {"loss": "a's is of --loss sigmoid, b's of --loss ipo"}),
        (Objective({"simpo": 1.0}), {"loss": "simpo", "rewards": "a's are of log-ratios, b's of log-probs per token"}),
    ],
)
def test_what_other_objectives_measure_otherwise_is_not_compared(objective: Objective, reasons: dict[str, str]) -> None:
    a = random_scores(20, beta=0.1)
    result = compare(a, dataclasses.replace(a, objective=objective))
    assert result["not_compared"].keys() == reasons.keys()
    assert all(words in result["not_compared"][name] for name, words in reasons.items())
    kept = result["differences"]
    assert "loss" not in kept and "kl/chosen" in kept
    assert ("rewards/margins" in kept) == ("rewards" not in reasons)
    about = {"model": "m", "reference": "r", "beta": 0.1}
    text = as_text({"a": about, "b": about, "pairs": 20, "same_tokens": True, "judged": count_new(20)} | result)
    assert all(f"{name} not compared" in text and words in text for name, words in reasons.items())


def test_the_columns_of_a_comparison_are_apart() -> None:
    about = {"model": "m", "reference": "r", "beta": 0.1}
    wide = {"a": -4.71e-14, "b": -4.71e-14, "difference": 4.71e-14, "interval": [0, 1]}
    result = compare(random_scores(20), random_scores(20)) | {"differences": {"loss": wide}}
    text = as_text({"a": about, "b": about, "pairs": 20, "same_tokens": True, "judged": count_new(20)} | result)
    (line,) = (line for line in text.splitlines() if line.startswith("loss"))
    assert line.split() == ["loss", "-4.710e-14", "-4.710e-14", "4.710e-14", "0", "to", "1"]


def test_what_only_one_has_is_not_compared_and_other_pairs_are_refused() -> None:
    result = compare(random_scores(20), random_scores(20, exact=False))
    assert "kl/chosen" not in result["differences"] and "loss" in result["differences"]
    with pytest.raises(UsageError, match="read different rows"):
        compare(random_scores(20), random_scores(21))
