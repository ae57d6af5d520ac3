"""Compare methods over several data sets by their ranks, as Demsar (2006, JMLR 7, 1-30) recommends.

1. On each block (a model and a data set, say) the methods are ranked, the best first; those that tie share their ranks.
2. Friedman's test (1937) asks whether the mean ranks differ more than by chance.
3. Two methods differ where their mean ranks are further apart than Nemenyi's critical difference (1963),
   q * sqrt(k (k + 1) / 6 N), where q is the quantile of the studentized range for k methods over sqrt(2), N the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range

LEAST_BLOCKS, LEAST_METHODS = 2, 3
"""With fewer there is nothing to compare by ranks."""


@dataclass(frozen=True)
class Ranks:
    """How methods rank over blocks.

    Attributes:
        means: The mean rank of each method, from 1, the best first.
        p: Probability of mean ranks as different, by Friedman's test, if the methods were all alike.
        difference: How far apart mean ranks must be to differ, at a level of 5 %.
        n_blocks: How many blocks there are.
    """

    means: Mapping[str, float]
    p: float
    difference: float
    n_blocks: int

    @property
    def like_the_best(self) -> list[str]:
        """The methods that cannot be told from the best one, which comes first."""
        best = min(self.means.values())
        return [name for name, mean in self.means.items() if mean - best < self.difference]

    @property
    def groups(self) -> list[list[str]]:
        """The largest groups of two or more methods of which none can be told from another, the best first."""
        names, found = list(self.means), []
        last = 0
        for first, name in enumerate(names):
            end = sum(self.means[other] - self.means[name] < self.difference for other in names)
            if end > max(last, first + 1):
                found.append(names[first:end])
                last = end
        return found


def critical_difference(n_methods: int, n_blocks: int, *, level: float = 0.05) -> float:
    """Compute how far apart two mean ranks must be to differ: Nemenyi's test (Demsar 2006, section 3.2.2).

    Args:
        n_methods: How many methods are ranked.
        n_blocks: On how many blocks.
        level: The level of the test.
    """
    quantile = studentized_range.ppf(1 - level, n_methods, math.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(n_methods * (n_methods + 1) / (6 * n_blocks)))


def compare_ranks(values: Mapping[str, np.ndarray]) -> Ranks:
    """Rank methods on each block, and test whether they differ.

    Args:
        values: For each method its values on all blocks, ``(n_blocks,)``, in the same order; larger is better.

    Raises:
        ValueError: If there are fewer than two blocks or three methods.
    """
    table = np.stack(list(values.values()), axis=1)
    n_blocks, n_methods = table.shape
    if n_blocks < LEAST_BLOCKS or n_methods < LEAST_METHODS:
        raise ValueError(f"compare_ranks needs two blocks and three methods, not {n_blocks} and {n_methods}")
    # What differs by rounding alone ties.
    table = np.round(table, 12)
    means = rankdata(-table, axis=1).mean(0)
    tied = (table == table[:, :1]).all()
    p = 1.0 if tied else float(friedmanchisquare(*table.T).pvalue)
    order = np.argsort(means, kind="stable")
    names = list(values)
    return Ranks({names[i]: float(means[i]) for i in order}, p, critical_difference(n_methods, n_blocks), n_blocks)
