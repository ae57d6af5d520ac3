"""Figures of conflict detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from figures.theme import LIGHT_THEME, OTHER_COLOUR, SERIES_COLOURS, escape
from interp.statistics import Estimate


def families_curve(points: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Estimate]) -> go.Figure:
    """AUROC in unseen phrasings against the number of phrasing families that a probe was fitted on.

    Next to it stands what as many prompts of all families are worth; dotted lines are what probes reach that were
    fitted on the unseen phrasings.

    Args:
        points: Records of ``probes.conflict_detectors.CurvePoint``.
        ceilings: AUROC by name.
    """
    x = [point["families"] for point in points]
    figure = go.Figure()
    figure.add_scatter(
        x=x,
        y=[point["auroc"] for point in points],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [point["high"] - point["auroc"] for point in points],
            "arrayminus": [point["auroc"] - point["low"] for point in points],
        },
        mode="lines+markers",
        name="prompts of so many families, worst to best draw",
        line={"color": SERIES_COLOURS[0]},
        customdata=[point["prompts"] for point in points],
        hovertemplate="%{x} families, %{customdata:.0f} prompts<br>AUROC %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=x,
        y=[point["same_number"] for point in points],
        mode="lines+markers",
        name="as many prompts of all families",
        line={"color": OTHER_COLOUR, "dash": "dash"},
        hovertemplate="AUROC %{y:.3f}<extra></extra>",
    )
    for colour, (name, ceiling) in zip(SERIES_COLOURS[1:], ceilings.items(), strict=False):
        figure.add_hline(
            y=ceiling.value,
            line={"color": colour, "dash": "dot"},
            annotation_text=f"fitted on the unseen phrasings: {escape(name)}",
        )
    return figure.update_layout(
        template=LIGHT_THEME,
        xaxis={"title": "phrasing families fitted on", "type": "log", "tickvals": x, "ticktext": list(map(str, x))},
        yaxis={"title": "AUROC in unseen phrasings"},
        legend={"orientation": "h", "y": -0.25},
    )
