"""Means with bootstrap intervals, resampled by subject."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        value: The mean.
        low: 2.5 % quantile of the bootstrap means.
        high: 97.5 % quantile.
        n: Number of values.
    """

    value: float
    low: float
    high: float
    n: int

    def to_record(self) -> dict[str, float]:
        """As a plain dictionary for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _draws(clusters: Sequence[Hashable], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each cluster is drawn, ``(RESAMPLES, n_clusters)``, and which cluster each value is of, ``(n,)``."""
    _, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    n_clusters = int(index.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=RESAMPLES)
    return drawn.astype(float), index


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
