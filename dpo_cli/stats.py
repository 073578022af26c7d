"""95 % intervals: of what is computed from rows by resampling the rows, and of a share.

Everything that is asked of one set of rows is computed from the same resamples, each of which is how often it has
every row: a mean is then a product of matrices, and ranks come from counts without sorting again.

Legend: B resamples, P rows (pairs, where no other are meant), K numbers that are computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr
from scipy.stats import t

Table = npt.NDArray[np.float64]
Statistic = Callable[[Table], Table]  # (B, P) counts -> (B, K)
Interval = list[float] | None  # [low, high]; None, null in JSON, where there is none

LEVEL = 0.95
Z = 1.959964  # the normal quantile of that level
MOST, LEAST = 2000, 400  # resamples; with the least of them an interval's ends are off by 1/7 standard error
DRAWS = 40_000_000  # rows drawn in all resamples, about: what takes seconds
BLOCK = 2**18  # counts that are there at a time: 2 MiB, so that they stay in the processor's cache


def bootstrap(statistic: Statistic, rows: int, seed: int = 0) -> Table:
    """Intervals of K numbers, each of which is computed from P exchangeable rows.

    The levels of the percentiles are expanded so that the interval of a mean is about as wide as Student's, where
    percentiles of few rows are too narrow. The resamples depend on ``rows`` and ``seed`` alone.

    Shapes: ``statistic`` takes counts (B, P) and gives (B, K) -> (K, 2); NaN where the statistic is, and of one row.
    Source: Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279, section 4.2.
    """
    found = np.concatenate([statistic(counts) for counts in resamples(rows, seed)])  # (B, K)
    if rows < 2:
        return np.full((found.shape[1], 2), np.nan)
    low = float(ndtr(math.sqrt(rows / (rows - 1)) * t.ppf((1 - LEVEL) / 2, rows - 1)))
    ends: Table = np.quantile(found, (low, 1 - low), axis=0).T
    return ends


def resamples(rows: int, seed: int = 0) -> Iterator[Table]:
    """How often each of P rows is in each resample of P of them, in blocks of (b, P)."""
    rng = np.random.default_rng(seed)
    left = min(MOST, max(LEAST, DRAWS // rows))
    while left:
        some = min(left, max(1, BLOCK // rows))
        drawn = rng.integers(rows, size=(some, rows)) + rows * np.arange(some)[:, None]
        yield np.bincount(drawn.reshape(-1), minlength=some * rows).reshape(some, rows).astype(float)
        left -= some


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


def wilson(hits: float, of: int) -> tuple[float, float]:
    """The interval of a share; a tie may count as half a hit, which can only make it wider than it need be.

    Source: Wilson (1927), the score interval: all shares p with |hits / of - p| <= z sqrt(p (1 - p) / of).
    """
    if not of:
        return 0.0, 1.0
    share, z2 = hits / of, Z * Z / of
    middle, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / of + z2 / of / 4)
    return max((middle - half) / (1 + z2), 0.0), min((middle + half) / (1 + z2), 1.0)
