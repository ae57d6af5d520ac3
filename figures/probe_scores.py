"""Figures of scored probes, as ``probes.scoring`` gives them."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from figures.probes import activation_patterns, auroc_by_layer, projection_by_layer, reliability_curve
from figures.theme import save_figure
from probes.scoring import PHRASING_GROUPS, LabelScores, Scores


def score_figures(scores: LabelScores) -> dict[str, go.Figure]:
    """The figures of one label's probes, by name.

    Returns:
        ``auroc_by_layer`` with controls and floor, ``calibration`` of the chosen probe in seen phrasings and in the
        unseen one; and where the residual stream was recorded ``projection`` and ``patterns``.
    """
    floor = scores.floor
    figures = {
        "auroc_by_layer": auroc_by_layer(
            scores.by_site,
            shuffled=scores.shuffled or None,
            floor=floor.score if floor else None,
            floor_label=floor.name if floor else "",
            chosen=scores.probes.best.site,
        ),
        "calibration": reliability_curve(
            {name: scores.by_group[name] for name in PHRASING_GROUPS if name in scores.by_group}
        ),
    }
    if scores.patterns is not None:
        labels, texts = scores.test["label"].to_list(), scores.test["text"].to_list()
        figures["projection"] = projection_by_layer(scores.features, scores.probes, labels, texts)
        figures["patterns"] = activation_patterns(scores.patterns)
    return figures


def save_score_figures(scores: Scores, folder: Path) -> None:
    """Write the figures of all scored probes to a folder, as HTML."""
    for one in scores.labels:
        for name, figure in score_figures(one).items():
            save_figure(figure, folder / f"{one.label}_{name}.html")
