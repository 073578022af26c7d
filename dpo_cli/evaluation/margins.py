"""What an evaluation says beyond its means: how sure they are, where the policy is right, whether length decides.

Legend: B resamples, P pairs, K numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binom

from dpo_cli.evaluation.scores import SIDES, Scores, Table, gap_of, means, perplexity, values, wins_of
from dpo_cli.evaluation.statistics import (
    Groups,
    Interval,
    Statistic,
    bootstrap,
    independent,
    interval,
    point,
    ratios,
    seldom,
    share,
    spearman,
    standardised_mean,
)
from dpo_cli.losses.objective import Objective
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.formatting import nice

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEW = 10  # prompts: of fewer a resample may have next to no spread, and a mean over its spread any size
BINS = 10  # of the confidence, from 1/2 to 1


def sections(scores: Scores, seed: int = 0) -> dict[str, Any]:
    """All that is told of the pairs beside ``scores.values``, under the names of ``dpo eval --json``.

    Units: rewards and margins as the loss has them, beta times nats; lengths in tokens that carry loss.
    """
    with_d, length, calibrated = _margin_d(scores), _length_statistics(scores), _brier(scores)
    ratio, names = _all_ratios(scores)
    parts = {"means": ratio, "d": with_d, "rank": _rank_change(scores), "brier": calibrated} | length
    found = _resampled(parts, scores, seed)
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
    are not in one unit, and those in log-ratios stand beside them. What other objectives measure otherwise is left out,
    and ``not_compared`` says why.

    Raises:
        UsageError: they are not the same pairs.
    """
    if a.where != b.where:
        raise UsageError("two models are compared on the same pairs, in the same order; these are not")
    apart = _not_compared(a.objective, b.objective)
    in_logratios = a.objective.beta != b.objective.beta or "rewards" in apart
    (means_a, values_a), (means_b, values_b) = (_comparable(s, in_logratios) for s in (a, b))
    names = [name for name in means_a if name in means_b and name.partition("/")[0] not in apart]
    sides = [ratios(*_columns(found, names)) for found in (means_a, means_b)]
    ends = bootstrap(lambda counts: np.asarray(sides[1](counts) - sides[0](counts)), len(a.where), seed, a.groups)
    differences = {
        name: {"a": values_a[name], "b": values_b[name], "difference": values_b[name] - values_a[name]}
        | {"interval": interval(end)}
        for name, end in zip(names, ends, strict=True)
    }
    better = wins_of(gap_of(b.logratios) - gap_of(a.logratios))
    told = {"share": float(better.mean()), "interval": share(better, a.groups)}
    return {"differences": differences, "not_compared": apart, "pairs_b_better": told}


def _not_compared(a: Objective, b: Objective) -> dict[str, str]:
    """What two objectives have no common unit for, ``loss`` or ``rewards``, and why."""
    found = {}
    if a != dataclasses.replace(b, beta=a.beta):
        more = "" if a.name != b.name else ", with other options"
        found["loss"] = f"a's is of --loss {a.name}, b's of --loss {b.name}{more}: they have no unit in common"
    if (a.reference, a.length_normalized) != (b.reference, b.length_normalized):
        found["rewards"] = f"a's are of {_gained(a)}, b's of {_gained(b)}: they have no unit in common"
    return found


def _gained(objective: Objective) -> str:
    return f"{'log-ratios' if objective.reference else 'log-probs'}{' a token' * objective.length_normalized}"


# ---- intervals --------------------------------------------------------------------------------------------------


def _resampled(parts: dict[str, Statistic], scores: Scores, seed: int) -> dict[str, tuple[Table, list[Interval]]]:
    """Values (K,) and intervals of several statistics, all from one resampling."""
    rows = len(scores.where)
    at = {name: point(statistic, rows) for name, statistic in parts.items()}
    ends = bootstrap(lambda counts: np.hstack([part(counts) for part in parts.values()]), rows, seed, scores.groups)
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
    shares = {"rewards/accuracies": scores.wins, "rewards/ties": scores.ties}  # of pairs
    ends = ends | {name: share(hits, scores.groups) for name, hits in shares.items()}
    if (exact := scores.distributions) is not None:
        # None moved: no pair has more than all its tokens moved, so the share of pairs is a bound for that of tokens.
        unmoved = [f"moved_tokens/{side}" for side, moved in zip(SIDES, exact.moved.T, strict=True) if not moved.any()]
        ends |= dict.fromkeys(unmoved, seldom(independent(len(scores.where), scores.groups)))
    perplexities = {
        name.replace("cross_entropy", "perplexity"): end and interval(np.array([perplexity(each) for each in end]))
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


def beyond_arithmetic(nats: Table, tie: Table | float) -> Table:
    """Differences of log-probs without those up to ``tie``: they are only arithmetic, and their order would count."""
    return np.where(np.abs(nats) <= tie, 0.0, nats)


# ---- effect -----------------------------------------------------------------------------------------------------


def _margin_d(scores: Scores) -> Statistic:
    return standardised_mean(beyond_arithmetic(gap_of(scores.gains), scores.tie))  # free of beta


def _rank_change(scores: Scores) -> Statistic:
    change = wins_of(gap_of(scores.logps)) - wins_of(gap_of(scores.ref_logps))
    return ratios(change[:, None], np.ones((len(change), 1)))


def _effect(scores: Scores, found: dict[str, tuple[Table, list[Interval]]]) -> dict[str, Any]:
    """How large the margin is against its own spread, and what changed in the order of the two log-probs."""
    (d,), (d_interval,) = found["d"]
    (change,), (change_interval,) = found["rank"]
    enough = independent(len(scores.where), scores.groups) >= FEW
    return {
        "margin_d": float(d),
        "margin_d_interval": d_interval if enough else None,
        "rank/policy": float(wins_of(gap_of(scores.logps)).mean()),
        "rank/reference": float(wins_of(gap_of(scores.ref_logps)).mean()),
        "rank/change": float(change),
        "rank/change_interval": change_interval,
    }


# ---- buckets ----------------------------------------------------------------------------------------------------


def _bucket(start: float, end: float, scores: Scores, inside: Any) -> dict[str, Any]:
    accuracy = {"accuracy": float(scores.wins[inside].mean()), "interval": _accuracy_interval(scores, inside)}
    return {"from": float(start), "to": float(end), "pairs": int(inside.sum())} | accuracy


def _accuracy_interval(scores: Scores, inside: Any) -> Interval:
    groups: Groups | None = None if scores.groups is None else scores.groups[inside]
    return share(scores.wins[inside], groups)


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
    return [_bucket(start, end, scores, inside) for start, end, inside in _cut(sure, edges)]


def _by_length(scores: Scores) -> list[dict[str, Any]]:
    """Accuracy by chosen minus rejected tokens: much less, less, about as many, more, much more; both ends included.

    About a third of the pairs are in the middle and about a fifth at the two ends, but for the rounding of the edges.
    """
    gap = gap_of(scores.tokens)
    near, far = (int(nice(max(float(np.quantile(np.abs(gap), q)), 1))) for q in (0.35, 0.8))
    far = max(far, 2 * near)
    bounds = [(gap.min(), -far - 1), (-far, -near - 1), (-near, near), (near + 1, far), (far + 1, gap.max())]
    inside = [(start, end, (start <= gap) & (gap <= end)) for start, end in bounds]
    return [_bucket(start, end, scores, these) for start, end, these in inside if these.any()]


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

    ``ece`` is the mean absolute difference of the two over bins of the confidence, each by its pairs. It is above 0 by
    chance alone: ``ece_expected`` is what so many independent pairs give of a policy that is calibrated perfectly.

    Source: Brier (1950); Naeini et al. (2015), expected calibration error.
    """
    sure, wins = _confidence(scores), scores.wins
    curve: list[dict[str, Any]] = []
    for start, end, inside in _cut(sure, np.linspace(0.5, 1, BINS + 1).round(2)):
        line = {"from": float(start), "to": float(end), "pairs": int(inside.sum())}
        said = {"predicted": float(sure[inside].mean()), "observed": float(wins[inside].mean())}
        curve.append(line | said | {"interval": _accuracy_interval(scores, inside)})
    off = sum(line["pairs"] * abs(line["observed"] - line["predicted"]) for line in curve)
    (brier,), (brier_interval,) = found["brier"]
    by_chance = sum(_mean_deviation(line["pairs"], line["predicted"]) for line in curve)
    errors = {"ece": off / len(wins), "ece_expected": by_chance / len(wins)}
    return {"brier": float(brier), "brier_interval": brier_interval} | errors | {"curve": curve}


def _mean_deviation(n: int, p: float) -> float:
    """The mean absolute deviation of the number of hits among n from n times their probability.

    Source: de Moivre (1730), see Diaconis and Zabell (1991): 2 m (1 - p) P(m hits), m the next integer above n p.
    """
    above = np.floor(n * p) + 1
    return float(2 * above * (1 - p) * binom.pmf(above, n, p))


# ---- length -----------------------------------------------------------------------------------------------------


def _length_statistics(scores: Scores) -> dict[str, Statistic]:
    """Correlations with length; of responses, by resampling the pairs they belong to."""
    gains = beyond_arithmetic(scores.gains, np.reshape(scores.tie, (-1, 1)))
    pair = np.repeat(np.arange(len(gains)), 2)
    return {
        "reward_length": spearman(gains.reshape(-1), scores.tokens.reshape(-1), pair),
        "margin_length": spearman(beyond_arithmetic(gap_of(gains), scores.tie), gap_of(scores.tokens)),
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
        told |= {f"{key}_interval": _accuracy_interval(scores, these), f"{key}_pairs": len(wins)}
    longer = (gap > 0) + 0.5 * (gap == 0)
    ends = share(longer, scores.groups)
    return told | {"accuracy_prefer_longer": float(longer.mean()), "accuracy_prefer_longer_interval": ends}
