"""Say which share of an edit's gain and damage is left once a gate lets it act on some prompts only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from interp.answers import Direction
from interp.conflicts import CONTEXT_KINDS
from interp.evaluation import UsageReport
from interp.statistics import Estimate, bootstrap_means, rate


def kept_shares(
    unedited: UsageReport, ungated: UsageReport, gated: UsageReport, towards: Direction | None
) -> dict[str, dict[str, Any]]:
    """Which share of the ungated edit's gain and damage is left behind a gate, with intervals by subject.

    Args:
        unedited: The unedited model's answers.
        ungated: Answers to the same prompts under the edit.
        gated: The same behind the gate.
        towards: The source whose rate is the gain; ``None`` has damage only.

    Returns:
        ``gain``, and the losses of accuracy ``none``, ``aligned``, ``irrelevant``, as far as there are such prompts.
        Of what the ungated edit does not change the share is undefined.
    """
    shares: dict[str, dict[str, Any]] = {}
    for kind in CONTEXT_KINDS:
        if kind == "conflict" and towards is None:
            continue
        hit = pl.col("usage") == towards if kind == "conflict" else pl.col("memory_span_match")
        frames = [report.select(kind=kind).frame for report in (unedited, ungated, gated)]
        if len(frames[0]):
            hits = [frame.select(hit.cast(pl.Float64)).to_series().to_numpy() for frame in frames]
            share = _kept_share(np.stack(hits, axis=1), frames[0]["subject"].to_list())
            shares["gain" if kind == "conflict" else kind] = share.to_record()
    return shares


def _kept_share(hits: np.ndarray, subjects: Sequence[str]) -> Estimate:
    """Which share of a change is kept; ``hits`` is ``(n, 3)``: unedited, ungated, gated."""
    changed, kept = hits[:, 1] - hits[:, 0], hits[:, 2] - hits[:, 0]
    if not changed.sum():
        return Estimate.undefined(len(hits))
    moved = np.flatnonzero(changed).tolist()
    one_way, kept_of_moved = abs(changed.sum()) == len(moved), kept[moved] / changed[moved]
    if one_way and np.count_nonzero(kept) == kept_of_moved.sum() and np.isin(kept_of_moved, (0, 1)).all():
        # Nothing else changed, and of what did each prompt keeps its change or loses it: a rate.
        return rate(kept_of_moved, [subjects[i] for i in moved])
    means = np.vstack([hits.mean(0), bootstrap_means(hits, subjects)])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (means[:, 2] - means[:, 0]) / (means[:, 1] - means[:, 0])
    # Where a resample has no change at all there is no share; what it would be is bounded by nothing.
    low, high = np.quantile(share[1:][np.isfinite(share[1:])], [0.025, 0.975])
    return Estimate(float(share[0]), float(low), float(high), len(hits))
