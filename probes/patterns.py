"""Sparsity and norm of activation vectors, which need no fitting to tell how a model uses its sources.

Zhao et al. 2024 (arXiv 2410.16090) find that the residual stream is more skewed when a model relies on its context
than when it relies on memory. They measure it by excess kurtosis, by the Hoyer and Gini indices of Hurley & Rickard
2009 ("Comparing measures of sparsity", IEEE Transactions on Information Theory 55), and by the two norms.

Every measure takes activations ``(n, d)``, or for z ``(n, n_heads, d_head)``, whose heads are laid side by side, and
gives ``(n,)`` values. Values narrower than float32 are widened first. A vector that a measure is not defined for (all
zero, or for the kurtosis all equal) gives 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor

from interp.errors import UserError
from interp.statistics import bootstrap_means

_SCHEMA = {
    "site": pl.String,
    "pattern": pl.String,
    "group": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "n": pl.Int64,
}


def kurtosis(features: Tensor) -> Tensor:
    """Fisher's excess kurtosis ``m4 / m2**2 - 3`` with population moments: 0 for a normal distribution, ``(n,)``."""
    values = _flat(features)
    centred = values - values.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    # Equal values may differ from their mean by rounding.
    varies = (values.amax(1) > values.amin(1)) & (deviation.squeeze(1) > 0)
    standardised = centred / torch.where(deviation > 0, deviation, 1)
    return torch.where(varies, standardised.pow(4).mean(1) - 3, 0)


def hoyer(features: Tensor) -> Tensor:
    """Hoyer index ``(sqrt(d) - L1 / L2) / (sqrt(d) - 1)``: 0 if all magnitudes are equal, 1 if one is not 0, ``(n,)``.

    Source: Hurley & Rickard 2009.
    """
    values = _flat(features)
    root = values.shape[1] ** 0.5
    norm = l2(values)
    return _ratio(root * norm - l1(values), (root - 1) * norm).clamp(0, 1)


def gini(features: Tensor) -> Tensor:
    """Gini index of the magnitudes: 0 if they are equal, ``1 - 1/d`` if one is not 0, ``(n,)``.

    With magnitudes ``c_1 <= ... <= c_d`` it is ``1 - 2 * sum_k c_k / L1 * (d - k + 1/2) / d`` (Hurley & Rickard
    2009).
    """
    values = _flat(features)
    d = values.shape[1]
    # As a sum of c_k * (2k - d - 1), which is the same and 0 for 0.
    ranks = torch.arange(1 - d, d, 2, dtype=values.dtype, device=values.device)
    return _ratio(values.abs().sort(1).values @ ranks, d * l1(values)).clamp(min=0)


def l1(features: Tensor) -> Tensor:
    """Sum of the magnitudes, ``(n,)``."""
    return _flat(features).abs().sum(1)


def l2(features: Tensor) -> Tensor:
    """Euclidean norm, ``(n,)``."""
    return _flat(features).norm(dim=1)


PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "kurtosis": kurtosis,
    "hoyer": hoyer,
    "gini": gini,
    "l1": l1,
    "l2": l2,
}
"""The measures by name."""


def patterns_by_group(
    features: Mapping[str, Tensor], groups: Sequence[str], clusters: Sequence[Hashable]
) -> pl.DataFrame:
    """The mean of every pattern at every site, group by group, with 95 % intervals.

    Args:
        features: By site ``(n, d)``, or for z ``(n, n_heads, d_head)``; a site is read once.
        groups: What is compared, for example the kinds of the prompts, ``n`` of them.
        clusters: What is resampled together, for example the subjects, ``n`` of them.

    Returns:
        One row for each site, pattern and group: ``site``, ``pattern``, ``group``, ``value``, ``low``, ``high``, ``n``.

    Raises:
        UserError: If groups, clusters and rows of a site are not equally many.
    """
    if len(groups) != len(clusters):
        raise UserError(f"There are {len(groups)} groups for {len(clusters)} clusters; give one of each a row.")
    measured, places = [], []
    for site in features:
        values = features[site]
        if len(values) != len(groups):
            raise UserError(f"There are {len(groups)} groups for {len(values)} rows of {site}; give one for each row.")
        measured += [measure(values).double().cpu().numpy() for measure in PATTERNS.values()]
        places += [{"site": site, "pattern": pattern} for pattern in PATTERNS]
    columns = np.stack(measured, axis=1)
    records = []
    for group in dict.fromkeys(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        # All columns share their draws, which are those of bootstrap_mean.
        means = bootstrap_means(columns[rows], [clusters[i] for i in rows])
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        numbers = zip(columns[rows].mean(0), low, high, strict=True)
        records += [
            {**place, "group": group, "value": float(v), "low": float(lo), "high": float(hi), "n": len(rows)}
            for place, (v, lo, hi) in zip(places, numbers, strict=True)
        ]
    return pl.DataFrame(records, schema=_SCHEMA)


def _flat(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return flat if flat.dtype == torch.float64 else flat.float()


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / torch.where(below > 0, below, 1), 0)
