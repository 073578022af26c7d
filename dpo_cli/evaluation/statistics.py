"""95 % intervals of what an evaluation reports, and the comparison of two evaluations.

Pairs of one prompt are not independent observations: they are added up first, so that a prompt counts once.

Legend: P pairs (or other rows), G prompts (or other groups).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from scipy.stats import spearmanr, t

from dpo_cli.evaluation.metrics import Groups, PairScores, Table, perplexity, wins
from dpo_cli.losses.objective import Objective
from dpo_cli.utils.errors import UsageError

Interval = list[float] | None  # [low, high]; None where there is none
LEVEL = 0.95
Z = 1.959964  # the normal quantile of that level
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def by_group(values: Table, groups: Groups | None) -> Table:
    """Add up values (P,) of each group: (G,); each row is its own group where there are none."""
    if groups is None:
        return values
    return np.asarray(np.bincount(np.unique(groups, return_inverse=True)[1], values), np.float64)


def ratio_interval(above: Table, below: Table, groups: Groups | None = None) -> Interval:
    """Student's interval of a ratio of sums over rows in exchangeable groups; None for a single group.

    Source: Cochran, Sampling Techniques (1977), sections 6.4 and 9A.5: the linearised ratio over clusters.
    """
    ratio = above.sum() / below.sum()
    return _student(ratio, by_group((above - ratio * below) / below.sum(), groups))


def student(values: Table) -> Interval:
    """Student's interval of the mean of independent values (P,); None for a single one."""
    return ratio_interval(values, np.ones_like(values))


def _student(center: float, deviations: Table) -> Interval:
    """The interval around a sum of G independent deviations, each already divided by the number of rows."""
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
    """Wilson's score interval of a share; ties may count as half a hit.

    Source: Wilson (1927): all shares p with |hits / of - p| <= z sqrt(p (1 - p) / of).
    """
    if not of:
        return 0.0, 1.0
    share, z2 = hits / of, Z * Z / of
    middle, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / of + z2 / of / 4)
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)


def intervals(scores: PairScores) -> dict[str, Interval]:
    """The interval of every mean in ``PairScores.means``, by name."""
    ends = {name: ratio_interval(*ratio, scores.groups) for name, ratio in scores.ratios.items()}
    for name, (above, below) in scores.ratios.items():
        if name.startswith(("rewards/accuracies", "rewards/ties", "logp_accuracy")):
            ends[name] = share_interval(above, scores.groups)
        elif name.startswith("shifted_tokens") and not above.any():  # none shifted: that is not certain of other pairs
            ends[name] = share_interval(np.zeros_like(below), scores.groups)
    for name in [name for name in ends if "cross_entropy/" in name]:
        high = perplexity((ends[name] or [math.nan])[-1])
        exponential = [perplexity(end) for end in ends[name] or ()] if math.isfinite(high) else None
        ends[name.replace("cross_entropy", "perplexity")] = exponential
    return ends


def quantiles(scores: PairScores) -> dict[str, float]:
    """Quantiles of the margin over pairs."""
    return {str(q): float(np.quantile(scores.margins, q)) for q in QUANTILES}


# ---- length -----------------------------------------------------------------------------------------------------


def length_bias(scores: PairScores) -> dict[str, Any]:
    """Whether margins go with length, and the accuracy where the chosen response is the longer or the shorter one.

    Lengths are tokens that carry loss.
    """
    gap = scores.tokens[:, 0] - scores.tokens[:, 1]
    rho, ends = spearman(np.where(scores.metrics["rewards/ties"] == 1, 0.0, scores.margins), gap, scores.groups)
    section: dict[str, Any] = {"margin_length_correlation": rho, "margin_length_correlation_interval": ends}
    for name, inside in (("chosen_longer", gap > 0), ("chosen_shorter", gap < 0)):
        hits, key = scores.wins[inside], f"accuracy_{name}"
        groups = None if scores.groups is None else scores.groups[inside]
        section[key] = float(hits.mean()) if len(hits) else math.nan
        section |= {f"{key}_interval": share_interval(hits, groups), f"{key}_pairs": len(hits)}
    longer = (gap > 0) + 0.5 * (gap == 0)
    section["accuracy_prefer_longer"] = float(longer.mean())
    return section | {"accuracy_prefer_longer_interval": share_interval(longer, scores.groups)}


def spearman(first: Table, second: Table, groups: Groups | None = None) -> tuple[float, Interval]:
    """Spearman's rank correlation of (P,) values and its interval; NaN and None where one side is constant.

    Source: Bonett and Wright (2000): Fisher's z with the variance (1 + rho^2 / 2) / (n - 3); n is the number of groups.
    """
    n = len(first) if groups is None else len(np.unique(groups))
    if len(first) < 2 or not np.ptp(first) or not np.ptp(second) or not np.isfinite(first).all():
        return math.nan, None
    rho = float(spearmanr(first, second).statistic)
    if n <= 3:
        return rho, None
    with np.errstate(divide="ignore"):
        half = Z * math.sqrt((1 + rho**2 / 2) / (n - 3))
        return rho, [float(end) for end in np.tanh(np.arctanh(rho) + np.array([-half, half]))]


# ---- two models -------------------------------------------------------------------------------------------------


def compare(a: PairScores, b: PairScores) -> dict[str, Any]:
    """Paired differences b - a on the same pairs, and the share of pairs whose log-ratio margin is larger in b.

    Where the betas differ, reward margins have no common unit, and log-ratio margins stand beside them. What the two
    objectives measure in other units is left out; ``not_compared`` says why.

    Raises:
        UsageError: they are not the same pairs.
    """
    if a.where != b.where:
        raise UsageError("two models are compared on the same pairs, in the same order; these are not")
    left_out = _not_compared(a.objective, b.objective)
    ratios, means = [dict(a.ratios), dict(b.ratios)], [a.means(), b.means()]
    margins = [each.logratios[:, 0] - each.logratios[:, 1] for each in (a, b)]
    if a.objective.beta != b.objective.beta or "rewards" in left_out:
        for ratio, mean, margin in zip(ratios, means, margins, strict=True):
            ratio["logratios/margins"] = margin, np.ones_like(margin)
            mean["logratios/margins"] = float(margin.mean())
    differences = {}
    for name in ratios[0]:
        if name not in ratios[1] or name.partition("/")[0] in left_out:
            continue
        deviations = [
            (above - above.sum() / below.sum() * below) / below.sum() for above, below in (r[name] for r in ratios)
        ]
        difference = means[1][name] - means[0][name]
        ends = _student(difference, by_group(deviations[1] - deviations[0], a.groups))
        differences[name] = {"a": means[0][name], "b": means[1][name], "difference": difference, "interval": ends}
    better = wins(margins[1] - margins[0])
    share = {"share": float(better.mean()), "interval": share_interval(better, a.groups)}
    return {"differences": differences, "not_compared": left_out, "pairs_b_better": share}


def _not_compared(a: Objective, b: Objective) -> dict[str, str]:
    """``loss`` or ``rewards`` where two objectives measure them in other units, and why."""
    why = {}
    if a != dataclasses.replace(b, beta=a.beta):
        more = "" if a.name != b.name else ", with other options"
        why["loss"] = f"a's is of --loss {a.name}, b's of --loss {b.name}{more}: they have no unit in common"
    if (a.reference, a.length_normalized) != (b.reference, b.length_normalized):
        why["rewards"] = f"a's are of {_reward_unit(a)}, b's of {_reward_unit(b)}: they have no unit in common"
    return why


def _reward_unit(objective: Objective) -> str:
    return f"{'log-ratios' if objective.reference else 'log-probs'}{' per token' * objective.length_normalized}"
