"""Figures of scored probes, as ``probes.scoring`` gives them."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import polars as pl

from figures.probes import activation_patterns, auroc_by_layer, projection_by_layer, reliability_curve
from figures.theme import save_figure
from interp.errors import UserError
from interp.statistics import Estimate
from probes.fitting import EMBEDDING, KNOWN_BEFOREHAND
from probes.scoring import PHRASING_GROUPS, LabelScores, Scores


def auroc_of_scores(frame: pl.DataFrame) -> go.Figure:
    """AUROC of one label's probes by layer, with shuffled labels and a floor.

    Args:
        frame: The label's rows of what ``score_probes`` writes.

    Raises:
        UserError: If the score of the probe that dev chose is not among them.
    """
    rows, label = frame.filter(group="test", measure="auroc"), frame["label"].item(0)
    found: dict[str, dict[str, Estimate]] = {"fitted": {}, "shuffled labels": {}, "floor": {}}
    for probe, site, *numbers in rows.select("probe", "site", "value", "low", "high", "n").iter_rows():
        found.setdefault(probe, {})[site] = Estimate(*numbers)
    chosen = next(iter(rows.filter(pl.col("chosen"), probe="fitted")["site"]), None)
    if chosen is None:
        raise UserError(f"The scores of {label} lack the probe that was chosen on dev; run probe score again.")
    names = {EMBEDDING: "embedding floor", KNOWN_BEFOREHAND: f"{KNOWN_BEFOREHAND} floor"}
    # What is known beforehand tells the source of an answer better than its last token does.
    order = reversed(names) if label == "source" else names
    floor = next((site for site in order if site in found["floor"]), None)
    return auroc_by_layer(
        found["fitted"],
        shuffled=found["shuffled labels"] or None,
        floor=found["floor"][floor] if floor else None,
        floor_label=names[floor] if floor else "",
        chosen=chosen,
    )


def score_figures(scores: LabelScores) -> dict[str, go.Figure]:
    """The figures of one label's probes, by name.

    Returns:
        ``auroc_by_layer`` with controls and floor, ``calibration`` of the chosen probe in seen phrasings and in the
        unseen one; and where the residual stream was recorded ``projection`` and ``patterns``.
    """
    groups = {name: scores.by_group[name] for name in PHRASING_GROUPS if name in scores.by_group}
    figures = {"auroc_by_layer": auroc_of_scores(scores.frame), "calibration": reliability_curve(groups)}
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
