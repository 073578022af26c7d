"""Intervals: known values, numbers worked by hand, and how often an interval covers what is true."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import binom, spearmanr

from dpo_cli.evaluation import statistics as stats
from dpo_cli.evaluation.statistics import (
    bootstrap,
    interval,
    point,
    ratios,
    resamples,
    seldom,
    share,
    spearman,
    standardised_mean,
    student,
    wilson,
)

MANY = 4000  # repetitions: they share the resamples, and each has rows of its own


def covered(above: np.ndarray, below: np.ndarray, truth: float, groups: np.ndarray | None = None) -> float:
    """The share of repetitions, a column each, whose interval of the ratio has the truth in it."""
    low, high = bootstrap(ratios(above, below), len(above), groups=groups).T
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("rows", [20, 300])
def test_intervals_of_normal_means_cover(rows: int) -> None:
    drawn = np.random.default_rng(rows).normal(1, 2, (rows, MANY))
    assert 0.935 < covered(drawn, np.ones_like(drawn), 1) < 0.965


def test_intervals_of_skewed_means_cover() -> None:
    drawn = np.random.default_rng(1).exponential(1, (300, MANY))
    assert 0.93 < covered(drawn, np.ones_like(drawn), 1) < 0.97


@pytest.mark.parametrize("rows", [30, 300])
def test_intervals_of_ratios_of_sums_cover(rows: int) -> None:
    """Nats a token, of responses of random lengths, where longer ones have other rates."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 200, (rows, MANY)).astype(float)
    nats = tokens * (1.5 - tokens / 400 + rng.normal(0, 0.3, tokens.shape))
    lengths = np.arange(5, 200)
    truth = 1.5 - (lengths**2).sum() / lengths.sum() / 400
    assert 0.93 < covered(nats, tokens, truth) < 0.97


def test_intervals_cover_with_the_fewest_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of 100,000 rows, for which no more are drawn."""
    monkeypatch.setattr(stats, "MOST", stats.LEAST)
    drawn = np.random.default_rng(3).normal(1, 2, (300, MANY))
    assert 0.93 < covered(drawn, np.ones_like(drawn), 1) < 0.97


def test_intervals_of_correlation_and_effect_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statistic's repetitions cannot share resamples, so there are fewer of both."""
    monkeypatch.setattr(stats, "MOST", 1000)
    rng, hits, repetitions = np.random.default_rng(4), np.zeros(2), 1200
    for seed in range(repetitions):
        x, noise = rng.normal(size=(2, 200))
        y = x + noise
        statistics = spearman(x, y), standardised_mean(x + 0.4)
        ends = bootstrap(lambda counts, of=statistics: np.hstack([each(counts) for each in of]), 200, seed)  # type: ignore[misc]
        truth = np.array([6 / math.pi * math.asin(math.sqrt(0.5) / 2), 0.4])  # Pearson (1907) of a normal pair
        hits += (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    coverage = hits / repetitions
    assert coverage.min() > 0.93 and coverage.max() < 0.97, coverage


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


# ---- rows in groups ---------------------------------------------------------------------------------------------

GROUPS = np.repeat(np.arange(30), 6)


def clustered(mean: float) -> np.ndarray:
    """Half of the variance is that of the group."""
    rng = np.random.default_rng(9)
    return np.asarray(mean + rng.normal(size=(30, MANY))[GROUPS] + rng.normal(size=(180, MANY)))


def test_intervals_of_means_cover_where_rows_belong_together() -> None:
    drawn = clustered(1)
    assert 0.93 < covered(drawn, np.ones_like(drawn), 1, GROUPS) < 0.97
    assert covered(drawn, np.ones_like(drawn), 1) < 0.75  # as if they did not


@pytest.mark.parametrize("mean", [0, 1, 2.5])
def test_intervals_of_shares_cover_where_rows_belong_together(mean: float) -> None:
    hits, truth = (clustered(mean) > 0) * 1.0, float(ndtr(mean / math.sqrt(2)))
    ends = np.array([share(column, GROUPS) for column in hits.T[:1500]])
    assert 0.93 < ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean() < 0.97


def test_single_groups_change_nothing() -> None:
    values, names = np.random.default_rng(10).normal(size=(50, 3)), np.random.default_rng(0).permutation(50) + 7
    statistic = ratios(values, np.ones_like(values))
    assert (bootstrap(statistic, 50) == bootstrap(statistic, 50, groups=names)).all()
    hits = (values[:, 0] > 0) * 1.0
    assert share(hits) == share(hits, names) == list(wilson(hits.sum(), 50))


def test_groups_come_and_go_together_within_bounded_memory() -> None:
    for groups, drawn in ((np.array([5, 2, 5, 9, 2, 5]), 3), (np.arange(70_000) % 10, 10)):
        for block in resamples(len(groups), 0, groups):
            assert block.size <= max(stats.BLOCK, len(groups))
            for each in np.unique(groups):
                assert (block[:, groups == each] == block[:, groups == each][:, :1]).all()
            assert (block[:, np.unique(groups, return_index=True)[1]].sum(1) == drawn).all()
            break


def test_one_group_has_no_interval_of_means_and_a_wide_one_of_shares() -> None:
    values = np.random.default_rng(11).normal(size=(9, 1))
    assert np.isnan(bootstrap(ratios(values, np.ones_like(values)), 9, groups=np.zeros(9, int))).all()
    assert share(np.ones(9), np.zeros(9, int)) == list(wilson(1, 1))
    assert share(np.ones(180), GROUPS) == list(wilson(30, 30))  # nothing shows how the groups scatter


def test_no_share_of_nothing_or_of_what_is_no_number() -> None:
    assert share(np.array([])) is None and share(np.array([1.0, np.nan])) is None
    assert seldom(100) == pytest.approx([0, 0.037], abs=1e-3)


def test_students_interval_by_hand() -> None:
    assert student(np.array([2.0, 4.0])) == pytest.approx([3 - 12.7062, 3 + 12.7062], abs=1e-4)
    assert student(np.array([2.0])) is None and student(np.array([2.0, np.nan])) is None


# ---- the resamples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 300, 70_000])
def test_resamples_draw_as_many_rows_as_there_are(rows: int) -> None:
    blocks = list(resamples(rows))
    assert all(block.size <= max(stats.BLOCK, rows) for block in blocks)  # memory is bounded
    assert all((block.sum(1) == rows).all() for block in blocks)
    expected = min(stats.MOST, max(stats.LEAST, stats.DRAWS // rows))
    assert sum(len(block) for block in blocks) == expected
    mean = sum(block.sum(0) for block in blocks) / expected
    assert np.abs(mean - 1).max() < 6 / math.sqrt(expected)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    first, again, other = (bootstrap(ratios(values, np.ones_like(values)), 50, seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_two_rows_reach_from_one_to_the_other() -> None:
    """Student's quantile of one degree of freedom is 12.7, so the levels are 0 and 1."""
    ends = bootstrap(ratios(np.array([[1.0], [5.0]]), np.ones((2, 1))), 2)
    assert ends.tolist() == [[1, 5]]


def test_of_few_rows_it_is_about_students_interval() -> None:
    values = np.random.default_rng(5).normal(size=8)
    low, high = bootstrap(ratios(values[:, None], np.ones((8, 1))), 8)[0]
    half = 2.3646 * values.std(ddof=1) / math.sqrt(8)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)


def test_one_row_has_no_interval() -> None:
    ends = bootstrap(ratios(np.ones((1, 2)), np.ones((1, 2))), 1)
    assert np.isnan(ends).all() and interval(ends[0]) is None
    assert interval(np.array([0.5, 1.0])) == [0.5, 1.0]


# ---- statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_that_of_the_rows_a_resample_has(ties: bool) -> None:
    rng = np.random.default_rng(6)
    x = rng.integers(0, 9, 40).astype(float) if ties else rng.normal(size=40)
    y = x + (rng.integers(0, 9, 40) if ties else rng.normal(size=40))
    counts = next(resamples(40))[:20]
    expected = [spearmanr(np.repeat(x, row.astype(int)), np.repeat(y, row.astype(int))).statistic for row in counts]
    assert spearman(x, y)(counts)[:, 0] == pytest.approx(expected)
    assert point(spearman(x, y), 40)[0] == pytest.approx(spearmanr(x, y).statistic)


def test_values_of_one_row_come_and_go_together() -> None:
    x, y = np.random.default_rng(7).normal(size=(2, 20))
    rows, counts = np.repeat(np.arange(10), 2), next(resamples(10))[:5]
    expected = spearman(x, y)(np.repeat(counts, 2, axis=1))
    assert spearman(x, y, rows)(counts) == pytest.approx(expected)


def test_standardised_mean_is_that_of_the_rows_a_resample_has() -> None:
    values = np.random.default_rng(8).normal(1, 2, 30)
    counts = next(resamples(30))[:20]
    drawn = [np.repeat(values, row.astype(int)) for row in counts]
    expected = [each.mean() / each.std(ddof=1) for each in drawn]
    assert standardised_mean(values)(counts)[:, 0] == pytest.approx(expected)


def test_what_is_no_number_has_no_rank() -> None:
    x = np.array([1.0, np.nan, 3.0])
    assert np.isnan(point(spearman(x, np.arange(3.0)), 3)) and np.isnan(point(spearman(np.arange(3.0), x), 3))


def test_what_is_all_equal_has_neither_spread_nor_ranks() -> None:
    same, other = np.full(9, 0.1), np.arange(9.0)
    assert np.isnan(point(standardised_mean(same), 9)) and np.isnan(point(spearman(same, other), 9))
