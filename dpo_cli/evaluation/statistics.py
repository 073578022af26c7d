"""95% intervals of what an evaluation reports, and the comparison of two evaluations.

Pairs of one prompt are not independent observations: they are added up first, so that a prompt counts once.

Legend: P pairs (or other rows), G prompts (or other groups).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dpo_cli.evaluation.metrics import Groups, PairScores, Table, reward_unit, wins
from dpo_cli.utils.errors import UsageError

Interval = list[float] | None  # [low, high]; None where there is none
LEVEL = 0.95
Z = 1.959964  # the normal quantile of that level
NOT_NEGATIVE = ("kl/", "reverse_kl/", "entropy/", "ref_entropy/", "cross_entropy/", "ref_cross_entropy/", "shifted_")


def deviations(above: Table, below: Table, groups: Groups | None) -> Table:
    """How far each group (G,) moves a ratio of sums over rows (P,): the linearised ratio."""
    rows = (above - above.sum() / below.sum() * below) / below.sum()
    return rows if groups is None else np.asarray(np.bincount(np.unique(groups, return_inverse=True)[1], rows), float)


def ratio_interval(above: Table, below: Table, groups: Groups | None = None) -> Interval:
    """Student's interval of a ratio of sums over rows in exchangeable groups; None for a single group.

    Source: Cochran, Sampling Techniques (1977), sections 6.4 and 9A.5: the linearised ratio over clusters.
    """
    return _student(above.sum() / below.sum(), deviations(above, below, groups))


def student(values: Table) -> Interval:
    """Student's interval of the mean of independent values (P,); None for a single one."""
    return ratio_interval(values, np.ones_like(values))


def not_negative(interval: Interval) -> Interval:
    """Cut an interval of what cannot be below 0 there: Student's, of few values, may reach further."""
    return interval and [max(end, 0.0) for end in interval]


def _student(center: float, deviations: Table) -> Interval:
    from scipy.stats import t  # which takes a second to import

    n = len(deviations)
    error = math.sqrt(n / (n - 1) * float(deviations @ deviations)) if n > 1 else math.nan
    if not math.isfinite(error + center):
        return None
    return [float(end) for end in t.interval(LEVEL, n - 1, center, error)] if error else [float(center)] * 2


def share_interval(hits: Table, groups: Groups | None = None) -> Interval:
    """Wilson's interval of the mean of hits (P,), each 0, 1/2 or 1, where every group is one observation."""
    if not len(hits) or not np.isfinite(hits).all():
        return None
    n = len(hits) if groups is None else len(np.unique(groups))
    return list(wilson(float(hits.mean()) * n, n))


def wilson(hits: float, of: float) -> tuple[float, float]:
    """Wilson's score interval of a share; ties may count as half a hit, which scipy's does not allow.

    Source: Wilson (1927): all shares p with |hits / of - p| <= z sqrt(p (1 - p) / of).
    """
    if not of:
        return 0.0, 1.0
    share, z2 = hits / of, Z * Z / of
    middle, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / of + z2 / of / 4)
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)


@np.errstate(over="ignore")
def intervals(scores: PairScores) -> dict[str, Interval]:
    """The interval of every mean in ``PairScores.means``, by name."""
    ends: dict[str, Interval] = {}
    for name, (above, below) in scores.ratios.items():
        none_shifted = name.startswith("shifted_tokens") and not above.any()  # which is not certain of other pairs
        if name.startswith(("rewards/accuracies", "rewards/ties", "logp_accuracy")) or none_shifted:
            ends[name] = share_interval(above, scores.groups)
        else:
            ends[name] = ratio_interval(above, below, scores.groups)
            if name.startswith(NOT_NEGATIVE):
                ends[name] = not_negative(ends[name])
        if "cross_entropy/" in name:
            low, high = np.exp(ends[name] or [math.nan, math.nan]).tolist()
            ends[name.replace("cross_entropy", "perplexity")] = [low, high] if math.isfinite(high) else None
    return ends


def length_bias(scores: PairScores) -> dict[str, Any]:
    """Whether margins go with length, and the accuracy where the chosen response is the longer or the shorter one.

    Lengths are tokens that carry loss.
    """
    gap, groups = scores.tokens[:, 0] - scores.tokens[:, 1], scores.groups
    rho, ends = spearman(np.where(scores.metrics["rewards/ties"] == 1, 0.0, scores.margins), gap, groups)
    section: dict[str, Any] = {"margin_length_correlation": rho, "margin_length_correlation_interval": ends}
    for key, inside in (("accuracy_chosen_longer", gap > 0), ("accuracy_chosen_shorter", gap < 0)):
        hits = scores.wins[inside]
        section[key] = float(hits.mean()) if len(hits) else math.nan
        section[f"{key}_interval"] = share_interval(hits, None if groups is None else groups[inside])
        section[f"{key}_pairs"] = len(hits)
    longer = (gap > 0) + 0.5 * (gap == 0)
    section["accuracy_prefer_longer"] = float(longer.mean())
    return section | {"accuracy_prefer_longer_interval": share_interval(longer, groups)}


def spearman(first: Table, second: Table, groups: Groups | None = None) -> tuple[float, Interval]:
    """Spearman's rank correlation of (P,) values and its interval; NaN and None where one side is constant.

    Source: Bonett and Wright (2000): Fisher's z with the variance (1 + rho^2 / 2) / (n - 3); n is the number of groups.
    """
    from scipy.stats import spearmanr

    n = len(first) if groups is None else len(np.unique(groups))
    if len(first) < 2 or not np.ptp(first) or not np.ptp(second) or not np.isfinite(first).all():
        return math.nan, None
    rho = float(spearmanr(first, second).statistic)
    if n <= 3:
        return rho, None
    with np.errstate(divide="ignore"):
        half = Z * math.sqrt((1 + rho**2 / 2) / (n - 3))
        return rho, [float(end) for end in np.tanh(np.arctanh(rho) + np.array([-half, half]))]


def compare(a: PairScores, b: PairScores) -> dict[str, Any]:
    """Paired differences b - a on the same pairs, and the share of pairs whose log-ratio margin is larger in b.

    What the two objectives measure in other units is left out; ``not_compared`` says why.

    Raises:
        UsageError: they are not the same pairs.
    """
    if a.where != b.where:
        raise UsageError("the two models read different rows, because of truncation: set --max-length")
    left_out, units = {}, [reward_unit(each.objective) for each in (a, b)]
    if a.objective != dataclasses.replace(b.objective, beta=a.objective.beta):
        left_out["loss"] = (
            f"a's is of --loss {a.objective.name}, b's of --loss {b.objective.name}, or their options differ"
        )
    if units[0] != units[1]:
        left_out["rewards"] = f"a's are of {units[0]}, b's of {units[1]}: they have no unit in common"
    margins = [each.logratios[:, 0] - each.logratios[:, 1] for each in (a, b)]
    of_a, of_b = (
        {**each.ratios, "logratios/margins": (margin, np.ones_like(margin))}
        for each, margin in zip((a, b), margins, strict=True)
    )
    differences = {}
    for name in of_a:
        if name in of_b and name.partition("/")[0] not in left_out:
            first, second = (float(above.sum() / below.sum()) for above, below in (of_a[name], of_b[name]))
            interval = _student(second - first, deviations(*of_b[name], a.groups) - deviations(*of_a[name], a.groups))
            differences[name] = {"a": first, "b": second, "difference": second - first, "interval": interval}
    better = wins(margins[1] - margins[0])
    share = {"share": float(better.mean()), "interval": share_interval(better, a.groups)}
    return {"differences": differences, "not_compared": left_out, "pairs_b_better": share}
