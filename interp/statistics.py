"""Means, rates and paired differences with intervals by subject.

Values of one subject depend on each other, so subjects are what counts:

    bootstrap_mean        the mean of any values: percentiles of the means of resampled subjects
    pigeonhole_means      the same where values depend in two ways, on their subject and on their seed, say
    rate                  a share of yes or no: Wilson's interval with an effective number of values
    paired_difference     what changes between two measurements of the same things, and a sign-flip test
    group_difference      how the means of two groups of other things differ, and a permutation test
    kept_share            which share of such a change a third measurement keeps
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000

UNDEFINED = "undefined"
"""What people read where there is no value."""

_Z = NormalDist().inv_cdf(0.975)
# Clusters' worth of belief that values of one cluster are all the same.
_BELIEF = 2
_ALL_FLIPS, _FLIPS = 12, 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean, or another statistic, with its 95 % interval.

    Attributes:
        value: The mean; NaN where it is undefined.
        low: Lower end of the interval.
        high: Upper end.
        n: Number of values.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def undefined(cls, n: int = 0) -> Estimate:
        """What there is to say of a statistic that these ``n`` values do not define."""
        return Estimate(math.nan, math.nan, math.nan, n)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Estimate:
        """What ``to_record`` gave."""
        numbers: dict[str, Any] = {name: math.nan if number is None else number for name, number in record.items()}
        return cls(**numbers)

    @property
    def is_defined(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    def to_record(self) -> dict[str, Any]:
        """As a plain dictionary for JSON; what is undefined is ``None``."""
        return {name: None if math.isnan(number) else number for name, number in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.is_defined else UNDEFINED


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean change with its 95 % interval and the p-value of no change.

    Attributes:
        p: Probability of a change as large, in either direction, if before and after, or the groups, were exchangeable.
    """

    p: float


def _members(clusters: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Which cluster each value is of, ``(n,)``, and how many there are."""
    names, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    return index, len(names)


def _draws(clusters: Sequence[Hashable], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each cluster is drawn, ``(RESAMPLES, n_clusters)``, and which cluster each value is of, ``(n,)``."""
    index, n_clusters = _members(clusters)
    return _drawn(n_clusters, seed), index


def _drawn(n_clusters: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=RESAMPLES)
    return drawn.astype(float)


def bootstrap_weights(clusters: Sequence[Hashable], *, seed: int = 0) -> np.ndarray:
    """How often each value is drawn under resampling of whole clusters, for statistics other than a mean.

    Args:
        clusters: ``n`` cluster labels.
        seed: Seed of the resampling.

    Returns:
        ``(RESAMPLES, n)`` weights.
    """
    drawn, index = _draws(clusters, seed)
    return drawn[:, index]


def bootstrap_means(values: np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0) -> np.ndarray:
    """Means of ``values`` under resampling of whole clusters with replacement.

    Values of one cluster (the phrasings of one subject, say) are dependent, so it is the clusters that are
    drawn (Davison & Hinkley 1997, section 3.8).

    Args:
        values: ``(n,)`` or ``(n, ...)``: trailing dimensions are resampled together.
        clusters: ``n`` cluster labels.
        seed: Seed of the resampling.

    Returns:
        ``(RESAMPLES, ...)`` means.
    """
    drawn, index = _draws(clusters, seed)
    sums = np.zeros((drawn.shape[1], *values.shape[1:]))
    np.add.at(sums, index, values)
    totals = np.tensordot(drawn, sums, axes=1)
    return totals / (drawn @ np.bincount(index)).reshape(-1, *[1] * (values.ndim - 1))


def bootstrap_mean(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], *, seed: int = 0) -> Estimate:
    """The mean of ``values`` with its 95 % percentile interval, resampled by cluster.

    Raises:
        ValueError: If there are no values.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise ValueError("bootstrap_mean needs at least one value")
    low, high = np.quantile(bootstrap_means(array, clusters, seed=seed), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), len(array))


class Crossed(NamedTuple):
    """Values that depend in two ways, each of which is a reason to be alike.

    Attributes:
        values: ``(n, ...)``: trailing dimensions are resampled together.
        rows: ``n`` labels of the first way, for example the subject of each value.
        columns: ``n`` labels of the second, for example the seed.
    """

    values: np.ndarray
    rows: Sequence[Hashable]
    columns: Sequence[Hashable]


def pigeonhole_means(tables: Sequence[Crossed], *, seed: int = 0) -> np.ndarray:
    """Resample the means of tables whose values depend in two ways: the pigeonhole bootstrap (Owen 2007).

    Rows and columns are drawn with replacement, each on their own, and a value counts as often as its row was drawn
    times as often as its column was (Owen & Eckles 2012). Intervals from it are rather too wide than too narrow. Rows
    are drawn once for all tables, of the rows that any of them has; tables with the same columns share their draws.
    With one table and one column it is ``bootstrap_means`` by row.

    Args:
        tables: Tables of values, none of them empty, all with the same trailing dimensions.
        seed: Seed of the resampling.

    Returns:
        ``(RESAMPLES, n_tables, ...)`` means; NaN where nothing of a table was drawn.
    """
    rows, n_rows = _members([row for table in tables for row in table.rows])
    drawn_rows = _drawn(n_rows, seed)
    drawn_columns: dict[tuple[str, ...], np.ndarray] = {}
    means, start = [], 0
    for table in tables:
        own, row = np.unique(rows[start : (start := start + len(table.values))], return_inverse=True)
        column, n_columns = _members(table.columns)
        names = tuple(sorted({str(name) for name in table.columns}))
        if names not in drawn_columns:
            drawn_columns[names] = _drawn(n_columns, seed + 1 + len(drawn_columns))
        trailing = table.values.shape[1:]
        sums, sizes = np.zeros((len(own), n_columns, *trailing)), np.zeros((len(own), n_columns))
        np.add.at(sums, (row, column), table.values)
        np.add.at(sizes, (row, column), 1)
        total, size = (
            np.einsum("dc,dc...->d...", drawn_columns[names], np.tensordot(drawn_rows[:, own], part, axes=1))
            for part in (sums, sizes)
        )
        size = size.reshape(-1, *[1] * len(trailing))
        means.append(np.divide(total, size, out=np.full(total.shape, np.nan), where=size > 0))
    return np.stack(means, axis=1)


def rate(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable]) -> Estimate:
    """The share of ones among zeros and ones, with an interval that is honest at 0 and 1 too.

    Wilson's (1927) interval, with an effective number of values for their number (Kish 1965): the design effect is the
    variance by cluster over that of independent values. What few clusters tell about it is drawn towards values that
    are all the same within a cluster: a rate of 0 or 1 is as sure as its number of clusters makes it.

    Raises:
        ValueError: If there are no values, or others than 0 and 1.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise ValueError("rate needs at least one value")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("rate needs zeros and ones")
    index, n_clusters = _members(clusters)
    sums, sizes = np.bincount(index, array, n_clusters), np.bincount(index, minlength=n_clusters).astype(float)
    low, high = cluster_wilson(sums[None], sizes[None])
    return Estimate(float(array.mean()), float(low[0]), float(high[0]), len(array))


def cluster_wilson(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The intervals of ``rate`` for several sets of clusters at once.

    Args:
        sums: How many ones each cluster holds, ``(..., n_clusters)``.
        sizes: How many values.

    Returns:
        Lower and upper ends, ``(...)`` each.
    """
    n, n_clusters = sizes.sum(-1), sizes.shape[-1]
    p = sums.sum(-1) / n
    independent = p * (1 - p) / n
    by_cluster = ((sums - p[..., None] * sizes) ** 2).sum(-1) / n**2
    alike = n / n_clusters
    observed = np.divide(by_cluster, independent, out=alike.copy(), where=independent > 0)
    # Clusters in which the rarer value occurs: where they are few, they tell little about the variance.
    telling = np.minimum((sums > 0).sum(-1), (sums < sizes).sum(-1)) if n_clusters > 1 else 0
    design = (telling * observed + _BELIEF * alike) / (telling + _BELIEF)
    effective = n / np.maximum(design, 1)
    centre = p + _Z**2 / (2 * effective)
    half = _Z * np.sqrt(p * (1 - p) / effective + _Z**2 / (4 * effective**2))
    low, high = (end / (1 + _Z**2 / effective) for end in (centre - half, centre + half))
    # What rounding leaves of 0 and 1.
    return np.where(p == 0, 0.0, np.clip(low, 0, p)), np.where(p == 1, 1.0, np.clip(high, p, 1))


def paired_difference(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Difference:
    """The mean change from ``before`` to ``after`` of the same things, with its interval and a test of no change.

    The test flips the signs of whole clusters' changes (Fisher 1935): all combinations where at most 12 clusters
    changed, else 10,000 at random. Where values are zeros and ones the interval is that of the difference of two rates,
    the share that rose less the share that fell, put together as in Newcombe (1998); else it is bootstrapped.

    Args:
        before: ``(n,)``.
        after: ``(n,)``, in the same order.
        clusters: ``n`` cluster labels.
        seed: Seed of the flips and of the resampling.

    Raises:
        ValueError: If there are no values, or they are not equally many.
    """
    first, last = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if not len(first) or len(first) != len(last):
        raise ValueError(f"paired_difference needs equally many values, not {len(first)} and {len(last)}")
    change = last - first
    index, n_clusters = _members(clusters)
    p = _sign_flip_p(np.bincount(index, change, n_clusters), seed)
    if np.isin(change, (-1, 0, 1)).all():
        low, high = _share_difference(rate(change > 0, clusters), rate(change < 0, clusters))
    else:
        low, high = np.quantile(bootstrap_means(change, clusters, seed=seed), [0.025, 0.975])
    return Difference(float(change.mean()), float(low), float(high), len(change), p)


def group_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    first_clusters: Sequence[Hashable],
    second_clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Difference:
    """Compare the means of two groups of different things: the second's less the first's, with a test of no difference.

    The test deals whole clusters out to groups of as many (Fisher 1935): in all ways where these are at most 10,000,
    else in as many at random. The interval is bootstrapped, each group on its own.

    Args:
        first: ``(n,)``.
        second: ``(m,)``.
        first_clusters: ``n`` cluster labels; a label that both groups have is a cluster in each.
        second_clusters: ``m`` cluster labels.
        seed: Seed of the deals and of the resampling.

    Raises:
        ValueError: If a group has no values.
    """
    groups = [np.asarray(values, dtype=float) for values in (first, second)]
    if not all(map(len, groups)):
        raise ValueError("group_difference needs values in both groups")
    of_clusters, means = [], []
    for number, (values, clusters) in enumerate(zip(groups, (first_clusters, second_clusters), strict=True)):
        index, _ = _members(clusters)
        of_clusters.append(np.stack([np.bincount(index, values), np.bincount(index)]))
        means.append(bootstrap_means(values, clusters, seed=seed + number))
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    value = float(groups[1].mean() - groups[0].mean())
    p = _dealt_p(np.hstack(of_clusters), of_clusters[0].shape[1], seed)
    return Difference(value, float(low), float(high), sum(map(len, groups)), p)


def kept_share(hits: np.ndarray, clusters: Sequence[Hashable]) -> Estimate:
    """Which share of a mean change from zeros and ones is kept, undefined where nothing changes.

    Where all that changes changes one way, and each of these keeps its change or loses it, the share is a ``rate``;
    else its interval is bootstrapped.

    Args:
        hits: The same things measured three times, before, after, and after in part, ``(n, 3)``.
        clusters: ``n`` cluster labels.
    """
    changed, kept = hits[:, 1] - hits[:, 0], hits[:, 2] - hits[:, 0]
    if not changed.sum():
        return Estimate.undefined(len(hits))
    moved = np.flatnonzero(changed).tolist()
    one_way, kept_of_moved = abs(changed.sum()) == len(moved), kept[moved] / changed[moved]
    if one_way and np.count_nonzero(kept) == kept_of_moved.sum() and np.isin(kept_of_moved, (0, 1)).all():
        return rate(kept_of_moved, [clusters[i] for i in moved])
    means = np.vstack([hits.mean(0), bootstrap_means(hits, clusters)])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (means[:, 2] - means[:, 0]) / (means[:, 1] - means[:, 0])
    # Where a resample has no change at all there is no share; what it would be is bounded by nothing.
    low, high = np.quantile(share[1:][np.isfinite(share[1:])], [0.025, 0.975])
    return Estimate(float(share[0]), float(low), float(high), len(hits))


def _sign_flip_p(changes: np.ndarray, seed: int) -> float:
    """Share of sign flips of the clusters' changes whose sum is at least as far from 0 as it is."""
    moved = changes[changes != 0]
    # Sums of the same numbers in another order may differ in their last digits.
    reached = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()
    if len(moved) <= _ALL_FLIPS:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(moved))))
        return float((np.abs(signs @ moved) >= reached).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(_FLIPS, len(moved)))
    return float((1 + (np.abs(signs @ moved) >= reached).sum()) / (1 + _FLIPS))


def _dealt_p(clusters: np.ndarray, count: int, seed: int) -> float:
    """Share of deals of clusters, sums and sizes ``(2, n)``, whose means differ at least as far as with the first.

    Args:
        clusters: Sums and sizes of all clusters, ``(2, n)``, those of the first group first.
        count: How many clusters the first group has.
        seed: Seed of the deals.
    """
    n_clusters = clusters.shape[1]
    is_all = math.comb(n_clusters, count) <= _FLIPS
    if is_all:
        chosen = np.array(list(itertools.combinations(range(n_clusters), count)))
    else:
        order = np.random.default_rng(seed).permuted(np.tile(np.arange(n_clusters), (_FLIPS, 1)), axis=1)
        chosen = order[:, :count]

    def differences(members: np.ndarray) -> np.ndarray:
        inside = clusters[:, members].sum(-1)
        outside = clusters.sum(-1, keepdims=True) - inside
        return np.abs(outside[0] / outside[1] - inside[0] / inside[1])

    # Sums of the same numbers in another order may differ in their last digits.
    reached = (differences(chosen) >= differences(np.arange(count)[None]) * (1 - 1e-9)).sum()
    return float(reached / len(chosen) if is_all else (1 + reached) / (1 + len(chosen)))


def _share_difference(rose: Estimate, fell: Estimate) -> tuple[float, float]:
    """The interval of the difference of two shares of the same things, of which no one is in both."""
    both = rose.value * fell.value
    correlation = -math.sqrt(both / ((1 - rose.value) * (1 - fell.value))) if both else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(one**2 + other**2 - 2 * correlation * one * other)

    value = rose.value - fell.value
    low = value - reach(rose.value - rose.low, fell.high - fell.value)
    high = value + reach(rose.high - rose.value, fell.value - fell.low)
    return max(low, -1.0), min(high, 1.0)
