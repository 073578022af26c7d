"""What an evaluation says beyond its means: how sure they are, where the policy is right, whether length decides.

Legend: B resamples, P pairs, K numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_cli.errors import UsageError
from dpo_cli.scores import TIE, Scores, Table, means, values
from dpo_cli.stats import (
    Interval,
    Statistic,
    bootstrap,
    interval,
    point,
    ratios,
    spearman,
    standardised_mean,
    wilson,
)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHARES = ("rewards/accuracies", "rewards/ties")  # a pair either is or is not: Wilson's interval
BINS = 10  # of the confidence, from 1/2 to 1
NICE = (1, 2, 5)  # times a power of ten: edges that are read at a glance


def sections(scores: Scores, seed: int = 0) -> dict[str, Any]:
    """All that is told of the pairs beside ``scores.values``, under the names of ``dpo eval --json``.

    Units: rewards and margins as the loss has them, beta times nats; lengths in tokens that carry loss.
    """
    with_d, length, calibrated = _margin_d(scores), _length_statistics(scores), _brier(scores)
    ratio, names = _all_ratios(scores)
    parts = {"means": ratio, "d": with_d, "rank": _rank_change(scores), "brier": calibrated} | length
    found = _resampled(parts, len(scores.where), seed)
    return {
        "intervals": _intervals(scores, dict(zip(names, found["means"][1], strict=True))),
        "rewards/margins_quantiles": {str(q): float(np.quantile(scores.margins, q)) for q in QUANTILES},
        "effect": _effect(scores, found),
        "buckets": {"margin": _by_margin(scores), "length": _by_length(scores)},
        "calibration": _calibration(scores, found),
        "length": _length(scores, found),
    }


def compared(a: Scores, b: Scores, seed: int = 0) -> dict[str, Any]:
    """What changes from a to b on the same pairs: paired differences b - a, and the share of pairs that b does better.

    The better one has the larger margin in log-ratios, whatever its beta; where the betas differ, the rewards' margins
    are not in one unit, and those in log-ratios stand beside them.

    Raises:
        UsageError: they are not the same pairs.
    """
    if a.where != b.where:
        raise UsageError("two models are compared on the same pairs, in the same order; these are not")
    (means_a, values_a), (means_b, values_b) = ((_comparable(s, a.beta != b.beta)) for s in (a, b))
    names = [name for name in means_a if name in means_b]
    sides = [ratios(*_columns(found, names)) for found in (means_a, means_b)]
    ends = bootstrap(lambda counts: np.asarray(sides[1](counts) - sides[0](counts)), len(a.where), seed)
    differences = {
        name: {"a": values_a[name], "b": values_b[name], "difference": values_b[name] - values_a[name]}
        | {"interval": interval(end)}
        for name, end in zip(names, ends, strict=True)
    }
    better = _halved_ties(gap_of(b.logratios) - gap_of(a.logratios))
    return {"differences": differences, "pairs_b_better": {"share": float(better.mean()), "interval": _share(better)}}


# ---- intervals --------------------------------------------------------------------------------------------------


def _resampled(parts: dict[str, Statistic], rows: int, seed: int) -> dict[str, tuple[Table, list[Interval]]]:
    """Values (K,) and intervals of several statistics, all from one resampling."""
    at = {name: point(statistic, rows) for name, statistic in parts.items()}
    ends = bootstrap(lambda counts: np.hstack([part(counts) for part in parts.values()]), rows, seed)
    cuts = np.cumsum([len(value) for value in at.values()])[:-1]
    return {
        name: (at[name], [interval(end) for end in part])
        for name, part in zip(parts, np.split(ends, cuts), strict=True)
    }


def _columns(found: dict[str, tuple[Table, Table]], names: Sequence[str]) -> tuple[Table, Table]:
    """Numerators and denominators of the named means, (P, K) each."""
    above, below = (np.stack([found[name][part] for name in names], 1) for part in (0, 1))
    return above, below


def _all_ratios(scores: Scores) -> tuple[Statistic, list[str]]:
    found = means(scores)
    return ratios(*_columns(found, list(found))), list(found)


def _intervals(scores: Scores, ends: dict[str, Interval]) -> dict[str, Interval]:
    """By name; those of perplexities are from the cross-entropies', whose exponential they are."""
    shares = dict(zip(SHARES, (scores.wins, scores.ties), strict=True))
    ends = ends | {name: _share(hits) for name, hits in shares.items()}
    perplexities = {
        name.replace("cross_entropy", "perplexity"): end and [math.exp(each) for each in end]
        for name, end in ends.items()
        if name.startswith(("cross_entropy/", "ref_cross_entropy/"))
    }
    return ends | perplexities


def _comparable(scores: Scores, in_logratios: bool) -> tuple[dict[str, tuple[Table, Table]], dict[str, float]]:
    found, known = means(scores), values(scores)
    if in_logratios:
        margins = gap_of(scores.logratios)
        found["logratios/margins"] = margins, np.ones(len(margins))
        known["logratios/margins"] = float(margins.mean())
    return found, known


def _share(hits: Table) -> list[float]:
    return list(wilson(float(hits.sum()), len(hits)))


def gap_of(table: Table) -> Table:
    """Chosen minus rejected, (P, 2) -> (P,)."""
    return table[:, 0] - table[:, 1]


def _halved_ties(gap: Table) -> Table:
    """1 where a gap in nats is above 0, 1/2 where it is only arithmetic, else 0."""
    return (gap > TIE) + 0.5 * (np.abs(gap) <= TIE)


def beyond_arithmetic(nats: Table) -> Table:
    """Differences of log-probs without those that are only arithmetic, whose order would say something."""
    return np.where(np.abs(nats) <= TIE, 0.0, nats)


# ---- effect -----------------------------------------------------------------------------------------------------


def _margin_d(scores: Scores) -> Statistic:
    return standardised_mean(beyond_arithmetic(gap_of(scores.logratios)))  # free of beta


def _ranked_right(logps: Table) -> Table:
    return _halved_ties(gap_of(logps))


def _rank_change(scores: Scores) -> Statistic:
    change = _ranked_right(scores.logps) - _ranked_right(scores.ref_logps)
    return ratios(change[:, None], np.ones((len(change), 1)))


def _effect(scores: Scores, found: dict[str, tuple[Table, list[Interval]]]) -> dict[str, Any]:
    """How large the margin is against its own spread, and what changed in the order of the two log-probs."""
    (d,), (d_interval,) = found["d"]
    (change,), (change_interval,) = found["rank"]
    return {
        "margin_d": float(d),
        "margin_d_interval": d_interval,
        "rank/policy": float(_ranked_right(scores.logps).mean()),
        "rank/reference": float(_ranked_right(scores.ref_logps).mean()),
        "rank/change": float(change),
        "rank/change_interval": change_interval,
    }


# ---- buckets ----------------------------------------------------------------------------------------------------


def _bucket(start: float, end: float, wins: Table) -> dict[str, Any]:
    accuracy = {"accuracy": float(wins.mean()), "interval": _share(wins)}
    return {"from": float(start), "to": float(end), "pairs": len(wins)} | accuracy


def _cut(places: Table, edges: Table) -> list[tuple[float, float, Any]]:
    """Buckets from each edge up to the next, the last with its end, and which places are in each; none is empty."""
    inner = np.searchsorted(edges[1:-1], places, side="right")
    parts = [(edges[i], edges[i + 1], inner == i) for i in range(len(edges) - 1)]
    return [part for part in parts if part[2].any()]


def _by_margin(scores: Scores) -> list[dict[str, Any]]:
    """Accuracy by how sure the policy is: fifths of the absolute margin."""
    sure = np.abs(scores.margins)
    edges = np.unique(np.quantile(sure, np.linspace(0, 1, 6)))
    edges = edges if len(edges) > 1 else np.repeat(edges, 2)
    return [_bucket(start, end, scores.wins[inside]) for start, end, inside in _cut(sure, edges)]


def _by_length(scores: Scores) -> list[dict[str, Any]]:
    """Accuracy by chosen minus rejected tokens: much less, less, about as many, more, much more; both ends included.

    About a third of the pairs are in the middle and about a fifth at the two ends, but for the rounding of the edges.
    """
    gap = gap_of(scores.tokens)
    near, far = (_nice(float(np.quantile(np.abs(gap), q))) for q in (0.35, 0.8))
    far = max(far, 2 * near)
    bounds = [(gap.min(), -far - 1), (-far, -near - 1), (-near, near), (near + 1, far), (far + 1, gap.max())]
    inside = [(start, end, (start <= gap) & (gap <= end)) for start, end in bounds]
    return [_bucket(start, end, scores.wins[these]) for start, end, these in inside if these.any()]


def _nice(length: float) -> int:
    """The round number of tokens that is nearest by ratio, at least 1."""
    power = 10 ** math.floor(math.log10(max(length, 1)))
    near: list[int] = [each * scale for scale in (power, 10 * power) for each in NICE]
    return min(near, key=lambda each: abs(math.log(each / max(length, 1))))


# ---- calibration ------------------------------------------------------------------------------------------------


def _confidence(scores: Scores) -> Table:
    """The probability sigma(|margin|) that the policy gives the response it prefers: (P,)."""
    return np.asarray(1 / (1 + np.exp(-np.abs(scores.margins))))


def _brier(scores: Scores) -> Statistic:
    """The mean square of 1 - sigma(margin), what the probability of the chosen response lacks; 1/4 says nothing."""
    sure = _confidence(scores)
    lacking = np.where(scores.margins > 0, 1 - sure, sure)
    return ratios(lacking[:, None] ** 2, np.ones((len(sure), 1)))


def _calibration(scores: Scores, found: dict[str, tuple[Table, list[Interval]]]) -> dict[str, Any]:
    """Whether the policy is right as often as sigma(|margin|) says.

    ``ece`` is the mean absolute difference of the two over bins of the confidence, each by its pairs.

    Source: Brier (1950); Naeini et al. (2015), expected calibration error.
    """
    sure, wins = _confidence(scores), scores.wins
    curve: list[dict[str, Any]] = []
    for start, end, inside in _cut(sure, np.linspace(0.5, 1, BINS + 1).round(2)):
        line = {"from": float(start), "to": float(end), "pairs": int(inside.sum())}
        said = {"predicted": float(sure[inside].mean()), "observed": float(wins[inside].mean())}
        curve.append(line | said | {"interval": _share(wins[inside])})
    off = sum(line["pairs"] * abs(line["observed"] - line["predicted"]) for line in curve)
    (brier,), (brier_interval,) = found["brier"]
    return {"brier": float(brier), "brier_interval": brier_interval, "ece": off / len(wins), "curve": curve}


# ---- length -----------------------------------------------------------------------------------------------------


def _length_statistics(scores: Scores) -> dict[str, Statistic]:
    """Correlations with length; of responses, by resampling the pairs they belong to."""
    logratios = beyond_arithmetic(scores.logratios)
    pair = np.repeat(np.arange(len(logratios)), 2)
    return {
        "reward_length": spearman(logratios.reshape(-1), scores.tokens.reshape(-1), pair),
        "margin_length": spearman(beyond_arithmetic(gap_of(logratios)), gap_of(scores.tokens)),
    }


def _length(scores: Scores, found: dict[str, tuple[Table, list[Interval]]]) -> dict[str, Any]:
    """Whether rewards go with length, and how good the policy is where length speaks for and against the chosen one."""
    told: dict[str, Any] = {}
    for name in ("reward_length", "margin_length"):
        (rho,), (ends,) = found[name]
        told |= {f"{name}_correlation": float(rho), f"{name}_correlation_interval": ends}
    gap = gap_of(scores.tokens)
    for name, these in (("chosen_longer", gap > 0), ("chosen_shorter", gap < 0)):
        wins, key = scores.wins[these], f"accuracy_{name}"
        told[key] = float(wins.mean()) if len(wins) else math.nan
        told |= {f"{key}_interval": _share(wins) if len(wins) else None, f"{key}_pairs": len(wins)}
    longer = (gap > 0) + 0.5 * (gap == 0)
    return told | {"accuracy_prefer_longer": float(longer.mean()), "accuracy_prefer_longer_interval": _share(longer)}
