"""95 % intervals: of what is computed from rows by resampling the rows, of a share, and of a mean.

Rows that belong together, as the pairs of one prompt do, are not so many observations: they are drawn together, and
an interval is as wide as the number of such groups makes it.

Everything that is asked of one set of rows is computed from the same resamples, each of which is how often it has
every row: a mean is then a product of matrices, and ranks come from counts without sorting again.

Legend: B resamples, P rows (pairs, where no other are meant), G groups of them, K numbers that are computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit
from scipy.stats import t

Table = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
Statistic = Callable[[Table], Table]  # (B, P) counts -> (B, K)
Interval = list[float] | None  # [low, high]; None, null in JSON, where there is none

LEVEL = 0.95
Z = 1.959964  # the normal quantile of that level
MOST, LEAST = 2000, 400  # resamples; with the least of them an interval's ends are off by 1/7 standard error
DRAWS = 40_000_000  # rows drawn in all resamples, about: what takes seconds
BLOCK = 2**18  # counts that are there at a time: 2 MiB, so that they stay in the processor's cache


def bootstrap(statistic: Statistic, rows: int, seed: int = 0, groups: Groups | None = None) -> Table:
    """Intervals of K numbers, each of which is computed from P rows in G exchangeable groups, or each on its own.

    The levels of the percentiles are expanded so that the interval of a mean is about as wide as Student's, where
    percentiles of few groups are too narrow. The resamples depend on ``rows``, ``groups`` and ``seed`` alone.

    Shapes: ``statistic`` takes counts (B, P) and gives (B, K) -> (K, 2); NaN where the statistic is, and of one group.
    ``groups`` (P,) says of which group each row is.
    Source: Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279, section 4.2.
    """
    if (n := independent(rows, groups)) < 2:
        return np.full((len(point(statistic, rows)), 2), np.nan)
    found = np.concatenate([statistic(counts) for counts in resamples(rows, seed, groups)])  # (B, K)
    low = float(ndtr(math.sqrt(n / (n - 1)) * t.ppf((1 - LEVEL) / 2, n - 1)))
    ends: Table = np.quantile(found, (low, 1 - low), axis=0).T
    return ends


def resamples(rows: int, seed: int = 0, groups: Groups | None = None) -> Iterator[Table]:
    """How often each of P rows is in each resample of G groups, in blocks of (b, P)."""
    rng = np.random.default_rng(seed)
    members = _members(rows, groups)
    units = rows if members is None else int(members.max()) + 1
    left = min(MOST, max(LEAST, DRAWS // rows))
    while left:
        some = min(left, max(1, BLOCK // rows))
        drawn = rng.integers(units, size=(some, units)) + units * np.arange(some)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=some * units).reshape(some, units).astype(float)
        yield counts if members is None else np.take(counts, members, axis=1)
        left -= some


def independent(rows: int, groups: Groups | None) -> int:
    """The number of groups G, which is P where each row stands on its own."""
    return rows if groups is None else len(np.unique(groups))


def _members(rows: int, groups: Groups | None) -> npt.NDArray[np.intp] | None:
    """Places of the rows' groups, (P,), or None where no two rows share one."""
    if groups is None or independent(rows, groups) == rows:
        return None
    return np.unique(groups, return_inverse=True)[1]


def ratios(above: Table, below: Table) -> Statistic:
    """K ratios of sums over rows; means are those over rows of ones.

    Shapes: ``above``, ``below`` (P, K).
    """
    return lambda counts: np.asarray((counts @ above) / (counts @ below))


def standardised_mean(values: Table) -> Statistic:
    """The mean over the standard deviation, Cohen's d of a difference; NaN where all is equal.

    Shapes: ``values`` (P,); K = 1.
    """
    values = values - values.mean() if values.size and not np.ptp(values) else values  # exactly 0, so that it shows
    powers = np.stack([values, values**2], 1)

    def statistic(counts: Table) -> Table:
        n = counts.sum(1)
        mean, square = (counts @ powers / n[:, None]).T
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt(np.maximum(square - mean**2, 0) * n / (n - 1))
            return np.asarray(np.where(spread > 0, mean / spread, np.nan))[:, None]

    return statistic


def spearman(first: Table, second: Table, rows: npt.NDArray[np.intp] | None = None) -> Statistic:
    """Spearman's rank correlation, ties by their mean rank; NaN where one side is all equal.

    ``rows`` says of which resampled row each value is, where a row has several: a pair has two responses.

    Shapes: ``first``, ``second``, ``rows`` (N,); K = 1.
    """
    rows = np.arange(len(first)) if rows is None else rows
    if np.isnan(first).any() or np.isnan(second).any():
        return lambda counts: np.full((len(counts), 1), np.nan)  # sorted, they would have ranks
    order = np.argsort(first, kind="stable")  # so that the ranks of one side need no rearranging
    first, second, rows = first[order], second[order], rows[order]
    ranks_first, ranks_second = _ranking(first), _ranking(second)

    def statistic(counts: Table) -> Table:
        counts = np.take(counts, rows, axis=1)  # (B, N)
        middle = (counts.sum(1, keepdims=True) + 1) / 2
        x, y = ranks_first(counts) - middle, ranks_second(counts) - middle
        weighted = counts * x
        both, xx = np.vecdot(weighted, y), np.vecdot(weighted, x)
        yy = np.vecdot(counts * y, y)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(both / np.sqrt(xx * yy))[:, None]

    return statistic


def _ranking(values: Table) -> Statistic:
    """Ranks of all N values in resamples that have them so often: (B, N) counts -> (B, N)."""
    order = np.argsort(values, kind="stable")
    _, starts, group = np.unique(values[order], return_index=True, return_inverse=True)
    place = np.empty_like(order)
    place[order] = group
    in_order, distinct = bool((order == np.arange(len(order))).all()), len(starts) == len(order)

    def ranks(counts: Table) -> Table:
        counts = counts if in_order else np.take(counts, order, axis=1)
        equal = counts if distinct else np.add.reduceat(counts, starts, axis=1)  # (B, groups)
        ranked = np.cumsum(equal, 1) - (equal - 1) / 2
        return ranked if in_order and distinct else np.take(ranked, place, axis=1)

    return ranks


def point(statistic: Statistic, rows: int) -> Table:
    """The statistic of the rows as they are: (K,)."""
    found: Table = statistic(np.ones((1, rows)))[0]
    return found


def interval(ends: Table) -> Interval:
    """Low and high end (2,) as they are reported."""
    return [float(end) for end in ends] if np.isfinite(ends).all() else None


def share(hits: Table, groups: Groups | None = None) -> Interval:
    """The interval of the mean of hits (P,) between 0 and 1: Wilson's, where each row stands on its own.

    Rows in groups count as the number of independent ones whose share would scatter as much, and by Student's
    quantile as groups are few; where all are equal, and nothing shows how they scatter, as the groups.

    Source: Korn and Graubard (1998), Dean and Pagano (2015): intervals of shares in clustered samples.
    """
    n, mean = float(len(hits)), float(hits.mean()) if len(hits) else math.nan
    if not math.isfinite(mean):
        return None
    if (members := _members(len(hits), groups)) is not None:
        few = independent(len(hits), groups)
        off = np.bincount(members, hits - mean)  # (G,)
        scatter = float(off @ off) * few / max(few - 1, 1) / n**2  # the mean's variance
        narrower = float(Z / stdtrit(max(few - 1, 1), (1 + LEVEL) / 2)) ** 2
        n = min(n, mean * (1 - mean) / scatter * narrower) if few > 1 and scatter else few
    return list(wilson(float(hits.sum()) * (n / len(hits)), n))


def seldom(n: int) -> Interval:
    """The interval of a share that is 0 in all of n groups: no certainty, but up to about 4 / n."""
    return list(wilson(0, n))


def student(values: Table) -> Interval:
    """Student's interval of the mean of values (P,); none of a single one."""
    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * values.std(ddof=1) / math.sqrt(len(values))
    return interval(values.mean() + np.array([-half, half]))


def wilson(hits: float, of: float) -> tuple[float, float]:
    """The interval of a share; a tie may count as half a hit, which can only make it wider than it need be.

    Source: Wilson (1927), the score interval: all shares p with |hits / of - p| <= z sqrt(p (1 - p) / of).
    """
    if not of:
        return 0.0, 1.0
    share, z2 = hits / of, Z * Z / of
    middle, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / of + z2 / of / 4)
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)
